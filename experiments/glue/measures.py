"""What the statistics measure: agreement with the exact Fisher, overlap and conflict of experts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import optax_moma as om
from experiments.agreement import by_leaf, dense, named
from optax_moma.demo.encoder import Params
from optax_moma.diagnostics import curvature_overlap, sign_conflict

from .experts import SNAPSHOTS, Expert
from .saliency import SCORES, factored


def agreements(
    trained: Expert, base: Params, fisher: Params
) -> Iterator[tuple[str, str, str, float, int]]:
    """(kind, estimate, leaf, Spearman's rho, entries) of each estimate with the exact Fisher.

    Kind ``curvature`` compares estimates of curvature with F, ``saliency`` scores of entries with
    d^2 F. Only entries that training changed count.
    """
    curvatures = {"R, C": factored(trained.statistics.curvature)}
    curvatures |= {
        f"R, C after {i} of {SNAPSHOTS} parts": v
        for i, v in enumerate(trained.statistics.history, start=1)
    }
    if not _is_factored(trained.statistics.curvature):
        curvatures["Adam's v"] = trained.statistics.curvature
    scores = {
        name: SCORES[name](trained, base, fisher)
        for name in SCORES
        if name not in ("random", "exact Fisher")
    }
    truth = {"curvature": fisher, "saliency": SCORES["exact Fisher"](trained, base, fisher)}
    estimates = {"curvature": curvatures, "saliency": scores}
    moved = jax.tree.map(lambda w, w0: np.asarray(w) != np.asarray(w0), trained.encoder, base)
    for kind, own in estimates.items():
        for estimate, tree in own.items():
            if tree is not None:
                for leaf, rho, entries in by_leaf(tree, truth[kind], moved):
                    yield kind, estimate, leaf, rho, entries


def _is_factored(curvature: Any) -> bool:
    return any(isinstance(v, om.Factored) for v in named(curvature).values())


def overlap(a: Any, b: Any) -> float:
    """How much two experts need the same entries, from 0 to 1.

    `optax_moma.diagnostics.curvature_overlap`, averaged over leaves by their numbers of entries.
    """
    overlaps = named(curvature_overlap([a, b]))
    sizes = {name: dense(v).size for name, v in named(a).items()}
    return sum(float(overlaps[name]) * n for name, n in sizes.items()) / sum(sizes.values())


def conflict(a: Params, b: Params, base: Params) -> dict[str, float]:
    """Of two task vectors, the cosine and the share of magnitude that is lost when added."""
    one, other, start = (_flat(tree) for tree in (a, b, base))
    d, e = ((x["all"] - start["all"]).astype(np.float64) for x in (one, other))
    length = float(np.sqrt(np.sum(d * d) * np.sum(e * e)))
    return {
        "cosine": float(np.sum(d * e)) / (length or 1.0),
        "sign_conflict": float(sign_conflict([one, other], start)["all"]),
    }


def _flat(tree: Params) -> dict[str, np.ndarray]:
    return {"all": np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])}
