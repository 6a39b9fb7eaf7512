"""Tables and figures from the CSV files; no number here is computed from anything else."""

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pages import Block, Row, number, save, table, tidy, unique

from .variants import VARIANTS

REFERENCE = "soft"
COLOURS = {
    "dense": "black",
    "soft": "C0",
    "domain": "C1",
    "domain, metric": "C2",
    "domain, r identities": "C3",
    "domain, scale r": "C6",
    "sparse, top 2": "C4",
}
"""Of the lines in the figures; other variants are grey."""
FAR = 2
"""Losses beyond so many times the lowest are drawn at the edge of a figure, with their value."""


def best(rows: Sequence[Row], variant: str) -> dict[str, Row]:
    """By seed, a variant's rows at the rate that was best on dev with seed 0."""
    own = [row for row in rows if row["variant"] == variant]
    first = [row for row in own if row["seed"] == "0"]
    if not first:  # the study has not come to it yet
        return {}
    rate = min(first, key=lambda row: float(row["dev_loss"]))["learning_rate"]
    return {row["seed"]: row for row in own if row["learning_rate"] == rate}


def differences(rows: Sequence[Row], variant: str, reference: str = REFERENCE) -> list[float]:
    """Test loss above that of the reference, seed by seed, each at its own best rate."""
    ours, theirs = best(rows, variant), best(rows, reference)
    column = "test_loss"
    return [float(ours[s][column]) - float(theirs[s][column]) for s in ours if s in theirs]


def costs(setup: str, results: Path) -> Mapping[str, Row]:
    """By variant, what a step takes; empty where nothing was measured."""
    path = results / f"cost_{setup}.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as lines:
        return {row["variant"]: row for row in csv.DictReader(lines)}


def learned(rows: list[Row], results: Path, setup: str, name: str) -> str:
    """What every variant learned at its best rate, at which rates, and a figure of both."""
    accuracy = "test_accuracy" in rows[0]
    rows.sort(key=lambda row: list(VARIANTS).index(row["variant"]))
    measured = costs(setup, results)
    lines = []
    for variant in unique(rows, "variant"):
        own = best(rows, variant)
        column = lambda c, own=own: [float(row[c]) for row in own.values()]  # noqa: E731
        more = differences(rows, variant)
        price = measured.get(variant)
        lines.append(
            [
                variant,
                f"{int(next(iter(own.values()))['parameters']):,}",
                next(iter(own.values()))["learning_rate"],
                number(column("test_loss"), 3, 1.0),
                "" if variant == REFERENCE else number(more, 3, 1.0),
                *([number(column("test_accuracy"))] if accuracy else []),
                number(column("test_evenness"), 2, 1.0) if variant != "dense" else "",
                *(
                    f"{float(price[name]):.0f}" if price else ""
                    for name in ("milliseconds", "temporaries_mb")
                ),
                str(len(own)),
            ]
        )
    header = ["variant", "parameters", "best rate", "test loss", "minus soft, paired"]
    header += ["test accuracy, %"] if accuracy else []
    header += ["evenness of gates", "step, ms", "temporaries, MB", "seeds"]
    seconds = sum(float(row["seconds"]) for row in rows)
    about = (
        f"Mean ± standard error over seeds. {len(rows)} runs of {rows[0]['steps']} steps,"
        f" {seconds / 60:.0f} minutes of training on a shared machine ({rows[0]['machine']})."
    )
    parts = [
        table(header, lines),
        about,
        "Dev loss of seed 0 by learning rate, by which rates were chosen:",
        by_rate(rows),
        confounded(rows),
        figure(rows, results / f"{name}.png"),
        f"`{rows[0]['command']}`",
    ]
    return "\n\n".join(filter(None, parts))


def confounded(rows: Sequence[Row]) -> str:
    """What the published start seems to win at one rate, and what is left at rates of their own."""
    ours, plain, scaled = "domain, r identities", "domain", "domain, scale r"
    if not {ours, plain, scaled} <= set(unique(rows, "variant")):
        return ""
    dev = {
        (row["variant"], row["learning_rate"]): float(row["dev_loss"])
        for row in rows
        if row["seed"] == "0"
    }
    rates = sorted((r for v, r in dev if v == ours and (plain, r) in dev), key=float)
    gaps = ", ".join(f"{dev[ours, r] - dev[plain, r]:+.3f} at {float(r):g}" for r in rates)
    left, own = (number(differences(rows, ours, v), 3, 1.0) for v in (plain, scaled))
    return (
        f"`{ours}` less `{plain}`: at one rate for both, {gaps} (dev loss, seed 0); each at its"
        f" best rate, {left} (test loss, paired). `{ours}` less `{scaled}`, each at its best rate:"
        f" {own}."
    )


def by_rate(rows: Sequence[Row]) -> str:
    """Dev losses of seed 0; the lowest of each variant is bold."""
    rates = sorted(unique(rows, "learning_rate"), key=float)
    lines = []
    for variant in unique(rows, "variant"):
        first = {
            row["learning_rate"]: float(row["dev_loss"])
            for row in rows
            if row["variant"] == variant and row["seed"] == "0"
        }
        low = min(first.values())
        cells = [f"{first[r]:.3f}" if r in first else "" for r in rates]
        cells = [f"**{c}**" if c == f"{low:.3f}" else c for c in cells]
        lines.append([variant, *cells])
    return table(["variant", *rates], lines)


def figure(rows: Sequence[Row], path: Path) -> str:
    """Left: loss by rate. Right: what is lost or won against soft merging, seed by seed."""
    drawn = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = drawn.subplots(1, 2)
    _rates(rows, left)
    variants = [v for v in unique(rows, "variant") if v != REFERENCE]
    for place, variant in enumerate(variants):
        more = differences(rows, variant)
        if not more:
            continue
        colour = COLOURS.get(variant, "0.5")
        right.plot(more, [place] * len(more), "o", color=colour, ms=5, alpha=0.6)
        right.plot(np.mean(more), place, "|", color=colour, ms=22, mew=2.5)
    right.axvline(0, color="C0", lw=1)
    right.set_yticks(range(len(variants)), variants)
    right.invert_yaxis()
    right.set_xlabel("test loss minus that of soft merging (left is better)")
    right.set_title("at each variant's best rate; dots: seeds, bars: means")
    tidy(right)
    return save(drawn, path)


def _rates(rows: Sequence[Row], axes: Axes) -> None:
    rows = [row for row in rows if row["seed"] == "0"]
    # One run that went wrong would flatten all curves.
    top = FAR * min(float(row["dev_loss"]) for row in rows)
    for variant in unique(rows, "variant"):
        own = sorted(
            (float(row["learning_rate"]), float(row["dev_loss"]))
            for row in rows
            if row["variant"] == variant
        )
        known = variant in COLOURS
        for rate, loss in own:
            if loss > top:
                axes.plot(rate, top, "^", color=COLOURS.get(variant, "0.8"), ms=9)
                place = {"xytext": (-8, 0), "textcoords": "offset points", "ha": "right"}
                axes.annotate(f"{loss:.2f}", (rate, top), va="center", **place)
        axes.plot(
            [rate for rate, _ in own],
            [min(loss, top) for _, loss in own],
            "o-",
            color=COLOURS.get(variant, "0.8"),
            label=variant if known else None,
            lw=5 if variant == REFERENCE else 1.8 if known else 1,  # domain lies on soft
            alpha=0.4 if variant == REFERENCE else 1,
            ms=4,
            zorder=2 if known else 1,
        )
    if not set(unique(rows, "variant")) <= set(COLOURS):
        axes.plot([], [], "o-", color="0.8", lw=1, ms=4, label="other variants")
    axes.set_xscale("log", base=2)
    ticks = sorted({float(row["learning_rate"]) for row in rows})
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("dev loss, seed 0")
    axes.set_title("the same grid of rates for all")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=4)
    tidy(axes)


def cost(rows: list[Row], results: Path) -> str:
    """Time and memory of a step of one layer; the models' stand in their own tables."""
    lines = [
        [
            row["variant"],
            f"{int(row['parameters']):,}",
            f"{float(row['temporaries_mb']):.0f}",
            f"{float(row['milliseconds']):.0f}",
            f"{float(row['of_soft']):.2f}",
            f"{float(row['of_soft_median']):.2f}",
        ]
        for row in rows
    ]
    header = ["layer", "parameters", "temporaries, MB", "step, ms", "of soft", "of soft, medians"]
    about = f"Shortest of {rows[0]['rounds']} steps taken in turns; {rows[0]['machine']}."
    return "\n\n".join([table(header, lines), about, f"`{rows[0]['command']}`"])


BLOCKS: Mapping[str, Block] = {
    "cost": Block("cost_layer", "What a step takes", cost),
    "large": Block("cost_large", "What a step of twice the tokens takes", cost),
    "largest": Block("cost_largest", "What a step of four times the tokens takes", cost),
    "language": Block(
        "language", "Language modelling", partial(learned, setup="language", name="language")
    ),
    "trec": Block("trec", "Question types (TREC)", partial(learned, setup="text", name="trec")),
    "sst2": Block("sst2", "Sentiment (SST-2)", partial(learned, setup="text", name="sst2")),
}
"""By name: the CSV file, the heading, and what is made of it."""
