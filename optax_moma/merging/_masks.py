"""More masks and weights, and methods of them: Breadcrumbs, DELLA, SCE, PCB, consensus, MagMax.

In the formulas t runs over the k experts, d_t = expert_t - base, and w_t are the user's weights.
"""

from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np

from optax_moma._checks import check_integer
from optax_moma._matrix import reshard, sharding_of
from optax_moma.merging import _metric, _select, _steps
from optax_moma.merging._contract import Contract, check_number, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, gathered, per_expert, sum_experts
from optax_moma.merging._matrices import check_axes, layout_of
from optax_moma.merging._steps import Chain, Number, chain
from optax_moma.merging._sums import fixed_mean, fixed_sum


@merge_step
class Band:
    """See ``band``."""

    density: Number
    top: Number

    @property
    def contract(self) -> Contract:
        """A base."""
        return Contract(base=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by the mask."""
        bits = _select.ordered_bits(leaf.delta)
        n = bits.size // bits.shape[0]
        outliers = _select.share(self.top, n)
        rank = jnp.minimum(outliers + _select.kept_count(self.density, n), n)
        low, high = (_select.kth_largest(leaf.delta, r) for r in (rank, outliers))
        # The "0-th largest" is above all scores, so that no outliers are dropped at top = 0.
        mask = _select.keep(bits, low, self.density) & (bits < per_expert(high, bits))
        return leaf._replace(weight=leaf.weight * mask)


def band(density: Number, top: Number = 0.01) -> Band:
    """Keeps, in each expert, the largest entries below the outliers.

    weight_t *= [|d_t| is among the (top + density) * n largest, but not among the top * n largest].

    The counts are max(1, floor(density * n)) kept entries below floor(top * n) outliers, per leaf.

    Args:
      density: Share of entries kept, from 0 to 1.
      top: Share of the largest entries dropped, from 0 to 1 - density.

    Returns:
      A step. Needs a base.

    Raises:
      ValueError: if a number is out of range, or both add up to more than 1.

    Example:
      >>> from optax_moma.merging import band, chain, merge, total
      >>> expert = {"w": jnp.array([9., 1., 2., 3.])}
      >>> merge(chain(band(0.5, top=0.25), total()), [expert], base={"w": jnp.zeros(4)})
      {'w': Array([0., 0., 2., 3.], dtype=float32)}

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs" (arXiv 2312.06795).
    """
    check_number("density", density, 0, 1)
    check_number("top", top, 0, 1)
    _check_sum("density + top", density, top)
    return Band(density, top)


def _check_sum(name: str, a: Number, b: Number) -> None:
    """Raises if two numbers given in Python are more than 1 together."""
    # Not a > 1 - b: in floating point 1 - 0.9 is less than 0.1.
    if not isinstance(a, jax.Array) and not isinstance(b, jax.Array) and a + b > 1:
        raise ValueError(f"{name} must be at most 1, got {a} + {b}; lower one of them.")


def breadcrumbs(density: Number = 0.9, top: Number = 0.01, scale: Number = 0.3) -> Chain:
    """Drops outliers and small entries, and adds the task vectors up.

    merged = base + scale * sum_t w_t m_t d_t, m_t as in ``band``.

    Needs a base; takes any number of experts. Counts are per leaf. With ``elect`` and ``mean`` in
    place of ``total`` it is what mergekit calls breadcrumbs_ties.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      top: Share of the largest entries dropped.
      scale: The factor of the sum.

    Returns:
      A method for ``merge``: ``chain(band(density, top), total(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import breadcrumbs, merge
      >>> experts, base = [{"w": jnp.array([9., 1., 2., 3.])}], {"w": jnp.zeros(4)}
      >>> merge(breadcrumbs(density=0.5, top=0.25, scale=2.0), experts, base=base)
      {'w': Array([0., 0., 4., 6.], dtype=float32)}

    Source: Davari and Belilovsky 2024, "Model Breadcrumbs" (arXiv 2312.06795).
    """
    return chain(band(density, top), _steps.total(), _steps.scale(scale))


@merge_step
class MatchNorm:
    """See ``match_norm``."""

    @property
    def contract(self) -> Contract:
        """A base."""
        return Contract(base=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Scales the task vectors."""
        size = jnp.abs(leaf.delta)
        largest = jnp.max(size, axis=tuple(range(1, size.ndim)))
        total = lambda x: jnp.stack([fixed_sum(*pair) for pair in zip(x, largest, strict=True)])  # noqa: E731
        whole, kept = total(size), total(size * (leaf.weight != 0))
        factor = jnp.where(kept == 0, 1.0, whole / _metric.nonzero(kept))
        return leaf._replace(delta=leaf.delta * per_expert(factor, leaf.delta))


def match_norm() -> MatchNorm:
    """Gives each masked task vector the L1 norm it had before, leaf by leaf.

    d_t *= sum|d_t| / sum|[weight_t != 0] d_t|.

    After ``drop(density, rescale=False)`` this is DARE as in mergekit.

    Returns:
      A step. Needs a base.

    Example:
      >>> from optax_moma.merging import chain, match_norm, merge, total, trim
      >>> expert = {"w": jnp.array([3., 1.])}
      >>> merge(chain(trim(0.5), match_norm(), total()), [expert], base={"w": jnp.zeros(2)})
      {'w': Array([4., 0.], dtype=float32)}
    """
    return MatchNorm()


@merge_step
class DropByMagnitude:
    """See ``drop_by_magnitude``."""

    density: Number
    spread: Number
    axes: str = field(metadata={"static": True})
    rescale: bool = field(metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A base, a key, and whole leaves: it sorts."""
        return Contract(base=True, key=True, whole=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by random masks."""
        assert leaf.keys is not None
        shape = leaf.delta.shape[1:]
        place = jnp.stack([_place(d, self.axes) for d in leaf.delta])
        probability = self.density + self.spread * place
        draws = jax.lax.map(lambda key: jax.random.uniform(key, shape, jnp.float32), leaf.keys)
        leaf = leaf._replace(weight=leaf.weight * (draws < probability))
        if not self.rescale:
            return leaf
        return leaf._replace(delta=leaf.delta / _metric.nonzero(probability))


def _place(delta: jax.Array, axes: str) -> jax.Array:
    """Returns where entries stand among those of their fan-in: -1, smallest, to 1, largest.

    What is no matrix is ranked as a whole.
    """
    layout = layout_of(axes, delta.shape)
    x = gathered(jnp.abs(jax.lax.stop_gradient(delta)))
    x = x.reshape(-1, 1) if layout is None else layout.to_matrix(x)
    size = x.shape[-2]
    if size <= 1:
        return jnp.zeros_like(delta)
    rank = jnp.argsort(jnp.argsort(x, axis=-2), axis=-2)
    rank = rank.reshape(delta.shape) if layout is None else layout.from_matrix(rank, rank)
    return 2 * (reshard(rank, sharding_of(delta)).astype(delta.dtype) / (size - 1)) - 1


def drop_by_magnitude(
    density: Number, spread: Number = 0.15, *, rescale: bool = True, axes: str = "mn"
) -> DropByMagnitude:
    """Drops entries of each expert at random, small ones more often, and scales up the rest.

    p_t = density + spread * (2 r_t - 1), r_t in [0, 1] the rank of |d_t| among the entries of one
    output, along fan-in (in leaves that are no matrices: among all entries);
    weight_t *= m_t, m_t ~ Bernoulli(p_t); d_t /= p_t.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      spread: How much more than the average the largest entries are kept, and the smallest less.
      rescale: Whether to divide the task vectors by the probabilities.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A step. Needs a base and a key.

    Raises:
      ValueError: if a probability would not be between 0 and 1, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import chain, drop_by_magnitude, merge, total
      >>> expert, base = {"w": jnp.array([1., 2.])}, {"w": jnp.zeros(2)}
      >>> method = chain(drop_by_magnitude(0.5, spread=0.5), total())
      >>> merge(method, [expert], base=base, key=jax.random.key(0))
      {'w': Array([0., 2.], dtype=float32)}

    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617).
    """
    check_number("density", density, 0, 1)
    check_number("spread", spread, 0, 1 if isinstance(density, jax.Array) else float(density))
    _check_sum("density + spread", density, spread)
    return DropByMagnitude(density, spread, check_axes(axes), bool(rescale))


def della(
    density: Number = 0.5, spread: Number = 0.15, scale: Number = 1.0, *, axes: str = "mn"
) -> Chain:
    """Drops entries at random, small ones more often, elects signs, and averages.

    With m_t and p_t as in ``drop_by_magnitude``, e_t = m_t d_t / p_t, sign = sign(sum_t w_t e_t),
    a_t = m_t [sign(d_t) == sign]: merged = base + scale * sum_t w_t a_t e_t / sum_t w_t a_t.

    Needs a base and a key; takes any number of experts, with weights that are not negative.
    Entries are rescaled by one over their probability, as published; mergekit matches the L1 norm.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      spread: How much more than the average the largest entries are kept, and the smallest less.
      scale: The factor of the merged task vector.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A method for ``merge``:
      ``chain(drop_by_magnitude(density, spread, axes=axes), elect(), mean(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import della, merge
      >>> experts, base = [{"w": jnp.array([1., 2.])}], {"w": jnp.zeros(2)}
      >>> merge(della(0.5, spread=0.5), experts, base=base, key=jax.random.key(0))
      {'w': Array([0., 2.], dtype=float32)}

    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617).
    """
    drop = drop_by_magnitude(density, spread, axes=axes)
    return chain(drop, _steps.elect(), _steps.mean(), _steps.scale(scale))


@merge_step
class Select:
    """See ``select``."""

    density: Number

    @property
    def contract(self) -> Contract:
        """A base, and experts that can differ."""
        return Contract(base=True, min_experts=2)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies task vectors and weights by the common mask."""
        k = leaf.delta.shape[0]
        spread = leaf.delta - sum_experts(leaf.delta) / k
        # The root of the variance orders as the variance does, and squares no small numbers.
        largest = _metric.ceiling(jnp.max(jnp.abs(spread)))
        score = jnp.sqrt(sum_experts((spread / largest) ** 2))[None]
        threshold = _select.kth_largest(score, _select.kept_count(self.density, score.size))
        mask = _select.keep(_select.ordered_bits(score), threshold, self.density)
        return leaf._replace(delta=leaf.delta * mask, weight=leaf.weight * mask)


def select(density: Number) -> Select:
    """Keeps, in all experts, the entries in which they differ most.

    d_t, weight_t *= [Var_t[d_t] >= the k-th largest], k = max(1, floor(density * n)), per leaf.

    Args:
      density: Share of entries kept, from 0 to 1.

    Returns:
      A step. Needs a base and at least two experts.

    Raises:
      ValueError: if the density is out of range.

    Example:
      >>> from optax_moma.merging import chain, mean, merge, select
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., 1.])}]
      >>> merge(chain(select(0.5), mean()), experts, base={"w": jnp.zeros(2)})
      {'w': Array([2., 0.], dtype=float32)}

    Source: Wan et al. 2024, "FuseChat" (arXiv 2408.07990), step S of SCE.
    """
    check_number("density", density, 0, 1)
    return Select(density)


@merge_step
class Energy:
    """See ``energy``."""

    @property
    def contract(self) -> Contract:
        """A base."""
        return Contract(base=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by a number per expert."""
        scaled = leaf.delta / _metric.ceiling(jnp.max(jnp.abs(leaf.delta)))
        squares = jnp.stack([fixed_mean(row**2, 4.0) for row in scaled])
        return leaf._replace(weight=leaf.weight * per_expert(squares, leaf.delta))


def energy() -> Energy:
    """Weighs the experts by the mean square of their task vectors, leaf by leaf.

    weight_t *= mean(d_t**2) / c, with one c for all experts.

    Returns:
      A step. Needs a base.

    Example:
      >>> from optax_moma.merging import chain, energy, mean, merge
      >>> experts = [{"w": jnp.array([3.])}, {"w": jnp.array([1.])}]
      >>> merge(chain(energy(), mean()), experts, base={"w": jnp.zeros(1)})
      {'w': Array([2.8], dtype=float32)}

    Source: Wan et al. 2024, "FuseChat" (arXiv 2408.07990), step C of SCE.
    """
    return Energy()


def sce(density: Number = 0.1) -> Chain:
    """Selects where experts differ, weighs them by their energy, and erases minority signs.

    m = [Var_t[d_t] >= its k-th largest, k = density * n], e_t = m d_t, c_t = mean(e_t**2),
    sign = sign(sum_t w_t e_t), a_t = m [sign(e_t) == sign];
    merged = base + sum_t w_t c_t a_t e_t / sum_t w_t c_t a_t.

    Needs a base; takes at least two experts, with weights that are not negative.

    Args:
      density: Share of entries kept, from 0 to 1.

    Returns:
      A method for ``merge``: ``chain(select(density), elect(), energy(), mean())``.

    Raises:
      ValueError: if the density is out of range.

    Example:
      >>> from optax_moma.merging import merge, sce
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., 1.])}]
      >>> merge(sce(0.5), experts, base={"w": jnp.zeros(2)})
      {'w': Array([2.8, 0. ], dtype=float32)}

    Source: Wan et al. 2024, "FuseChat" (arXiv 2408.07990).
    """
    return chain(select(density), _steps.elect(), energy(), _steps.mean())


@merge_step
class Compete:
    """See ``compete``."""

    density: Number

    @property
    def contract(self) -> Contract:
        """A base, and whole leaves: exp and tanh are computed in another way where one is split."""
        return Contract(base=True, whole=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Clips the task vectors and multiplies the weights by the scores."""
        k, axes = leaf.delta.shape[0], tuple(range(1, leaf.delta.ndim))
        size = jnp.abs(leaf.delta)
        n = size.size // k
        tail = int(n * _TAIL)
        low, high = jnp.min(size, axis=axes), jnp.max(size, axis=axes)
        if tail:
            ranks = (n - tail, tail + 1)
            low, high = (_score(_select.kth_largest(size, jnp.uint32(r))) for r in ranks)
        low, high = per_expert(low, size), per_expert(high, size)
        size = jnp.clip(size, low, high).astype(leaf.delta.dtype)
        within = jnp.exp(k * ((size - low) / _metric.nonzero(high - low)) ** 2)
        say = leaf.weight * leaf.delta
        score = within * jnp.tanh(say * sum_experts(say))
        # Only differences count, and what is not negative is ordered by its magnitude.
        score = score - jnp.min(score, axis=axes, keepdims=True)
        last = _select.kth_largest(score, _select.kept_count(self.density, n))
        last, best = per_expert(_score(last), score), jnp.max(score, axis=axes, keepdims=True)
        even = (size != 0) & (score >= last)
        share = jnp.where(best > last, jnp.maximum(score - last, 0) / (best - last), even)
        return leaf._replace(
            delta=jnp.sign(leaf.delta) * size,
            weight=leaf.weight * share * (jnp.asarray(self.density) > 0),
        )


# The share of the largest entries, and of the smallest, that is clipped.
_TAIL = 1e-4


def _score(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def compete(density: Number = 0.1) -> Compete:
    """Weighs entries by how they stand out in their expert and agree with the others.

    s_t = exp(k z_t**2) tanh(w_t d_t sum_s w_s d_s), k the number of experts and z_t = |d_t| scaled
    from 0 to 1; weight_t *= max(0, s_t - q_t) / (max(s_t) - q_t), with q_t the r-th largest s_t,
    r = max(1, floor(density * n)), so that the r-th itself has no say unless it is the first.
    Before all, the floor(n / 10000) largest and smallest |d_t| are clipped to the next ones. All
    per leaf; the published code scales and counts over the whole model.

    Args:
      density: Share of entries kept, from 0 to 1.

    Returns:
      A step. Needs a base.

    Raises:
      ValueError: if the density is out of range.

    Example:
      >>> from optax_moma.merging import chain, compete, mean, merge
      >>> experts = [{"w": jnp.array([3., 1., 2.])}, {"w": jnp.array([1., -2., 0.])}]
      >>> merge(chain(compete(0.7), mean()), experts, base={"w": jnp.zeros(3)})
      {'w': Array([ 3., -2.,  0.], dtype=float32)}

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging" (arXiv 2410.02396).
    """
    check_number("density", density, 0, 1)
    return Compete(density)


def pcb(density: Number = 0.1, scale: Number = 1.2) -> Chain:
    """Lets entries compete within and between experts, and averages by their scores.

    merged = base + scale * sum_t w_t a_t d_t / sum_t w_t a_t, a_t from 0 to 1 as in ``compete``.

    Needs a base; takes any number of experts, with weights that are not negative. The authors also
    search for a number per expert on validation data; here those are the weights.

    Args:
      density: Share of entries kept in each expert, from 0 to 1.
      scale: The factor of the merged task vector. Tune it.

    Returns:
      A method for ``merge``: ``chain(compete(density), mean(), scale(scale))``.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import merge, pcb
      >>> experts = [{"w": jnp.array([3., 1., 2.])}, {"w": jnp.array([1., -2., 0.])}]
      >>> merge(pcb(0.7, scale=1.0), experts, base={"w": jnp.zeros(3)})
      {'w': Array([ 3., -2.,  0.], dtype=float32)}

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging" (arXiv 2410.02396).
    """
    return chain(compete(density), _steps.mean(), _steps.scale(scale))


@merge_step
class Consensus:
    """See ``consensus``."""

    threshold: Number
    experts: int = field(metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A base, and as many experts as must agree."""
        return Contract(base=True, min_experts=self.experts)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by the common mask."""
        say = leaf.weight * leaf.delta
        agree = sum_experts(own_entries(say, self.threshold).astype(jnp.int32))
        return leaf._replace(weight=leaf.weight * (agree >= self.experts))


def own_entries(x: jax.Array, threshold: Number) -> jax.Array:
    """Returns the TALL masks of k task vectors, with one threshold or one per expert."""
    if jnp.ndim(threshold):
        if jnp.shape(threshold) != x.shape[:1]:
            raise ValueError(
                f"threshold must be a number, or an array with one for each of the {len(x)} "
                f"experts, got the shape {jnp.shape(threshold)}."
            )
        threshold = per_expert(jnp.asarray(threshold), x)
    return jnp.abs(x) > threshold * jnp.abs(sum_experts(x) - x)


def checked_threshold(threshold: Number | np.ndarray) -> Number:
    """Returns a threshold of TALL masks, which may be an array, after a look at its numbers."""
    if not isinstance(threshold, np.ndarray):
        check_number("threshold", threshold, 0)
        return threshold
    for number in threshold.flat:
        check_number("threshold", number, 0)
    return jnp.asarray(threshold)


def consensus(threshold: Number | np.ndarray = 0.4, experts: int = 2) -> Consensus:
    """Keeps the entries that matter to several experts.

    m_t = [|w_t d_t| > threshold * |sum_s w_s d_s - w_t d_t|] (the TALL mask of expert t);
    weight_t *= [sum_s m_s >= experts].

    Consensus task arithmetic is ``chain(consensus(), total(), scale(0.3))``. The masks one by one,
    to keep every expert, are those of ``tall_masks``.

    Args:
      threshold: How large an expert's entry must be relative to all others' sum, at least 0; the
        paper tunes one per task, from 0.2 to 0.6: an array (k,), in the order of the experts'
        names.
      experts: How many experts must need an entry.

    Returns:
      A step. Needs a base and at least ``experts`` experts.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import chain, consensus, merge, total
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([0.1, 1.])}]
      >>> merge(chain(consensus(), total()), experts, base={"w": jnp.zeros(2)})
      {'w': Array([0., 2.], dtype=float32)}

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and
    Compression" (arXiv 2405.07813).
    """
    return Consensus(checked_threshold(threshold), check_integer("experts", experts, 1))


@merge_step
class Largest:
    """See ``largest``."""

    contract = Contract(base=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors."""
        first, *others = leaf.weight * leaf.delta
        for other in others:
            first = jnp.where(jnp.abs(other) > jnp.abs(first), other, first)
        return combined(leaf, first)


def largest() -> Largest:
    """Combines the experts by taking, at each entry, the task vector that is largest there.

    delta = w_s d_s, s = argmax_t |w_t d_t|, entrywise; of equals the first by name.

    Returns:
      A step. Needs a base.

    Example:
      >>> from optax_moma.merging import largest, merge
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -2.])}]
      >>> merge(largest(), experts, base={"w": jnp.zeros(2)})
      {'w': Array([ 3., -2.], dtype=float32)}

    Source: Marczak et al. 2024, "MagMax" (arXiv 2407.06322).
    """
    return Largest()


def magmax(scale: Number = 0.5) -> Chain:
    """Takes the largest entries of all task vectors.

    merged = base + scale * w_s d_s, s = argmax_t |w_t d_t|, entrywise.

    Needs a base; takes any number of experts. Meant for experts that were fine-tuned one after the
    other, each from the one before, on tasks that arrive in sequence; takes others as well.

    Args:
      scale: The factor of the merged task vector, which the authors tune on validation data.

    Returns:
      A method for ``merge``: ``chain(largest(), scale(scale))``.

    Raises:
      ValueError: if the scale is not finite.

    Example:
      >>> from optax_moma.merging import magmax, merge
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -2.])}]
      >>> merge(magmax(), experts, base={"w": jnp.zeros(2)})
      {'w': Array([ 1.5, -1. ], dtype=float32)}

    Source: Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning"
    (arXiv 2407.06322).
    """
    return chain(largest(), _steps.scale(scale))
