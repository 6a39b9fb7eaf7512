"""Curvature as a weight: powers of it that neither overflow nor underflow, dense or factored.

Adam's second moments can be 1e-18 and less, so nothing here adds an epsilon: curvature is divided
by its largest entry or by its mean first. What is a number per leaf is either exact, such as a
largest entry and a power of two, or a sum of fixed bits, so that it is the same for a sharded leaf.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_moma._moments import Factored
from optax_moma.merging._leaf import Curvature
from optax_moma.merging._sums import fixed_mean


def is_needed(power: jax.Array | float) -> bool:
    """Whether this power of the curvature is anything but one, as nobody knows of an array."""
    return isinstance(power, jax.Array) or power != 0


def factors(curvature: Curvature, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (row, col) whose product is the curvature; a dense one has a col of ones."""
    if isinstance(curvature, Factored):
        return jnp.asarray(curvature.row, dtype), jnp.asarray(curvature.col, dtype)
    dense = jnp.asarray(curvature, dtype)
    return dense, jnp.ones((1,) * dense.ndim, dtype)


def relative_power(
    curvature: Sequence[Curvature], power: jax.Array | float, dtype: jnp.dtype
) -> jax.Array:
    """Returns (v_t / mean(v_t))**power for each expert t, shape (k, *shape)."""

    def one(v: Curvature) -> jax.Array:
        row, col = (f / ceiling(jnp.max(f)) for f in factors(v, dtype))
        # Times the reciprocal: how a compiler divides by one number for all depends on sharding.
        row = row * (1 / nonzero(_mean_of_product(row, col)))
        return row**power * col**power

    return jnp.stack([one(v) for v in curvature])


def joint_power(
    curvature: Sequence[Curvature], power: jax.Array | float, dtype: jnp.dtype
) -> jax.Array:
    """Returns (v_t / c)**power for each expert t with one c for all, shape (k, *shape)."""
    rows, cols = zip(*(factors(v, dtype) for v in curvature), strict=True)
    row_max, col_max = (
        ceiling(jnp.max(jnp.stack([jnp.max(f) for f in fs]))) for fs in (rows, cols)
    )
    return jnp.stack(
        [(r / row_max) ** power * (c / col_max) ** power for r, c in zip(rows, cols, strict=True)]
    )


def saliency_root(
    delta: jax.Array, curvature: Sequence[Curvature], power: jax.Array | float
) -> jax.Array:
    """Returns the root of the saliency, |delta_t| * v_t**(power / 2), shape (k, *shape).

    It orders entries as the saliency delta**2 * v**power does, without squaring small numbers.
    """
    roots = (factors(v, delta.dtype) for v in curvature)
    half = power / 2
    return jnp.abs(delta) * jnp.stack([row**half * col**half for row, col in roots])


def _mean_of_product(row: jax.Array, col: jax.Array) -> jax.Array:
    """Returns mean(row * col) of factors that are at most 2, of the same bits in any order."""
    alone = [tuple(i for i, n in enumerate(x.shape) if n == 1) for x in (row, col)]
    rows, cols = fixed_mean(row, 2.0, alone[1]), fixed_mean(col, 2.0, alone[0])
    return fixed_mean(rows * cols, 4.0)


def ceiling(x: jax.Array) -> jax.Array:
    """Returns a power of two to divide by, which is exact: x over it is below 2. One for zero."""
    _, exponent = jnp.frexp(x)
    least, most = jnp.finfo(x.dtype).minexp, jnp.finfo(x.dtype).maxexp - 1
    return jnp.where(x == 0, 1, jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent, least, most)))


def nonzero(x: jax.Array) -> jax.Array:
    """Returns x with zeros replaced by ones, to divide by: zero over it stays zero."""
    return jnp.where(x == 0, jnp.ones_like(x), x)
