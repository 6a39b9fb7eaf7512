"""The merges that are compared: each method is a line of a table.

All are tuned alike: the density (where a method has one) on one grid, then the scale of the merged
task vector on another, by the mean share of the experts' scores on one half of dev.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
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
SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0)
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


def _breadcrumbs(density: float = 0.9, scale: float = 0.3) -> merging.Step:
    return merging.breadcrumbs(density, min(0.01, 1 - density), scale)


def _della(density: float = 0.5, scale: float = 1.0) -> merging.Step:
    return merging.della(density, min(0.15, density, 1 - density), scale)


def _knots_ties(density: float = 0.2, scale: float = 1.0) -> merging.Step:
    inner = merging.knots(merging.trim(density), merging.elect(), merging.mean())
    return merging.chain(inner, merging.scale(scale))


METHODS: Mapping[str, Method] = {
    "average": Method(merging.average),
    "task arithmetic": Method(merging.task_arithmetic),
    "TIES": Method(merging.ties),
    "DARE": Method(merging.dare),
    "Breadcrumbs": Method(_breadcrumbs),
    "DELLA": Method(_della),
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
    "curvature TIES": Method(merging.curvature_ties, "optimizer"),
    "curvature TIES (Fisher, data)": Method(merging.curvature_ties, "fisher"),
    "moma": Method(merging.moma, "optimizer"),
    "moma (Fisher, data)": Method(merging.moma, "fisher"),
}
"""Every method that is compared, by the name in the tables."""


def _ties_without(
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


@merging.merge_step
class Sides:
    """Merges a matrix as `merging.moma` does, in the metric of its inputs, or of both sides.

    Of both, W minimises sum_t tr((W - d_t)^T A_t (W - d_t) B_t), as with the curvature of K-FAC:
    A_t = G_t G_t^T, B_t = G_t^T G_t, each a little drawn to its diagonal, which is all the say of
    the ridge here. By conjugate gradients from the mean.

    Attributes:
      side: "inputs" or "both".
      shrinkage: How much the two Grams are drawn to their diagonals.
      steps: Of conjugate gradients.
    """

    side: Literal["inputs", "both"] = field(metadata={"static": True})
    shrinkage: float = 0.03
    steps: int = field(default=60, metadata={"static": True})

    @property
    def contract(self) -> merging.Contract:
        """A base and a curvature."""
        return merging.Contract(base=True, curvature=True, combines=True, whole=True)

    def __call__(self, leaf: merging.TaskVectors) -> merging.TaskVectors:
        """Combines the task vectors of a matrix; averages other leaves."""
        if leaf.delta.ndim != 3 or leaf.curvature is None:
            return merging.mean()(leaf)
        v = jnp.stack([jnp.asarray(_dense(v)) for v in leaf.curvature])
        G = leaf.delta * jnp.sqrt(v / _mean(v))
        G = G / jnp.maximum(jnp.sqrt(jnp.sum(G**2, axis=(1, 2), keepdims=True)), 1e-30)
        out = self._of_inputs(leaf.delta, G) if self.side == "inputs" else self._of_both(leaf, G)
        out = out[None]
        return leaf._replace(delta=out, weight=jnp.ones_like(out), curvature=None, keys=None)

    def _of_inputs(self, d: jax.Array, G: jax.Array) -> jax.Array:
        k, m, _ = d.shape
        A = [_product(G_t, G_t.T) for G_t in G]
        c = 0.1 * k / m
        right = _total(jnp.stack([_product(*pair) for pair in zip(A, d, strict=True)]))
        whole = sum(A[1:], A[0]) + c * jnp.eye(m)
        return jax.scipy.linalg.solve(whole, right + c * _total(d) / k, assume_a="pos")

    def _of_both(self, leaf: merging.TaskVectors, G: jax.Array) -> jax.Array:
        d, (k, m, n) = leaf.delta, leaf.delta.shape
        diagonals = [(jnp.sum(G**2, axis=axis) + 1e-6 / G.shape[3 - axis]) for axis in (2, 1)]

        def curved(t: int, W: jax.Array) -> jax.Array:
            # Both Grams have trace 1: times m and n they are of order one.
            rows, columns = diagonals[0][t][:, None], diagonals[1][t]
            full, s = 1 - self.shrinkage, self.shrinkage
            W = m * (s * rows * W + full * _product(G[t], _product(G[t].T, W)))
            return n * (s * W * columns + full * _product(_product(W, G[t].T), G[t]))

        def all_curved(W: jax.Array) -> jax.Array:
            return _total(jnp.stack([curved(t, W) for t in range(k)]))

        right = _total(jnp.stack([curved(t, d[t]) for t in range(k)]))
        say = m * n * _total(diagonals[0][:, :, None] * diagonals[1][:, None, :])
        return jax.scipy.sparse.linalg.cg(
            all_curved, right, _total(d) / k, maxiter=self.steps, M=lambda r: r / say
        )[0]


def _mean(v: jax.Array) -> jax.Array:
    mean = jnp.mean(v, axis=(1, 2), keepdims=True)
    return jnp.where(mean > 0, mean, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _sides(side: Literal["inputs", "both"]) -> Callable[..., merging.Step]:
    def make(scale: float = 1.0) -> merging.Step:
        return merging.chain(Sides(side), merging.scale(scale))

    return make


FLOOR = 1e-8
"""The absolute floor of the published merge."""


@merging.merge_step
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
    "moma, no curvature": Method(partial(merging.moma, power=0.0), "optimizer"),
    "moma, power 1/4": Method(partial(merging.moma, power=0.25), "optimizer"),
    "moma, power 1": Method(partial(merging.moma, power=1.0), "optimizer"),
    "moma, ridge 1": Method(partial(merging.moma, ridge=1.0), "optimizer"),
    "moma, ridge 0.01": Method(partial(merging.moma, ridge=1e-2), "optimizer"),
    "moma, row and column sums": Method(merging.moma, "factored"),
    "moma, embeddings averaged": Method(merging.moma, "optimizer", layers=True),
    "moma, of the inputs, embeddings averaged": Method(_sides("inputs"), "optimizer", layers=True),
    "moma, of both sides, embeddings averaged": Method(_sides("both"), "optimizer", layers=True),
    "curvature TIES": Method(merging.curvature_ties, "optimizer"),
    "curvature TIES, trim by magnitude": Method(_ties_without("magnitude"), "optimizer"),
    "curvature TIES, no trim": Method(_ties_without("none"), "optimizer"),
    "curvature TIES, no vote": Method(_ties_without(vote=False), "optimizer"),
    "curvature TIES, no weights": Method(_ties_without(weights=False), "optimizer"),
    "curvature TIES, power 1": Method(_ties_without(power=1.0), "optimizer"),
    "curvature TIES, power 1/4": Method(_ties_without(power=0.25), "optimizer"),
    "curvature TIES, global threshold": Method(_ties_without(scope="global"), "optimizer"),
    "curvature TIES, row and column sums": Method(merging.curvature_ties, "factored"),
    "UMTAM": Method(merging.umtam, "optimizer"),
    "UMTAM, trim by magnitude": Method(_published_without(trim="magnitude"), "optimizer"),
    "UMTAM, no vote": Method(_published_without(vote=False), "optimizer"),
    "UMTAM, no weights": Method(_published_without(weights=False), "optimizer"),
    "UMTAM, no floors": Method(_published_without(floors=False), "optimizer"),
}
"""Three merges with one step taken out or changed."""


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
        step = merging.average() if embeddings else method.make(**setting)
        own, estimates = (
            {name: part(tree, embeddings) for name, tree in trees.items()}
            for trees in (encoders, curvature or {})
        )
        whole |= _merge(step, own, part(base, embeddings), estimates or None)
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
