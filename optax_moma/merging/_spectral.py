"""Merges of matrices by their singular vectors: TSV-M, Iso-C, Iso-CTS, KnOTS.

The task vectors of a matrix are taken with their weights, so that masks and curvature can come
before. Kernels are (fan-in, fan-out), as in Flax: the papers' matrices are their transposes. Each
step here merges one matrix, and ``EachMatrix`` finds the matrices of a leaf.
"""

from dataclasses import field

import jax
import jax.numpy as jnp

from optax_moma._checks import check_integer
from optax_moma.merging import _metric, _steps
from optax_moma.merging._contract import Contract, Step, check_number, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, heard, per_expert, sum_experts
from optax_moma.merging._matrices import EachMatrix, check_axes
from optax_moma.merging._steps import Chain, Number, chain

_CONTRACT = Contract(base=True, nonnegative_weights=True, combines=True)


def svd(x: jax.Array, size: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns U, S, V^T of a matrix, or of a stack; a direction of no strength is zero in all.

    The vectors of a singular value that is rounding only are whatever the decomposition came up
    with: no merge may depend on them. ``size`` is a norm of what x was computed from, which has
    left its rounding in x; by default x itself.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    largest = s[..., :1] if size is None else size
    known = s > largest * jnp.finfo(s.dtype).eps * max(x.shape[-2:])
    return u * known[..., None, :], s * known, vt * known[..., None]


def _mean_strength(s: jax.Array) -> jax.Array:
    """Returns the mean of the singular values that are not zero."""
    # The second factor is one at full rank, so that there the mean has the bits of a mean of all.
    return jnp.mean(s) * (s.size / _metric.nonzero(jnp.sum(s > 0)))


def _polar(x: jax.Array) -> jax.Array:
    """Returns the matrix with orthonormal columns (or rows) nearest to x, within its span."""
    u, _, vt = svd(x)
    return jnp.matmul(u, vt, precision="highest")


def _leading(
    x: jax.Array, rank: int, size: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    u, s, vt = svd(x, size)
    return u[:, :rank], s[:rank], vt[:rank]


def _product(u: jax.Array, s: jax.Array, vt: jax.Array) -> jax.Array:
    return jnp.matmul(u * s, vt, precision="highest")


@merge_step
class Tsv:
    """See ``tsv_m``."""

    contract = _CONTRACT

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        k, *shape = leaf.delta.shape
        rank = max(1, min(shape) // k)
        parts = [_leading(x, rank) for x in leaf.weight * leaf.delta]
        us, ss, vts = zip(*parts, strict=True)
        u, vt = _polar(jnp.concatenate(us, axis=1)), _polar(jnp.concatenate(vts))
        return combined(leaf, _product(u, jnp.concatenate(ss), vt))


def tsv_m(scale: Number = 1.0, *, axes: str = "mn") -> Chain:
    """Adds up the leading singular parts of the experts, made orthogonal to each other.

    w_t d_t = U_t S_t V_t^T; U, S, V hold the leading r / k columns of each; merged = base + scale *
    polar(U) S polar(V)^T, polar(X) = P Q^T where X = P D Q^T.

    Directions of no strength, their singular values being zero to rounding, are left out: of an
    expert of low rank (LoRA), or that left the matrix as it was. The published code takes those
    that the decomposition chose at random.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged.

    Args:
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, one letter per axis: m for fan-in, n for fan-out, b for a
        stack of matrices that are merged one by one. "mn" takes leaves of two axes; "bmn" the
        kernels of layers stacked for a scan; "mnn" and "mmn" attention kernels (fan-in, heads,
        size) and (heads, size, fan-out), "bmnn" and "bmmn" stacks of those; "mmmn" convolutions;
        "mn bmn" leaves of two or three axes. Leaves of any other number of axes are no matrices.
        Where those of one number differ, each needs a rule of its own, as in ``moma``. In a
        recipe's rule with ``stacked`` the axis of the layers is not counted.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if the scale is not finite, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import merge, tsv_m
      >>> one, two = jnp.diag(jnp.array([3., 0.])), jnp.diag(jnp.array([0., 2.]))
      >>> jnp.abs(merge(tsv_m(), [{"w": one}, {"w": two}], base={"w": jnp.zeros((2, 2))})["w"])
      Array([[3., 0.],
             [0., 2.]], dtype=float32)

    Source: Gargiulo et al. 2025, "Task Singular Vectors" (arXiv 2412.00081).
    """
    return chain(EachMatrix(Tsv(), check_axes(axes)), _steps.scale(scale))


@merge_step
class IsoC:
    """See ``iso_c``."""

    contract = _CONTRACT

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        u, s, vt = svd(sum_experts(leaf.weight * leaf.delta))
        return combined(leaf, _product(u, jnp.full_like(s, _mean_strength(s)), vt))


def iso_c(scale: Number = 1.0, *, axes: str = "mn") -> Chain:
    """Adds the experts up and gives all directions of the sum the same strength.

    sum_t w_t d_t = U S V^T; merged = base + scale * mean(S) U V^T.

    Directions of no strength are left out, as in ``tsv_m``, of the mean too: the singular values
    add up to what they did before. The published code has all min(fan-in, fan-out) in the mean.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged.

    Args:
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if the scale is not finite, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import iso_c, merge
      >>> expert, base = {"w": jnp.diag(jnp.array([3., 1.]))}, {"w": jnp.zeros((2, 2))}
      >>> jnp.abs(merge(iso_c(), [expert], base=base)["w"])
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Marczak et al. 2025, "No Task Left Behind" (arXiv 2502.04959), Iso-C.
    """
    return chain(EachMatrix(IsoC(), check_axes(axes)), _steps.scale(scale))


@merge_step
class IsoCts:
    """See ``iso_cts``."""

    contract = _CONTRACT
    common: float = field(metadata={"static": True})

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        k, *shape = leaf.delta.shape
        own = min(round((min(shape) - int(min(shape) * self.common)) / k), min(shape) // k)
        shared = min(shape) - k * own
        # The paper's U, of the output side, is on the right of a kernel.
        x = jnp.swapaxes(leaf.weight * leaf.delta, 1, 2)
        parts = [_leading(sum_experts(x), shared)]
        u = parts[0][0]
        rest = x - jnp.einsum("ir,jr,kjo->kio", u, u, x, precision="highest")
        sizes = jnp.linalg.norm(x, axis=(1, 2))
        parts += [_leading(rest_t, own, size) for rest_t, size in zip(rest, sizes, strict=True)]
        us, ss, vts = zip(*parts, strict=True)
        s = jnp.concatenate(ss)
        flat = jnp.full_like(s, _mean_strength(s))
        u, vt = _polar(jnp.concatenate(us, axis=1)), _polar(jnp.concatenate(vts))
        return combined(leaf, _product(u, flat, vt).T)


def iso_cts(scale: Number = 1.0, common: float = 0.8, *, axes: str = "mn") -> Chain:
    """As ``iso_c``, with room for each expert's own directions.

    A share ``common`` of the r directions are the leading ones of sum_t w_t d_t, with U of the
    output side; each expert adds the leading s = round((1 - common) r / k) of what is left of
    w_t d_t outside of U. All are made orthogonal, and given the mean of their singular values.
    Directions of no strength are left out, of the mean too, as in ``iso_c``.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged.

    Args:
      scale: The factor of the merged task vector.
      common: Share of directions taken from the sum, from 0 to 1; fixes shapes, so not traced.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import iso_cts, merge
      >>> expert, base = {"w": jnp.diag(jnp.array([3., 1.]))}, {"w": jnp.zeros((2, 2))}
      >>> jnp.abs(merge(iso_cts(common=0.5), [expert], base=base)["w"])
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Marczak et al. 2025, "No Task Left Behind" (arXiv 2502.04959), Iso-CTS.
    """
    check_number("common", common, 0, 1)
    step = IsoCts(float(common))
    return chain(EachMatrix(step, check_axes(axes)), _steps.scale(scale))


@merge_step
class Knots:
    """See ``knots``."""

    inner: Chain
    rank: int | None = field(metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """What the inner steps ask for."""
        return self.inner.contract.union(_CONTRACT)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        k, m, n = leaf.delta.shape
        x, say = heard(leaf)
        # Without the directions that are rounding only, which would count as entries in a trim.
        u, s, vt = svd(x.reshape(k * m, n))
        rank = min(s.size, s.size if self.rank is None else self.rank)
        own = (u * s)[:, :rank].reshape(k, m, rank)
        weight = per_expert(say, own) * jnp.ones_like(own)
        merged = self.inner(TaskVectors(own, weight, jnp.zeros_like(own[0]), None, leaf.keys))
        coefficients = (merged.weight * merged.delta)[0]
        return combined(leaf, jnp.matmul(coefficients, vt[:rank], precision="highest"))


def knots(*steps: Step, rank: int | None = None, axes: str = "mn") -> EachMatrix:
    """Merges matrices by steps of your choice, in a basis that all the experts share.

    The stacked [d_1; ...; d_k] = [A_1; ...; A_k] V^T, by a singular value decomposition, with its
    singular values in A_t; merged = base + steps(A_1, ..., A_k) V^T.

    Needs a base; takes any number of experts, with weights that are not negative. Made for experts
    of low rank (LoRA). Leaves that are no matrices are averaged.

    Args:
      *steps: Steps such as ``trim(0.2), elect(), mean()``; one must combine the experts.
      rank: How many shared directions to keep, by default all; for LoRA experts, k times their
        rank, so that a density counts no empty directions.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A step that combines the experts.

    Raises:
      ValueError: if the steps do not combine, need a curvature (which has no meaning in another
        basis) or a pass over all leaves, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import chain, elect, knots, mean, merge, trim
      >>> method = chain(knots(trim(0.5), elect(), mean()))
      >>> experts = [{"w": jnp.eye(2)}, {"w": 3 * jnp.eye(2)}]
      >>> merge(method, experts, base={"w": jnp.zeros((2, 2))})["w"].round(4)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Stoica et al. 2024, "Model merging with SVD to tie the KnOTS" (arXiv 2410.19735).
    """
    inner = chain(*steps)
    if not inner.contract.combines:
        raise ValueError("knots() needs a step that combines the experts; add mean() or total().")
    if inner.contract.curvature or inner.contract.passes:
        raise ValueError(
            "knots() works in a basis of its own, leaf by leaf: its steps cannot use a curvature "
            "or a global threshold."
        )
    step = Knots(inner, None if rank is None else check_integer("rank", rank, 1))
    return EachMatrix(step, check_axes(axes))
