"""How well two estimates agree: correlations, of plain numbers and leaf by leaf."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata

import optax_moma as om

ENTRIES = 50_000
"""The most entries of a leaf that are ranked, drawn at random."""


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r in float64; 0 where one of the two is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (x, y))
    norm = np.sqrt(np.sum(x**2) * np.sum(y**2))
    return float(np.sum(x * y) / norm) if norm > 0 else 0.0


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho, with ties at their mean rank."""
    return correlation(rankdata(x), rankdata(y))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, ``Factored`` ones whole."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, om.Factored))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def dense(v: Any) -> np.ndarray:
    """One array, whether factored or not."""
    return np.asarray(v.row * v.col if isinstance(v, om.Factored) else v)


def by_leaf(estimate: Any, truth: Any, counted: Any) -> Iterator[tuple[str, float, int]]:
    """(leaf, rho, entries) of two trees' leaves, over the entries where ``counted`` is true.

    Leaves of fewer than ten such entries are left out; of larger ones `ENTRIES` are drawn.
    """
    exact, chosen = named(truth), named(counted)
    for leaf, v in named(estimate).items():
        places = np.flatnonzero(chosen[leaf])
        if len(places) < 10:
            continue
        if len(places) > ENTRIES:
            places = np.random.default_rng(0).choice(places, ENTRIES, replace=False)
        x, y = (dense(z).ravel()[places] for z in (v, exact[leaf]))
        yield leaf, rank_correlation(x, y), len(places)
