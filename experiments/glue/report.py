"""Tables and figures from the CSV files; no number here is computed from anything else."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.pages import Block, Row, number, pick, save, table, tidy, unique

from .tasks import KINDS

COLOURS = {
    "magnitude": "black",
    "exact Fisher": "C3",
    "curvature R, C": "C0",
    "curvature R, C, power 1/2": "C9",
    "path integral": "C2",
    "path curvature": "C8",
    "Adam's v": "C1",
    "dense S of the paper": "C4",
    "random": "0.6",
}
OPTIMIZERS = ("moma", "adamw", "umtam", "orthogonal")
"""The order of the tables, whatever the order in which results came."""
REFERENCE = "moma"
"""The merge with which the others are compared, set by set and seed by seed."""
OURS = "curvature R, C"
"""The score whose lead over magnitude is shown task by task."""
WEAK = ("cola", "rte")
"""Tasks on which experts of so few texts are hardly better than a constant answer, or worse."""

Shares = dict[tuple[str, str], float]
"""By experts and seed."""


# -------------------------------------------------------------------------------------- the blocks


def rates(rows: list[Row], results: Path) -> str:
    """Dev scores by learning rate; the best mean is the one that was used."""
    tasks, grid = unique(rows, "task"), unique(rows, "learning_rate")
    lines = []
    for optimizer in unique(rows, "optimizer"):
        for rate in grid:
            own = [
                pick(rows, "dev", optimizer=optimizer, learning_rate=rate, task=t) for t in tasks
            ]
            if all(own):
                flat = [x for values in own for x in values]
                lines.append([optimizer, rate, *map(number, own), f"{100 * np.mean(flat):.1f}"])
    return table(["optimizer", "learning rate", *(KINDS[t].title for t in tasks), "mean"], lines)


def experts(rows: list[Row], results: Path) -> str:
    """Test scores of the experts, and what training one took."""
    optimizers = unique(rows, "optimizer")
    lines = []
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        own = [row for row in rows if row["task"] == task and row["metric"] == metric]
        lines.append(
            [
                KINDS[task].title,
                metric,
                *(number(pick(own, "test", optimizer=o)) for o in optimizers),
                *(number(pick(own, "seconds", optimizer=o), 0, 1.0) for o in optimizers),
            ]
        )
    header = ["task", "metric", *(f"{o}, test" for o in optimizers)]
    return table([*header, *(f"{o}, seconds" for o in optimizers)], lines)


def costs(rows: list[Row], results: Path) -> str:
    """Seconds and bytes of the exact Fisher, beside the curvature that training left."""
    lines = []
    for optimizer in unique(rows, "optimizer"):
        own = [row for row in rows if row["optimizer"] == optimizer]
        ours, theirs = (pick(own, f"{kind}_bytes") for kind in ("curvature", "fisher"))
        lines.append(
            [
                optimizer,
                number(pick(own, "seconds"), 0, 1.0),
                number(pick(own, "training_seconds"), 0, 1.0),
                f"{np.mean(theirs) / 1e6:.1f}",
                f"{np.mean(ours) / 1e6:.1f}",
                f"{100 * np.sum(ours) / np.sum(theirs):.1f} %",
            ]
        )
    header = ["experts of", "Fisher, seconds", "training, seconds", "Fisher, MB"]
    return table([*header, "the optimizer's, MB", "share of bytes"], lines)


def selection(rows: list[Row], results: Path) -> str:
    """What is kept of the expert's score by each score at each density, against magnitude."""
    parts = []
    for split, optimizer in dict.fromkeys((row["split"], row["optimizer"]) for row in rows):
        own = [r for r in rows if r["split"] == split and r["optimizer"] == optimizer]
        densities = sorted(unique(own, "density"), key=float)
        names = unique(own, "score")
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        for axes, scope in zip(
            figure.subplots(1, 2, sharey=True), ("tensor", "global"), strict=True
        ):
            here = [r for r in own if r["scope"] == scope]
            curves = {name: _curve(here, name, densities) for name in names}
            most = max(map(_seeds_of, curves.values()))
            for name, curve in curves.items():
                mean = 100 * np.mean(list(curve.values()), axis=0)
                gap = 100 * _gaps(curve, curves["magnitude"])
                error = gap.std(axis=0, ddof=min(1, len(gap) - 1)) / np.sqrt(len(gap))
                x = [100 * float(density) for density in densities]
                colour = COLOURS.get(name)
                label = name if _seeds_of(curve) == most else f"{name} *"
                axes.plot(x, mean, "o-", color=colour, label=label, ms=4)
                axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.12, lw=0)
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.minorticks_off()
            axes.set_xlabel("entries of the task vector kept (%)")
            axes.set_title(f"one threshold per {'tensor' if scope == 'tensor' else 'expert'}")
            tidy(axes)
            lines = []
            for name in names:
                mean = np.mean(list(curves[name].values()), axis=0)
                gap = _gaps(curves[name], curves["magnitude"])
                lines.append(
                    [name]
                    + [
                        number([mean[i]])
                        + ("" if name == "magnitude" else f" ({_signed(gap[:, i])})")
                        for i in range(len(densities))
                    ]
                    + [str(_seeds_of(curves[name]))]
                )
            heading = f"Experts of {optimizer}, {split}, one threshold per "
            heading += "tensor" if scope == "tensor" else "expert"
            heads = [f"{100 * float(d):g} %" for d in densities]
            parts.append(f"{heading}:\n\n{table(['score', *heads, 'seeds'], lines)}")
            if OURS in curves and scope == "tensor":
                gaps = _by_task_gaps(curves[OURS], curves["magnitude"])
                parts.append(
                    f"{OURS} minus magnitude, by task, points:\n\n{_gap_table(gaps, heads)}"
                )
        axes = figure.axes[0]
        axes.set_ylabel("share of the expert's score kept (%)")
        figure.axes[1].legend(frameon=False, fontsize=8)
        figure.suptitle(
            f"Experts trained with {optimizer}: mean over tasks and seeds (* fewer seeds);"
            " shaded: standard error of the difference from magnitude"
        )
        parts.append(save(figure, results / f"selection_{optimizer}_{split}.png"))
    note = (
        "In brackets, the difference from magnitude with the same seeds: mean ± standard error over"
        " tasks, each the mean of its seeds."
    )
    return "\n\n".join([*parts, note])


def _curve(
    rows: list[Row], name: str, densities: Sequence[str]
) -> dict[tuple[str, str], np.ndarray]:
    """By task and seed, shares of the expert's score (densities,); those that are complete."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["score"] == name:
            share = float(row["value"]) / float(row["expert_value"])
            found.setdefault((row["task"], row["seed"]), {})[row["density"]] = share
    whole = {key: own for key, own in found.items() if len(own) == len(densities)}
    return {key: np.array([own[d] for d in densities]) for key, own in whole.items()}


def _seeds_of(curve: Mapping[tuple[str, str], np.ndarray]) -> int:
    return len({seed for _, seed in curve})


def _gaps(curve: Mapping[Any, np.ndarray], plain: Mapping[Any, np.ndarray]) -> np.ndarray:
    """(tasks, densities): what one curve has more than the other, each task's mean over seeds."""
    return np.array([np.mean(gaps, axis=0) for gaps in _by_task_gaps(curve, plain).values()])


def _by_task_gaps(
    curve: Mapping[Any, np.ndarray], plain: Mapping[Any, np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """By task, what one curve has more than the other, (densities,) for each seed of both."""
    by_task: dict[str, list[np.ndarray]] = {}
    for task, seed in curve:
        if (task, seed) in plain:
            by_task.setdefault(task, []).append(curve[task, seed] - plain[task, seed])
    return by_task


def _gap_table(gaps: Mapping[str, list[np.ndarray]], heads: Sequence[str]) -> str:
    """Each task's gaps over its seeds, and the mean over tasks without the one that gains most."""
    means = {task: np.mean(own, axis=0) for task, own in gaps.items()}
    lines = [
        [KINDS[task].title, *(_signed(np.array(own)[:, i]) for i in range(len(heads)))]
        for task, own in gaps.items()
    ]
    most = max(means, key=lambda task: float(np.sum(means[task])))
    others = np.array([mean for task, mean in means.items() if task != most])
    if len(others):
        cells = (_signed(others[:, i]) for i in range(len(heads)))
        lines.append([f"mean without {KINDS[most].title}", *cells])
    return table(["task", *heads], lines)


def _signed(gaps: np.ndarray) -> str:
    text = number(gaps)
    return text if text.startswith("-") else f"+{text}"


def merging(rows: list[Row], results: Path, name: str = "merging", *, floor: bool = True) -> str:
    """Shares of the experts' scores kept by every method, at its defaults and tuned.

    ``floor``: whether the figure reaches down to the base.
    """
    parts = []
    for split, optimizer in dict.fromkeys((row["split"], row["optimizer"]) for row in rows):
        own = [r for r in rows if r["split"] == split and r["optimizer"] == optimizer]
        sizes = sorted({row["experts"].count("+") + 1 for row in own}, reverse=True)
        shares = _shares(own)
        for size in sizes:
            parts.append(_merges_of(shares, own, size, f"Experts of {optimizer}, {split}"))
        methods = _by_lead(shares, sizes[0])
        parts.append(_by_task(own, sizes[0], methods))
        figure = results / f"{name}_{optimizer}_{split}.png"
        shown = [m for m in methods if m != "experts" and (floor or m != "base")]
        parts.append(_dots(shares, shown, sizes[0], optimizer, split, figure))
    parts.append(
        f"{REFERENCE}'s lead: tuned, over what was never tuned at its default; mean over the seeds"
        " (and sets of experts) that both have ± standard error. A method with fewer seeds is to be"
        " compared by this lead: its shares are those of other experts."
    )
    return "\n\n".join(parts)


def _merges_of(
    shares: Mapping[tuple[str, str, int], Shares], rows: list[Row], size: int, heading: str
) -> str:
    """The table of the merges of so many experts."""
    able = _shares([row for row in rows if row["task"] not in WEAK])
    lines = [
        [
            method,
            number(list(shares[method, "True", size].values())),
            number(list(shares[method, "False", size].values())),
            "" if method == REFERENCE else number(_leads(shares, method, size)),
            "" if method == REFERENCE else number(_leads(able, method, size)),
            str(_seeds(shares, method, size)),
        ]
        for method in _by_lead(shares, size)
    ]
    sets = len({row["experts"] for row in rows if row["experts"].count("+") + 1 == size})
    among = f"{size} experts" if sets == 1 else f"{size} experts, {sets} sets"
    head = f"{heading}, {among}: mean share of the experts' scores kept (%)"
    without = " and ".join(KINDS[task].title for task in WEAK)
    leads = (f"{REFERENCE}'s lead", f"lead without {without}")
    return f"{head}\n\n" + table(["method", "tuned", "default", *leads, "seeds"], lines)


def _by_lead(shares: Mapping[tuple[str, str, int], Shares], size: int) -> list[str]:
    """The methods that merged sets of this size, the best first: by the reference's lead."""
    merged = dict.fromkeys(m for (m, _, n), found in shares.items() if n == size and found)
    return sorted(merged, key=lambda m: np.mean(_leads(shares, m, size) or 100))


def _shares(rows: list[Row]) -> dict[tuple[str, str, int], Shares]:
    """By method, whether it is tuned, and size: the mean share over tasks of each set and seed."""
    found: dict[tuple[str, str, int], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        key = row["method"], row["tuned"], row["experts"].count("+") + 1
        own = found.setdefault(key, {}).setdefault((row["experts"], row["seed"]), [])
        own.append(float(row["share"]))
    means = {
        key: {which: float(np.mean(own)) for which, own in sets.items()}
        for key, sets in found.items()
    }
    every = product(unique(rows, "method"), ("False", "True"), {size for _, _, size in found})
    return {key: means.get(key, {}) for key in every}


def _seeds(shares: Mapping[tuple[str, str, int], Shares], method: str, size: int) -> int:
    """With how many seeds a method has merged sets of this size."""
    return len({seed for tuned in ("True", "False") for _, seed in shares[method, tuned, size]})


def _leads(shares: Mapping[tuple[str, str, int], Shares], method: str, size: int) -> list[float]:
    """By how much more of the experts' scores the reference keeps, set by set and seed by seed."""
    best = shares.get((REFERENCE, "True", size), {})
    theirs = shares[method, "True", size] or shares[method, "False", size]
    return [best[key] - theirs[key] for key in theirs if key in best]


def _by_task(rows: list[Row], size: int, methods: Sequence[str]) -> str:
    """Absolute scores by task, tuned, of the largest set."""
    rows = [row for row in rows if row["experts"].count("+") + 1 == size]
    tasks = unique(rows, "task")
    lines = []
    for method in methods:
        tuned = "False" if method in ("base", "experts") else "True"
        own = [number(pick(rows, "score", method=method, tuned=tuned, task=t)) for t in tasks]
        if any(own):
            lines.append([method, *own])
    return table(["score × 100, tuned", *(KINDS[t].title for t in tasks)], lines)


def _dots(
    shares: Mapping[tuple[str, str, int], Shares],
    methods: Sequence[str],
    size: int,
    optimizer: str,
    split: str,
    path: Path,
) -> str:
    figure = Figure(figsize=(8, 1.6 + 0.27 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for tuned, marker, label in (("True", "o", "tuned on dev"), ("False", "|", "at its defaults")):
        for place, method in enumerate(methods):
            values = 100 * np.asarray(list(shares[method, tuned, size].values()))
            if len(values):
                axes.plot(values, [place] * len(values), marker, color="0.75", ms=5, zorder=1)
                style = {"color": "C0" if tuned == "True" else "C1", "ms": 9, "zorder": 2}
                axes.plot(values.mean(), place, marker, label=label, mew=2, **style)
    counts = {m: _seeds(shares, m, size) for m in methods}
    names = [m if counts[m] == max(counts.values()) else f"{m} *" for m in methods]
    axes.set_yticks(range(len(methods)), names)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.axvline(100, color="0.4", lw=1, ls="--")
    axes.set_xlabel(f"share of the experts' scores kept, mean over {size} tasks (%)")
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True)}
    figure.legend(first.values(), first.keys(), frameon=False, loc="outside lower center", ncols=2)
    where = {"held": "held half of dev", "test": "test"}[split]
    merged = [found for (_, _, n), found in shares.items() if n == size]
    seeds = sorted({seed for found in merged for _, seed in found}, key=int)
    among = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
    fewer = "; * fewer seeds" if len(set(counts.values())) > 1 else ""
    figure.suptitle(f"{size} experts of {optimizer} in one encoder; {where}, {among}{fewer}")
    tidy(axes)
    return save(figure, path)


def correlations(rows: list[Row], results: Path) -> str:
    """Mean rank correlation with the exact Fisher, over leaves of a kind, tasks and seeds."""
    kinds: Mapping[str, Callable[[str], bool]] = {
        "matrices of layers": lambda leaf: leaf.startswith("layers") and leaf.endswith("kernel"),
        "embeddings": lambda leaf: leaf.endswith("embedding"),
        "vectors": lambda leaf: leaf.endswith(("bias", "scale")),
    }
    lines = []
    for optimizer, kind, estimate in dict.fromkeys(
        (row["optimizer"], row["kind"], row["estimate"]) for row in rows
    ):
        own = [
            row
            for row in rows
            if (row["optimizer"], row["kind"], row["estimate"]) == (optimizer, kind, estimate)
        ]
        cells = []
        for belongs in kinds.values():
            by_task: dict[str, list[float]] = {}
            for row in own:
                if belongs(row["leaf"]):
                    by_task.setdefault(row["task"], []).append(float(row["rho"]))
            cells.append(number([float(np.mean(v)) for v in by_task.values()], 2, 1.0))
        lines.append([optimizer, kind, estimate, *cells])
    return "\n\n".join(
        [
            table(["experts of", "of", "estimate", *kinds], lines),
            _layers(rows, results),
            "Mean over tasks ± standard error. A curvature is compared with F, a saliency with"
            " d²F, over the entries that training changed.",
        ]
    )


def _layers(rows: list[Row], results: Path) -> str:
    rows = [r for r in rows if r["leaf"].startswith("layers") and r["leaf"].endswith("kernel")]
    optimizers = unique(rows, "optimizer")
    depth = sorted({int(row["leaf"].split("/")[1]) for row in rows})
    figure = Figure(figsize=(5.5 * len(optimizers), 4), layout="constrained")
    for axes, optimizer in zip(
        figure.subplots(1, len(optimizers), sharey=True, squeeze=False)[0], optimizers, strict=True
    ):
        own = [r for r in rows if r["optimizer"] == optimizer and r["kind"] == "saliency"]
        for estimate in unique(own, "estimate"):
            means = [
                np.mean(
                    [
                        float(r["rho"])
                        for r in own
                        if r["estimate"] == estimate and int(r["leaf"].split("/")[1]) == layer
                    ]
                )
                for layer in depth
            ]
            axes.plot(depth, means, "o-", label=estimate, color=COLOURS.get(estimate), ms=4)
        axes.set_xticks(depth)
        axes.set_xlabel("layer")
        axes.set_title(f"experts of {optimizer}")
        axes.legend(frameon=False, fontsize=8)
        tidy(axes)
    figure.axes[0].set_ylabel("rank correlation with d² × exact Fisher")
    return save(figure, results / "correlations.png")


def pairs(rows: list[Row], results: Path) -> str:
    """Cosine, sign conflict, overlap and barrier: the mean over pairs, and every pair."""
    columns = {
        "cosine": "cosine of task vectors",
        "sign_conflict": "sign conflict",
        "overlap_optimizer": "overlap, optimizer's curvature",
        "overlap_fisher": "overlap, exact Fisher",
        "barrier": "barrier",
    }
    optimizers = unique(rows, "optimizer")
    lines = [
        [o, *(number(pick(rows, column, optimizer=o), 3, 1.0) for column in columns)]
        for o in optimizers
    ]
    figure = Figure(figsize=(5.6 * len(optimizers), 4), layout="constrained")
    for axes, optimizer in zip(
        figure.subplots(1, len(optimizers), squeeze=False)[0], optimizers, strict=True
    ):
        own = [row for row in rows if row["optimizer"] == optimizer]
        names = list(dict.fromkeys(unique(own, "a") + unique(own, "b")))
        above, below = np.full((2, len(names), len(names)), np.nan)
        for row in own:
            i, j = sorted((names.index(row["a"]), names.index(row["b"])))
            above[i, j] = np.mean(pick(own, "overlap_optimizer", a=row["a"], b=row["b"]))
            below[j, i] = np.mean(pick(own, "sign_conflict", a=row["a"], b=row["b"]))
        # Each half has a scale of its own: sign conflict hardly varies beside overlap.
        for grid, colours, label in (
            (below, "cividis", "sign conflict (below)"),
            (above, "magma", "overlap of curvature (above)"),
        ):
            figure.colorbar(axes.imshow(grid, cmap=colours), ax=axes, shrink=0.8, label=label)
        titles = [KINDS[name].title for name in names]
        axes.set_xticks(range(len(names)), titles, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), titles)
        axes.set_title(f"pairs of experts trained with {optimizer}")
    return "\n\n".join(
        [table(["experts of", *columns.values()], lines), save(figure, results / "pairs.png")]
    )


def _block(file: str, title: str, make: Callable[[list[Row], Path], str]) -> Block:
    """A block whose rows are sorted by optimizer."""

    def of_sorted(rows: list[Row], results: Path) -> str:
        return make(sorted(rows, key=lambda row: OPTIMIZERS.index(row["optimizer"])), results)

    return Block(file, title, of_sorted)


BLOCKS: Mapping[str, Block] = {
    "rates": _block("rates", "Learning rates, on dev", rates),
    "experts": _block("experts", "Experts", experts),
    "costs": _block("fisher", "What curvature costs", costs),
    "selection": _block("select", "Selection", selection),
    "merging": _block("merges", "Merging", merging),
    "ablations": _block("ablations", "Ablations", partial(merging, name="ablations", floor=False)),
    "correlations": _block("correlations", "Agreement with the exact Fisher", correlations),
    "pairs": _block("pairs", "Overlap, conflict, barriers", pairs),
}
"""By name: the CSV file, the heading, and what is made of it."""
