"""The steps that diagonal merges are chained from: masks, votes, weights, means."""

from collections.abc import Sequence
from dataclasses import field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

from optax_moma.merging import _metric, _select
from optax_moma.merging._contract import Contract, Step, SummaryStep, check_number, merge_step
from optax_moma.merging._leaf import TaskVectors, combined, sum_experts

Number = float | jax.Array


@merge_step
class Chain:
    """Steps applied one after the other; itself a step."""

    steps: tuple[Step, ...]

    @property
    def contract(self) -> Contract:
        """What all the steps ask together."""
        contract = Contract()
        for step in self.steps:
            contract = contract.union(step.contract)
        return contract

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Maps the record of one leaf through all the steps."""
        return _through(self.steps, leaf)

    def count(self, leaf: TaskVectors) -> Any:
        """Returns what one leaf adds to the summary of the first step that still needs one."""
        i = self._pending()
        return cast(SummaryStep, self.steps[i]).count(_through(self.steps[:i], leaf))

    def refine(self, counts: Any) -> "Chain":
        """Returns the chain with that step refined."""
        i = self._pending()
        refined = cast(SummaryStep, self.steps[i]).refine(counts)
        return Chain((*self.steps[:i], refined, *self.steps[i + 1 :]))

    def _pending(self) -> int:
        return next(i for i, step in enumerate(self.steps) if step.contract.passes)


def _through(steps: Sequence[Step], leaf: TaskVectors) -> TaskVectors:
    for position, step in enumerate(steps):
        if step.contract.key and leaf.keys is not None:
            # Two random steps of one chain must not draw the same numbers.
            keys = jax.lax.map(partial(jax.random.fold_in, data=position), leaf.keys)
            leaf = step(leaf._replace(keys=keys))._replace(keys=leaf.keys)
        else:
            leaf = step(leaf)
    return leaf


def chain(*steps: Step) -> Chain:
    """Composes steps into a merge method, applied from first to last.

    merged = base + (step_n ∘ ... ∘ step_1)(expert_1 - base, ..., expert_k - base), leaf by leaf.

    Args:
      *steps: Steps, or chains of them. One of them must combine the experts (``mean`` or
        ``total``); what needs the single experts (a curvature, a random key) goes before it.

    Returns:
      A method for ``merge``. It is a pytree of its steps' numbers.

    Raises:
      TypeError: if something is not a step.
      ValueError: if a step that needs the single experts comes after they were combined.

    Example:
      >>> from optax_moma.merging import chain, elect, mean, merge, trim
      >>> ties = chain(trim(0.5), elect(), mean())
      >>> base = {"w": jnp.zeros(2)}
      >>> merge(ties, [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., -2.])}], base=base)["w"]
      Array([ 3., -2.], dtype=float32)
    """
    flat: list[Step] = []
    for step in steps:
        if not (callable(step) and isinstance(getattr(step, "contract", None), Contract)):
            raise TypeError(
                f"chain() takes steps such as trim(0.2) or mean(), got {step!r}. "
                "A step is callable and has a contract; was a factory passed without calling it?"
            )
        flat.extend(step.steps if isinstance(step, Chain) else (step,))
    done = False
    for i, step in enumerate(flat):
        if done and (step.contract.curvature or step.contract.key):
            raise ValueError(
                f"Step {i} of the chain, {type(step).__name__}, needs the single experts, but an "
                "earlier step has combined them: put it before mean() or total()."
            )
        done = done or step.contract.combines
    if len({step.contract.gram for step in flat if step.contract.curvature}) > 1:
        raise ValueError(
            "The chain needs a curvature for each entry in one step and Grams in another; merge in "
            "two calls."
        )
    return Chain(tuple(flat))


@merge_step
class Trim:
    """See ``trim``."""

    density: Number
    power: Number
    search: _select.GlobalThreshold | None = None
    by: Literal["magnitude", "saliency"] = field(default="magnitude", metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A base, a curvature for saliencies, two passes for a global threshold."""
        passes = 0 if self.search is None else self.search.passes
        return Contract(base=True, curvature=self.by == "saliency", passes=passes)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by the mask."""
        score = self._score(leaf)
        if self.search is None:
            threshold = _select.kth_largest(
                score, _select.kept_count(self.density, score.size // score.shape[0])
            )
        else:
            assert self.search.bits is not None
            threshold = self.search.bits
        mask = _select.keep(_select.ordered_bits(score), threshold, self.density)
        return leaf._replace(weight=leaf.weight * mask)

    def count(self, leaf: TaskVectors) -> jax.Array:
        """Returns one leaf's histogram of scores."""
        assert self.search is not None
        return self.search.count(_select.ordered_bits(self._score(leaf)))

    def refine(self, counts: jax.Array) -> "Trim":
        """Returns the step with 16 more bits of its thresholds known."""
        assert self.search is not None
        return replace(self, search=self.search.refine(counts, self.density))

    def _score(self, leaf: TaskVectors) -> jax.Array:
        if self.by == "magnitude":
            return leaf.delta
        assert leaf.curvature is not None
        return _metric.saliency_root(leaf.delta, leaf.curvature, self.power)


def trim(
    density: Number,
    *,
    by: Literal["magnitude", "saliency"] = "magnitude",
    power: Number = 1.0,
    scope: Literal["leaf", "global"] = "leaf",
) -> Trim:
    """Keeps, in each expert, the share of entries with the highest scores.

    score_t = |delta_t|, or the saliency delta_t**2 * v_t**power, v_t the expert's curvature;
    weight_t *= [score_t >= the k-th largest score_t], k = max(1, floor(density * n)).

    Entries that tie with the k-th largest are all kept. Zero scores are kept only at density 1,
    which keeps everything; density 0 keeps nothing. Where an expert's curvature is all zero, so is
    its saliency, and the leaf stays at the base.

    Args:
      density: Share of entries kept, from 0 to 1.
      by: "magnitude" or "saliency".
      power: Exponent of the curvature in the saliency, at least 0.
      scope: "leaf" for a threshold per leaf, as in mergekit and peft; "global" for one threshold
        per expert over all leaves, as in the published TIES code and fusion_bench, which needs two
        passes over the leaves before the merge.

    Returns:
      A step. Needs a base, and a curvature for saliencies.

    Raises:
      ValueError: if a number or a switch is out of range.

    Example:
      >>> from optax_moma.merging import chain, merge, total
      >>> merge(chain(trim(0.5), total()), [{"w": jnp.array([1., -3.])}], base={"w": jnp.zeros(2)})
      {'w': Array([ 0., -3.], dtype=float32)}

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), section 4; with saliencies the
    FFG masks of "OTA-Merging" (arXiv 2509.11167).
    """
    check_number("density", density, 0, 1)
    check_number("power", power, 0)
    if by not in ("magnitude", "saliency"):
        raise ValueError(f"by must be 'magnitude' or 'saliency', got {by!r}.")
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}.")
    return Trim(density, power, _select.GlobalThreshold() if scope == "global" else None, by)


@merge_step
class Drop:
    """See ``drop``."""

    density: Number
    rescale: bool = field(default=True, metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A base and a key."""
        return Contract(base=True, key=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by random masks."""
        assert leaf.keys is not None
        shape = leaf.delta.shape[1:]
        # One expert after the other: a vmap of some generators draws other numbers.
        draws = jax.lax.map(lambda key: jax.random.uniform(key, shape, jnp.float32), leaf.keys)
        density = jnp.asarray(self.density, leaf.delta.dtype)
        leaf = leaf._replace(weight=leaf.weight * (draws < self.density))
        # Times the reciprocal: how a compiler divides by one number for all depends on sharding.
        scaled = leaf.delta * (1 / _metric.nonzero(density))
        return leaf._replace(delta=scaled) if self.rescale else leaf


def drop(density: Number, *, rescale: bool = True) -> Drop:
    """Drops entries of each expert at random and scales up the rest.

    weight_t *= m_t, m_t ~ Bernoulli(density); delta_t /= density, so that the expected task vector
    is unchanged.

    The draws depend on the key, the leaf's path and the expert's name only, not on the order of
    leaves or experts.

    Args:
      density: Share of entries kept on average, from 0 to 1.
      rescale: Whether to divide the task vectors by the density.

    Returns:
      A step. Needs a base and a key.

    Raises:
      ValueError: if the density is out of range.

    Example:
      >>> from optax_moma.merging import chain, merge, total
      >>> half = merge(chain(drop(0.5), total()), [{"w": jnp.ones(1000)}],
      ...              base={"w": jnp.zeros(1000)}, key=jax.random.key(0))
      >>> sorted(set(half["w"].tolist()))
      [0.0, 2.0]

    Source: Yu et al. 2024, "Language Models are Super Mario" (arXiv 2311.03099), with p = 1 -
    density. mergekit rescales to the L1 norm before the drop instead: see ``match_norm``.
    """
    check_number("density", density, 0, 1)
    return Drop(density, bool(rescale))


Vote = Literal["weighted", "unweighted", "count"]
Tied = Literal["base", "positive", "majority"]


@merge_step
class Elect:
    """See ``elect``."""

    vote: Vote = field(default="weighted", metadata={"static": True})
    tied: Tied = field(default="base", metadata={"static": True})
    majority: jax.Array | None = None

    @property
    def contract(self) -> Contract:
        """A base, and a pass to find the majority of all entries."""
        passes = int(self.tied == "majority" and self.majority is None)
        return Contract(base=True, passes=passes)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by the agreement with the vote."""
        votes, elected = self._election(leaf)
        if self.tied != "base":
            winner = 1 if self.majority is None else self.majority.astype(elected.dtype)
            elected = jnp.where(elected == 0, winner, elected)
        return leaf._replace(weight=leaf.weight * ((jnp.sign(votes) == elected) & (elected != 0)))

    def count(self, leaf: TaskVectors) -> jax.Array:
        """Returns how many of one leaf's entries elect the positive and the negative sign."""
        _, elected = self._election(leaf)
        return jnp.stack([jnp.sum(elected == sign, dtype=jnp.uint32) for sign in (1, -1)])

    def refine(self, counts: jax.Array) -> "Elect":
        """Returns the step that knows the majority."""
        majority = (counts[0] > counts[1]).astype(jnp.int32) - (counts[0] < counts[1])
        return replace(self, majority=majority)

    def _election(self, leaf: TaskVectors) -> tuple[jax.Array, jax.Array]:
        if self.vote == "weighted":
            votes = leaf.weight * leaf.delta
        else:
            votes = (leaf.weight != 0) * leaf.delta
            votes = jnp.sign(votes) if self.vote == "count" else votes
        return votes, jnp.sign(sum_experts(votes))


def elect(*, vote: Vote = "weighted", tied: Tied = "base") -> Elect:
    """Elects a sign for each entry and silences the experts that disagree.

    sign = sign(sum_t vote_t); weight_t *= [sign(vote_t) == sign].

    Args:
      vote: What is summed. "weighted": weight_t * delta_t, the task vectors with their present
        weights, so that after ``weigh`` it is a vote by curvature. "unweighted": delta_t, of all
        that have a say. "count": its sign, one vote for each expert.
      tied: Who wins where the votes add up to zero. "base": nobody has a say, and the merge keeps
        the base. "positive": the positive sign. "majority": the sign that wins at most entries of
        the whole model, which needs a pass over the leaves before the merge.

    Returns:
      A step. Needs a base.

    Raises:
      ValueError: if a switch is not one of these.

    Example:
      >>> from optax_moma.merging import chain, mean, merge
      >>> experts = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([-1., -1.])}]
      >>> merge(chain(elect(), mean()), experts, base={"w": jnp.zeros(2)})["w"]
      Array([3., 0.], dtype=float32)

    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708), section 4.
    """
    for name, value, known in (("vote", vote, get_args(Vote)), ("tied", tied, get_args(Tied))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    return Elect(vote, tied)


@merge_step
class Weigh:
    """See ``weigh``."""

    power: Number
    normalize: bool = field(default=True, metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """A curvature."""
        return Contract(curvature=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the weights by a power of the curvature."""
        assert leaf.curvature is not None
        scaled = _metric.relative_power if self.normalize else _metric.joint_power
        weight = leaf.weight * scaled(leaf.curvature, self.power, leaf.delta.dtype)
        heard = sum_experts(jnp.abs(weight)) > 0
        return leaf._replace(weight=jnp.where(heard, weight, leaf.weight))


def weigh(power: Number = 1.0, *, normalize: bool = True) -> Weigh:
    """Weighs the experts, entry by entry, by a power of their curvature.

    weight_t *= (v_t / mean(v_t))**power, the mean over the leaf, or (v_t / c)**power with one c
    for all experts if not ``normalize``. Where this silences every expert that had a say (their
    curvature is zero), the weights stay as they were.

    Normalised, the merge does not change when one expert's curvature is multiplied by a number:
    a batch size, a loss scale, a number of steps. Not normalised, it does not change when all
    are.

    Args:
      power: Exponent of the curvature, at least 0: 1 for a Fisher-weighted mean, 0.5 for
        curvatures that are noisy or of rank one.
      normalize: Whether each expert's curvature is divided by its mean over the leaf first.

    Returns:
      A step. Needs a curvature.

    Raises:
      ValueError: if the power is negative.

    Example:
      >>> from optax_moma.merging import chain, mean, merge
      >>> curvature = [{"w": jnp.array([3., 1.])}, {"w": jnp.array([1., 1.])}]
      >>> experts = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
      >>> merge(chain(weigh(normalize=False), mean()), experts, curvature=curvature)["w"]
      Array([0.75, 0.5 ], dtype=float32)

    Source: Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging"
    (arXiv 2111.09832), with power 1/2 "OTA-Merging" (arXiv 2509.11167).
    """
    check_number("power", power, 0)
    return Weigh(power, bool(normalize))


@merge_step
class Mean:
    """See ``mean``."""

    by: Literal["weight", "count"] = field(default="weight", metadata={"static": True})

    @property
    def contract(self) -> Contract:
        """Weights that are not negative, if they are what is divided by."""
        return Contract(nonnegative_weights=self.by == "weight", combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors."""
        return combined(leaf, weighted_mean(leaf, self.by))


def weighted_mean(leaf: TaskVectors, by: Literal["weight", "count"] = "weight") -> jax.Array:
    """Returns the mean of a leaf's task vectors as in ``mean``, shape ``leaf.delta.shape[1:]``."""
    heard = leaf.weight if by == "weight" else (leaf.weight != 0).astype(leaf.weight.dtype)
    say = sum_experts(heard)
    average = sum_experts(leaf.weight * leaf.delta) / _metric.nonzero(say)
    if leaf.base is not None:
        return average
    return jnp.where(say == 0, sum_experts(leaf.delta) / leaf.delta.shape[0], average)


def mean(*, by: Literal["weight", "count"] = "weight") -> Mean:
    """Combines the experts by a weighted mean of those that have a say.

    delta = sum_t weight_t * delta_t / sum_t weight_t, or, by count, over the number of experts
    whose weight is not zero. Where all weights are zero the merge keeps the base or, without a
    base, takes the plain mean of the experts.

    Args:
      by: "weight", or "count": then weights are factors, and not shares.

    Returns:
      A step. Weights must not be negative, unless by count.

    Raises:
      ValueError: if the switch is neither.

    Example:
      >>> from optax_moma.merging import merge
      >>> merge(mean(), [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}], weights=[3.0, 1.0])["w"]
      Array([0.75, 0.75], dtype=float32)
    """
    if by not in ("weight", "count"):
        raise ValueError(f"by must be 'weight' or 'count', got {by!r}.")
    return Mean(by)


@merge_step
class Total:
    """See ``total``."""

    @property
    def contract(self) -> Contract:
        """A base."""
        return Contract(base=True, combines=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Combines the task vectors."""
        return combined(leaf, sum_experts(leaf.weight * leaf.delta))


def total() -> Total:
    """Combines the experts by a weighted sum: delta = sum_t weight_t * delta_t.

    Returns:
      A step. Needs a base.

    Example:
      >>> from optax_moma.merging import merge
      >>> merge(total(), [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}], base={"w": jnp.zeros(2)})["w"]
      Array([2., 2.], dtype=float32)
    """
    return Total()


@merge_step
class Scale:
    """See ``scale``."""

    factor: Number

    @property
    def contract(self) -> Contract:
        """A base."""
        return Contract(base=True)

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Multiplies the task vectors."""
        return leaf._replace(delta=leaf.delta * jnp.asarray(self.factor, leaf.delta.dtype))


def scale(factor: Number) -> Scale:
    """Multiplies the task vectors, or the merged one: delta *= factor.

    Args:
      factor: A number, 1 leaves everything as it is, 0 gives the base.

    Returns:
      A step. Needs a base.

    Raises:
      ValueError: if the factor is not finite.

    Example:
      >>> from optax_moma.merging import chain, mean, merge
      >>> merge(chain(mean(), scale(0.5)), [{"w": jnp.ones(2)}], base={"w": jnp.zeros(2)})["w"]
      Array([0.5, 0.5], dtype=float32)
    """
    check_number("scale", factor)
    return Scale(factor)
