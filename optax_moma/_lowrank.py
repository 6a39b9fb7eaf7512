r"""The linear algebra of U, s, V: a matrix of rank r that follows a moving target.

Nothing here factorizes an array larger than r x r, and large arrays meet only matrix products, so
that every function runs with rows and columns sharded, and stacks of matrices are batched.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._checks import Scalar
from ._matrix import contract, divisor

Operator = Callable[[jax.Array], jax.Array]
_BLOCK = 32
_FEWEST = 4
"""Columns from which on XLA's products on a CPU add up in blocks: the Gram of fewer tall ones would
be off by more than the shift."""


class Factors(NamedTuple):
    """The matrix ``U diag(s) V^T`` (or a stack of them).

    U (m, r) has orthonormal columns, and null ones where the matrix has less than rank r; V (n, r)
    has unit columns; s (r,) is non-negative. Under a target that rests, the factors converge to its
    leading singular vectors and values, in order.
    """

    U: jax.Array
    s: jax.Array
    V: jax.Array


@jax.jit  # traced once for all matrices of a shape, and compiled once where nothing else is
def orthonormalize(Y: jax.Array) -> jax.Array:
    r"""An orthonormal basis Q (m, r) of the columns of Y, by passes of Cholesky-QR.

    A pass scales the columns to unit length, factorizes their Gram matrix, shifted by the rounding
    error it may hold, :math:`Y^T Y + \delta I = L L^T` with
    :math:`\delta = \max(r, \sqrt m / 8)\,eps`, and returns :math:`Y L^{-T}`. The scaling makes the
    Gram nearly the identity when the columns are scaled orthogonal vectors, as they become in a
    warm-started iteration. A column that depends on those before it shows as a small pivot, and
    leaves a null column in Q: so ``Q Q^T`` is a projection whatever the rank of Y. Two passes do
    it; a third is made where pivots are left in between.

    The order of the columns is that of Gram-Schmidt: the first k columns of Q span the first k of
    Y, which is what makes the factors converge to singular vectors one by one.

    Source: Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020.
    """
    m, r = Y.shape[-2:]
    if r < _FEWEST:
        filled = jnp.pad(Y, [(0, 0)] * (Y.ndim - 1) + [(0, _FEWEST - r)])
        return orthonormalize(filled)[..., :r]
    shift = max(r, m**0.5 / 8) * jnp.finfo(Y.dtype).eps
    Y, _ = _pass(Y, shift, least=8 * shift)
    # What is left of a dependent column after one pass is noise, which a second lays bare.
    Y, pivots = _pass(Y, shift, least=0.25)
    settled = jnp.all((pivots > 0.99) | (pivots < 2 * shift))
    return _unless(settled, Y, lambda: _pass(Y, shift, least=0.25)[0])


def _pass(Y: jax.Array, shift: Any, least: Any) -> tuple[jax.Array, jax.Array]:
    """One pass of Cholesky-QR, and the squared pivots; columns of a smaller one become null."""
    Y = Y / divisor(jnp.linalg.norm(Y, axis=-2, keepdims=True))
    gram = contract("mr,ms->rs", Y, Y)
    L = _cholesky(gram + shift * jnp.eye(gram.shape[-1], dtype=Y.dtype))
    pivots = jnp.diagonal(L, axis1=-2, axis2=-1) ** 2
    # The shift shortens a column that was orthogonal to the others by sqrt(1 + shift).
    Q = jnp.sqrt(1 + shift) * contract("mr,sr->ms", Y, _inverse(L))
    return jnp.where(pivots[..., None, :] > least, Q, 0), pivots


def follow(
    factors: Factors, decay: Scalar, matmul: Operator, rmatmul: Operator
) -> tuple[Factors, jax.Array]:
    r"""One warm-started subspace step: the rank-r part of ``decay * U s V^T + A``.

    .. math::
        Y = decay\, U s (V^T V) + A V, \quad Q = orth(Y), \quad
        Z = decay\, (Q^T U) s V^T + Q^T A

    and the result is :math:`Q Z = Q Q^T (decay\, U s V^T + A)`, the projection of the target on
    the subspace that one power iteration from V finds. It costs two products with A and no
    factorization of anything larger than r x r.

    Args:
      factors: The current rank-r matrix.
      decay: A number.
      matmul: ``X (n, r) -> A X (m, r)``; A itself is never needed.
      rmatmul: ``X (m, r) -> X^T A (r, n)``.

    Returns:
      The new factors, and ``Q^T A`` (r, n), from which A's share inside the subspace follows.
    """
    U, s, V = factors
    Us = U * (decay * s)[..., None, :]
    Q = orthonormalize(contract("mr,rs->ms", Us, contract("nr,ns->rs", V, V)) + matmul(V))
    inside = rmatmul(Q)
    Z = contract("rs,ns->rn", contract("mr,ms->rs", Q, Us), V) + inside
    return _normalized(Q, Z, V), inside


@jax.jit
def _normalized(Q: jax.Array, Z: jax.Array, previous: jax.Array) -> Factors:
    """``Q Z`` with Z (r, n) split into lengths and unit rows, the columns of V.

    A row that came to nothing is free to search: it keeps its previous direction, less what the
    other rows already cover, so that the next step looks where nobody has looked.
    """
    s = jnp.linalg.norm(Z, axis=-1)
    found = s > Z.shape[-2] * jnp.finfo(Z.dtype).eps * jnp.max(s, axis=-1, keepdims=True)
    s = jnp.where(found, s, 0)
    V = transposed(Z / divisor(s)[..., None] * found[..., None])

    def search() -> jax.Array:
        unseen = previous - contract("nr,rs->ns", V, contract("nr,ns->rs", V, previous))
        unseen = unseen / divisor(jnp.linalg.norm(unseen, axis=-2, keepdims=True))
        return jnp.where(found[..., None, :], V, unseen)

    return Factors(Q, s, _unless(jnp.all(found), V, search))


def _unless(settled: jax.Array, x: jax.Array, otherwise: Callable[[], jax.Array]) -> jax.Array:
    """``x`` where ``settled``, else what the function returns.

    A GPU's branches wait for the host, which costs more than these few thin products: it computes
    them in any case, and selects.
    """
    select = lambda: jnp.where(settled, x, otherwise())  # noqa: E731
    branch = lambda: jax.lax.cond(settled, lambda: x, otherwise)  # noqa: E731
    return jax.lax.platform_dependent(cuda=select, rocm=select, default=branch)


def transposed(x: jax.Array) -> jax.Array:
    """(*batch, m, n) -> (*batch, n, m)."""
    return jnp.swapaxes(x, -1, -2)


def _cholesky(gram: jax.Array) -> jax.Array:
    """The lower factor, by halves down to blocks that LAPACK factorizes without threads.

    Called from several threads of XLA's at once, those of OpenBLAS, which it takes for matrices
    larger than ``_BLOCK``, have been seen to wait for each other for ever.
    """
    r = gram.shape[-1]
    if r <= _BLOCK:
        return _batched(jnp.linalg.cholesky, gram)
    half = -(-r // 2)
    L, side = _cholesky(gram[..., :half, :half]), gram[..., half:, :half]
    inverse = _inverse(L)
    below = contract("rs,ts->rt", side, inverse)
    # Once more with what is left: a product with an inverse is less exact than a solve.
    left = side - contract("rs,ts->rt", below, L)
    below += contract("rs,ts->rt", left, inverse)
    rest = _cholesky(gram[..., half:, half:] - contract("rs,ts->rt", below, below))
    above = jnp.zeros_like(jnp.swapaxes(below, -1, -2))
    return jnp.concatenate(
        [jnp.concatenate([L, above], axis=-1), jnp.concatenate([below, rest], axis=-1)], axis=-2
    )


def _inverse(L: jax.Array) -> jax.Array:
    """The inverse of a lower triangular matrix, or of a stack of them."""
    return jax.lax.platform_dependent(
        L, cuda=_inverse_by_solve, rocm=_inverse_by_solve, default=_inverse_by_products
    )


def _inverse_by_solve(L: jax.Array) -> jax.Array:
    """One kernel of a GPU's, which would take some twenty for the products."""
    identity = jnp.eye(L.shape[-1], dtype=L.dtype)
    solve = lambda x: jax.lax.linalg.triangular_solve(x, identity, left_side=True, lower=True)  # noqa: E731
    return _batched(solve, L)


def _inverse_by_products(L: jax.Array) -> jax.Array:
    """2 log2(r) products.

    The inverses of the diagonal's blocks of one size give those of twice the size: ``[[A, 0],
    [B, C]]`` has the inverse ``[[A', 0], [-C' B A', C']]``. A triangular solve would go through
    the columns one by one on a TPU, and on a CPU to the threads of OpenBLAS, as above.
    """
    i = jnp.arange(L.shape[-1])
    X = jnp.where(i[:, None] == i, 1 / L, 0)
    size = 1
    while size < L.shape[-1]:
        block = i // size
        below = (block[:, None] % 2 == 1) & (block[:, None] - 1 == block)
        X -= contract("rs,st->rt", X, contract("rs,st->rt", jnp.where(below, L, 0), X))
        size *= 2
    return X


def _batched(function: Operator, x: jax.Array) -> jax.Array:
    """A function of one matrix on a stack of them; its own batching fails on explicit meshes."""
    for _ in range(x.ndim - 2):
        function = jax.vmap(function)
    return function(x)
