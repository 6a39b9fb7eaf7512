"""The study: which settings are forked, and the lines that each pair leaves in the CSV files."""

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from experiments.records import Records, machine
from optax_moma.diagnostics import barrier, interpolation_curve, midpoint_gain

from .forks import Measured, Setting, orders, train
from .problems import Params, Problem

console = Console(highlight=False)
ALPHAS = 5


class Plan(NamedTuple):
    """What is run on one problem.

    Attributes:
      series: by name, settings that one program runs.
      prefix: how the shared beginning of a pair is trained.
      prefix_steps: its length.
      steps: length of every branch: the same for all batch sizes, so that at one learning rate
        training goes the same way for the same time, and only the noise differs.
      pairs: seeds.
      checks: how often noise is measured on the way.
    """

    series: Mapping[str, Sequence[Setting]]
    prefix: Setting
    prefix_steps: int
    steps: int
    pairs: tuple[int, ...]
    checks: int


def grid(
    optimizer: str,
    batch: int,
    rates: Iterable[float],
    *,
    momentum: float = 0.0,
    decays: Iterable[float] = (0.0,),
    schedule: str = "cosine",
) -> list[Setting]:
    """All pairs of a learning rate and a weight decay."""
    return [
        Setting(optimizer, batch, schedule, rate, momentum, decay)
        for rate in rates
        for decay in decays
    ]


HALF_DECADES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAY = (5e-4,)


def image_plan() -> Plan:
    """Learning rates at three batches, other momenta, weight decays, no annealing; AdamW; moma."""
    sgd = partial(grid, "sgd", momentum=0.9, decays=DECAY)
    adaptive = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    series = {f"sgd, batch {b}": sgd(b, HALF_DECADES) for b in (32, 8, 128)}
    other = {
        momentum: partial(grid, "sgd", 32, [factor * r for r in HALF_DECADES], momentum=momentum)
        for momentum, factor in ((0.0, 10), (0.99, 0.1))
    }
    for momentum, make in other.items():
        series[f"sgd, momentum {momentum:g}"] = make(decays=DECAY)
    series["sgd, weight decay"] = grid(
        "sgd", 32, (0.01, 0.1), momentum=0.9, decays=(0.0, 1e-4, 2e-3, 1e-2)
    )
    series["sgd, constant rate"] = sgd(32, HALF_DECADES, schedule="constant")
    for name in ("adamw", "moma"):
        for b in (32, 8, 128):
            series[f"{name}, batch {b}"] = grid(name, b, adaptive, decays=(0.01,))
    for b in (8, 128):
        series[f"sgd, constant rate, batch {b}"] = sgd(b, HALF_DECADES, schedule="constant")
    for momentum, make in other.items():
        series[f"sgd, constant rate, momentum {momentum:g}"] = make(
            decays=DECAY, schedule="constant"
        )
    prefix = Setting("sgd", 32, "constant", 0.03, 0.9, 5e-4)
    return Plan(series, prefix, 500, 1500, (0, 1, 2, 3), 10)


def language_plan() -> Plan:
    """Learning rates of AdamW at two batches."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    series = {f"adamw, batch {b}": grid("adamw", b, rates, decays=(0.01,)) for b in (4, 16)}
    return Plan(series, Setting("adamw", 16, "constant", 1e-3, 0.0, 0.01), 400, 300, (0, 1, 2), 4)


FORKS = ("problem", "series", "learning_rate", "momentum", "weight_decay", "pair")
ESTIMATES = (*FORKS, "step")


def run(problem: Problem, plan: Plan, results: Path) -> None:
    """Runs what is not in the files yet, series by series."""
    done = Records(results / "forks.csv", FORKS)
    estimates = Records(results / "estimates.csv", ESTIMATES)
    starts = None
    for name, settings in plan.series.items():
        last = _key(problem, name, settings[-1], plan.pairs[-1])
        if done.holds(**last):
            continue
        if starts is None:
            starts = prefixes(problem, plan)
        begin = time.monotonic()
        rows = orders(_size(problem), plan.pairs, plan.steps, settings[0].batch)
        ends, measured = jax.block_until_ready(train(problem, settings, starts, rows, plan.checks))
        share = (time.monotonic() - begin) / (len(settings) * len(plan.pairs))
        for s, setting in enumerate(settings):
            for p, pair in enumerate(plan.pairs):
                key = _key(problem, name, setting, pair)
                own = Measured(*(np.asarray(x[s, p], np.float64) for x in measured))
                if not done.holds(**key):
                    _write_estimates(estimates, key, setting, plan, own)
                    branches = [taken(ends, s, p, branch) for branch in (0, 1)]
                    done.add(**key, **outcome(problem, setting, branches, own), seconds=share,
                             machine=machine())  # fmt: skip
        console.print(f"{problem.name}: {name}, {time.monotonic() - begin:.0f} s")


def _key(problem: Problem, series: str, setting: Setting, pair: int) -> dict[str, Any]:
    numbers = setting._asdict()
    names = ("learning_rate", "momentum", "weight_decay")
    return {"problem": problem.name, "series": series, **{n: numbers[n] for n in names},
            "pair": pair}  # fmt: skip


def taken(tree: Any, *place: int) -> Any:
    """One of many, from leaves with leading axes."""
    return jax.tree.map(lambda x: x[place], tree)


def _size(problem: Problem) -> int:
    return len(jax.tree.leaves(problem.train)[0])


def prefixes(problem: Problem, plan: Plan) -> Params:
    """The shared beginnings, one per pair."""
    init = jax.vmap(lambda seed: problem.init(jax.random.key(seed)))
    starts = init(np.array(plan.pairs))
    rows = orders(_size(problem), [100 + p for p in plan.pairs], plan.prefix_steps,
                  plan.prefix.batch)  # fmt: skip
    ends, _ = train(problem, [plan.prefix], starts, rows[:, :1], 1)
    return jax.tree.map(lambda x: x[0, :, 0], ends)


def outcome(
    problem: Problem, setting: Setting, branches: Sequence[Params], measured: Measured
) -> dict[str, Any]:
    """What one pair came to: its ends, its middle, and the noise averaged over training.

    A branch that is not finite gives NaN.
    """
    lengthening = 1 - setting.momentum
    mean = lambda variance: float(np.mean(measured.rate * variance) / lengthening)  # noqa: E731
    found = {
        "batch": setting.batch,
        "optimizer": setting.optimizer,
        "schedule": setting.schedule,
        "proxy": setting.noise,
        "logged": mean(measured.logged),
        "moments": mean(measured.moments),
        "exact": mean(measured.exact),
        "adaptive": float(np.mean(measured.adaptive)),
    }
    names = ("score_a", "score_b", "score_merged", "loss_a", "loss_b", "loss_merged", "gain",
             "loss_gain", "barrier")  # fmt: skip
    if not all(np.all(np.isfinite(x)) for x in jax.tree.leaves(branches)):
        return found | dict.fromkeys(names, float("nan"))
    evaluate = partial(problem.score, examples=problem.test)
    curve = interpolation_curve(*branches, evaluate, ALPHAS)
    score, loss = (np.asarray(curve.values[n], np.float64) for n in ("score", "loss"))
    middle = ALPHAS // 2
    values = (score[0], score[-1], score[middle], loss[0], loss[-1], loss[middle],
              midpoint_gain(curve.alphas, score), -midpoint_gain(curve.alphas, loss),
              barrier(curve.alphas, loss))  # fmt: skip
    return found | {n: float(v) for n, v in zip(names, values, strict=True)}


def _write_estimates(
    records: Records, key: dict[str, Any], setting: Setting, plan: Plan, measured: Measured
) -> None:
    """The three estimates of the gradient's variance at every check, of the first branch."""
    every = plan.steps // plan.checks
    for check in range(plan.checks):
        step = every * (check + 1)
        if key["pair"] in plan.pairs[:2] and not records.holds(**key, step=step):
            at = {n: float(getattr(measured, n)[0, check]) for n in ("logged", "moments", "exact",
                                                                     "square")}  # fmt: skip
            records.add(**key, step=step, optimizer=setting.optimizer, batch=setting.batch, **at)
