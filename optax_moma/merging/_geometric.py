"""Merges that keep lengths and angles: SLERP, Karcher mean, Model Stock.

A leaf is one vector. With a base the vectors are task vectors, without one the parameters.
"""

from dataclasses import field
from itertools import combinations
from typing import Literal

import jax
import jax.numpy as jnp

from optax_moma._checks import check_integer
from optax_moma.merging import _metric, _steps
from optax_moma.merging._contract import Contract, Step, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, heard, per_expert, sum_experts
from optax_moma.merging._steps import Chain, chain
from optax_moma.merging._sums import fixed_sum


def _norms(x: jax.Array) -> jax.Array:
    """Returns the norms of (k, *shape) vectors, shape (k,), of numbers as small as they may be."""
    largest, _, norms = _scaled(x)
    return largest * norms


def _unit(x: jax.Array) -> jax.Array:
    _, scaled, norms = _scaled(x)
    # Times the reciprocal: how a compiler divides by one number for all depends on sharding.
    return scaled * per_expert(1 / _metric.nonzero(norms), x)


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a power of two per vector, (k,), the vectors over it, and their norms, (k,)."""
    axes = tuple(range(1, x.ndim))
    largest = _metric.ceiling(jnp.max(jnp.abs(x), axis=axes))
    scaled = x / per_expert(largest, x)
    return largest, scaled, jnp.sqrt(_sum(scaled**2, 4.0))


def _sum(x: jax.Array, bound: float) -> jax.Array:
    """Returns the sums over (k, *shape) numbers up to a bound, (k,): the same bits if sharded."""
    return jnp.stack([fixed_sum(row, bound) for row in x])


Scope = Literal["leaf", "filter"]


@merge_step
class EachFilter:
    """Lets a step that combines vectors merge each filter of a leaf on its own.

    A filter is what makes one output: all entries along the axes before the last. Leaves of one
    axis or none are one vector.
    """

    step: Step

    @property
    def contract(self) -> Contract:
        """What the step asks for."""
        return self.step.contract

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the experts."""
        if leaf.delta.ndim < 3:
            return self.step(leaf)

        def one(delta: jax.Array, weight: jax.Array, base: jax.Array | None) -> jax.Array:
            merged = self.step(TaskVectors(delta, weight, base, None, None))
            return (merged.weight * merged.delta)[0]

        last = (-1, -1, None if leaf.base is None else -1)
        merged = jax.vmap(one, last, -1)(leaf.delta, leaf.weight, leaf.base)
        return combined(leaf, merged)


def _scoped(step: Step, scope: Scope) -> Chain:
    if scope not in ("leaf", "filter"):
        raise ValueError(f"scope must be 'leaf' or 'filter', got {scope!r}.")
    return chain(step if scope == "leaf" else EachFilter(step))


@merge_step
class Slerp:
    """See ``slerp``."""

    @property
    def contract(self) -> Contract:
        """Two experts."""
        return Contract(nonnegative_weights=True, min_experts=2, max_experts=2, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines two vectors."""
        x, say = heard(leaf)
        share = say / _metric.nonzero(jnp.sum(say))
        a, b = _unit(x)
        # Kahan's formula is exact for small angles, where the arc cosine is not.
        angle = 2 * jnp.arctan2(_norms((a - b)[None])[0], _norms((a + b)[None])[0])
        parallel = jnp.abs(jnp.cos(angle)) > 0.9995
        arc = jnp.sin(share * angle) / jnp.where(parallel, 1.0, jnp.sin(angle))
        factors = per_expert(jnp.where(parallel, share, arc), x)
        return combined(leaf, sum_experts(factors * x))


def slerp(*, scope: Scope = "leaf") -> Chain:
    """Interpolates two experts along an arc, leaf by leaf.

    merged = [base +] (sin(s_1 a) x_1 + sin(s_2 a) x_2) / sin(a), a the angle between x_1 and x_2,
    s_t = w_t / (w_1 + w_2); the straight line where |cos(a)| > 0.9995.

    Takes exactly two experts, with weights that are not negative; the base is optional. Without
    one x_t are the experts' parameters (SLERP), with one their task vectors (NuSLERP). The share
    of each end is given by ``weights``, so that the order of the experts does not matter.

    Args:
      scope: "leaf", or "filter" for an angle per output, the last axis of a leaf of two or more
        axes; mergekit's NuSLERP by rows, as PyTorch has outputs along the first.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if the scope is neither.

    Example:
      >>> from optax_moma.merging import merge, slerp
      >>> experts = [{"w": jnp.array([2., 0.])}, {"w": jnp.array([0., 2.])}]
      >>> merge(slerp(), experts)["w"].round(4)
      Array([1.4142, 1.4142], dtype=float32)

    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves".
    """
    return _scoped(Slerp(), scope)


@merge_step
class Karcher:
    """See ``karcher``."""

    iterations: int = field(metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """Weights that are not negative."""
        return Contract(nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the vectors."""
        x, say = heard(leaf)
        share = say / _metric.nonzero(jnp.sum(say))
        units, shares = _unit(x), per_expert(share, x)

        def step(_: jax.Array, u: jax.Array) -> jax.Array:
            cosine = _sum(units * u, 2.0)
            across = units - per_expert(cosine, x) * u
            sine = _norms(across)
            length = jnp.arctan2(sine, cosine) / _metric.nonzero(sine)
            tangent = sum_experts(shares * per_expert(length, x) * across)[None]
            size = _norms(tangent)[0]
            return _unit(jnp.cos(size) * u + jnp.sinc(size / jnp.pi) * tangent)

        start = _unit(sum_experts(shares * units)[None])
        u = jax.lax.fori_loop(0, self.iterations, step, start)[0]
        return combined(leaf, jnp.sum(share * _norms(x)) * u)


def karcher(iterations: int = 10) -> Chain:
    """Averages the experts' directions on the sphere, and their lengths.

    u is the unit vector that minimises sum_t s_t angle(u, x_t)**2, found by ``iterations`` steps
    u <- exp_u(sum_t s_t log_u(x_t / |x_t|)) from the normalised weighted mean of directions;
    merged = [base +] (sum_t s_t |x_t|) u, s_t = w_t / sum w.

    Takes any number of experts, with weights that are not negative; the base is optional. Two
    experts of one length and equal weights give the same as ``slerp``.

    Args:
      iterations: How many steps, at least 0.

    Returns:
      A method for ``merge``.

    Raises:
      TypeError: if the number of iterations is no integer.
      ValueError: if it is negative.

    Example:
      >>> from optax_moma.merging import karcher, merge
      >>> experts = [{"w": jnp.array([2., 0.])}, {"w": jnp.array([0., 4.])}]
      >>> merge(karcher(), experts)["w"].round(4)
      Array([2.1213, 2.1213], dtype=float32)

    Source: Karcher 1977, "Riemannian center of mass and mollifier smoothing".
    """
    return chain(Karcher(check_integer("iterations", iterations, 0)))


def multislerp() -> Chain:
    """Averages the experts' directions as vectors, and their lengths.

    merged = [base +] (sum_t s_t |x_t|) u / |u|, u = sum_t s_t x_t / |x_t|, s_t = w_t / sum w.

    Takes any number of experts, with weights that are not negative; the base is optional. It is
    where ``karcher`` starts. mergekit, which has it as multislerp, describes one step in the
    tangent space at u; but the tangents there add up to zero, so the step stays at u.

    Returns:
      A method for ``merge``: ``karcher(iterations=0)``.

    Example:
      >>> from optax_moma.merging import merge, multislerp
      >>> experts = [{"w": jnp.array([2., 0.])}, {"w": jnp.array([0., 4.])}]
      >>> merge(multislerp(), experts, weights=[3.0, 1.0])["w"].round(4)
      Array([2.3717, 0.7906], dtype=float32)

    Source: Goddard, "Multi-SLERP", the method of that name in mergekit.
    """
    return karcher(iterations=0)


@merge_step
class Stock:
    """See ``model_stock``."""

    @property
    def contract(self) -> Contract:
        """A base and at least two experts."""
        return Contract(base=True, nonnegative_weights=True, min_experts=2, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors."""
        x, _ = heard(leaf)
        k, units = x.shape[0], _unit(x)
        cosines = [fixed_sum(units[s] * units[t], 2.0) for s, t in combinations(range(k), 2)]
        cosine = jnp.maximum(jnp.mean(jnp.stack(cosines)), 0)
        ratio = k * cosine / (1 + (k - 1) * cosine)
        return combined(leaf, ratio * _steps.weighted_mean(leaf))


def model_stock(*, scope: Scope = "leaf") -> Chain:
    """Averages the experts, drawn to the base by as much as they disagree.

    merged = base + r mean_t d_t, r = k c / (1 + (k - 1) c), c the mean cosine between pairs of task
    vectors, per leaf; c below zero counts as zero, so that r is between 0 and 1.

    Needs a base; takes at least two experts, with weights (of the mean) that are not negative.

    Args:
      scope: "leaf", or "filter" for a cosine per output, the last axis of a leaf of two or more
        axes.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if the scope is neither.

    Example:
      >>> from optax_moma.merging import merge, model_stock
      >>> experts = [{"w": jnp.array([5., 0.])}, {"w": jnp.array([3., 4.])}]
      >>> merge(model_stock(), experts, base={"w": jnp.zeros(2)})["w"].round(4)
      Array([3. , 1.5], dtype=float32)

    Source: Jang et al. 2024, "Model Stock" (arXiv 2403.19522).
    """
    return _scoped(Stock(), scope)
