"""The recipe: finds the noise of training at which the models of a setup merge best.

A setup is a Python file with two functions:

    def train(noise: float, pair: int, branch: int) -> params
    def evaluate(params) -> dict of numbers, among them "score", the higher the better

``noise`` is a multiple of today's: multiply the learning rate by it, or divide the batch. The two
branches of a pair start alike (a pretrained model, or a prefix of the pair's own) and see the data
in different orders. ``evaluate`` must not look at test data in its score; what else it returns is
shown for the noise that was chosen.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.records import Records, machine
from optax_moma.merging import average, merge

Params = Any
KEY = ("setup", "noise", "pair")


class Setup(NamedTuple):
    """A training of the user's, and what it is called."""

    name: str
    train: Callable[[float, int, int], Params]
    evaluate: Callable[[Params], dict[str, Any]]


class SetupError(Exception):
    """The file is no setup; the message says what it lacks."""


def load(path: Path) -> Setup:
    """Reads a setup from a Python file.

    Raises:
      SetupError: it cannot be read, or a function is missing.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise SetupError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lacking = [name for name in ("train", "evaluate") if not callable(getattr(module, name, None))]
    if lacking:
        raise SetupError(f"{path} defines no function {' and no '.join(lacking)}.")
    return Setup(path.stem, module.train, module.evaluate)


def sweep(
    setup: Setup,
    records: Records,
    noises: Sequence[float],
    pairs: int,
    refinements: int = 1,
    told: Callable[[str], None] = lambda _: None,
) -> float:
    """Trains and merges pairs at each noise; returns the one with the best mean merged score.

    Each refinement then tries, around the best noise so far, the geometric means with its two
    neighbours; beyond an end of the grid, the grid's next step.
    """
    known, todo = set(noises), sorted(noises)
    for refinement in range(refinements + 1):
        for noise in todo:
            for pair in range(pairs):
                if not records.holds(setup=setup.name, noise=noise, pair=pair):
                    records.add(**measured(setup, noise, pair))
                    told(f"{setup.name}: noise x {noise:.4g}, pair {pair + 1} of {pairs}")
        # Lines of an earlier, finer sweep are not looked at: the same call ends the same way.
        found = best([p for p in summary(records, setup.name) if p.noise in known])
        if refinement < refinements:
            todo = around(found.noise, sorted(known))
            known.update(todo)
    return found.noise


def around(noise: float, known: Sequence[float]) -> list[float]:
    """Two noises to try next to one of those known, ascending."""
    place = known.index(noise)
    step = known[1] / known[0] if len(known) > 1 else 4.0
    low = np.sqrt(known[place - 1] * noise) if place > 0 else noise / step
    high = np.sqrt(known[place + 1] * noise) if place + 1 < len(known) else noise * step
    return [float(f"{low:.6g}"), float(f"{high:.6g}")]


def measured(setup: Setup, noise: float, pair: int) -> dict[str, Any]:
    """One line: both branches, and their average."""
    start = time.monotonic()
    branches = [setup.train(noise, pair, branch) for branch in (0, 1)]
    merged = setup.evaluate(merge(average(), branches))
    single = [setup.evaluate(params) for params in branches]
    row: dict[str, Any] = {"setup": setup.name, "noise": float(noise), "pair": pair}
    for name, value in merged.items():
        row[name] = float(np.mean([float(s[name]) for s in single]))
        row[f"{name}_merged"] = float(value)
    return row | {"seconds": time.monotonic() - start, "machine": machine()}


class Point(NamedTuple):
    """All pairs at one noise: scores of branches and merges, (pairs,)."""

    noise: float
    single: np.ndarray
    merged: np.ndarray


def summary(records: Records, name: str) -> list[Point]:
    """By ascending noise."""
    rows = records.where(setup=name)
    column = lambda noise, key: np.array(  # noqa: E731
        [float(r[key]) for r in rows if float(r["noise"]) == noise]
    )
    noises = sorted({float(row["noise"]) for row in rows})
    return [Point(n, column(n, "score"), column(n, "score_merged")) for n in noises]


def best(points: Sequence[Point]) -> Point:
    """The one with the highest mean score of merges."""
    return max(points, key=lambda point: np.nan_to_num(np.mean(point.merged), nan=-np.inf))


def error(values: np.ndarray) -> float:
    """The standard error of a mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def show(points: Sequence[Point], console: Console) -> None:
    """The table, and the advice."""
    chosen = best(points)
    table = Table("noise", "branch", "merged", "gain", title="Mean over pairs ± standard error")
    for point in points:
        cells = [point.single, point.merged, point.merged - point.single]
        style = "bold green" if point is chosen else None
        table.add_row(
            f"x {point.noise:.4g}", *(f"{np.mean(x):.4f} ± {error(x):.4f}" for x in cells),
            style=style,
        )  # fmt: skip
    console.print(table)
    console.print(advice(points))


def advice(points: Sequence[Point]) -> str:
    """What to do, and how sure that is."""
    chosen = best(points)
    today = next((p for p in points if p.noise == 1), None)
    text = f"Merges are best at {chosen.noise:.4g} times today's noise"
    if today is None or today is chosen:
        return text + "."
    gap = chosen.merged - today.merged
    sure = "" if abs(np.mean(gap)) > 2 * error(gap) else "; that is within two standard errors"
    return (
        f"{text}: multiply the learning rate by {chosen.noise:.4g} or divide the batch by it."
        f" Against today's, {np.mean(gap):+.4f} ± {error(gap):.4f} by pairs{sure}."
    )
