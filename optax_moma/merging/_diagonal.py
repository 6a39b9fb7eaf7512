"""Methods that weigh each entry on its own: averages, masks, votes, curvature.

In the formulas t runs over the experts, d_t = expert_t - base, w_t are the user's weights (1 by
default), v_t is the curvature, m_t are masks of zeros and ones, and all products are entrywise.
"""

import jax.numpy as jnp

from optax_moma.merging import _metric, _select, _steps
from optax_moma.merging._contract import Contract, check_number, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, sum_experts
from optax_moma.merging._matrices import EachMatrix, check_axes
from optax_moma.merging._steps import Chain, Number, chain


def average() -> Chain:
    """Averages the experts.

    merged = sum_t w_t expert_t / sum_t w_t.

    Needs neither base nor curvature; takes any number of experts.

    Returns:
      A method for ``merge``: ``chain(mean())``.

    Example:
      >>> from optax_moma.merging import average, merge
      >>> merge(average(), [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}])
      {'w': Array([0.5, 0.5], dtype=float32)}

    Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482).
    """
    return chain(_steps.mean())


def task_arithmetic(scale: Number = 0.3) -> Chain:
    """Adds the task vectors up.

    merged = base + scale * sum_t w_t d_t.

    Needs a base; takes any number of experts. A negative weight subtracts a task.

    Args:
      scale: The factor of the sum. Tune it: 0.3 suits eight tasks, 1 / k is the average.

    Returns:
      A method for ``merge``: ``chain(total(), scale(scale))``.

    Raises:
      ValueError: if the scale is not finite.

    Example:
      >>> from optax_moma.merging import merge, task_arithmetic
      >>> merge(task_arithmetic(0.5), [{"w": jnp.ones(2)}] * 3, base={"w": jnp.zeros(2)})
      {'w': Array([1.5, 1.5], dtype=float32)}

    Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic" (arXiv 2212.04089).
    """
    return chain(_steps.total(), _steps.scale(scale))


def ties(density: Number = 0.2, scale: Number = 1.0) -> Chain:
    """Trims, elects signs, and averages those that agree.

    m_t = [|d_t| >= its k-th largest, k = density * n], per leaf;
    sign = sign(sum_t w_t m_t d_t); a_t = m_t [sign(d_t) == sign];
    merged = base + scale * sum_t w_t a_t d_t / sum_t w_t a_t, and base where nobody is left.

    Needs a base; takes any number of experts, with weights that are not negative.

    Libraries differ. Here leaves are trimmed one by one, the vote is on weighted task vectors, the
    sum is divided by the weights that agree, and a tied vote keeps the base. ``mergekit.ties``,
    ``peft.ties`` and ``fusion_bench.ties`` do as those libraries do.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      scale: The factor of the merged task vector.

    Returns:
      A method for ``merge``: ``chain(trim(density), elect(), mean(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import merge, ties
      >>> experts = [{"w": jnp.array([3., 1., 0.])}, {"w": jnp.array([1., -2., 0.])}]
      >>> merge(ties(density=0.7), experts, base={"w": jnp.zeros(3)})
      {'w': Array([ 2., -2.,  0.], dtype=float32)}

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708).
    """
    return chain(_steps.trim(density), _steps.elect(), _steps.mean(), _steps.scale(scale))


def dare(density: Number = 0.5, scale: Number = 1.0) -> Chain:
    """Drops entries at random, scales up the rest, and adds the task vectors up.

    merged = base + scale * sum_t w_t m_t d_t / density, m_t ~ Bernoulli(density).

    Needs a base and a key; takes any number of experts. The same key gives the same draws in
    whatever order leaves and named experts come. mergekit rescales to the L1 norm before the drop
    instead of by 1 / density: that is ``mergekit.dare_linear``.

    Args:
      density: Share of entries kept on average, from 0 to 1: one minus the paper's drop rate.
      scale: The factor of the sum.

    Returns:
      A method for ``merge``: ``chain(drop(density), total(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax
      >>> from optax_moma.merging import dare, merge
      >>> experts, base = [{"w": jnp.ones(4)}, {"w": jnp.ones(4)}], {"w": jnp.zeros(4)}
      >>> merge(dare(density=1.0, scale=0.5), experts, base=base, key=jax.random.key(0))
      {'w': Array([1., 1., 1., 1.], dtype=float32)}

    Source: Yu et al. 2024, "Language Models are Super Mario" (arXiv 2311.03099).
    """
    return chain(_steps.drop(density), _steps.total(), _steps.scale(scale))


def fisher() -> Chain:
    """Averages the experts, weighed by their curvature.

    merged = sum_t w_t v_t expert_t / sum_t w_t v_t; where all v_t are zero, the average.

    Needs a curvature; the base is optional and changes nothing but rounding. Takes any number of
    experts, with weights that are not negative. The curvatures are compared as they are: they must
    be on one scale (the same estimator, batch size and loss scale), else use ``weigh()``, which
    normalises them. With Adam's second moments in place of the Fisher this is "Squisher"
    (arXiv 2507.18807).

    Returns:
      A method for ``merge``: ``chain(weigh(1.0, normalize=False), mean())``.

    Example:
      >>> from optax_moma.merging import fisher, merge
      >>> experts = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
      >>> curvature = [{"w": jnp.array([3e-18, 0.])}, {"w": jnp.array([1e-18, 0.])}]
      >>> merge(fisher(), experts, curvature=curvature)
      {'w': Array([0.75, 0.5 ], dtype=float32)}

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging"
    (arXiv 2111.09832), equation 4.
    """
    return chain(_steps.weigh(1.0, normalize=False), _steps.mean())


def ota(density: Number = 0.4, power: Number = 0.5) -> Chain:
    """Keeps the salient entries and averages them, weighed by a power of the curvature.

    m_t = [v_t d_t**2 >= its k-th largest, k = density * n], per leaf (FFG masks);
    merged = base + sum_t w_t m_t v_t**power d_t / sum_t w_t m_t v_t**power, and base where nobody
    is left.

    Needs a base and a curvature; takes any number of experts, with weights that are not negative.
    The authors find an absolute threshold per model by sweeping the density; here the density is
    given, per leaf. The curvatures are compared as they are, as the authors do by default: give
    them one scale, or use ``curvature_ties``, which normalises them.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      power: Exponent of the curvature in the weights, at least 0.

    Returns:
      A method for ``merge``:
      ``chain(trim(density, by="saliency"), weigh(power, normalize=False), mean())``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import merge, ota
      >>> experts = [{"w": jnp.array([2., 1.])}, {"w": jnp.array([1., 2.])}]
      >>> curvature = [{"w": jnp.array([16., 1.])}, {"w": jnp.array([1., 1.])}]
      >>> merge(ota(density=1.0), experts, base={"w": jnp.zeros(2)}, curvature=curvature)
      {'w': Array([1.8, 1.5], dtype=float32)}

    Source: "OTA-Merging" (arXiv 2509.11167).
    """
    return chain(
        _steps.trim(density, by="saliency"),
        _steps.weigh(power, normalize=False),
        _steps.mean(),
    )


def curvature_ties(density: Number = 0.2, power: Number = 0.5, scale: Number = 1.0) -> Chain:
    """TIES by curvature: trims by saliency, then votes and averages by curvature.

    m_t = [d_t**2 v_t**power >= its k-th largest, k = density * n], per leaf;
    h_t = w_t m_t (v_t / mean(v_t))**power, the mean over the leaf;
    sign = sign(sum_t h_t d_t); a_t = [sign(d_t) == sign];
    merged = base + scale * sum_t h_t a_t d_t / sum_t h_t a_t, and base where nobody is left.

    Needs a base and a curvature; takes any number of experts, with weights that are not negative.
    All leaves are merged, vectors too. Each expert's curvature is normalised leaf by leaf, so that
    its batch size, loss scale or number of steps does not matter. A leaf in which an expert's
    curvature is all zero was never trained, and counts as unchanged. Entry by entry, so it is cheap
    and any leaf will do; ``moma`` sees matrices as a whole.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      power: Exponent of the curvature, at least 0.
      scale: The factor of the merged task vector.

    Returns:
      A method for ``merge``: ``chain(trim(density, by="saliency", power=power), weigh(power),
      elect(), mean(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import curvature_ties, merge
      >>> experts = [{"w": jnp.array([1., -1.])}, {"w": jnp.array([1., 2.])}]
      >>> curvature = [{"w": jnp.array([1., 9.])}, {"w": jnp.array([5., 5.])}]
      >>> merge(curvature_ties(1.0), experts, base={"w": jnp.zeros(2)}, curvature=curvature)
      {'w': Array([1., 2.], dtype=float32)}

    Source: this library; its parts are those of ``ties``, ``ota`` and ``umtam``.
    """
    return chain(
        _steps.trim(density, by="saliency", power=power),
        _steps.weigh(power),
        _steps.elect(),
        _steps.mean(),
        _steps.scale(scale),
    )


# The published code clamps row and column sums, the greatest weight and the sum of weights by the
# same absolute number.
_UMTAM_FLOOR = 1e-8


@merge_step
class Umtam:
    """See ``umtam``."""

    density: Number

    @property
    def contract(self) -> Contract:
        """A base and a curvature."""
        return Contract(base=True, curvature=True, nonnegative_weights=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors of a matrix."""
        d = leaf.delta
        assert leaf.curvature is not None
        v = jnp.stack([r * c for r, c in (_metric.factors(v, d.dtype) for v in leaf.curvature)])
        R = jnp.maximum(jnp.sum(v, axis=2, keepdims=True), _UMTAM_FLOOR)
        C = jnp.maximum(jnp.sum(v, axis=1, keepdims=True), _UMTAM_FLOOR)
        H = jnp.sqrt(R * C)
        s = d**2 * H
        threshold = _select.kth_largest(s, _select.kept_count(self.density, s.size // s.shape[0]))
        mask = _select.keep(_select.ordered_bits(s), threshold, self.density)
        elected = jnp.sign(sum_experts(mask * s * jnp.sign(d)))
        agree = mask & (jnp.sign(d) == elected) & (elected != 0)
        w = leaf.weight * agree * H / (jnp.max(H, axis=(1, 2), keepdims=True) + _UMTAM_FLOOR)
        return combined(leaf, sum_experts(w * d) / jnp.maximum(sum_experts(w), _UMTAM_FLOOR))


def umtam(density: Number = 0.2, *, axes: str = "mn") -> Chain:
    """Merges matrices as the published method does, step by step, for comparison.

    For each matrix, with R_t and C_t the row and column sums of the curvature v_t:
    H_t = sqrt(max(R_t, 1e-8) max(C_t, 1e-8)^T); s_t = d_t**2 H_t;
    m_t = [s_t >= its k-th largest, k = density * n];
    sign = sign(sum_t m_t s_t sign(d_t)); a_t = m_t [sign(d_t) == sign];
    h_t = H_t / (max(H_t) + 1e-8);
    merged = base + sum_t w_t a_t h_t d_t / max(sum_t w_t a_t h_t, 1e-8).

    Needs a base and a curvature; takes any number of experts, with weights that are not negative.
    As published, all leaves but matrices stay at the base, there is no scale, and the floors are
    absolute: where row or column sums are below 1e-8, as with small gradients they are, the
    curvature says nothing and the saliency is the magnitude. ``curvature_ties`` has none of these.

    Args:
      density: Share of entries kept in each matrix of each expert, from 0 to 1.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``.

    Raises:
      ValueError: if the density is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import merge, umtam
      >>> experts = [{"w": jnp.array([[2., 0.]])}, {"w": jnp.array([[1., -1.]])}]
      >>> curvature = [{"w": jnp.ones((1, 2))}] * 2
      >>> merge(umtam(density=0.5), experts, base={"w": jnp.zeros((1, 2))}, curvature=curvature)
      {'w': Array([[ 1.5, -1. ]], dtype=float32)}

    Source: Moayedikia and Troncoso 2025, "Bridging Training and Merging Through Momentum-Aware
    Optimization" (arXiv 2512.17109), Algorithm 2 as in the authors' code.
    """
    check_number("density", density, 0, 1)
    return chain(EachMatrix(Umtam(density), check_axes(axes), average=False))
