"""Tables and figures from the CSV files; no number here is computed from anything else."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import spearmanr

from experiments.pages import Block, Row, number, save, table, tidy, unique

MEASURES: Mapping[str, str] = {
    "learning_rate": "η",
    "per_batch": "η / B",
    "proxy": "η / (B (1 − μ))",
    "squared": "η / (B (1 − μ)²)",
    "logged": "measured: moments, every step",
    "moments": "measured: moments, last state",
    "exact": "measured: two batches",
    "adaptive": "measured: preconditioned",
}
"""What gains may be a function of, and what tables call it."""
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C7")
SURE = 0.005
TITLES = {"fashion": "Fashion-MNIST", "language": "Language model"}


class Point(NamedTuple):
    """One setting: means over its pairs, and the standard error of the gain.

    Attributes:
      series: name.
      optimizer: name.
      schedule: cosine or constant.
      x: by name of `MEASURES`, and ``adaptive``: how noisy it is.
      gains: (pairs,): score of the average less mean score of its branches.
      merged: (pairs,): score of the average.
      single: (pairs,): mean score of the branches.
      loss_gains: (pairs,): mean loss of the branches less that of the average.
      barriers: (pairs,).
    """

    series: str
    optimizer: str
    schedule: str
    x: dict[str, float]
    gains: np.ndarray
    merged: np.ndarray
    single: np.ndarray
    loss_gains: np.ndarray
    barriers: np.ndarray


def points(rows: Sequence[Row], problem: str) -> list[Point]:
    """All settings of a problem whose branches stayed finite."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["problem"] == problem and np.isfinite(float(row["gain"])):
            names = ("series", "learning_rate", "momentum", "weight_decay")
            found.setdefault(tuple(row[n] for n in names), []).append(row)
    return [_point(own) for own in found.values()]


def _point(rows: list[Row]) -> Point:
    column = lambda name: np.array([float(row[name]) for row in rows])  # noqa: E731
    x = {n: float(np.mean(column(n))) for n in MEASURES if n in rows[0]}
    x["per_batch"] = x["learning_rate"] / float(rows[0]["batch"])
    x["squared"] = x["proxy"] / (1 - float(rows[0]["momentum"]))
    single = (column("score_a") + column("score_b")) / 2
    names = (rows[0][n] for n in ("series", "optimizer", "schedule"))
    others = map(column, ("loss_gain", "barrier"))
    return Point(*names, x, column("gain"), column("score_merged"), single, *others)


def error(values: np.ndarray) -> float:
    """The standard error of a mean."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def by_noise(found: Sequence[Point], name: str = "proxy") -> list[Point]:
    """Ascending."""
    return sorted(found, key=lambda point: point.x[name])


# ---------------------------------------------------------------------------------- an inverted U?


def shapes(rows: list[Row], results: Path) -> str:
    """Of each series along its learning rates: gain at the ends and at the peak."""
    lines = []
    for problem in unique(rows, "problem"):
        every = points(rows, problem)
        for series in dict.fromkeys(point.series for point in every):
            own = by_noise([p for p in every if p.series == series])
            if len(own) < 3 or "decay" in series:
                continue
            top = max(own, key=lambda p: np.mean(p.gains))
            best = max(own, key=lambda p: np.mean(p.merged))
            alone = max(own, key=lambda p: np.mean(p.single))
            drop = [np.mean(top.gains) - np.mean(p.gains) for p in (own[0], own[-1])]
            spread = [np.hypot(error(top.gains), error(p.gains)) for p in (own[0], own[-1])]
            rises, falls = (d > 2 * s for d, s in zip(drop, spread, strict=True))
            shape = {(True, True): "inverted U", (True, False): "rises",
                     (False, True): "falls"}.get((rises, falls), "flat")  # fmt: skip
            lines.append(
                [TITLES[problem], series, *(number(p.gains, 2) for p in (own[0], top, own[-1])),
                 shape, *(f"{p.x['proxy']:.2g}" for p in (top, best, alone)), number(best.merged),
                 number(alone.single)]
            )  # fmt: skip
    header = ["problem", "series", "gain, least noise", "gain, peak", "gain, most noise",
              "shape", "peak at η/(B(1−μ))", "best merge at", "best branch at", "best merge",
              "best branch"]  # fmt: skip
    note = (
        "Gains and scores in points (% right) ± standard error over pairs. 'Inverted U': the peak"
        " is above both ends by more than two standard errors; 'rises': above the low end only;"
        " 'falls': above the high end only; 'flat': above neither."
    )
    return f"{table(header, lines)}\n\n{note}"


# ------------------------------------------------------------------------------ do they collapse?


def explained(found: Sequence[Point], name: str, value: Callable[[Point], float]) -> float:
    """How much of a value's variance over settings a cubic in log noise predicts.

    For each series by a fit to all others, beyond whose range it is constant.
    """
    x = np.log10([point.x[name] for point in found])
    y = np.array([value(point) for point in found])
    series = np.array([point.series for point in found])
    predicted = np.empty_like(y)
    for own in np.unique(series):
        out = series == own
        degree = min(3, len(np.unique(x[~out])) - 1)
        fit = np.polynomial.Polynomial.fit(x[~out], y[~out], degree)
        predicted[out] = fit(np.clip(x[out], x[~out].min(), x[~out].max()))
    return float(1 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2))


Kind = tuple[str, str, str]
"""Problem, optimizer and schedule."""


def title(kind: Kind) -> str:
    """What tables and figures call it."""
    problem, optimizer, schedule = kind
    return f"{TITLES[problem]}, {optimizer}, {'annealed' if schedule == 'cosine' else 'constant'}"


def groups(rows: Sequence[Row]) -> dict[Kind, list[Point]]:
    """Settings whose gains may lie on one curve."""
    found: dict[Kind, list[Point]] = {}
    for problem in unique(rows, "problem"):
        for point in points(rows, problem):
            found.setdefault((problem, point.optimizer, point.schedule), []).append(point)
    return found


def collapse(rows: list[Row], results: Path) -> str:
    """How well each measure of noise predicts the gain of series it has not seen."""
    made = groups(rows)
    gain: Callable[[Point], float] = lambda point: float(np.mean(point.gains))  # noqa: E731
    merged: Callable[[Point], float] = lambda point: float(np.mean(point.merged))  # noqa: E731
    lines = []
    for kind, every in made.items():
        own = [point for point in every if "decay" not in point.series]
        if len({point.series for point in own}) < 3:
            continue  # a cubic through the few points of one other series says nothing
        sure = [point for point in own if error(point.gains) < SURE]
        for what, value, some in (
            ("merged", merged, own), ("gain", gain, own), ("gain, ± < 0.5", gain, sure)
        ):  # fmt: skip
            # Adam's and moma's momentum is an average: the four proxies are two.
            cells = [
                f"{explained(some, name, value):.2f}" if name in useful(kind[1]) else ""
                for name in MEASURES
            ]
            if some is own or len(some) < len(own):
                lines.append([title(kind), what, *cells])
    note = (
        "Share of the variance over settings that the noise of this column predicts, by a cubic in"
        " its logarithm fitted to the other series: 1 is one curve for all, 0 is no better than"
        " the mean, less than 0 is worse. '± < 0.5' leaves out settings whose pairs differ so"
        " much that the standard error of their gain is 0.5 points or more."
    )
    figures = [figure(made, problem, results) for problem in unique(rows, "problem")]
    return "\n\n".join([table(["settings", "of", *MEASURES.values()], lines), note, *figures])


def useful(optimizer: str) -> tuple[str, ...]:
    """The measures that say something of an optimizer of their own."""
    if optimizer == "sgd":
        return tuple(name for name in MEASURES if name != "adaptive")
    return tuple(name for name in MEASURES if name not in ("per_batch", "squared"))


def figure(made: Mapping[Kind, list[Point]], problem: str, results: Path) -> str:
    """Gain against the learning rate, the proxy and the measured noise."""
    kinds = [kind for kind in made if kind[0] == problem]
    panels = {name: MEASURES[name] for name in ("learning_rate", "proxy", "logged")}
    drawn = Figure(figsize=(4 * len(panels), 2.9 * len(kinds)), layout="constrained")
    grid = drawn.subplots(len(kinds), len(panels), squeeze=False, sharey="row")
    for kind, row in zip(kinds, grid, strict=True):
        for axes, (name, label) in zip(row, panels.items(), strict=True):
            _curves(axes, made[kind], name)
            axes.set_xlabel(label)
        row[0].set_ylabel(f"{kind[1]}, {title(kind).rpartition(', ')[2]}\ngain (points)")
        row[0].legend(frameon=False, fontsize=7)
    drawn.suptitle(
        f"{TITLES[problem]}: accuracy of the average of two branches, less their mean accuracy;"
        " mean of pairs ± s.e."
    )
    return save(drawn, results / f"gain_{problem}.png")


def label_of(series: str) -> str:
    """``sgd, constant rate, batch 8`` -> ``batch 8``."""
    return series.rpartition(", ")[2].replace("constant rate", "batch 32")


def _curves(axes: Axes, found: Sequence[Point], name: str) -> None:
    for colour, series in zip(COLOURS, dict.fromkeys(p.series for p in found), strict=False):
        mine = by_noise([p for p in found if p.series == series], name)
        style = {"ls": "none", "marker": "x"} if "decay" in series else {"marker": "o", "lw": 1}
        axes.errorbar(
            [p.x[name] for p in mine],
            [100 * np.mean(p.gains) for p in mine],
            [100 * error(p.gains) for p in mine],
            label=label_of(series), color=colour, ms=4, **style,
        )  # fmt: skip
    axes.axhline(0, color="0.5", lw=0.8)
    axes.set_xscale("log")
    tidy(axes)


# -------------------------------------------------------------------------- what else the forks say


def decay(rows: list[Row], results: Path) -> str:
    """What weight decay does at two learning rates."""
    lines = []
    for row in dict.fromkeys(
        (r["problem"], r["series"], r["learning_rate"], r["weight_decay"])
        for r in rows
        if "decay" in r["series"]
    ):
        names = ("problem", "series", "learning_rate", "weight_decay")
        own = [r for r in rows if tuple(r[n] for n in names) == row]
        for point in points(own, row[0]):
            cells = (number(x, 2) for x in (point.single, point.merged, point.gains))
            lines.append([*row[2:], *cells, f"{point.x['logged']:.3g}"])
    return table(["η", "weight decay", "branch", "merged", "gain", "measured noise"], lines)


# ---------------------------------------------------------------- the moments against two batches


def estimates(rows: list[Row], results: Path) -> str:
    """Rank correlation of the estimates from moments with the exact one."""
    lines = []
    for problem, optimizer in dict.fromkeys((r["problem"], r["optimizer"]) for r in rows):
        own = [r for r in rows if (r["problem"], r["optimizer"]) == (problem, optimizer)]
        for name, title in (("logged", "every step"), ("moments", "last state")):
            x, y, run = _columns(own, name)
            series = np.array([name.partition("/")[0] for name in run])
            inner = (
                np.nanmedian([spearmanr(x[of == one], y[of == one]).statistic
                              for one in np.unique(of)])
                for of in (series, run)
            )  # fmt: skip
            lines.append(
                [TITLES[problem], optimizer, title, str(len(x)),
                 f"{spearmanr(x, y).statistic:.3f}", *(f"{value:.2f}" for value in inner),
                 f"{np.median(x / y):.2f}", f"{np.percentile(x / y, 10):.2f} to"
                 f" {np.percentile(x / y, 90):.2f}"]
            )  # fmt: skip
    header = ["problem", "optimizer", "moments of", "points", "rank correlation",
              "within a series (median)", "within a run (median)", "median ratio",
              "80 % of ratios"]  # fmt: skip
    parts = [table(header, lines)]
    for column, what in (("learning_rate", "learning rate"), ("step", "step")):
        parts += [f"Median ratio of 'every step' by {what}:", ratios(rows, column, what)]
    return "\n\n".join([*parts, scatter(rows, results)])


def ratios(rows: Sequence[Row], column: str, what: str) -> str:
    """How far the moments are off where a column has each of its values."""
    kinds = list(dict.fromkeys((r["problem"], r["optimizer"]) for r in rows))
    values = sorted(unique(rows, column), key=float)
    lines = []
    for value in values:
        cells = []
        for kind in kinds:
            x, y, _ = _columns(
                [r for r in rows if (r["problem"], r["optimizer"], r[column]) == (*kind, value)],
                "logged",
            )
            cells.append(f"{np.median(x / y):.2f}" if len(x) else "")
        lines.append([value, *cells])
    return table([what, *(f"{TITLES[p]}, {optimizer}" for p, optimizer in kinds)], lines)


def _columns(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The estimate, the exact one, and which run each is from; only where both are positive."""
    x, y = (np.array([float(r[n]) for r in rows]) for n in (name, "exact"))
    ids = ["/".join(r[n] for n in ("series", "learning_rate", "momentum", "weight_decay", "pair"))
           for r in rows]  # fmt: skip
    known = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    return x[known], y[known], np.array(ids)[known]


def scatter(rows: list[Row], results: Path) -> str:
    """Every check of every run."""
    kinds = list(dict.fromkeys((r["problem"], r["optimizer"]) for r in rows))
    drawn = Figure(figsize=(3.3 * len(kinds), 3.6), layout="constrained")
    panels = drawn.subplots(1, len(kinds), squeeze=False)[0]
    for axes, (problem, optimizer) in zip(panels, kinds, strict=True):
        own = [r for r in rows if (r["problem"], r["optimizer"]) == (problem, optimizer)]
        for name, colour, label in (
            ("moments", "C1", "last state"),
            ("logged", "C0", "every step"),
        ):
            x, y, _ = _columns(own, name)
            axes.plot(y, x, ".", color=colour, ms=3, alpha=0.5, label=label)
        ends = [min(y.min(), x.min()), max(y.max(), x.max())]
        axes.plot(ends, ends, color="0.3", lw=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{TITLES[problem]}, {optimizer}", fontsize=10)
        axes.set_xlabel("variance from two batches")
        tidy(axes)
    panels[0].set_ylabel("variance from the moments")
    panels[0].legend(frameon=False, markerscale=3)
    drawn.suptitle("Variance of the mini-batch gradient over training and settings; line: equal")
    return save(drawn, results / "estimates.png")


# --------------------------------------------------------------------------------------- the recipe


def recipe(rows: list[Row], results: Path) -> str:
    """What ``sweep`` found, and what test data say of it."""
    noises = sorted({float(row["noise"]) for row in rows})
    at = lambda noise, name: np.array(  # noqa: E731
        [float(r[name]) for r in rows if float(r["noise"]) == noise]
    )
    best = max(noises, key=lambda noise: np.mean(at(noise, "score_merged")))
    lines = [
        [f"{'**' if noise == best else ''}x {noise:g}{'**' if noise == best else ''}",
         *(number(at(noise, n), 2) for n in ("score", "score_merged", "test", "test_merged"))]
        for noise in noises
    ]  # fmt: skip
    header = ["noise", "branch, dev", "merged, dev", "branch, test", "merged, test"]
    return table(header, lines)


def timing(rows: list[Row], results: Path) -> str:
    """Wall time by series."""
    lines = []
    for problem in unique(rows, "problem"):
        for series in unique([r for r in rows if r["problem"] == problem], "series"):
            own = [r for r in rows if (r["problem"], r["series"]) == (problem, series)]
            lines.append([TITLES[problem], series, str(len(own)),
                          f"{sum(float(r['seconds']) for r in own):.0f}",
                          own[0]["machine"]])  # fmt: skip
    return table(["problem", "series", "pairs", "seconds", "machine"], lines)


BLOCKS: Mapping[str, Block] = {
    "shapes": Block("forks", "Is it an inverted U?", shapes),
    "collapse": Block("forks", "Do the curves collapse?", collapse),
    "decay": Block("forks", "Weight decay", decay),
    "estimates": Block("estimates", "Noise from the moments against two batches", estimates),
    "recipe": Block("sweep_fashion", "The recipe", recipe),
    "timing": Block("forks", "Time", timing),
}
"""By name: the CSV file, the heading, and what is made of it."""
