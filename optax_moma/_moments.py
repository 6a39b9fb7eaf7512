r"""R and C: second moments kept as sums over rows and columns.

For a matrix G (m, n) of gradients, R (m,) and C (n,) are moving averages of the row and column sums
of ``G^2``. Their outer product over their common total is the rank-one matrix closest to the moving
average of ``G^2`` in generalized Kullback-Leibler divergence:

.. math::
    \hat v_{ij} = \frac{R_i C_j}{\sum_k R_k} .

Source: Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._checks import Scalar
from ._matrix import Layout, divisor


class Factored(NamedTuple):
    """A rank-one estimate of a leaf's second moment: ``row * col``, broadcast to its shape.

    Both factors carry all the leaf's axes, with size one where they do not vary: a matrix of shape
    (m, n) has ``row`` (m, 1) and ``col`` (1, n); a stack of matrices (L, m, n) has (L, m, 1) and
    (L, 1, n). Powers stay factored: ``v**p = row**p * col**p``.

    Attributes:
      row: What varies along the rows: each row's share of the total.
      col: What varies along the columns: the second moments, summed over the rows.
    """

    row: jax.Array
    col: jax.Array


def ema(average: jax.Array, x: jax.Array, decay: Scalar) -> jax.Array:
    """``decay * average + (1 - decay) * x``."""
    return decay * average + (1 - decay) * x


def row_sums(x: jax.Array) -> jax.Array:
    """(*batch, m, n) -> (*batch, m)."""
    return jnp.sum(x, axis=-1)


def col_sums(x: jax.Array) -> jax.Array:
    """(*batch, m, n) -> (*batch, n)."""
    return jnp.sum(x, axis=-2)


def inverse_root(
    R: jax.Array, C: jax.Array, weight: Scalar, eps: Scalar
) -> tuple[jax.Array, jax.Array]:
    r"""The preconditioner ``P = (v / weight)^(-1/2)`` as its factors p (m,) and q (n,), P = p q^T.

    ``weight`` is the total weight of the moving average (``1 - b2^t``), so that ``v / weight`` is
    free of its bias towards zero. ``eps`` bounds how much less than the average row (or column) a
    row may count: :math:`p_i = (R_i / \bar R + eps)^{-1/2}`. It is relative, so a loss scaled by a
    constant gives the same update. A matrix that never got a gradient has P = 0, and so have a row
    and a column whose squares once overflowed to infinity: the others go on without them.
    """
    row_mean, col_mean = (_mean(x, axis=-1) for x in (R, C))
    p = _inverse_root(R / divisor(row_mean) + eps)
    q = _inverse_root(C / divisor(col_mean) + eps)
    # v_ij = R_i C_j / sum(R) = (R_i / mean R) (C_j / mean C) mean(C) / m
    root = jnp.sqrt(R.shape[-1] * weight) * jax.lax.rsqrt(divisor(col_mean))
    return p, jnp.where(col_mean > 0, q * root, 0)


def dense_inverse_root(v: jax.Array, weight: Scalar, eps: Scalar) -> jax.Array:
    """``(v / weight)^(-1/2)`` entry by entry, with the same relative ``eps``; 0 where v is 0."""
    mean = _mean(v)
    root = jnp.sqrt(weight) * jax.lax.rsqrt(divisor(mean))
    return jnp.where(v > 0, _inverse_root(v / divisor(mean) + eps) * root, 0)


def _mean(x: jax.Array, axis: int | None = None) -> jax.Array:
    """The mean, in which an infinite entry counts as zero: relative to it all others would be."""
    plain, finite = (
        jnp.mean(y, axis=axis, keepdims=axis is not None)
        for y in (x, jnp.where(jnp.isfinite(x), x, 0))
    )
    # The plain mean where it will do: with a mask the compiler adds up in another order.
    return jnp.where(jnp.isfinite(plain), plain, finite)


def _inverse_root(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, jax.lax.rsqrt(divisor(x)), 0)


def estimate(R: jax.Array, C: jax.Array, weight: Scalar, layout: Layout) -> Factored:
    """``v / weight`` of a leaf of this layout, still factored. Zero where R and C are."""
    total = divisor(jnp.sum(R, axis=-1, keepdims=True))
    return Factored(layout.rows_in_leaf(R / total), layout.cols_in_leaf(C / weight))
