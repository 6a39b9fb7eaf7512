"""Tables and figures from the CSV files; no number here is computed from anything else."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.pages import Block, Row, number, save, table, tidy, unique

from .stages import forgetting

TITLES = {
    "classes": "two classes of Fashion-MNIST at a time",
    "domains": "digits of other sources",
    "text": "text tasks, MiniLM",
}


LABELS = {
    "moma": "running_moma",
    "moma, from the merge": "running_moma, from the merge",
    "CMM, moma": "CMM, om.moma's curvature",
}
"""Of methods whose names in the CSV files do not tell the merge from the optimizer."""


def label(method: str) -> str:
    """What tables and figures call a method."""
    return LABELS.get(method, method)


def passage(rows: Sequence[Row]) -> np.ndarray:
    """(stages, tasks) of one method in one order, NaN where nothing was measured."""
    last = max(int(row["place"]) for row in rows)
    found = np.full((last + 1, last + 1), np.nan)
    for row in rows:
        found[int(row["stage"]), int(row["place"])] = float(row["accuracy"])
    return found


def passages(rows: Sequence[Row], stream: str) -> dict[str, list[np.ndarray]]:
    """By method, one array per order."""
    own = [row for row in rows if row["stream"] == stream]
    found = {}
    for name in unique(own, "method"):
        mine = [row for row in own if row["method"] == name]
        found[name] = [
            passage([row for row in mine if row["order"] == order])
            for order in sorted(unique(mine, "order"))
        ]
    return found


def finals(found: Sequence[np.ndarray]) -> list[float]:
    """Mean accuracy over all tasks at the end, by order."""
    return [float(np.mean(x[-1])) for x in found]


def is_reference(found: Sequence[np.ndarray]) -> bool:
    """Whether there is an end alone: the base, or all tasks at once."""
    return bool(np.all(np.isnan(found[0][0])))


def accuracy(rows: list[Row], results: Path) -> str:
    """Final accuracy, accuracy when a task was new, and forgetting; the curves below."""
    parts = []
    for stream in unique(rows, "stream"):
        made = passages(rows, stream)
        order = sorted(made, key=lambda name: -np.mean(finals(made[name])))
        lines = []
        for name in order:
            ends = finals(made[name])
            cells = [number(ends), *(f"{100 * end:.1f}" for end in ends)]
            if is_reference(made[name]):
                lines.append([f"*{name}*", *cells, "", ""])
            else:
                new = [float(np.mean(np.diagonal(x))) for x in made[name]]
                lost = [forgetting(x) for x in made[name]]
                lines.append([label(name), *cells, number(new), number(lost)])
        count = max(len(found) for found in made.values())
        header = ["method", "at the end", *(f"order {n + 1}" for n in range(count))]
        parts += [
            f"### {TITLES[stream][0].upper()}{TITLES[stream][1:]}",
            table([*header, "when new", "forgotten"], lines),
            figure(made, stream, results),
        ]
    note = (
        "Test accuracy in %, mean over tasks; mean over three orders ± standard error. 'When new':"
        " of each task right after it came. 'Forgotten': how far tasks but the last fell from"
        " their best."
    )
    return "\n\n".join([note, *parts])


SHOWN = {
    "CMM": "C0",
    "CMM, not linear": "C9",
    "CMM, normalised": "navy",
    "running average": "C1",
    "independent average": "C8",
    "moma": "black",
    "OPCM": "C2",
    "Perturb-and-Merge": "C4",
    "EWC": "C5",
    "EWC, optimizer's v": "C6",
    "sequential": "C3",
}
"""Methods of the figures, and their colours; the rest is in the tables."""


def figure(made: Mapping[str, list[np.ndarray]], stream: str, results: Path) -> str:
    """Mean accuracy over the tasks seen so far, and the first task's alone."""
    drawn = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for name, colour in SHOWN.items():
        if name not in made:
            continue
        seen = 100 * np.array([np.nanmean(x, axis=1) for x in made[name]])
        first = 100 * np.array([x[:, 0] for x in made[name]])
        stages = np.arange(1, seen.shape[1] + 1)
        for axes, values in ((left, seen), (right, first)):
            axes.plot(stages, values.mean(axis=0), "o-", color=colour, label=label(name), ms=4)
    for name, style in (("base", ":"), ("all at once", "--"), ("one expert per task", "--")):
        if name in made:
            left.axhline(100 * np.mean(finals(made[name])), color="0.4", ls=style, lw=1, label=name)
    left.set_ylabel("test accuracy (%)")
    left.set_title("all tasks so far")
    right.set_title("the first task alone")
    for axes in (left, right):
        axes.set_xticks(range(1, 1 + max(len(x[0]) for x in made.values())))
        axes.set_xlabel("tasks seen")
        tidy(axes)
    shown = left.get_legend_handles_labels()
    drawn.legend(*shown, loc="outside lower center", ncol=6, fontsize=8, frameon=False)
    drawn.suptitle(f"{TITLES[stream][0].upper()}{TITLES[stream][1:]}: mean of three orders")
    return save(drawn, results / f"accuracy_{stream}.png")


def tuning(rows: list[Row], results: Path) -> str:
    """What was chosen, and how much the choice was worth on dev."""
    lines = []
    for stream in unique(rows, "stream"):
        own = [row for row in rows if row["stream"] == stream]
        for name in unique(own, "method"):
            mine = [row for row in own if row["method"] == name]
            scores = [np.nan_to_num(float(row["dev"])) for row in mine]
            best = mine[int(np.argmax(scores))]
            lines.append(
                [stream, label(name), str(len(mine)), best["rate"], best["number"],
                 f"{100 * max(scores):.1f}", f"{100 * min(scores):.1f}"]
            )  # fmt: skip
    header = ["stream", "method", "tried", "learning rate", "own number", "best", "worst"]
    return f"{table(header, lines)}\n\nMean accuracy on dev at the end of the first order, in %."


def costs(rows: list[Row], results: Path) -> str:
    """Bytes that are kept between tasks, after the first and the last; seconds of a task."""
    lines = []
    for stream in unique(rows, "stream"):
        own = [row for row in rows if row["stream"] == stream]
        last = max(int(row["stage"]) for row in own)
        for name in unique(own, "method"):
            mine = [row for row in own if row["method"] == name]
            later = [row for row in mine if int(row["stage"]) > 0]  # compiled by then
            sizes = [
                {int(row["bytes"]) for row in mine if int(row["stage"]) == stage}
                for stage in (0, last)
            ]
            first, end = (f"{max(size) / 1e6:.2f}" for size in sizes)
            seconds = (
                f"{np.median([float(row[column]) for row in later]):.3f}"
                for column in ("training", "merging")
            )
            lines.append([stream, label(name), first, end, *seconds])
    header = ["stream", "method", "MB after the first task", "MB after the last",
              "seconds, training", "seconds, merge"]  # fmt: skip
    return table(header, lines)


def linear(rows: list[Row], results: Path) -> str:
    """Linearised steps beside ordinary ones."""
    lines = [
        [row["model"], row["batch"], f"{float(row['ordinary_ms']):.1f}",
         f"{float(row['linear_ms']):.1f}", f"{float(row['ratio']):.2f}"]
        for row in rows
    ]  # fmt: skip
    header = ["model", "batch", "ordinary, ms a step", "linearised, ms a step", "median ratio"]
    return table(header, lines)


BLOCKS: Mapping[str, Block] = {
    "accuracy": Block("accuracy", "Accuracy and forgetting", accuracy),
    "costs": Block("costs", "Memory and time", costs),
    "linear": Block("cost", "Linearised fine-tuning beside ordinary", linear),
    "tuning": Block("tuning", "What was tuned", tuning),
}
"""By name: the CSV file, the heading, and what is made of it."""
