"""Methods for one matrix, applied to every matrix of a leaf: kernels, stacks of layers, heads."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optax_moma._matrix import Layout
from optax_moma._moments import Factored
from optax_moma.merging._contract import Contract, Step
from optax_moma.merging._leaf import TaskVectors, combined
from optax_moma.merging._steps import weighted_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EachMatrix:
    """Lets a step that combines matrices (m, n) merge each matrix of a leaf, one after the other.

    Leaves that are no matrices are averaged. Which are, ``axes`` says, see ``tsv_m``; without axes
    the Grams of a leaf.
    """

    step: Step
    axes: str | None = field(default=None, metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """What the step asks for."""
        return self.step.contract

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the experts."""
        shape, layout = leaf.delta.shape[1:], None
        if self.axes is not None:
            layout = layout_of(self.axes, shape)
        elif leaf.curvature is not None and not isinstance(leaf.curvature[0], Factored):
            layout = gram_layout(leaf.curvature[0].shape, shape)
        if layout is None:
            return combined(leaf, weighted_mean(leaf))
        stack = layout.matrix_shape[:-2]
        if not stack and shape == layout.matrix_shape:
            return self.step(leaf)
        matrices = _matrices(leaf, layout)
        if stack:
            # One after the other: the decompositions of a stack need the memory of one matrix.
            merged = jax.lax.map(partial(_merged, self.step), matrices)
        else:
            merged = _merged(self.step, jax.tree.map(lambda x: x[0], matrices))
        base = leaf.delta[0] if leaf.base is None else leaf.base
        return combined(leaf, layout.from_matrix(merged.reshape(layout.matrix_shape), base))


def _merged(step: Step, leaf: TaskVectors) -> jax.Array:
    merged = step(leaf)
    return (merged.weight * merged.delta)[0]


def _matrices(leaf: TaskVectors, layout: Layout) -> TaskVectors:
    """Returns the records of all matrices of a leaf, stacked along a first axis."""
    shape = layout.matrix_shape[-2:]

    def one(x: jax.Array) -> jax.Array:
        return layout.to_matrix(x).reshape(-1, *shape)

    def experts(x: jax.Array) -> jax.Array:
        return jnp.stack([one(x_t) for x_t in x], axis=1)

    delta = experts(leaf.delta)
    keys = leaf.keys
    if keys is not None:
        count = jnp.arange(delta.shape[0])
        keys = jax.lax.map(lambda i: jax.lax.map(lambda k: jax.random.fold_in(k, i), keys), count)
    curvature = leaf.curvature
    if curvature is not None:
        # Only Grams come here: what estimates each entry has no meaning in a matrix method.
        curvature = tuple(jnp.reshape(jnp.asarray(g), (-1, shape[0], shape[0])) for g in curvature)
    base = None if leaf.base is None else one(leaf.base)
    return TaskVectors(delta, experts(leaf.weight), base, curvature, keys)


def layout_of(axes: str, shape: tuple[int, ...]) -> Layout | None:
    """Returns how a leaf of this shape holds matrices, or None if it holds none."""
    letters = next((a for a in axes.split() if len(a) == len(shape)), None)
    if letters is None:
        return None
    named = (tuple(i for i, a in enumerate(letters) if a == letter) for letter in "bmn")
    return Layout(tuple(shape), *named)


def gram_layout(gram: tuple[int, ...], shape: tuple[int, ...]) -> Layout | None:
    """Returns how a leaf of this shape holds matrices whose inputs have Grams of this shape.

    (*stack, m, m) belongs to a leaf (*stack, ..., ...) in which m is the product of the axes after
    the stack, before those of the outputs.
    """
    axes, stack = tuple(range(len(shape))), len(gram) - 2
    if stack < 0 or gram[-1] != gram[-2] or gram[:stack] != shape[:stack]:
        return None
    cuts = range(stack + 1, len(shape))
    cut = next((i for i in cuts if math.prod(shape[stack:i]) == gram[-1]), None)
    return None if cut is None else Layout(shape, axes[:stack], axes[stack:cut], axes[cut:])


def check_axes(axes: Any) -> str:
    """Returns ``axes``, after looking whether they name fan-in and fan-out."""
    if not isinstance(axes, str):
        raise TypeError(f'axes must be a string such as "mn" or "bmn", got {axes!r}.')
    layouts = axes.split()
    for letters in layouts:
        if not {"m", "n"} <= set(letters) <= {"b", "m", "n"}:
            raise ValueError(
                f"axes must have one letter per axis of a leaf, m for fan-in, n for fan-out and b "
                f'for a stack of matrices, such as "mn" or "bmn", got {letters!r}.'
            )
    lengths = [len(letters) for letters in layouts]
    if not layouts or len(set(lengths)) < len(lengths):
        raise ValueError(
            "axes must name one layout, or several of different numbers of axes, got "
            f"{axes!r}; merge leaves that need others by rules of their own."
        )
    return axes
