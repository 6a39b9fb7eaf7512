"""Scores of the entries of a task vector, and what is left when only the best are kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import optax_moma as om
from optax_moma.demo.encoder import Params

from .experts import Expert

Scope = Literal["tensor", "global"]
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)


def factored(curvature: Any) -> Any:
    """Row and column sums only, of matrices; what is factored already stays as it is."""

    def one(v: Any) -> Any:
        if isinstance(v, om.Factored) or v.ndim != 2:
            return v
        total = jnp.sum(v)
        rows = jnp.sum(v, axis=1, keepdims=True) / jnp.where(total > 0, total, 1)
        return om.Factored(rows, jnp.sum(v, axis=0, keepdims=True))

    return jax.tree.map(one, curvature, is_leaf=lambda x: isinstance(x, om.Factored))


def path_integral(trained: Expert) -> Params | None:
    """The decrease of the loss along the trajectory, as far as its row and column sums tell.

    A matrix has the rank-one estimate r_i c_j / sum(r); what went up counts as zero.
    """
    saved = trained.statistics.saliency
    if "saliency_row" not in saved:
        return None

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in saved["saliency"]:
            return jnp.maximum(saved["saliency"][name], 0)
        rows, columns = (jnp.maximum(saved[f"saliency_{side}"][name], 0) for side in ("row", "col"))
        total = jnp.sum(rows)
        return rows[:, None] * columns / jnp.where(total > 0, total, 1)

    return jax.tree_util.tree_map_with_path(one, trained.encoder)


def path_curvature(trained: Expert, base: Params) -> Any:
    """Curvature from the path integral: the decrease of a row (column) over its squared change."""
    paths = path_integral(trained)
    if paths is None:
        return None

    def one(decrease: jax.Array, w: jax.Array, w0: jax.Array) -> Any:
        squared = jnp.square(w - w0)
        if w.ndim != 2:
            return _ratio(decrease, squared)
        return om.Factored(
            _ratio(*(jnp.sum(x, axis=1, keepdims=True) for x in (decrease, squared))),
            _ratio(*(jnp.sum(x, axis=0, keepdims=True) for x in (decrease, squared))),
        )

    return jax.tree.map(one, paths, trained.encoder, base)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)


def dense_saliency(trained: Expert, base: Params) -> Params | None:
    """The paper's S where umtam kept it; squared change where it keeps none (vectors)."""
    saved = trained.statistics.saliency
    if "saliency_row" in saved or "saliency" not in saved:
        return None

    def one(path: Any, w: jax.Array, w0: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return saved["saliency"].get(name, jnp.square(w - w0))

    return jax.tree_util.tree_map_with_path(one, trained.encoder, base)


def random_scores(base: Params) -> Params:
    """Uniform numbers."""
    leaves, treedef = jax.tree.flatten(base)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return treedef.unflatten(
        [jax.random.uniform(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    )


Score = Callable[[Expert, Params, Params], Any]
"""(expert, base, its exact Fisher) -> a tree of scores, or None where the optimizer kept none."""

SCORES: Mapping[str, Score] = {
    "random": lambda e, base, fisher: random_scores(base),
    "magnitude": lambda e, base, fisher: om.saliency(e.encoder, base, fisher, power=0.0),
    "curvature R, C": lambda e, base, fisher: om.saliency(
        e.encoder, base, factored(e.statistics.curvature)
    ),
    "curvature R, C, power 1/2": lambda e, base, fisher: om.saliency(
        e.encoder, base, factored(e.statistics.curvature), power=0.5
    ),
    "path integral": lambda e, base, fisher: path_integral(e),
    "path curvature": lambda e, base, fisher: _maybe(e, base, path_curvature(e, base)),
    "dense S of the paper": lambda e, base, fisher: dense_saliency(e, base),
    "Adam's v": lambda e, base, fisher: _maybe(e, base, dense_curvature(e)),
    "exact Fisher": lambda e, base, fisher: om.saliency(e.encoder, base, fisher),
}
"""Every score that is compared, by the name in the tables."""


def _maybe(trained: Expert, base: Params, curvature: Any) -> Any:
    return None if curvature is None else om.saliency(trained.encoder, base, curvature)


def dense_curvature(trained: Expert) -> Any:
    """Adam's second moments; None for an optimizer that keeps sums."""
    leaves = jax.tree.leaves(
        trained.statistics.curvature, is_leaf=lambda x: isinstance(x, om.Factored)
    )
    if any(isinstance(v, om.Factored) for v in leaves):
        return None
    return trained.statistics.curvature


def kept(
    params: Params, base: Params, scores: Params, densities: Sequence[float], scope: Scope
) -> list[Params]:
    """The base plus the entries of the task vector with the highest scores, for each density.

    A density is a share of the entries that training changed: rows of words that no text holds
    have not, and would make any density look sparser than it is.
    """
    leaves, treedef = jax.tree.flatten(params)
    old = [np.asarray(x) for x in jax.tree.leaves(base)]
    delta = [np.asarray(x) - x0 for x, x0 in zip(leaves, old, strict=True)]
    score = [np.asarray(s, np.float32) for s in treedef.flatten_up_to(scores)]
    if scope == "tensor":
        places = [_places([s], [d]) for s, d in zip(score, delta, strict=True)]
    else:
        flat = _places(score, delta)
        places = np.split(flat, np.cumsum([d.size for d in delta])[:-1])
    return [
        treedef.unflatten(
            [
                jnp.asarray(x0 + np.where(place.reshape(d.shape) <= density, d, 0))
                for x0, d, place in zip(old, delta, places, strict=True)
            ]
        )
        for density in densities
    ]


def _places(scores: Sequence[np.ndarray], deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Each entry's place from the best score on, as a share of the changed entries; flat."""
    score, changed = (np.concatenate([x.ravel() for x in xs]) for xs in (scores, deltas))
    changed = changed != 0
    order = np.argsort(np.where(changed, -score, np.inf), kind="stable")
    place = np.empty(len(order))
    place[order] = np.arange(1, len(order) + 1) / max(1, np.count_nonzero(changed))
    return place
