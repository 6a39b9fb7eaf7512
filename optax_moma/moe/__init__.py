r"""CAMEx: layers that merge their experts' weights in a learned metric, and multiply once.

A mixture of experts mixes outputs; these layers mix weights. A router looks at a whole sequence, or
at a segment of it, and gives the experts gates s (E,). With base W0 (m, n), experts W_e, and task
vectors ``t_e = W_e - W0`` the unit's tokens meet the one kernel

.. math::
    W = \sum_e s_e W_e \quad (soft) \qquad
    W = W_0 + \alpha \sum_e s_e\, mask_e \odot M_e(t_e) \quad (domain, ties, dare)

The metric is a sum of r Kronecker products, learned with the rest; a matrix of fan-in m = m1 m2 and
fan-out n = n1 n2 has, per expert, r (m1^2 + m2^2 + n1^2 + n2^2) numbers for it:

.. math:: M(t) = \sum_{k=1}^r (A_k \otimes B_k)\, t\, (C_k \otimes D_k)^T .

Source: Nguyen et al., "CAMEx: Curvature-aware Merging of Experts", arXiv 2502.18821; soft merging:
Muqeeth et al., "Soft Merging of Experts with Adaptive Routing", 2023; causal segments: Zhong et
al., "Lory", 2024; the router: Shazeer et al., "Outrageously Large Neural Networks", 2017.

Needs Flax: ``pip install "optax-moma[flax]"``, then ``import optax_moma.moe``. Experts may lie
sharded on a mesh of automatic axes (``AxisType.Auto``); with explicit ones the metric does not run.
"""

from optax_moma.moe._layers import (
    Dense,
    ExpertWeights,
    MergedLinear,
    MergedMLP,
    SparseMLP,
    fold,
    upcycle,
)
from optax_moma.moe._metric import KroneckerMetric, metric_from_curvature
from optax_moma.moe._router import Router, Routing

__all__ = [
    "Dense",
    "ExpertWeights",
    "KroneckerMetric",
    "MergedLinear",
    "MergedMLP",
    "Router",
    "Routing",
    "SparseMLP",
    "fold",
    "metric_from_curvature",
    "upcycle",
]
