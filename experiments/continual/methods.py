"""The ways through a stream, with one interface: a sequential merge, and how its experts train.

| method | merged by | experts start from | its number |
|---|---|---|---|
| CMM | curvature, running | the merge so far | mixing rate, or 1/t |
| running average | equal weights | the merge so far | mixing rate, or 1/t |
| independent average | equal weights, 1/t | the base | none |
| moma | outputs' metrics, running | the base, or the merge so far | scale |
| OPCM | projection | the base | alpha |
| Perturb-and-Merge (its merge) | one step, least loss | the merge so far | none |
| sequential | the newest alone | the newest | none |
| EWC | the newest alone, with a penalty | the newest | strength |
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_moma.merging import Sequential, opcm, perturb_and_merge, running_mean, running_moma

Tree = Any
Correction = Literal["previous", "finetuned", "ridge"]


class Method(NamedTuple):
    """One way through a stream.

    Attributes:
      merge: from the method's own number to a sequential merge.
      numbers: what is tried for that number.
      linear: whether experts are trained, and the merge used, in the base's tangent space.
      start: what experts are trained from.
      optimizer: adamw or moma; its moments are the curvature.
      penalty: whether the loss holds on to the curvature of earlier tasks, and whose: the
        optimizer's, or the Fisher information from examples.
      correction: how the merge's features are corrected: towards those of the merge before the
        task, or of the model just trained (L1, gradient descent on the body's last kernel), or in
        closed form towards the merge before the task.
      of: the method that is corrected: it is tuned first, and its rate and number are kept.
    """

    merge: Callable[[Any], Sequential]
    numbers: tuple[float | None, ...] = (None,)
    linear: bool = False
    start: Literal["merge", "base"] = "merge"
    optimizer: str = "adamw"
    penalty: Literal["optimizer", "fisher"] | None = None
    correction: Correction | None = None
    of: str | None = None


class Elastic(NamedTuple):
    """The state of ``elastic``: the newest expert, and the sum of all curvatures."""

    newest: Any
    curvature: Tree


def elastic() -> Sequential:
    """Keeps the newest expert, and for the penalty of online EWC the sum of the curvatures."""
    newest = running_mean(1.0, power=0)

    def init(base: Tree) -> Elastic:
        return Elastic(newest.init(base), jax.tree.map(jnp.zeros_like, base))

    def update(state: Elastic, expert: Tree, curvature: Tree | None = None) -> Elastic:
        total = jax.tree.map(jnp.add, state.curvature, curvature)
        return Elastic(newest.update(state.newest, expert), total)

    return Sequential(init, update, lambda state: newest.params(state.newest))


MIXING = (None, 0.3, 0.45, 0.6)
"""None is 1/t, all tasks alike; the others span what CMM's authors tried."""
SCALES = (0.5, 0.7, 1.0, 1.4)
STRENGTHS = (1e0, 1e2, 1e4, 1e6)
CORRECTIONS = (1e-5, 1e-4, 1e-3, 1e-2)
"""Learning rates of a correction."""
RIDGES = (1e1, 1e2, 1e3, 1e4)


def _cmm(number: Any) -> Sequential:
    return running_mean(number)


def _mean(number: Any) -> Sequential:
    return running_mean(number, power=0)


METHODS: Mapping[str, Method] = {
    "CMM": Method(_cmm, MIXING, linear=True),
    "CMM, moma": Method(_cmm, MIXING, linear=True, optimizer="moma"),
    "CMM, not linear": Method(_cmm, MIXING),
    "CMM, normalised": Method(lambda a: running_mean(a, normalize=True), MIXING, linear=True),
    "running average": Method(_mean, MIXING),
    "running average, linear": Method(_mean, MIXING, linear=True),
    "independent average": Method(_mean, start="base"),
    "moma": Method(running_moma, SCALES, start="base"),
    "moma, from the merge": Method(running_moma, SCALES),
    "OPCM": Method(opcm, (0.25, 0.5, 0.75, 1.0), start="base"),
    "Perturb-and-Merge": Method(lambda _: perturb_and_merge()),
    "sequential": Method(lambda _: running_mean(1.0, power=0)),
    "sequential, linear": Method(lambda _: running_mean(1.0, power=0), linear=True),
    "EWC": Method(lambda _: elastic(), STRENGTHS, penalty="fisher"),
    "EWC, optimizer's v": Method(lambda _: elastic(), STRENGTHS, penalty="optimizer"),
    "CMM + to previous": Method(_cmm, CORRECTIONS, linear=True, correction="previous", of="CMM"),
    "CMM + to fine-tuned": Method(_cmm, CORRECTIONS, linear=True, correction="finetuned", of="CMM"),
    "CMM, not linear + to previous": Method(
        _cmm, CORRECTIONS, correction="previous", of="CMM, not linear"
    ),
    "CMM, not linear + to fine-tuned": Method(
        _cmm, CORRECTIONS, correction="finetuned", of="CMM, not linear"
    ),
    "CMM, not linear + ridge": Method(_cmm, RIDGES, correction="ridge", of="CMM, not linear"),
}
"""All methods. Those with ``of`` are corrected versions: their number is the correction's."""
