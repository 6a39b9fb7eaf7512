r"""The orthogonal factor of a matrix, block by block, by products alone.

For a block X (b, n) with b <= n, its Gram :math:`A_0 = X X^T / \alpha^2` and :math:`Z_0 = I`,

.. math::
    P_i = a I + b A_i + c A_i^2, \quad Z_{i+1} = P_i Z_i, \quad A_{i+1} = P_i A_i P_i,
    \quad \alpha = \max((tr (X X^T)^4)^{1/8}, \sqrt n)

bring :math:`Z X / \alpha` near the orthogonal factor :math:`(X X^T)^{-1/2} X`: the singular vectors
stay, and every singular value that is not tiny moves to about one. These are the Newton-Schulz
iterations of Muon, but on the Gram matrix: two products with X in all. Its Schatten norm
bounds the largest singular value far more closely than Muon's Frobenius norm does, so that three of
them, with ``(a, b, c) = (3.4445, -4.7750, 2.0315)``, bring the values above a fiftieth of alpha to
between 0.68 and 1.21. They do not settle there: the slope at zero is what is wanted.

X is an update of entries about one, whose rows are :math:`\sqrt n` long: of a matrix that gets no
gradients any more the momentum fades below a fiftieth of that, and so does its orthogonal factor.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; blocks after
Khaled et al., "MuonBP: Faster Muon via Block-Periodic Orthogonalization", 2025.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._matrix import contract, reshape, reshard, sharding_of, spec_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 3
_ROUGH = None
"""The backend's default, or what ``jax.default_matmul_precision`` says. Factors rounded to bfloat16
change the result by one to three percent, by fifteen where a single direction is a thousand times
the others, and no value leaves its range; the polynomials of the Gram would not bear it."""


def orthogonal_factor(
    X: jax.Array, block_size: int, size: Any = 1.0, least: Any = None
) -> jax.Array:
    """Each block of each matrix of X (*batch, m, n) with its singular values moved to about size.

    The shorter side is cut into blocks of at most ``block_size`` rows (or columns): a power of two
    of them, as the devices of a mesh are. Rows, columns and blocks that are null stay so.

    ``size`` and ``least``, the n under alpha's root, are numbers or arrays (*batch, 1, 1); None for
    the longer side.
    """
    side = -2 if X.shape[-2] <= X.shape[-1] else -1
    count = 1
    while count * block_size < X.shape[side]:
        count *= 2
    blocks = _split(X, side, count)
    # The wide matrix by rows, the tall one by columns: neither is transposed.
    gram, apply = ("rn,sn->rs", "rs,sn->rn") if side == -2 else ("mr,ms->rs", "rs,ms->mr")
    least = max(X.shape[-2:]) if least is None else least
    size, least = (x[..., None, :, :] if jnp.ndim(x) else x for x in (size, least))
    inverse = _inverse_root(contract(gram, blocks, blocks, _ROUGH), least)
    return _joined(contract(apply, size * inverse, blocks, _ROUGH), side, X)


def _inverse_root(gram: jax.Array, least: Any) -> jax.Array:
    """Z of the iterations above over alpha, which is at least sqrt(least): about gram^(-1/2)."""
    product = lambda x, y: contract("rs,st->rt", x, y)  # noqa: E731
    size = jnp.maximum(jnp.max(jnp.abs(gram), axis=(-2, -1), keepdims=True), least)
    A = gram / size  # before it is squared, lest that overflow
    square = product(A, A)
    root = jnp.sqrt(jnp.linalg.norm(square, axis=(-2, -1), keepdims=True))
    root = jnp.maximum(root, least / size)
    A, square, alpha = A / root, square / root**2, jnp.sqrt(size * root)
    P = Z = _polynomial(A, square)
    for _ in range(ITERATIONS - 1):
        A = product(product(P, A), P)
        P = _polynomial(A, product(A, A))
        Z = product(P, Z)
    return Z / alpha


def _polynomial(A: jax.Array, square: jax.Array) -> jax.Array:
    a, b, c = COEFFICIENTS
    return a * jnp.eye(A.shape[-1], dtype=A.dtype) + b * A + c * square


def _split(X: jax.Array, side: int, count: int) -> jax.Array:
    """(*batch, m, n) -> (*batch, count, rows, n), or (*batch, count, m, columns) for side -1.

    With null rows (or columns) last where the side is no multiple of ``count``.
    """
    length = X.shape[side]
    spec, sharding = list(spec_of(X)), sharding_of(X)
    if sharding is not None:  # blocks that lie on several devices are gathered
        spec[side] = _dividing(spec[side], 1 if length % count else count, sharding.mesh)
        X = reshard(X, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    if missing := -length % count:
        widths = [(0, 0)] * X.ndim
        widths[side] = (0, missing)
        X = jnp.pad(X, widths)
    at = X.ndim + side
    cut = (*X.shape[:at], count, X.shape[side] // count, *X.shape[at + 1 :])
    blocks = reshape(X, cut, (*spec[: at + 1], None, *spec[at + 1 :]))
    return jnp.moveaxis(blocks, at, X.ndim - 2)


def _joined(blocks: jax.Array, side: int, like: jax.Array) -> jax.Array:
    """The inverse of :func:`_split`, with the shape and the sharding of ``like``."""
    at = like.ndim + side
    blocks = jnp.moveaxis(blocks, like.ndim - 2, at)
    spec = spec_of(blocks)
    whole = (*blocks.shape[:at], blocks.shape[at] * blocks.shape[at + 1], *blocks.shape[at + 2 :])
    X = reshape(blocks, whole, (*spec[: at + 1], *spec[at + 2 :]))
    return reshard(X[tuple(map(slice, like.shape))], sharding_of(like))


def _dividing(axes: Any, count: int, mesh: Any) -> tuple[str, ...] | None:
    """The first of these mesh axes, as many as divide ``count`` blocks among them."""
    kept: list[str] = []
    for name in axes if isinstance(axes, tuple) else [axes] if axes else []:
        if count % mesh.shape[name]:
            break
        kept.append(name)
        count //= mesh.shape[name]
    return tuple(kept) or None
