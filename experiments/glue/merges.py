"""The merges that are compared: each method is a line of a table.

All are tuned alike: the density (where a method has one) on one grid, then the scale of the merged
task vector on another, by the mean share of the experts' scores on one half of dev.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

import optax_moma as om
from optax_moma import merging
from optax_moma.demo.encoder import Params
from optax_moma.demo.pipeline import along

from .experts import Expert
from .saliency import factored

DENSITIES = (0.1, 0.2, 0.5, 1.0)
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
Curvature = Literal["none", "optimizer", "factored", "fisher", "grams"]
"""Which curvature a method is given: what the optimizer holds (factored for moma and umtam, dense
for AdamW), its row and column sums only, or the exact Fisher or the Grams of all inputs, which need
data."""
EMBEDDINGS = ("words", "positions", "types")


class Method(NamedTuple):
    """A method, and what it is given.

    Attributes:
      make: Makes it; called without arguments for its defaults, and with a ``density`` and scale 1
        where it has these arguments.
      curvature: What it is given.
      layers: Whether it is made for matrices that multiply activations: embeddings, whose fan-in
        are 30,522 words, are averaged.
    """

    make: Callable[..., merging.Step | merging.Sequential]
    curvature: Curvature = "none"
    layers: bool = False

    def settings(self) -> list[dict[str, float]]:
        """The grid of its settings, but for the scale of the result."""
        names = inspect.signature(self.make).parameters
        fixed = {"scale": 1.0} if "scale" in names else {}
        if "density" not in names:
            return [fixed]
        return [{"density": density} | fixed for density in DENSITIES]


def _weighed(power: float = 0.5, scale: float = 1.0) -> merging.Step:
    return merging.chain(merging.weigh(power), merging.mean(), merging.scale(scale))


def _weighed_by_one(scale: float = 1.0) -> merging.Step:
    return _weighed(1.0, scale)


def _consensus(scale: float = 0.3) -> merging.Step:
    return merging.chain(merging.consensus(), merging.total(), merging.scale(scale))


def _knots_ties(density: float = 0.2, scale: float = 1.0) -> merging.Step:
    inner = merging.knots(merging.trim(density), merging.elect(), merging.mean())
    return merging.chain(inner, merging.scale(scale))


METHODS: Mapping[str, Method] = {
    "average": Method(merging.average),
    "task arithmetic": Method(merging.task_arithmetic),
    "TIES": Method(merging.ties),
    "DARE": Method(merging.dare),
    "Breadcrumbs": Method(merging.breadcrumbs),
    "DELLA": Method(merging.della),
    "SCE": Method(merging.sce),
    "PCB": Method(merging.pcb),
    "consensus": Method(_consensus),
    "Model Stock": Method(merging.model_stock),
    "Karcher": Method(merging.karcher),
    "KnOTS-TIES": Method(_knots_ties, layers=True),
    "TSV-M": Method(merging.tsv_m, layers=True),
    "Iso-C": Method(merging.iso_c, layers=True),
    "Iso-CTS": Method(merging.iso_cts, layers=True),
    "WUDI": Method(merging.wudi, layers=True),
    "ACE": Method(merging.ace, layers=True),
    "DOGE": Method(merging.doge, layers=True),
    "OPCM": Method(merging.opcm, layers=True),
    "RegMean (data)": Method(merging.regmean, "grams"),
    "Fisher (data)": Method(merging.fisher, "fisher"),
    "Fisher (data), normalised": Method(_weighed_by_one, "fisher"),
    "Fisher (data), root": Method(_weighed, "fisher"),
    "curvature": Method(_weighed_by_one, "optimizer"),
    "curvature, root": Method(_weighed, "optimizer"),
    "Perturb-and-Merge": Method(merging.perturb_and_merge, "optimizer"),
    "OTA": Method(merging.ota, "optimizer"),
    "UMTAM": Method(merging.umtam, "optimizer"),
    "moma": Method(merging.moma, "optimizer"),
    "moma (Fisher, data)": Method(merging.moma, "fisher"),
}
"""Every method that is compared, by the name in the tables."""


def _moma_without(
    trim: Literal["saliency", "magnitude", "none"] = "saliency",
    *,
    vote: bool = True,
    weights: bool = True,
    power: float = 0.5,
    scope: Literal["leaf", "global"] = "leaf",
) -> Callable[..., merging.Step]:
    def make(density: float = 0.2, scale: float = 1.0) -> merging.Step:
        steps: list[merging.Step] = []
        if trim == "saliency":
            steps.append(merging.trim(density, by="saliency", power=power, scope=scope))
        elif trim == "magnitude":
            steps.append(merging.trim(density, scope=scope))
        if weights:
            steps.append(merging.weigh(power))
        if vote:
            steps.append(merging.elect())
        return merging.chain(*steps, merging.mean(), merging.scale(scale))

    return make


FLOOR = 1e-8
"""The absolute floor of the published merge."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Published:
    """The published merge of matrices with its steps apart; as it is, equal to `merging.umtam`.

    Attributes:
      density: Share of entries kept.
      trim: By saliency d^2 H, or by magnitude.
      vote: Whether signs are elected, by saliency.
      weights: Whether the mean is weighed by H, or plain.
      floors: Whether row and column sums are at least `FLOOR`.
    """

    density: float
    trim: Literal["saliency", "magnitude"] = field(default="saliency", metadata={"static": True})
    vote: bool = field(default=True, metadata={"static": True})
    weights: bool = field(default=True, metadata={"static": True})
    floors: bool = field(default=True, metadata={"static": True})

    @property
    def contract(self) -> merging.Contract:
        """A base and a curvature."""
        return merging.Contract(base=True, curvature=True, combines=True)

    def __call__(self, leaf: merging.TaskVectors) -> merging.TaskVectors:
        """Combines the task vectors of a matrix; all other leaves stay at the base."""
        d = leaf.delta
        if d.ndim != 3 or leaf.curvature is None:
            return leaf._replace(delta=0 * d[:1], weight=0 * d[:1], curvature=None, keys=None)
        floor = FLOOR if self.floors else 0.0
        v = jnp.stack([jnp.asarray(_dense(v)) for v in leaf.curvature])
        H = jnp.sqrt(
            jnp.maximum(jnp.sum(v, 2, keepdims=True), floor)
            * jnp.maximum(jnp.sum(v, 1, keepdims=True), floor)
        )
        s = d**2 * H
        scored = merging.trim(self.density)(
            leaf._replace(delta=s if self.trim == "saliency" else d)
        ).weight
        keep = scored > 0
        if self.vote:
            elected = jnp.sign(_total(keep * s * jnp.sign(d)))
            keep = keep & (jnp.sign(d) == elected) & (elected != 0)
        largest = jnp.max(H, axis=(1, 2), keepdims=True)
        h = H / (largest + FLOOR if self.floors else largest) if self.weights else jnp.ones_like(H)
        w = leaf.weight * keep * h
        say = _total(w)
        say = jnp.maximum(say, FLOOR) if self.floors else jnp.where(say > 0, say, 1)
        out = (_total(w * d) / say)[None]
        return leaf._replace(delta=out, weight=jnp.ones_like(out), curvature=None, keys=None)


def _dense(v: Any) -> jax.Array:
    return v.row * v.col if isinstance(v, om.Factored) else v


def _total(x: jax.Array) -> jax.Array:
    # Term by term: a sum over stacked experts is slow on a CPU.
    return sum(x[1:], start=x[0])


def _published_without(**changes: Any) -> Callable[..., merging.Step]:
    def make(density: float = 0.2) -> merging.Step:
        return merging.chain(Published(density, **changes))

    return make


ABLATIONS: Mapping[str, Method] = {
    "moma": Method(merging.moma, "optimizer"),
    "moma, trim by magnitude": Method(_moma_without("magnitude"), "optimizer"),
    "moma, no trim": Method(_moma_without("none"), "optimizer"),
    "moma, no vote": Method(_moma_without(vote=False), "optimizer"),
    "moma, no weights": Method(_moma_without(weights=False), "optimizer"),
    "moma, power 1": Method(_moma_without(power=1.0), "optimizer"),
    "moma, power 1/4": Method(_moma_without(power=0.25), "optimizer"),
    "moma, global threshold": Method(_moma_without(scope="global"), "optimizer"),
    "moma, row and column sums": Method(merging.moma, "factored"),
    "UMTAM": Method(merging.umtam, "optimizer"),
    "UMTAM, trim by magnitude": Method(_published_without(trim="magnitude"), "optimizer"),
    "UMTAM, no vote": Method(_published_without(vote=False), "optimizer"),
    "UMTAM, no weights": Method(_published_without(weights=False), "optimizer"),
    "UMTAM, no floors": Method(_published_without(floors=False), "optimizer"),
}
"""The two merges with one step taken out or changed."""


def given(
    method: Method,
    experts: Mapping[str, Expert],
    fisher: Callable[[str], Params],
    grams: Callable[[str], Any],
) -> Any:
    """The curvatures a method is given, by expert; None if it needs none."""
    if method.curvature == "none":
        return None
    if method.curvature == "fisher":
        return {name: fisher(name) for name in experts}
    if method.curvature == "grams":
        return {name: grams(name) for name in experts}
    own = {name: expert.statistics.curvature for name, expert in experts.items()}
    if method.curvature == "factored":
        return {name: factored(curvature) for name, curvature in own.items()}
    return own


def merged(
    method: Method, setting: Mapping[str, float], experts: Mapping[str, Expert], base: Params,
    curvature: Any,
) -> Params:  # fmt: skip
    """One encoder out of several."""
    step = method.make(**setting)
    encoders = {name: expert.encoder for name, expert in experts.items()}
    if not method.layers:
        return _merge(step, encoders, base, curvature)

    def part(tree: Params, embeddings: bool) -> Params:
        return {k: v for k, v in tree.items() if (k in EMBEDDINGS) == embeddings}

    whole: Params = {}
    for embeddings in (True, False):
        own = {name: part(encoder, embeddings) for name, encoder in encoders.items()}
        step = merging.average() if embeddings else method.make(**setting)
        whole |= _merge(step, own, part(base, embeddings), None)
    return whole


def _merge(
    step: merging.Step | merging.Sequential, encoders: Mapping[str, Params], base: Params,
    curvature: Any,
) -> Params:  # fmt: skip
    if isinstance(step, merging.Sequential):
        state = step.init(base)
        for name, encoder in encoders.items():
            state = step.update(state, encoder, None if curvature is None else curvature[name])
        return step.params(state)
    key = jax.random.key(0) if step.contract.key else None
    return om.merge(step, encoders, base=base, curvature=curvature, key=key)


class Choice(NamedTuple):
    """One point of a method's grid and its score on the tuning half of dev."""

    setting: dict[str, float]
    scale: float
    score: float


def tried(
    method: Method,
    experts: Mapping[str, Expert],
    base: Params,
    curvature: Any,
    score: Callable[[Params], float],
) -> Iterator[tuple[Choice, Params]]:
    """Every point of a method's grid that is looked at, with its merge."""
    for setting in method.settings():
        whole = merged(method, setting, experts, base, curvature)
        for scale, value in climb(lambda s, whole=whole: score(along(base, whole, s)), SCALES):
            yield Choice(setting, scale, value), whole


def climb(
    score: Callable[[float], float], grid: Sequence[float], margin: float = 0.03
) -> Iterator[tuple[float, float]]:
    """Points of a grid from scale 1 outwards, each way until the score has fallen by ``margin``.

    The score has one hill along the scale, up to noise; what lies beyond a clear fall is not
    looked at.
    """
    middle = list(grid).index(1.0)
    best = score(grid[middle])
    yield grid[middle], best
    for way in (range(middle + 1, len(grid)), range(middle - 1, -1, -1)):
        for i in way:
            value = score(grid[i])
            yield grid[i], value
            if value < best - margin:
                break
            best = max(best, value)
