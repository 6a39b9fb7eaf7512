"""Merges of matrices that solve a least-squares problem: RegMean, WUDI.

Kernels are (fan-in, fan-out), as in Flax: the papers' matrices are their transposes. Each step here
merges one matrix, and ``EachMatrix`` finds the matrices of a leaf.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax

from optax_moma._checks import check_integer
from optax_moma.merging import _metric, _steps
from optax_moma.merging._contract import Contract, check_number
from optax_moma.merging._leaf import TaskVectors, combined, heard, per_expert, sum_experts
from optax_moma.merging._matrices import EachMatrix, check_axes
from optax_moma.merging._steps import Chain, Number, chain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RegMean:
    """See ``regmean``."""

    ratio: Number
    ridge: Number

    contract = Contract(curvature=True, gram="mn", nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the experts' matrices."""
        assert leaf.curvature is not None
        x, say = heard(leaf)
        grams = jnp.stack([jnp.asarray(g, x.dtype) for g in leaf.curvature])
        grams = grams / _metric.nonzero(jnp.max(jnp.abs(grams)))
        diagonal = grams * jnp.eye(x.shape[1], dtype=x.dtype)
        grams = per_expert(say, x) * (self.ratio * grams + (1 - self.ratio) * diagonal)
        a = sum_experts(grams)
        b = sum_experts(jnp.einsum("kij,kjo->kio", grams, x, precision="highest"))
        return combined(leaf, _ridge_solution(a, b, _steps.weighted_mean(leaf), self.ridge))


def regmean(ratio: Number = 0.95, ridge: Number = 1e-6, *, axes: str = "mn") -> Chain:
    """Finds the matrix whose outputs are nearest to each expert's on its own inputs.

    With G_t = Z_t^T Z_t, Z_t (examples, fan-in) the inputs of the layer in expert t, off-diagonal
    entries times ``ratio``, A = sum_t w_t G_t and c = ridge * trace(A) / fan-in:
    merged = [base +] (A + c I)^-1 (sum_t w_t G_t x_t + c mean_t x_t).

    Needs, as ``curvature``, a tree per expert with the Gram (fan-in, fan-in) of every kernel, and
    None at leaves without one: those, and leaves that are no matrices, are averaged. The base is
    optional and changes nothing but rounding; takes any number of experts, with weights that are
    not negative. The Grams are compared as they are: divide each by its number of examples.

    Args:
      ratio: Factor of the off-diagonal entries, from 0 to 1.
      ridge: How much the solution is drawn to the mean, at least 0, relative to the mean
        eigenvalue of A; it decides where no expert has inputs. 0 is the published formula.
      axes: Which leaves are matrices, as in ``tsv_m``; a stack of matrices
        (b, m, n) has Grams (b, m, m), with all fan-in axes in one.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

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
    return chain(EachMatrix(RegMean(ratio, ridge), check_axes(axes)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
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
        gram = jnp.einsum("kio,kjo->kij", x, x, precision="highest") / norms
        a = sum_experts(gram)
        b = sum_experts(jnp.einsum("kij,kjo->kio", gram, x, precision="highest"))
        start = sum_experts(x)
        if self.steps is None:
            merged = _ridge_solution(a, b, start, self.ridge)
        else:
            merged = _descent(a, b, start, self.learning_rate / size, self.steps)
        return combined(leaf, size * merged)


def _ridge_solution(a: jax.Array, b: jax.Array, start: jax.Array, ridge: Number) -> jax.Array:
    """Returns the X that minimises <X, a X> - 2 <X, b> + c |X - start|**2, c relative to a."""
    c = ridge * _metric.nonzero(jnp.trace(a)) / a.shape[0]
    lower = jax.scipy.linalg.cho_factor(a + c * jnp.eye(a.shape[0], dtype=a.dtype), lower=True)
    return jax.scipy.linalg.cho_solve(lower, b + c * start)


def _descent(
    a: jax.Array, b: jax.Array, start: jax.Array, learning_rate: jax.Array, steps: int
) -> jax.Array:
    """Returns the X that Adam reaches from start on <X, a X> - 2 <X, b>."""
    optimizer = optax.adam(learning_rate)

    def step(_: jax.Array, state: tuple[jax.Array, optax.OptState]) -> tuple:
        x, opt_state = state
        gradient = 2 * (jnp.matmul(a, x, precision="highest") - b)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(x, updates), opt_state

    return jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]


def wudi(ridge: Number = 1e-2, scale: Number = 1.0, *, axes: str = "mn") -> Chain:
    """Finds the matrix that disturbs each expert least on what its own task vector reads.

    With X_t = w_t d_t, (fan-in, fan-out), and c = ridge * trace(A) / fan-in:
    X minimises sum_t |X_t^T (X - X_t)|**2 / |X_t|**2 + c |X - sum_t X_t|**2, which is
    (A + c I)^-1 (B + c sum_t X_t), A = sum_t X_t X_t^T / |X_t|**2,
    B = sum_t X_t X_t^T X_t / |X_t|**2; merged = base + scale * X.

    Needs a base; takes any number of experts, with weights that are not negative. Leaves that are
    no matrices are averaged. One Cholesky factorisation of fan-in x fan-in per matrix. The authors
    stop an iteration early instead: that is ``wudi_adam``.

    Args:
      ridge: How much the solution is drawn to the sum of the task vectors, where the authors'
        iteration starts; at least 0, relative to the mean eigenvalue of A. In float32 keep it
        above 1e-6.
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
