"""What the statistics measure: agreement with the exact Fisher, overlap and conflict of experts."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

import optax_moma as om
from optax_moma.demo.encoder import Params
from optax_moma.demo.pipeline import along

from .experts import SNAPSHOTS, Expert
from .saliency import SCORES, factored
from .tasks import correlation

ENTRIES = 50_000
"""The most entries of a leaf that are ranked, drawn at random."""


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, ``Factored`` ones whole."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, om.Factored))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def dense(v: Any) -> np.ndarray:
    """One array, whether factored or not."""
    return np.asarray(v.row * v.col if isinstance(v, om.Factored) else v)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, with ties at their mean rank."""
    return correlation(rankdata(x), rankdata(y))


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
    moved = named(
        jax.tree.map(lambda w, w0: np.asarray(w) != np.asarray(w0), trained.encoder, base)
    )
    for kind, own in estimates.items():
        exact = named(truth[kind])
        for estimate, tree in own.items():
            if tree is None:
                continue
            for leaf, v in named(tree).items():
                rows = np.flatnonzero(moved[leaf])
                if len(rows) < 10:
                    continue
                if len(rows) > ENTRIES:
                    rows = np.random.default_rng(0).choice(rows, ENTRIES, replace=False)
                x, y = (dense(z).ravel()[rows] for z in (v, exact[leaf]))
                yield kind, estimate, leaf, rank_correlation(x, y), len(rows)


def _is_factored(curvature: Any) -> bool:
    return any(isinstance(v, om.Factored) for v in named(curvature).values())


def overlap(a: Any, b: Any) -> float:
    """How much two curvatures lie in the same places, from 0 to 1.

    The mean over leaves of sum sqrt(p q), with p and q the curvatures over their sums, weighed by
    the leaves' numbers of entries.
    """
    total, entries = 0.0, 0
    theirs = named(b)
    for leaf, v in named(a).items():
        p, q = (dense(x).astype(np.float64) for x in (v, theirs[leaf]))
        norm = np.sqrt(p.sum() * q.sum())
        if norm > 0:
            total += p.size * float(np.sum(np.sqrt(p * q)) / norm)
            entries += p.size
    return total / max(entries, 1)


def conflict(a: Params, b: Params, base: Params) -> dict[str, float]:
    """Cosine of two task vectors, and the share of |d_a d_b| on which their signs differ."""
    product = against = 0.0
    squares = np.zeros(2)
    for x, y, x0 in zip(*(jax.tree.leaves(tree) for tree in (a, b, base)), strict=True):
        d, e = (np.asarray(z, np.float64) - np.asarray(x0, np.float64) for z in (x, y))
        product += float(np.sum(d * e))
        against += float(np.sum(np.abs(d * e)[d * e < 0]))
        squares += [np.sum(d * d), np.sum(e * e)]
    together = product + against  # sum of d e where the signs agree
    return {
        "cosine": product / float(np.sqrt(squares.prod()) or 1.0),
        "sign_conflict": against / (together + against or 1.0),
    }


def path(a: Params, b: Params, points: int, score: Callable[[Params], float]) -> list[float]:
    """Scores at equal distances on the line from one model to another."""
    return [score(along(a, b, float(t))) for t in np.linspace(0, 1, points)]


def barrier(scores: list[float]) -> float:
    """The deepest the scores fall below the line between the ends; 0 if they never do."""
    line = np.linspace(scores[0], scores[-1], len(scores))
    return float(np.max(line - scores))
