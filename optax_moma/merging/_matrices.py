"""Methods for one matrix, applied to every matrix of a leaf: kernels, stacks of layers, heads."""

import math
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optax_moma._matrix import Layout
from optax_moma._moments import Factored
from optax_moma.merging._contract import Contract, Step, merge_step
from optax_moma.merging._leaf import Curvature, TaskVectors, combined, gathered
from optax_moma.merging._metric import factors
from optax_moma.merging._steps import weighted_mean


@merge_step
class EachMatrix:
    """Lets a step that combines matrices (m, n) merge each matrix of a leaf, one after the other.

    Leaves that are no matrices are averaged, or stay at the base if not ``average``. Which are,
    ``axes`` says, see ``tsv_m``; without axes the Grams of a leaf.
    """

    step: Step
    axes: str | None = field(default=None, metadata={"static": True})
    average: bool = field(default=True, metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """What the step asks for, a curvature of matrices only, and whole leaves."""
        return self.step.contract._replace(axes=self.axes, whole=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the experts."""
        shape, layout = leaf.delta.shape[1:], None
        if self.axes is not None:
            layout = layout_of(self.axes, shape)
        elif leaf.curvature is not None and not isinstance(leaf.curvature[0], Factored):
            layout = gram_layout(leaf.curvature[0].shape, shape)
        if layout is None:
            rest = weighted_mean(leaf) if self.average else jnp.zeros_like(leaf.delta[0])
            return combined(leaf, rest)
        whole = jax.tree.map(gathered, leaf._replace(keys=None))._replace(keys=leaf.keys)
        if layout.matrix_shape == shape and len(shape) == 2:
            merged = _merged(self.step, whole)
        elif len(layout.matrix_shape) == 2:
            alone = jax.tree.map(lambda x: x[0], _matrices(whole, layout, self.contract.gram))
            merged = _merged(self.step, alone._replace(keys=leaf.keys))
        else:
            # One after the other: the decompositions of a stack need the memory of one matrix.
            stack = _matrices(whole, layout, self.contract.gram)
            merged = jax.lax.map(partial(_merged, self.step), stack)
        merged = layout.from_matrix(merged.reshape(layout.matrix_shape), leaf.delta[0])
        return combined(leaf, merged)


def _merged(step: Step, leaf: TaskVectors) -> jax.Array:
    merged = step(leaf)
    return (merged.weight * merged.delta)[0]


def _matrices(leaf: TaskVectors, layout: Layout, gram: bool) -> TaskVectors:
    """Returns the records of all matrices of a leaf, stacked along a first axis."""
    m, n = layout.matrix_shape[-2:]

    def one(x: jax.Array) -> jax.Array:
        return layout.to_matrix(x).reshape(-1, m, n)

    def experts(x: jax.Array) -> jax.Array:
        return jnp.stack([one(x_t) for x_t in x], axis=1)

    def curvature(v: Curvature) -> jax.Array:
        row, col = factors(v, leaf.delta.dtype)
        return row.reshape(-1, m, m) if gram else one(jnp.broadcast_to(row * col, layout.shape))

    def own(i: jax.Array) -> jax.Array:
        return jax.lax.map(lambda key: jax.random.fold_in(key, i), leaf.keys)

    delta = experts(leaf.delta)
    keys = None if leaf.keys is None else jax.lax.map(own, jnp.arange(delta.shape[0]))
    return TaskVectors(
        delta,
        experts(leaf.weight),
        None if leaf.base is None else one(leaf.base),
        None if leaf.curvature is None else tuple(map(curvature, leaf.curvature)),
        keys,
    )


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
