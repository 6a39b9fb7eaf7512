"""The study: every method is tuned on dev in the first order, and reported on test in all three."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from experiments.glue.experts import size
from experiments.records import Records, machine
from optax_moma.continual import ewc, stages

from .methods import Method
from .worlds import World

Tree = Any
console = Console(highlight=False)


class Passage(NamedTuple):
    """What a way through a stream came to.

    Attributes:
      accuracy: (stages, tasks), NaN for tasks not seen yet.
      bytes: (stages,), of the state that is kept between tasks.
      training: (stages,), seconds.
      merging: (stages,), seconds of the merge and of its correction.
    """

    accuracy: np.ndarray
    bytes: np.ndarray
    training: np.ndarray
    merging: np.ndarray

    @property
    def final(self) -> float:
        """Mean accuracy over all tasks at the end."""
        return float(np.mean(self.accuracy[-1]))

    @property
    def forgetting(self) -> float:
        """How far tasks but the last fell from their best, on average, by the end."""
        return forgetting(self.accuracy)


def forgetting(accuracy: np.ndarray) -> float:
    """The mean, over all tasks but the last, of the best accuracy so far less the final one."""
    return float(np.mean(np.nanmax(accuracy[:, :-1], axis=0) - accuracy[-1, :-1]))


def go_through(
    world: World,
    order: Sequence[str],
    method: Method,
    rate: float,
    number: float | None,
    split: str,
    seed: int,
    correction: float | None = None,
    *,
    every: bool = True,
) -> Passage:
    """One way through the tasks in this order; accuracy after each of them.

    Args:
      world: model and data.
      order: names of tasks.
      method: the way.
      rate: learning rate.
      number: the method's own number.
      split: where accuracy is measured.
      seed: of the order of examples.
      correction: the correction's number.
      every: whether accuracy is measured after every task, or at the end alone.
    """
    merge = method.merge(number)
    last: list[Any] = [None]
    seconds: list[float] = []

    def train(params: Tree, task: str) -> tuple[Tree, Tree]:
        begin = time.monotonic()
        penalty = None
        if method.penalty is not None:
            # Before the first task its curvature is zero, and so is the penalty.
            state = merge.init(world.base) if last[0] is None else last[0].state
            penalty = ewc(params, state.curvature, np.float32(number))
        start = world.base if method.start == "base" else params
        expert, curvature = world.train(start, task, method, rate, penalty, seed)
        if method.penalty == "fisher":
            curvature = world.fisher(expert, task)
        jax.block_until_ready((expert, curvature))
        seconds.append(time.monotonic() - begin)
        return expert, curvature

    def corrected(params: Tree, previous: Tree, tuned: Tree, task: str) -> Tree:
        assert correction is not None
        return world.corrected(method, correction, params, previous, tuned, task)

    accuracy, sizes, merging = np.full((len(order), len(order)), np.nan), [], []
    fix = corrected if method.correction else None
    steps = stages(merge, world.base, order, train, fix)
    for n in range(len(order)):
        begin = time.monotonic()
        last[0] = jax.block_until_ready(next(steps))
        merging.append(time.monotonic() - begin - seconds[-1])
        sizes.append(size(last[0].state))
        for place, task in enumerate(order[: n + 1] if every or n + 1 == len(order) else ()):
            accuracy[n, place] = world.accuracy(last[0].params, task, method.linear, split)
    return Passage(accuracy, *map(np.array, (sizes, seconds, merging)))


def tuning_records(results: Path) -> Records:
    """Mean dev accuracy at the end of the first order."""
    return Records(results / "tuning.csv", ("stream", "method", "rate", "number"))


def tune(world: World, results: Path) -> None:
    """Tries every learning rate with every number of every method."""
    records = tuning_records(results)
    for name, method in world.methods.items():
        begin = time.monotonic()
        base_rate, base_number = chosen(results, world.name, method.of) if method.of else (0, None)
        for rate in (base_rate,) if method.of else world.rates:
            for number in method.numbers:
                key = {"stream": world.name, "method": name, "rate": rate, "number": number}
                if records.holds(**key):
                    continue
                numbers = (base_number, number) if method.of else (number, None)
                found = go_through(
                    world, world.orders[0], method, rate, numbers[0], "dev", 0, numbers[1],
                    every=False,
                )  # fmt: skip
                records.add(**key, dev=found.final)
        rate, number = chosen(results, world.name, name)
        console.print(
            f"{world.name}: {name}: rate {rate:g}, number {number},"
            f" {time.monotonic() - begin:.0f} s"
        )


def chosen(results: Path, stream: str, method: str) -> tuple[float, float | None]:
    """The rate and the number with the best dev accuracy.

    Raises:
      ValueError: nothing was tried yet.
    """
    rows = tuning_records(results).where(stream=stream, method=method)
    if not rows:
        raise ValueError(f"{method} was not tuned on {stream} yet: run the stage tune first.")
    best = max(rows, key=lambda row: np.nan_to_num(float(row["dev"]), nan=-1))
    return float(best["rate"]), None if best["number"] == "None" else float(best["number"])


def report(world: World, results: Path) -> None:
    """Every method as tuned, in all orders, on test; what it may be held against beside it."""
    for n, order in enumerate(world.orders):
        for name, method in world.methods.items():
            write(world, results, name, method, n)
        references(world, results, n, order)


def accuracies(results: Path) -> Records:
    """Test accuracy of every task seen so far, after every stage."""
    return Records(results / "accuracy.csv", ("stream", "method", "order", "stage", "place"))


def write(world: World, results: Path, name: str, method: Method, n: int) -> None:
    """One method in one order, unless it is there."""
    costs = Records(results / "costs.csv", ("stream", "method", "order", "stage"))
    records, order = accuracies(results), world.orders[n]
    label = {"stream": world.name, "method": name, "order": n}
    if costs.holds(**label, stage=len(order) - 1):
        return
    rate, own = chosen(results, world.name, name)
    number = chosen(results, world.name, method.of)[1] if method.of else own
    found = go_through(world, order, method, rate, number, "test", n, own)
    for stage, place in zip(*np.nonzero(np.isfinite(found.accuracy)), strict=True):
        if not records.holds(**label, stage=stage, place=place):
            accuracy = float(found.accuracy[stage, place])
            records.add(**label, stage=stage, place=place, task=order[place], accuracy=accuracy)
    for stage in range(len(order)):
        if not costs.holds(**label, stage=stage):
            costs.add(
                **label,
                stage=stage,
                bytes=int(found.bytes[stage]),
                training=float(found.training[stage]),
                merging=float(found.merging[stage]),
                machine=machine(),
            )
    console.print(
        f"{world.name}, order {n}: {name}: {100 * found.final:.1f}, forgot"
        f" {100 * found.forgetting:.1f}"
    )


def references(world: World, results: Path, n: int, order: Sequence[str]) -> None:
    """What has seen no task, or all of them at once, or a task alone."""
    records, last = accuracies(results), len(order) - 1
    label = {"stream": world.name, "order": n, "stage": last}
    if all(records.holds(**label, method=name, place=last) for name in world.bounds):
        return
    for name, task, accuracy in world.references(order, n):
        place = order.index(task)
        key = {"stream": world.name, "method": name, "order": n, "stage": last, "place": place}
        if not records.holds(**key):
            records.add(**key, task=task, accuracy=accuracy)
