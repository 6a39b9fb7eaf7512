"""The merge that we recommend: least squares in a metric that the optimizer has measured.

An optimizer divides gradients by the root of their second moments. So a step, times that root, is
a sum of gradients again; and a task vector is the sum of an expert's steps. The Gram of its columns
tells which combinations of a layer's outputs the loss pulled at, as the Gram of a layer's inputs
tells which inputs it saw, and no data are needed for it.
"""

from dataclasses import field

import jax
import jax.numpy as jnp

from optax_moma.merging import _metric, _steps
from optax_moma.merging._contract import Contract, check_number, merge_step
from optax_moma.merging._gram import least_squares
from optax_moma.merging._leaf import TaskVectors, combined, heard, per_expert, sum_experts
from optax_moma.merging._matrices import EachMatrix, check_axes
from optax_moma.merging._steps import Chain, Number, chain


@merge_step
class OutputMetric:
    """See ``moma``: the merge of one matrix."""

    power: Number
    ridge: Number
    curved: bool = field(metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A base, and a curvature if its power is not zero."""
        return Contract(base=True, curvature=self.curved, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        d, w = heard(leaf)
        roots = jnp.ones_like(d)
        if self.curved:
            assert leaf.curvature is not None
            roots = _metric.relative_power(leaf.curvature, self.power, d.dtype)
        G, moved = zip(*map(gradients, d, roots), strict=True)
        w = jnp.where(jnp.stack(moved), w, 0)
        # Solved for what is apart from the mean: of experts that agree that is nothing.
        mean = sum_experts(per_expert(w, d) * d) / _metric.nonzero(jnp.sum(w))
        apart = [(d_t - mean).T for d_t in d]
        return combined(leaf, mean + least_squares([G_t.T for G_t in G], apart, w, self.ridge).T)


def gradients(d: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns G / |G|, G = d root, and whether there is any G."""
    G = d / _metric.nonzero(jnp.max(jnp.abs(d))) * root
    norm = jnp.sqrt(jnp.sum(G**2))
    return G / _metric.nonzero(norm), norm > 0


def moma(
    scale: Number = 1.0, *, power: Number = 0.5, ridge: Number = 0.1, axes: str = "mn"
) -> Chain:
    """Moves each combination of outputs as those experts do that were trained along it.

    For each matrix, (fan-in m, fan-out n), with v_t the curvature over its mean and all products
    but those of matrices entrywise:
    G_t = d_t v_t**power, the gradients that the expert has added up;
    B_t = w_t G_t^T G_t / |G_t|**2, (n, n), the metric of its outputs; B = sum_t B_t;
    M = sum_t w_t d_t / sum_t w_t, of the experts whose G_t is not zero;
    W minimises sum_t tr((W - d_t) B_t (W - d_t)^T) + c |W - M|**2, c = ridge * tr(B) / n:
    W = M + sum_t (d_t - M) B_t (B + c I)^-1; merged = base + scale * W.

    All other leaves are averaged, and with the default ``axes`` that is every leaf of three axes or
    more: Flax's attention kernels, and layers stacked for a scan. No one string fits them all; give
    ``merge`` rules for them, as below.

    Experts that agree are left as they are; where they were trained along different outputs, each
    has its own way. Each expert's curvature is normalised, so that its batch size, loss scale or
    number of steps does not matter; an expert that did not change a matrix, or whose curvature of
    it is all zero, has no say in it.

    Needs a base, and a curvature of the matrices unless its power is 0; takes any number of
    experts, with weights that are not negative. Per matrix, k products of n x n and one Cholesky
    factorisation of that size, or of k m x k m where that is smaller, as in an output layer of many
    words. Entry by entry, and so many times as fast on a CPU, is ``curvature_ties``.

    Args:
      scale: The factor of the merged task vector.
      power: Exponent of the curvature, at least 0. 1/2 undoes what an Adam-like optimizer divided
        gradients by; 0 takes the task vectors as they are, for experts without a curvature.
      ridge: How much the solution is drawn to the mean, at least 0, relative to the mean eigenvalue
        of B; it decides along outputs that no expert was trained along. Where experts have gone far
        from the base and fight for the same outputs, it should be larger, or the scale smaller.
        In effect it is at least 4e-6 n, which rounding to float32 needs.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import merge, moma
      >>> one, two = jnp.array([[2., 0.], [2., 0.]]), jnp.array([[0., 0.], [0., 4.]])
      >>> curvature = [{"w": jnp.ones((2, 2))}] * 2
      >>> base = {"w": jnp.zeros((2, 2))}
      >>> merge(moma(), [{"w": one}, {"w": two}], base=base, curvature=curvature)["w"].round(1)
      Array([[1.9, 0. ],
             [1.9, 3.8]], dtype=float32)

      Rules for attention in Flax: the kernels of queries, keys and values are (fan-in, heads,
      size), that of the output (heads, size, fan-out), and biases (heads, size) are no matrices.
      Stacked for a scan they have a b in front: "bmnn", "bmmn", and "bmn" for the rest.

      >>> from optax_moma.merging import average
      >>> methods = [
      ...     ("**/{bias,scale}", average()),
      ...     ("**/{query,key,value}/kernel", moma(axes="mnn")),
      ...     ("**/out/kernel", moma(axes="mmn")),
      ...     ("**", moma()),
      ... ]

    Source: this library. The least squares are those of RegMean (arXiv 2212.09849), Grams from task
    vectors those of WUDI (arXiv 2503.08099), here of the outputs, and of gradients; the metric is a
    factor of K-FAC's (arXiv 1503.05671). ``experiments/glue`` compares it with the others.
    """
    check_number("power", power, 0)
    check_number("ridge", ridge, 0)
    step = EachMatrix(OutputMetric(power, ridge, _metric.is_needed(power)), check_axes(axes))
    return chain(step, _steps.scale(scale))
