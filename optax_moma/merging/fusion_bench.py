"""Methods as fusion_bench has them, where they differ from ours.

Its simple average, task arithmetic, DARE, Fisher (with ``minimal_fisher_weight=0``; to normalise,
give ``weights`` of one over each Fisher's norm), RegMean (``regmean(ridge=0)``), TSV-M, Iso-C,
Iso-CTS, WUDI (``wudi_adam``) and TALL masks (``consensus``) are ours.

Source: fusion_bench 0.2.33, which the tests compare with.
"""

from typing import Literal

from optax_moma.merging import _steps


def ties(
    density: _steps.Number = 0.2,
    scale: _steps.Number = 0.3,
    combine: Literal["sum", "mean"] = "sum",
) -> _steps.Chain:
    """TIES as published: one trim for the whole model, and a sum or a mean of those that agree.

    m_t = [|d_t| >= its k-th largest, k = density * n], over all leaves together;
    sign = sign(sum_t m_t d_t), or where that is 0 the sign that wins most entries of the model;
    a_t = m_t [sign(d_t) == sign]; merged = base + scale * sum_t w_t a_t d_t, or, for the mean,
    that over sum_t a_t.

    Needs a base, and three passes over the leaves before the merge; takes any number of experts.
    fusion_bench keeps one entry more, and has no weights.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      scale: The factor of the merged task vector.
      combine: "sum" or "mean": fusion_bench's ``merge_func``.

    Returns:
      A method for ``merge``: ``chain(trim(density, scope="global"), elect(vote="unweighted",
      tied="majority"), total(), scale(scale))``, with ``mean(by="count")`` for the mean.

    Raises:
      ValueError: if a number is out of range, or the switch neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import fusion_bench, merge
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -2.])}]
      >>> method = fusion_bench.ties(density=1.0, scale=1.0, combine="mean")
      >>> merge(method, experts, base={"w": jnp.zeros(2)})
      {'w': Array([ 2., -2.], dtype=float32)}

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), and its authors' code.
    """
    if combine not in ("sum", "mean"):
        raise ValueError(f"combine must be 'sum' or 'mean', got {combine!r}.")
    return _steps.chain(
        _steps.trim(density, scope="global"),
        _steps.elect(vote="unweighted", tied="majority"),
        _steps.total() if combine == "sum" else _steps.mean(by="count"),
        _steps.scale(scale),
    )
