"""What the demo shows of a comparison: a table, a CSV file, a figure."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from optax_moma.demo.tasks import Task, standard_error

BASE, EXPERTS = "base", "experts"
"""The names of the rows that are no merges."""


class Row(NamedTuple):
    """A model's test scores by task; ``scale`` is None where nothing was tuned."""

    model: str
    scale: float | None
    scores: Mapping[str, float]


class Comparison(NamedTuple):
    """All that was measured.

    Attributes:
      tasks: the tasks.
      rows: the base, the experts (the row named `EXPERTS`), then the merges.
      scales: the grid on which every method with a scale was tuned.
      tuning: by method, the mean share kept on the dev split at each of ``scales``.
    """

    tasks: Sequence[Task]
    rows: Sequence[Row]
    scales: Sequence[float]
    tuning: Mapping[str, Sequence[float]]


def shares(scores: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """score / the expert's score, by task.

    >>> shares({"a": 0.5, "b": 0.25}, {"a": 0.5, "b": 0.5})
    {'a': 1.0, 'b': 0.5}
    """
    return {task: scores[task] / experts[task] for task in experts}


def mean(values: Mapping[str, float]) -> float:
    """The plain mean over tasks."""
    return float(np.mean(list(values.values())))


def _shares(comparison: Comparison) -> dict[str, dict[str, float]]:
    experts = next(row.scores for row in comparison.rows if row.model == EXPERTS)
    return {row.model: shares(row.scores, experts) for row in comparison.rows}


def table(comparison: Comparison) -> Table:
    """Scores, and shares kept, in percent; the best merge of each column in bold."""
    kept = _shares(comparison)
    merges = [row.model for row in comparison.rows if row.model not in (BASE, EXPERTS)]
    best = {task.name: max(kept[model][task.name] for model in merges) for task in comparison.tasks}
    best_mean = max(mean(kept[model]) for model in merges)
    out = Table(
        title="Test score × 100, and % of the expert's kept",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    out.add_column("Model", vertical="bottom")
    out.add_column("Scale", justify="right", vertical="bottom")
    for task in comparison.tasks:
        out.add_column("\n".join([*task.title.split(), task.metric]), justify="right")
    out.add_column("Mean\nkept", justify="right", vertical="bottom")

    def cell(text: str, bold: bool) -> Text:
        return Text(text, style="bold" if bold else "")

    for row in comparison.rows:
        own, total = kept[row.model], mean(kept[row.model])
        merge = row.model in merges
        out.add_row(
            row.model,
            "" if row.scale is None else f"{row.scale:g}",
            *(
                cell(
                    f"{100 * row.scores[t.name]:.1f} {100 * own[t.name]:3.0f}%",
                    merge and own[t.name] == best[t.name],
                )
                for t in comparison.tasks
            ),
            cell(f"{100 * total:.1f}%", merge and total == best_mean),
            end_section=row.model == EXPERTS,
        )
    return out


def notes(comparison: Comparison) -> str:
    """How to read the table."""
    experts = next(row.scores for row in comparison.rows if row.model == EXPERTS)
    counts = [len(task.splits["test"].rows) for task in comparison.tasks]
    errors = [
        100 * standard_error(task, experts[task.name], count)
        for task, count in zip(comparison.tasks, counts, strict=True)
    ]
    texts = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"Each task with its own expert's head, {texts} test texts a task, standard errors "
        f"{min(errors):.1f} to {max(errors):.1f} points. Scales were tuned on other texts, all on "
        "one grid; the average has none. In bold, the best merge for each task."
    )


def write_csv(comparison: Comparison, path: Path) -> None:
    """One line per model: its scale, every task's score and share kept, and the mean share."""
    kept = _shares(comparison)
    names = [task.name for task in comparison.tasks]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "scale", *names, *(f"{name}_share" for name in names), "mean_share"]
        )
        for row in comparison.rows:
            own = kept[row.model]
            numbers = [row.scores[n] for n in names] + [own[n] for n in names] + [mean(own)]
            scale = "" if row.scale is None else f"{row.scale:g}"
            writer.writerow([row.model, scale, *(f"{x:.6f}" for x in numbers)])


def draw(comparison: Comparison, path: Path) -> None:
    """Two panels: the share each model keeps of each task, and how the scale was tuned."""
    figure = Figure(figsize=(11.5, 5), layout="constrained")
    test, dev = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_test(test, comparison)
    _draw_tuning(dev, comparison)
    for axes in (test, dev):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def _draw_test(axes: Axes, comparison: Comparison) -> None:
    kept = _shares(comparison)
    rows = [row for row in comparison.rows if row.model != EXPERTS]
    places = np.arange(len(rows))
    # Tasks are a little apart, so that equal shares do not hide each other.
    offsets = np.linspace(-0.2, 0.2, len(comparison.tasks))
    for i, task in enumerate(comparison.tasks):
        values = [100 * kept[row.model][task.name] for row in rows]
        marker = "osD^vPX"[i % 7]
        axes.plot(values, places + offsets[i], marker, color=f"C{i}", ms=7, label=task.title)
    means = [100 * mean(kept[row.model]) for row in rows]
    axes.vlines(means, places - 0.33, places + 0.33, color="black", lw=2.5, label="mean")
    for place, value in zip(places, means, strict=True):
        at = (1.01, place)
        text = f"{value:.1f} %"
        axes.annotate(text, at, xycoords=("axes fraction", "data"), va="center", fontsize=9)
    scales = ["" if row.scale is None else f" (× {row.scale:g})" for row in rows]
    axes.set_yticks(places, [row.model + s for row, s in zip(rows, scales, strict=True)])
    axes.invert_yaxis()
    axes.axvline(100, color="0.4", lw=1, ls="--")
    axes.set_xlabel("share of the expert's test score kept (%)")
    axes.set_title("Test: one encoder, each task with its expert's head", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False, fontsize=9)


def _draw_tuning(axes: Axes, comparison: Comparison) -> None:
    # Other colours than the tasks': the method listed last, ours, is black.
    colours = ["C4", "C5", "C9", "C6", "C8"]
    for i, (name, curve) in enumerate(comparison.tuning.items()):
        last = i == len(comparison.tuning) - 1
        colour = "black" if last else colours[i % len(colours)]
        axes.plot(comparison.scales, 100 * np.asarray(curve), color=colour, label=name)
        top = int(np.argmax(curve))
        axes.plot(comparison.scales[top], 100 * curve[top], "o", color=colour, ms=8)
    axes.set_xlabel("scale of the merged task vector (chosen: dot)")
    axes.set_ylabel("mean share kept (%)")
    axes.set_title("Dev: the scale of each method", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
