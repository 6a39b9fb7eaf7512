"""Tables and figures of the study, from its results alone.

    python -m experiments.pretrain.report            # prints; fills RESULTS.md, draws the figures

An optimizer stands with the learning rate that had the lowest validation loss with seed 0, and with
the mean over all seeds at that rate ± its standard error. Sensitivity is the area under the curve
of validation loss against log2 of the learning rate, over the common grid and above the curve's own
minimum, divided by the grid's length: the loss that a rate picked at random costs. A run that
diverged counts as one that knows nothing, log(vocabulary). What ran at a single rate stands in a
table of its own, beside the optimizer of which it changes a part.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import pages

from . import optimizers
from .study import RATES, RESULTS, Row, best_rate, latest, read

matplotlib.use("Agg")  # figures go to files
from matplotlib import pyplot as plt

Size = tuple[int, int, int, int, int]
SIZE = ("width", "layers", "length", "batch", "steps")
HEADER = (
    "optimizer", "state, % of AdamW's", "best lr", "seeds", "validation loss",
    "against AdamW's defaults, %", "sensitivity",
)  # fmt: skip
PARTS_HEADER = (
    "optimizer", "state, % of AdamW's", "lr", "seeds", "validation loss", "unchanged",
    "difference",
)  # fmt: skip
BETAS_HEADER = (
    "optimizer", "best b1, b2", "its loss", "worst b1, b2", "its loss", "a pair at random",
    "a pair and a rate at random",
)  # fmt: skip
NOTE = (
    "Validation loss: mean over the seeds at the best rate ± standard error; one seed has none."
    " Sensitivity: by how much the loss is above the optimizer's best if the rate is drawn from"
    f" {RATES[0]:g} to {RATES[-1]:g}, all factors alike (seed 0, straight lines between the rates"
    " that were run; a run that diverged counts as one that knows nothing, the logarithm of the"
    " vocabulary); empty where one of these rates was not run."
)
COLOURS = {
    "moma": "C0",
    "moma:residual=1.0": "C9",
    "moma_clipped": "#9edae5",
    "moma_clipped:b1=0.98": "#c7e9f0",
    "adamw": "C3",
    "adamw:b1=0.5,b2=0.95": "C1",
    "adamw:b2=0.95": "C6",
    "adafactor": "C2",
    "adafactor:b1=0.9": "C8",
    "galore": "C4",
    "muon": "C5",
    "umtam": "C7",
}
"""Of families, the same in all figures; others are left out, or grey where they are the best."""
FAR = 1.2
"""A loss of more than so many times the lowest is told at the edge, not drawn to scale."""
MARKERS = {0: "o", 4: "v", 8: "s", 16: "o", 32: "^", 64: "D", 128: "P"}
"""Of ranks; 0 is none."""


class Tuned(NamedTuple):
    """An optimizer at its best learning rate.

    Attributes:
      share: state's bytes over AdamW's.
      rate: the best learning rate with seed 0.
      runs: validation losses by rate and seed.
      sensitivity: None while rates of the grid are missing.
    """

    share: float
    rate: float
    runs: dict[tuple[float, int], float]
    sensitivity: float | None

    @property
    def losses(self) -> list[float]:
        """Those at the best rate, one per seed."""
        return [loss for (rate, _), loss in self.runs.items() if rate == self.rate]

    @property
    def curve(self) -> dict[float, float]:
        """By rate, the loss with the seed that the rate was tuned with."""
        return {rate: loss for (rate, seed), loss in sorted(self.runs.items()) if seed == 0}

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(np.mean(self.losses))

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds, 0 for one."""
        count = len(self.losses)
        return float(np.std(self.losses, ddof=1) / math.sqrt(count)) if count > 1 else 0.0


def size_of(row: Row) -> Size:
    """What runs share that may be compared."""
    width, layers, length, batch, steps = (int(row[name]) for name in SIZE)
    return width, layers, length, batch, steps


def sensitivity(curve: dict[float, float], vocabulary: int) -> float | None:
    """Mean excess loss over the common grid of learning rates; None while some are missing."""
    if any(rate not in curve for rate in RATES):
        return None
    capped = {
        rate: min(loss, math.log(vocabulary)) if math.isfinite(loss) else math.log(vocabulary)
        for rate, loss in curve.items()
    }
    x = np.log2(RATES)
    excess = np.array([capped[rate] for rate in RATES]) - min(capped.values())
    return float(np.trapezoid(excess, x) / (x[-1] - x[0]))


def tuned(rows: Iterable[Row]) -> dict[Size, dict[str, Tuned]]:
    """Every optimizer of every size at its best."""
    groups: dict[Size, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[size_of(row)][row["optimizer"]].append(row)
    found: dict[Size, dict[str, Tuned]] = {}
    for size, by_optimizer in sorted(groups.items()):
        found[size] = {}
        for optimizer, own in by_optimizer.items():
            share = int(own[0]["state_bytes"]) / int(own[0]["adamw_bytes"])
            runs = {(float(r["lr"]), int(r["seed"])): float(r["validation"]) for r in own}
            t = Tuned(share, math.nan, runs, None)
            if t.curve:
                found[size][optimizer] = t._replace(
                    rate=best_rate(t.curve),
                    sensitivity=sensitivity(t.curve, int(own[0]["vocabulary"])),
                )
    return found


def lines(group: dict[str, Tuned]) -> list[tuple[str, ...]]:
    """The rows of a size's table, lowest loss first."""
    adamw = group["adamw"].mean if "adamw" in group else math.nan
    number = lambda x, form: "" if x is None or math.isnan(x) else format(x, form)  # noqa: E731
    return [
        (
            name,
            f"{100 * t.share:.1f}",
            f"{t.rate:g}",
            str(len(t.losses)),
            pages.number(t.losses, 4, 1.0),
            number(100 * (t.mean / adamw - 1), "+.2f"),
            number(t.sensitivity, ".4f"),
        )
        for name, t in sorted(group.items(), key=lambda item: item[1].mean)
        if len(t.curve) > 1
    ]


def whole(optimizer: str) -> str:
    """The optimizer of which this one changes a part, which is the last of its arguments."""
    name, _, arguments = optimizer.partition(":")
    kept = arguments if "," not in arguments else arguments.rpartition(",")[0]
    name = "moma" if name == "moma_variant" else name
    return f"{name}:{kept}" if kept.startswith("rank=") else name


def part_lines(group: dict[str, Tuned]) -> list[tuple[str, ...]]:
    """The rows of what ran at one rate: its loss, the whole optimizer's with that rate and these
    seeds, if it has them all, and the difference, seed by seed.
    """
    found = []
    for name, t in sorted(group.items(), key=lambda item: item[1].mean):
        if len(t.curve) > 1:
            continue
        runs = group[whole(name)].runs if whole(name) in group else {}
        unchanged = [runs[run] for run in t.runs] if t.runs.keys() <= runs.keys() else []
        differences = [x - y for x, y in zip(t.runs.values(), unchanged, strict=False)]
        found.append((
            name,
            f"{100 * t.share:.1f}",
            f"{t.rate:g}",
            str(len(t.losses)),
            pages.number(t.losses, 4, 1.0),
            pages.number(unchanged, 4, 1.0),
            pages.number(differences, 4, 1.0, sign="+"),
        ))  # fmt: skip
    return found


def betas(group: dict[str, Tuned]) -> dict[str, dict[tuple[float, float], Tuned]]:
    """By optimizer, the results by (b1, b2), where several pairs ran over the whole grid."""
    found: dict[str, dict[tuple[float, float], Tuned]] = defaultdict(dict)
    for name, t in group.items():
        kind, arguments = optimizers.parse(name)
        pair = arguments.pop("b1", 0.9), arguments.pop("b2", 0.999)
        if kind in ("adamw", "moma") and set(arguments) <= {"rank"} and set(RATES) <= set(t.curve):
            of = f"{kind}:rank={arguments['rank']}" if arguments else kind
            found[of][pair] = t
    return {name: dict(sorted(pairs.items())) for name, pairs in found.items() if len(pairs) > 2}


def betas_lines(found: dict[str, dict[tuple[float, float], Tuned]]) -> list[tuple[str, ...]]:
    """How much the loss depends on b1 and b2, over the pairs that all optimizers have; seed 0."""
    common = set.intersection(*(set(pairs) for pairs in found.values()))
    rows = []
    for name, pairs in found.items():
        low = {pair: min(pairs[pair].curve.values()) for pair in common}
        best, worst = min(low, key=low.__getitem__), max(low, key=low.__getitem__)
        drawn = [pairs[pair].curve[rate] for pair in common for rate in RATES]
        rows.append((
            name, f"{best[0]:g}, {best[1]:g}", f"{low[best]:.4f}", f"{worst[0]:g}, {worst[1]:g}",
            f"{low[worst]:.4f}", f"{np.mean(list(low.values())) - low[best]:+.4f}",
            f"{np.mean(drawn) - low[best]:+.4f}",
        ))  # fmt: skip
    return rows


def betas_figure(
    size: Size, found: dict[str, dict[tuple[float, float], Tuned]], folder: Path
) -> str:
    """Loss against rate, a panel for each optimizer, a line for each pair of betas: a link."""
    fig, axes = plt.subplots(
        1, len(found), figsize=(8.5, 4), sharex=True, sharey=True, layout="constrained"
    )
    every = sorted({pair for pairs in found.values() for pair in pairs})
    for ax, (name, pairs) in zip(axes, found.items(), strict=True):
        pages.tidy(ax)
        ax.set(xscale="log", xlabel="learning rate", title=name)
        ax.tick_params(axis="x", rotation=45)
        for pair, t in pairs.items():
            ax.plot(
                list(t.curve),
                list(t.curve.values()),
                marker="o",
                color=f"C{every.index(pair)}",
                linewidth=2.5 if pair == (0.9, 0.999) else 1.2,
                label=f"b1 = {pair[0]:g}, b2 = {pair[1]:g}",
            )
    rates = sorted({r for pairs in found.values() for t in pairs.values() for r in t.curve})
    axes[0].set_xticks(rates, [f"{r:g}" for r in rates])
    axes[0].minorticks_off()
    axes[0].set_ylabel("validation loss, seed 0")
    labels = {
        text: line
        for ax in axes
        for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(labels.values(), labels, loc="outside right upper", fontsize=8)
    fig.suptitle(title(size))
    link = pages.save(fig, folder / f"{stem(size)}_betas.png")
    plt.close(fig)
    return link


def title(size: Size) -> str:
    """A size in words."""
    width, layers, length, batch, steps = size
    return f"width {width}, {layers} layers, {steps} steps of {batch} x {length} tokens"


def markdown(rows: list[Row], folder: Path) -> str:
    """All tables as Markdown, with where and in what time they were made; draws the figures."""
    rows, parts = latest(rows), [NOTE]
    for size, group in tuned(rows).items():
        own = [row for row in rows if size_of(row) == size]
        hours = sum(float(row["seconds"]) for row in own) / 3600
        machines = ", ".join(sorted({row["machine"] for row in own}))
        digests = ", ".join(sorted({row["code"] for row in own}))
        parts += [
            f"### {title(size)[0].upper()}{title(size)[1:]}",
            pages.table(HEADER, lines(group)),
            f"{len(own)} runs, {hours:.2f} hours in all, on {machines}. Code of the optimizers: "
            f"{digests}.",
            "\n".join(figures(size, group, folder)),
        ]
        if at_one_rate := part_lines(group):
            parts += [
                f"At a single rate ({title(size)}); *unchanged*: the loss of the optimizer of"
                " which a part is changed, with the same rate and seeds; *difference*: seed by"
                " seed.",
                pages.table(PARTS_HEADER, at_one_rate),
            ]
        if len(by_betas := betas(group)) > 1:
            parts += [
                f"By b1 and b2 ({title(size)}), with seed 0, over the pairs that all have: the best"
                " and the worst one, each at its best rate; and how far above the best is the loss"
                " of a pair at random, at its best rate, or at a rate of the common grid.",
                pages.table(BETAS_HEADER, betas_lines(by_betas)),
                betas_figure(size, by_betas, folder),
            ]
    return "\n\n".join(parts)


def stem(size: Size) -> str:
    """The beginning of the names of a size's figures."""
    return f"width{size[0]}_batch{size[3]}"


def rank(optimizer: str) -> int:
    """Its rank, 0 if it has none."""
    return optimizers.parse(optimizer)[1].get("rank", 0)


def family(optimizer: str) -> str:
    """An optimizer without its rank: points of one family are joined, and have one colour."""
    name, arguments = optimizers.parse(optimizer)
    rest = ",".join(f"{k}={v}" for k, v in arguments.items() if k != "rank")
    return f"{name}:{rest}" if rest else name


def families(group: dict[str, Tuned]) -> dict[str, list[tuple[int, Tuned]]]:
    """By family, (rank, result) in order of rank; 0 for those that have none."""
    found: dict[str, list[tuple[int, Tuned]]] = defaultdict(list)
    for name, result in group.items():
        found[family(name)].append((rank(name), result))
    return {name: sorted(pairs, key=lambda p: p[0]) for name, pairs in found.items()}


def colour(optimizer: str) -> str:
    """That of its family."""
    return COLOURS.get(family(optimizer), "0.5")


def references(group: dict[str, Tuned]) -> list[str]:
    """What ranks are held against: AdamW's defaults, and the best there is of it and Adafactor."""
    found = ["adamw"]
    for kind in ("adamw", "adafactor"):
        own = [name for name in group if optimizers.parse(name)[0] == kind]
        found += sorted(own, key=lambda name: group[name].mean)[:1]
    return [name for name in dict.fromkeys(found) if name in group]


def figures(size: Size, group: dict[str, Tuned], folder: Path) -> list[str]:
    """Loss against state, loss against rank, loss against learning rate: links to them."""
    main = {n: t for n, t in group.items() if len(t.curve) > 1 and family(n) in COLOURS}

    def draw(kind: str, x_label: str, ticks: list[float] | None = None) -> tuple:
        fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
        pages.tidy(ax)
        shown = "seed 0" if kind == "rates" else "mean over seeds ± standard error"
        ax.set(xscale="log", xlabel=x_label, ylabel=f"validation loss, {shown}", title=title(size))
        if ticks:
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.minorticks_off()
        return fig, ax, folder / f"{stem(size)}_{kind}.png"

    def close(fig, ax, path: Path) -> str:
        fig.legend(loc="outside right upper", fontsize=8)
        link = pages.save(fig, path)
        plt.close(fig)
        return link

    def curve(ax, x: list[float], results: list[Tuned], name: str) -> None:
        y, error = [t.mean for t in results], [t.error for t in results]
        ax.errorbar(x, y, error, marker="o", capsize=3, label=name, color=colour(name))

    fig, ax, path = draw("state", "state, % of AdamW's", [1, 3, 10, 30, 100])
    most = FAR * min(t.mean for t in main.values())
    for name, pairs in families(main).items():
        near = [t for _, t in pairs if t.mean <= most]
        curve(ax, [100 * t.share for t in near], near, name)
        for t in (t for _, t in pairs if t.mean > most):
            x = 100 * t.share
            ax.plot(
                x, 1, "^", color=colour(name), transform=ax.get_xaxis_transform(), clip_on=False
            )
            ax.annotate(
                f"{t.mean:.2f}",
                (x, 1),
                (0, -14),
                xycoords=ax.get_xaxis_transform(),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    low, high = ax.get_ylim()
    margin = max(0, 0.1 - (high - low)) / 2  # what one seed cannot tell apart is to look alike
    ax.set_ylim(low - margin, high + margin)
    links = [close(fig, ax, path)]

    # Two ranks make no curve.
    by_rank = {name: pairs for name, pairs in families(main).items() if len(pairs) > 2}
    if by_rank:
        ranks = sorted({r for pairs in by_rank.values() for r, _ in pairs})
        fig, ax, path = draw("rank", "rank", [float(r) for r in ranks])
        for name, pairs in by_rank.items():
            curve(ax, [r for r, _ in pairs], [t for _, t in pairs], name)
        for name in references(group):
            ax.axhline(group[name].mean, color=colour(name), linestyle=":", label=name)
        links.append(close(fig, ax, path))

    fig, ax, path = draw(
        "rates", "learning rate", sorted({r for t in main.values() for r in t.curve})
    )
    for name, t in main.items():
        finite = {rate: loss for rate, loss in t.curve.items() if math.isfinite(loss)}
        style = {"color": colour(name), "marker": MARKERS.get(rank(name), "o")}
        ax.plot(list(finite), list(finite.values()), label=name, **style)
    links.append(close(fig, ax, path))
    return links


def main() -> None:
    """Prints the tables; fills the page and draws the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=RESULTS.parent.parent / "RESULTS.md")
    args = parser.parse_args()
    rows = read(args.results)
    if not rows:
        raise SystemExit(f"{args.results} has no results yet: run experiments.pretrain.study.")
    for size, group in tuned(rows).items():
        table = Table(title=title(size))
        for name in HEADER:
            table.add_column(name, overflow="fold", no_wrap=name == "optimizer")
        for line in lines(group):
            table.add_row(*line)
        Console().print(table)
    block = pages.Block(args.results.stem, "Validation loss", markdown)
    pages.write_report(args.results.parent, args.page, {"study": block})


if __name__ == "__main__":
    main()
