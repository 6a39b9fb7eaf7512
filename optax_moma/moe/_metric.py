"""The metric that experts are merged in: a learned sum of Kronecker products."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from .._checks import Scalar, check_integer
from .._matrix import divisor
from .._moments import Factored


class KroneckerMetric(nnx.Module):
    r"""A linear map of each expert's task vector, learned: a sum of ``rank`` Kronecker products.

    :math:`M_e(t) = \sum_k (A_{ek} \otimes B_{ek})\, t\, (C_{ek} \otimes D_{ek})^T`, with m1 the
    largest divisor of m up to its root, m2 = m / m1, and the same for n. It starts as the identity:
    the first term is, in the others A is zero and B, C, D are random, so that they learn at once,
    and each something else. (Terms that all start as identities, as in the published code, multiply
    the merge by ``rank`` and stay equal.)

    Args:
      experts: E.
      fan_in: m; it must not be prime.
      fan_out: n; it must not be prime.
      rank: Terms, >= 1.
      rngs: Flax's random streams.

    Raises:
      ValueError: m or n has no divisors.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import KroneckerMetric
      >>> metric = KroneckerMetric(2, 6, 8, rank=3, rngs=nnx.Rngs(0))
      >>> t = jnp.arange(96.0).reshape(2, 6, 8)
      >>> bool(jnp.all(metric(t) == t)), metric.A.shape, metric.B.shape
      (True, (2, 3, 2, 2), (2, 3, 3, 3))

    Source: Nguyen et al., arXiv 2502.18821; this start of it is ours.
    """

    def __init__(self, experts: int, fan_in: int, fan_out: int, rank: int, *, rngs: nnx.Rngs):
        """The identity."""
        rank = check_integer("rank", rank, lowest=1)
        m1, m2 = _factors("fan-in", fan_in)
        n1, n2 = _factors("fan-out", fan_out)

        def start(size: int, others: jax.Array) -> nnx.Param:
            first = jnp.broadcast_to(jnp.eye(size), (experts, 1, size, size))
            return nnx.Param(jnp.concatenate([first, others / math.sqrt(size)], axis=1))

        def random(size: int) -> jax.Array:
            return jax.random.normal(rngs.params(), (experts, rank - 1, size, size))

        self.A = start(m1, jnp.zeros((experts, rank - 1, m1, m1)))
        self.B, self.C, self.D = (start(size, random(size)) for size in (m2, n1, n2))

    def __call__(self, delta: jax.Array) -> jax.Array:
        """(E, m, n) -> (E, m, n)."""
        terms = [
            jnp.swapaxes(f[...].astype(delta.dtype), 0, 1) for f in (self.A, self.B, self.C, self.D)
        ]

        # Term by term, and again for the gradients: what lies between a term's four products is as
        # large as the experts, and that of all terms at once would not stay in a cache.
        def add(total: jax.Array, term: list[jax.Array]) -> tuple[jax.Array, None]:
            return total + _kronecker(delta, *term), None

        step = jax.checkpoint(add, prevent_cse=False)  # within a scan no barrier is needed
        return jax.lax.scan(step, jnp.zeros_like(delta), terms)[0]


def _kronecker(x: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array) -> jax.Array:
    """(A kron B) x (C kron D)^T of each expert.

    Each factor meets the last of the four axes (m1, m2, n1, n2) and puts it first: one plain matrix
    product, whatever the axis, and after four the axes lie as before.
    """
    y = x
    for factor in (D, C, B, A):
        last = y.reshape(len(x), -1, factor.shape[-1])
        y = jnp.matmul(factor, last.mT, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(x.shape)


def _factors(what: str, size: int) -> tuple[int, int]:
    size = check_integer(what, size, lowest=1)
    small = next((d for d in range(math.isqrt(size), 1, -1) if size % d == 0), 1)
    if small == 1:
        raise ValueError(
            f"the {what} of {size} does not factor, and a Kronecker metric needs two factors: take"
            " a width that is not prime, or rank=None for no metric."
        )
    return small, size // small


def metric_from_curvature(
    curvatures: Sequence[Factored], rank: int = 1, *, power: Scalar = -0.5
) -> KroneckerMetric:
    r"""The metric that the experts' second moments give: ``M_e(t) = t * (R_e C_e^T)^power / mean``.

    R^p, cut into an (m1, m2) matrix, is its singular vectors' sum, and so is C^p; of the products
    of their terms the ``rank`` largest are kept, which is the best approximation of that many
    Kronecker terms. Each expert's factors are divided by their mean, so that the step keeps its
    scale. A row or column without curvature counts as an average one.

    Args:
      curvatures: Of each expert's kernel (m, n), with ``row`` (m, 1) and ``col`` (1, n); see
        :func:`optax_moma.curvature_from`.
      rank: Terms of the metric.
      power: -1/2 is the step of a natural gradient, as Adam takes it, which is how the paper sees a
        merge; a positive power weighs what matters more, as Fisher merging does.

    Returns:
      A :class:`KroneckerMetric`; give it to a layer by ``weights.metric = ...``.

    Raises:
      ValueError: The curvatures are no factored ones of matrices of one shape, or do not factor.

    Example:
      >>> import jax.numpy as jnp, optax_moma as om
      >>> from optax_moma.moe import metric_from_curvature
      >>> v = om.Factored(jnp.array([[1.0], [1.0], [9.0], [9.0]]), jnp.ones((1, 4)))
      >>> merged = metric_from_curvature([v], power=0.5)(jnp.ones((1, 4, 4)))
      >>> [round(float(x), 3) for x in merged[0, :, 0]]
      [0.5, 0.5, 1.5, 1.5]

    Source: the idea is ours; R and C as curvature: arXiv 2512.17109.
    """
    if not curvatures or any(not isinstance(v, Factored) for v in curvatures):
        raise ValueError("curvatures must be one Factored per expert, as moma's state gives them.")
    shapes = {(v.row.shape, v.col.shape) for v in curvatures}
    m, n = curvatures[0].row.shape[0], curvatures[0].col.shape[-1]
    if shapes != {((m, 1), (1, n))}:
        raise ValueError(
            "curvatures must have rows (m, 1) and columns (1, n) of one shape, got"
            f" {sorted(shapes)}."
        )
    metric = KroneckerMetric(len(curvatures), m, n, rank, rngs=nnx.Rngs(0))
    halves = [
        (_terms(v.row.ravel(), power, metric.A), _terms(v.col.ravel(), power, metric.C))
        for v in curvatures
    ]
    chosen = [_largest_products(rows, cols, rank) for rows, cols in halves]
    for name, factor in zip("ABCD", zip(*chosen, strict=True), strict=True):
        diagonals = jnp.stack(factor)
        param = getattr(metric, name)
        param[...] = diagonals[..., None] * jnp.eye(diagonals.shape[-1])
    return metric


def _terms(v: jax.Array, power: Scalar, outer: nnx.Param) -> tuple[jax.Array, ...]:
    """v^power over its mean, as singular vectors and values of its (outer, inner) matrix."""
    mean = divisor(jnp.mean(v))
    x = jnp.where(v > 0, divisor(v / mean) ** power, 1)
    u, s, vt = jnp.linalg.svd((x / jnp.mean(x)).reshape(outer.shape[-1], -1), full_matrices=False)
    return u.T, s, vt


def _largest_products(
    rows: tuple[jax.Array, ...], cols: tuple[jax.Array, ...], rank: int
) -> tuple[jax.Array, ...]:
    """The diagonals of A, B, C, D, (rank, size) each; zero where there are no more products."""
    (a, s, b), (c, z, d) = rows, cols
    sizes, places = jax.lax.top_k((s[:, None] * z).ravel(), min(rank, s.size * z.size))
    i, j = jnp.divmod(places, z.size)
    pad = lambda x: jnp.pad(x, ((0, rank - len(x)), (0, 0)))  # noqa: E731
    return pad(sizes[:, None] * a[i]), pad(b[i]), pad(c[j]), pad(d[j])
