"""Merges of matrices that solve a least-squares problem: RegMean, WUDI, ACE, DOGE.

Kernels are (fan-in, fan-out), as in Flax: the papers' matrices are their transposes. Each step here
merges one matrix, and ``EachMatrix`` finds the matrices of a leaf.
"""

from collections.abc import Callable, Sequence
from dataclasses import field

import jax
import jax.numpy as jnp
import optax

from optax_moma._checks import check_integer
from optax_moma.merging import _metric, _select, _steps
from optax_moma.merging._contract import Contract, check_number, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, heard, per_expert, sum_experts
from optax_moma.merging._matrices import EachMatrix, check_axes
from optax_moma.merging._spectral import svd
from optax_moma.merging._steps import Chain, Number, chain


@merge_step
class RegMean:
    """See ``regmean``."""

    ratio: Number
    ridge: Number

    contract = Contract(curvature=True, gram=True, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the experts' matrices."""
        assert leaf.curvature is not None
        x, say = heard(leaf)
        grams = jnp.stack([jnp.asarray(g, x.dtype) for g in leaf.curvature])
        grams = grams / _metric.nonzero(jnp.max(jnp.abs(grams)))
        diagonal = grams * jnp.eye(x.shape[1], dtype=x.dtype)
        grams = per_expert(say, x) * (self.ratio * grams + (1 - self.ratio) * diagonal)
        # Solved for what is apart from the mean: of experts that agree that is nothing.
        mean = _steps.weighted_mean(leaf)
        pulls = sum_experts(product(grams, x - mean))
        return combined(leaf, mean + ridge_inverse(sum_experts(grams), pulls, self.ridge))


def regmean(ratio: Number = 0.95, ridge: Number = 1e-6) -> Chain:
    """Finds the matrix whose outputs are nearest to each expert's on its own inputs.

    With G_t = Z_t^T Z_t, Z_t (examples, fan-in) the inputs of the layer in expert t, off-diagonal
    entries times ``ratio``, A = sum_t w_t G_t and c = ridge * trace(A) / fan-in:
    merged = [base +] (A + c I)^-1 (sum_t w_t G_t x_t + c mean_t x_t).

    Needs, as ``curvature``, a tree per expert with the Gram (fan-in, fan-in) of every kernel, as
    ``input_grams`` collects them, and None at leaves without one: those are averaged. Kernels of
    more than two axes have their fan-in first, and stacks of matrices (*stack, fan-in, fan-out)
    have stacks of Grams (*stack, fan-in, fan-in). The base is
    optional and changes nothing but rounding; takes any number of experts, with weights that are
    not negative. The Grams are compared as they are: divide each by its number of examples.

    Args:
      ratio: Factor of the off-diagonal entries, from 0 to 1.
      ridge: How much the solution is drawn to the mean, at least 0, relative to the mean
        eigenvalue of A; it decides where no expert has inputs. 0 is the published formula, which
        has no solution for fewer examples than inputs and ``ratio`` 1: then as much as rounding.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import merge, regmean
      >>> experts = [{"w": jnp.full((2, 1), 4.0)}, {"w": jnp.zeros((2, 1))}]
      >>> grams = [{"w": jnp.diag(jnp.array([3., 1.]))}, {"w": jnp.eye(2)}]
      >>> [f"{x:.3f}" for x in merge(regmean(), experts, curvature=grams)["w"].ravel()]
      ['3.000', '2.000']

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models"
    (arXiv 2212.09849).
    """
    check_number("ratio", ratio, 0, 1)
    check_number("ridge", ridge, 0)
    return chain(EachMatrix(RegMean(ratio, ridge)))


@merge_step
class Wudi:
    """See ``wudi`` and ``wudi_adam``: closed form if ``steps`` is None."""

    ridge: Number
    learning_rate: Number
    steps: int | None = field(metadata={"static": True})

    contract = Contract(base=True, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        x = leaf.weight * leaf.delta
        # The problem is homogeneous: solved for entries of order one, nothing under- or overflows.
        size = _metric.nonzero(jnp.max(jnp.abs(x)))
        x = x / size
        norms = _metric.nonzero(jnp.sum(x**2, axis=(1, 2), keepdims=True))
        factors, start = x / jnp.sqrt(norms), sum_experts(x)
        if self.steps is None:
            # Solved for what is apart from the start: of experts that agree that is nothing.
            apart = list(x - start)
            merged = start + least_squares(list(factors), apart, jnp.ones(len(x)), self.ridge)
        else:
            merged = _descent(
                lambda y: 2 * sum_experts(product(factors, product(factors.mT, y - x))),
                start,
                self.learning_rate / size,
                self.steps,
            )
        return combined(leaf, size * merged)


def least_squares(
    factors: Sequence[jax.Array], d: Sequence[jax.Array], weights: jax.Array, ridge: Number
) -> jax.Array:
    """Returns the X that minimises sum_t w_t |F_t^T (X - d_t)|**2 + c |X|**2.

    F_t (m, p), d_t (m, n), A = sum_t w_t F_t F_t^T, c = ridge * tr(A) / m, or what rounding needs:
    X = (A + c I)^-1 sum_t w_t F_t F_t^T d_t. With F all sqrt(w_t) F_t side by side and P all
    sqrt(w_t) F_t^T d_t below each other, that is F (F^T F + c I)^-1 P: it is the smaller Gram that
    is factorised, so that the words of an embedding may be on either side.
    """
    k, (m, p) = len(factors), factors[0].shape
    ridge = resolved(ridge, m, d[0].dtype)
    if k * p < m:
        roots = jnp.where(weights > 0, jnp.sqrt(_metric.nonzero(weights)), 0)
        F = jnp.concatenate([root * F_t for root, F_t in zip(roots, factors, strict=True)], axis=1)
        P = jnp.concatenate([product(F_t.T, d_t) for F_t, d_t in zip(factors, d, strict=True)])
        P = jnp.repeat(roots, p)[:, None] * P
        return product(F, ridge_inverse(product(F.T, F), P, ridge * (k * p / m)))
    A = [w_t * product(F_t, F_t.T) for w_t, F_t in zip(weights, factors, strict=True)]
    pulls = [product(A_t, d_t) for A_t, d_t in zip(A, d, strict=True)]
    return ridge_inverse(sum_experts(A), sum_experts(pulls), ridge)


def resolved(ridge: Number, n: int, dtype: jnp.dtype) -> jax.Array:
    """Returns a ridge of at least 32 eps n, so that c is at least 32 eps tr(A).

    Rounding puts some eps tr(A) of everything where A is zero, and 1 / c magnifies it.
    """
    return jnp.maximum(jnp.asarray(ridge, dtype), 32 * n * jnp.finfo(dtype).eps)


def ridge_inverse(a: jax.Array, b: jax.Array, ridge: Number) -> jax.Array:
    """Returns (a + c I)^-1 b, c = ridge * tr(a) / n, for a symmetric a that is not negative.

    Where rounding makes a + c I indefinite, c is as much as this rounding.
    """
    n = a.shape[0]

    def factorised(c: jax.Array) -> jax.Array:
        return jax.scipy.linalg.cho_factor(a + c * jnp.eye(n, dtype=a.dtype), lower=True)[0]

    c = ridge * _metric.nonzero(jnp.trace(a)) / n
    rounding = n**0.5 * jnp.finfo(a.dtype).eps * _metric.nonzero(jnp.linalg.norm(a))
    lower = factorised(c)
    lower = jax.lax.cond(
        jnp.all(jnp.isfinite(lower)), lambda: lower, lambda: factorised(jnp.maximum(c, rounding))
    )
    return jax.scipy.linalg.cho_solve((lower, True), b)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product of matrices, or of stacks of them, in full precision."""
    return jnp.matmul(a, b, precision="highest")


def _descent(
    gradient: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    learning_rate: jax.Array,
    steps: int,
) -> jax.Array:
    """Returns the X that Adam reaches from start."""
    optimizer = optax.adam(learning_rate)

    def step(_: jax.Array, state: tuple[jax.Array, optax.OptState]) -> tuple:
        x, opt_state = state
        updates, opt_state = optimizer.update(gradient(x), opt_state)
        return optax.apply_updates(x, updates), opt_state

    return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]


def wudi(ridge: Number = 1e-2, scale: Number = 1.0, *, axes: str = "mn") -> Chain:
    """Finds the matrix that disturbs each expert least on what its own task vector reads.

    With X_t = w_t d_t, (fan-in, fan-out), and c = ridge * trace(A) / fan-in:
    X minimises sum_t |X_t^T (X - X_t)|**2 / |X_t|**2 + c |X - sum_t X_t|**2, which is
    (A + c I)^-1 (B + c sum_t X_t), A = sum_t X_t X_t^T / |X_t|**2,
    B = sum_t X_t X_t^T X_t / |X_t|**2; merged = base + scale * X.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged. One Cholesky factorisation per matrix, of the smaller of fan-in and
    k times fan-out. The authors stop an iteration early instead: that is ``wudi_adam``.

    Args:
      ridge: How much the solution is drawn to the sum of the task vectors, where the authors'
        iteration starts; at least 0, relative to the mean eigenvalue of A, and in effect at least
        4e-6 times the fan-in, which rounding to float32 needs.
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import merge, wudi
      >>> one, two = jnp.diag(jnp.array([3., 0.])), jnp.diag(jnp.array([0., 2.]))
      >>> merge(wudi(), [{"w": one}, {"w": two}], base={"w": jnp.zeros((2, 2))})["w"].round(4)
      Array([[3., 0.],
             [0., 2.]], dtype=float32)

    Source: Cheng et al. 2025, "Whoever Started the Interference Should End It" (arXiv 2503.08099).
    """
    check_number("ridge", ridge, 0)
    step = Wudi(ridge, 0.0, None)
    return chain(EachMatrix(step, check_axes(axes)), _steps.scale(scale))


def wudi_adam(
    learning_rate: Number = 1e-5, steps: int = 300, scale: Number = 1.0, *, axes: str = "mn"
) -> Chain:
    """Solves ``wudi`` without its ridge by steps of Adam from the sum, as the authors do.

    Adam's steps have the size of the learning rate whatever the gradients', so the result depends
    on the scale of the task vectors.

    Args:
      learning_rate: Adam's learning rate, in units of the parameters.
      steps: Number of steps, at least 1; fixes the loop, so not traced.
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import merge, wudi_adam
      >>> one, two = jnp.diag(jnp.array([3., 0.])), jnp.diag(jnp.array([0., 2.]))
      >>> merge(wudi_adam(), [{"w": one}, {"w": two}], base={"w": jnp.zeros((2, 2))})["w"].round(4)
      Array([[3., 0.],
             [0., 2.]], dtype=float32)

    Source: Cheng et al. 2025, "Whoever Started the Interference Should End It" (arXiv 2503.08099).
    """
    check_number("learning_rate", learning_rate, 0)
    step = Wudi(0.0, learning_rate, check_integer("steps", steps, 1))
    return chain(EachMatrix(step, check_axes(axes)), _steps.scale(scale))


@merge_step
class Ace:
    """See ``ace``."""

    eps: Number
    threshold: Number
    share: float = field(metadata={"static": True})

    contract = Contract(base=True, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        x = leaf.weight * leaf.delta
        energy = jnp.sum(x**2, axis=(1, 2)) + _ACE_FLOOR
        logs = jnp.log(energy)
        spread = jnp.var(logs, ddof=1) if x.shape[0] > 1 else jnp.zeros(())
        uneven = spread > self.threshold * (jnp.mean(logs) ** 2 + _ACE_FLOOR)

        centred = x - jnp.mean(x, axis=2, keepdims=True)
        grams = jnp.einsum("kio,kjo->kij", centred, centred, precision="highest")
        traces = jnp.trace(grams, axis1=1, axis2=2) + _ACE_FLOOR
        size = per_expert(jnp.where(uneven, traces, 1), x)
        grams = grams / size
        ridges = self.eps / size * jnp.eye(x.shape[1], dtype=x.dtype)

        a = sum_experts(grams + ridges)
        b = sum_experts(jnp.einsum("kij,kjo->kio", grams + ridges, centred, precision="highest"))
        prior = jnp.mean(sum_experts(grams), axis=1) / jnp.where(uneven, jnp.mean(energy), 1)
        merged = jnp.linalg.solve(a + prior[:, None], b)

        def refined(merged: jax.Array) -> jax.Array:
            apart = grams - a / x.shape[0]
            rest = sum_experts(jnp.einsum("kij,kjo->kio", apart, x, precision="highest"))
            u, s, vt = jnp.linalg.svd(merged + rest, full_matrices=False)
            rank = max(1, int(s.size * self.share))
            leading = jnp.matmul(u[:, :rank], vt[:rank], precision="highest")
            return merged + jnp.mean(s[:rank]) * leading

        return combined(leaf, jax.lax.cond(uneven, refined, lambda merged: merged, merged))


# What the authors add to norms and means before they take a logarithm or divide.
_ACE_FLOOR = 1e-12


def ace(
    eps: Number = 1e-5,
    threshold: Number = 0.3,
    share: float = 0.3,
    scale: Number = 1.0,
    *,
    axes: str = "mn",
) -> Chain:
    """Solves the regression of ``regmean`` with Grams guessed from the task vectors.

    With X_t = w_t d_t, (fan-in m, fan-out n), Z_t = X_t minus its mean over the outputs,
    G_t = Z_t Z_t^T, H_t = G_t + eps I, c = sum_t G_t 1 / m, the same for all outputs:
    X = (sum_t H_t + c 1^T)^-1 sum_t H_t Z_t; merged = base + scale * X.

    If the experts differ in size, Var_t[log |X_t|**2] > threshold * (mean_t log |X_t|**2)**2,
    which is tested matrix by matrix, then G_t and eps are divided by trace(G_t) and c by
    mean_t |X_t|**2, and X += mean(s) U V^T, with U, s, V the leading ``share`` of the singular
    triplets of X + sum_t (G_t - sum_s H_s / k) X_t.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged. Each expert's Gram, fan-in x fan-in, is made: average embeddings,
    whose fan-in are the words, by another method. Follows the authors' code where summaries of the
    paper differ: it is Z_t, not X_t, that the Grams multiply, so that X has no mean over the
    outputs.

    Args:
      eps: The ridge, above 0, in units of the square of a matrix's singular values: it is no share.
        The authors take 1e-5 for image models, 2e-4 for RoBERTa and 4e-2 for GPT-2; their code has
        1e-2.
      threshold: How uneven experts are treated as such; the test depends on the units too.
      share: Share of the spectrum in the refinement, from 0 to 1; fixes shapes, so not traced.
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import ace, merge
      >>> one, two = jnp.array([[2., -2.], [0., 0.]]), jnp.array([[0., 0.], [2., -2.]])
      >>> merge(ace(), [{"w": one}, {"w": two}], base={"w": jnp.zeros((2, 2))})["w"].round(3)
      Array([[ 1., -1.],
             [ 1., -1.]], dtype=float32)

    Source: Xu et al. 2026, "ACE-Merging" (arXiv 2603.02945), and its code.
    """
    check_number("eps", eps, 0)
    if not isinstance(eps, jax.Array) and eps == 0:
        raise ValueError("eps must be above 0: the Grams of experts are singular.")
    check_number("threshold", threshold, 0)
    check_number("share", share, 0, 1)
    step = Ace(eps, threshold, float(share))
    return chain(EachMatrix(step, check_axes(axes)), _steps.scale(scale))


@merge_step
class Doge:
    """See ``doge``."""

    density: Number
    norm: Number
    learning_rate: Number
    steps: int = field(metadata={"static": True})
    subspace: int = field(metadata={"static": True})

    contract = Contract(base=True, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        x, say = heard(leaf)
        size = _metric.nonzero(jnp.max(jnp.abs(x)))
        x = x / size
        norms = jnp.sqrt(jnp.sum(x**2, axis=(1, 2)))
        scales = jnp.where(norms == 0, 0, say * self.norm / (size * _metric.nonzero(norms)))
        total, whole = sum_experts(per_expert(scales, x) * x), jnp.sum(scales)

        # The paper's U, of the output side, is on the right of a kernel.
        k, rank = x.shape[0], min(x.shape[1:])
        own = svd(x)[2][:, : max(1, rank // k)]
        shared = svd(own.reshape(-1, x.shape[2]))[2][: rank // self.subspace]

        def gradient(shift: jax.Array) -> jax.Array:
            clash = jnp.sum(x * (x - total - whole * shift), axis=1, keepdims=True)
            g = -2 * whole * sum_experts(clash * x)
            g_shared = jnp.einsum("io,ro,rp->ip", g, shared, shared, precision="highest")
            return g - g_shared

        start = jnp.zeros_like(total)
        shift = _descent(gradient, start, self.learning_rate / size, self.steps)
        threshold = _select.kth_largest(x, _select.kept_count(self.density, total.size))
        kept = _select.keep(_select.ordered_bits(x), threshold, self.density)
        return combined(leaf, size * sum_experts(per_expert(scales, x) * kept * (x + shift)))


def doge(
    density: Number = 0.3,
    norm: Number = 0.07,
    learning_rate: Number = 1e-4,
    steps: int = 400,
    subspace: int = 6,
    *,
    axes: str = "mn",
) -> Chain:
    """Shifts all task vectors so that they clash less, but not where they have much in common.

    With l_t = w_t norm / |d_t|, S a common shift (fan-in, fan-out), and all products entrywise, S
    is what Adam reaches from 0 on
    sum_t sum_outputs (sum_inputs d_t (d_t - sum_s l_s (d_s + S)))**2, with gradients projected on
    the complement of the shared subspace: the leading r / subspace directions of the outputs among
    the leading r / k ones of each d_t, r the smaller side. Then, m_t keeping the largest entries of
    d_t, merged = base + sum_t l_t m_t (d_t + S).

    Directions of no strength are left out, as in ``tsv_m``. Of directions that are shared alike, as
    all are where one expert alone has changed a matrix, rounding decides which lead.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged (in the published code they stay at the base). Entries are kept matrix
    by matrix, where the published code counts those of the whole model. Every matrix of an expert
    is scaled to the length ``norm``, so the result depends on the scale of the task vectors.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      norm: The length that each task vector gets, in units of the parameters.
      learning_rate: Adam's learning rate, in units of the parameters.
      steps: Number of steps of Adam, at least 1; fixes the loop, so not traced.
      subspace: One over the share of directions that are left alone, at least 1; fixes shapes.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import doge, merge
      >>> one, two = jnp.diag(jnp.array([3., 0.])), jnp.diag(jnp.array([0., 2.]))
      >>> method = doge(density=0.25, norm=2.0, steps=1)
      >>> merge(method, [{"w": one}, {"w": two}], base={"w": jnp.zeros((2, 2))})["w"].round(3)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)

    Source: Wei et al. 2025, "Modeling Multi-Task Model Merging as Adaptive Projective Gradient
    Descent" (arXiv 2501.01230), with task arithmetic (DOGE TA).
    """
    check_number("density", density, 0, 1)
    check_number("norm", norm, 0)
    check_number("learning_rate", learning_rate, 0)
    sizes = (check_integer("steps", steps, 1), check_integer("subspace", subspace, 1))
    return chain(EachMatrix(Doge(density, norm, learning_rate, *sizes), check_axes(axes)))
