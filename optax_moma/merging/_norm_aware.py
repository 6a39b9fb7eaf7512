"""NAN, norm-aware merging: an expert whose vector is short has learned from much."""

import jax.numpy as jnp

from optax_moma.merging import _metric
from optax_moma.merging._contract import Contract, merge_step
from optax_moma.merging._leaf import TaskVectors, per_expert, sum_experts
from optax_moma.merging._sums import fixed_sum


@merge_step
class NormAware:
    """See ``norm_aware``."""

    @property
    def contract(self) -> Contract:
        """Nothing."""
        return Contract()

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by the inverse norms."""
        scaled = leaf.delta / _metric.ceiling(jnp.max(jnp.abs(leaf.delta)))
        norm = jnp.sqrt(jnp.stack([fixed_sum(row**2, 4.0) for row in scaled]))
        inverse = jnp.where(norm > 0, 1 / _metric.nonzero(norm), 0)
        # Where nobody has a norm, everybody counts the same.
        inverse = jnp.where(sum_experts(norm) > 0, inverse, 1)
        return leaf._replace(
            weight=leaf.weight * per_expert(inverse / sum_experts(inverse), leaf.delta)
        )


def norm_aware() -> NormAware:
    """Weighs the experts, leaf by leaf, by the inverse of their norms.

    weight_t *= c_t, c_t = (1 / |d_t|) / sum_s (1 / |d_s|), with the Frobenius norm of a leaf's task
    vector or, in a merge without a base, of its parameters.

    In a least-squares problem an expert should count as much as the data it has seen, and the
    variance of what it learned falls with that. An expert that did not move a leaf at all has no
    say in it; where none did, all have the same.

    The authors' own accounts take norms of parameters, without a base, and leave open whether of
    layers or of whole models: here it is of leaves, so that they can be merged one by one. For
    whole models pass ``weights=[1 / optax.tree.norm(expert) for expert in experts]`` to ``merge``.

    Returns:
      A step, to be put before the others: ``chain(norm_aware(), mean())``, or
      ``chain(norm_aware(), trim(0.2), elect(), mean())``. Needs nothing.

    Example:
      >>> from optax_moma.merging import chain, mean, merge, norm_aware
      >>> experts = [{"w": jnp.array([3., 0.])}, {"w": jnp.array([0., 1.])}]
      >>> merge(chain(norm_aware(), mean()), experts, base={"w": jnp.zeros(2)})["w"]
      Array([0.75, 0.75], dtype=float32)

    Source: Si et al. 2025, "NAN: A Training-Free Solution to Coefficient Estimation in Model
    Merging" (arXiv 2505.16148).
    """
    return NormAware()
