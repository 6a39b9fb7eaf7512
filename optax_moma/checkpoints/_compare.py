"""How far models are apart, and where they contradict each other: a merge's trouble, foretold."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from ..diagnostics import curvature_overlap, drift, sign_conflict
from ..merging import MergeError
from . import _orbax
from ._source import CurvatureOf, Model, Step, open_checkpoint, open_curvature, open_model


class LeafComparison(NamedTuple):
    """How one leaf differs between models.

    Attributes:
      name: The leaf's path.
      drift: For each model after the first ||w - w0|| / ||w0||, w0 the first's.
      conflict: The share of the task vectors' total magnitude that is lost when they are added:
        1 - sum |sum_t d_t| / sum sum_t |d_t|. 0: all signs agree; of two, 1: they cancel out. None
        for fewer than two.
      overlap: The mean over pairs of models of the cosine between the square roots of their
        curvatures; 1: they need the same entries. None if not all have one.
    """

    name: str
    drift: tuple[float, ...]
    conflict: float | None
    overlap: float | None

    @property
    def trouble(self) -> float:
        """What leaves are sorted by: drift times conflict, that is, how much would be lost."""
        return max(self.drift) * (1.0 if self.conflict is None else self.conflict)


def compare(
    base: Path | str,
    *experts: Path | str,
    item: str | None = None,
    step: Step = None,
    params: str | None = None,
) -> list[LeafComparison]:
    """Compares models with the first, leaf by leaf; the leaves with most trouble come first.

    Args:
      base: A checkpoint; what the others were fine-tuned from, if there is such a one.
      *experts: More checkpoints. Their curvature is found in their optimizer's state, if they have
        one.
      item: The name of the tree in all of them, if they are Orbax checkpoints that have several.
      step: Which step of those that are folders of steps; "latest" for the last of each.
      params: The path of the params in those that have it; in the others, and by default, they are
        searched for.

    Returns:
      One ``LeafComparison`` for every floating-point leaf.

    Raises:
      ValueError: if there is nothing to compare, or leaves are missing or of other shapes.

    Example:
      >>> import tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder = tempfile.mkdtemp()
      >>> for name, w in (("base", [1.0, 1.0]), ("a", [2.0, 1.0]), ("b", [1.0, 0.0])):
      ...     ocp.save(f"{folder}/{name}", {"w": jnp.array(w)})
      >>> leaf, = compare(f"{folder}/base", f"{folder}/a", f"{folder}/b")
      >>> leaf.name, leaf.conflict, [round(x, 3) for x in leaf.drift]
      ('w', 0.0, [0.707, 0.707])
    """
    if not experts:
        raise ValueError("compare takes a base and at least one more checkpoint")
    # Runs are often compared with a base that is no run: without steps, and nothing but params.
    paths = [Path(path) for path in (base, *experts)]
    opened = [open_checkpoint(path, item, step if _orbax.steps(path) else None) for path in paths]
    having = [params is not None and x.holds(params) for x in opened]
    models = [
        open_model(str(path), x, params if has or not any(having) else None)
        for path, x, has in zip(paths, opened, having, strict=True)
    ]
    problems = [problem for model in models[1:] for problem in _mismatches(models[0], model)]
    if problems:
        raise MergeError("Cannot compare,", problems)
    curvatures = [_curvature_in(model) for model in models[1:]]
    found = [_compared(name, models, curvatures) for name in models[0].floats]
    return sorted(found, key=lambda leaf: leaf.trouble, reverse=True)


def _mismatches(first: Model, other: Model) -> list[str]:
    lacking = [name for name in first.arrays if name not in other.arrays]
    problems = [f"{other.label} lacks {', '.join(lacking[:10])}"] if lacking else []
    return problems + [
        f"{other.label}, {name}: shape {other.arrays[name].shape}, but {first.label} has {x.shape}"
        for name, x in first.arrays.items()
        if name in other.arrays and other.arrays[name].shape != x.shape
    ]


def _curvature_in(model: Model) -> CurvatureOf | None:
    if model.checkpoint.tensors is not None:
        return None
    try:
        return open_curvature(model, model.checkpoint, None, 0.999, None)
    except ValueError:
        return None


def _compared(
    name: str, models: Sequence[Model], curvatures: Sequence[CurvatureOf | None]
) -> LeafComparison:
    base, *experts = (
        jnp.asarray(m.checkpoint.read([m.stored[name]])[m.stored[name]]) for m in models
    )
    overlap = None
    known = [v for v in curvatures if v is not None and name in v.needs]
    if len(known) == len(experts) > 1:
        leaf = models[0].leaves[name]
        estimates = tuple(
            v.assembled(name, leaf, v.checkpoint.read(v.needs[name].names)) for v in known
        )
        overlap = float(curvature_overlap(estimates))
    return LeafComparison(
        name,
        tuple(float(drift(expert, base)) for expert in experts),
        float(sign_conflict(experts, base)) if len(experts) > 1 else None,
        overlap,
    )
