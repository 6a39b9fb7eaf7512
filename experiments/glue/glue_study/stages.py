"""The stages of the study: each reads what is cached and adds lines to CSV files."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from rich.console import Console

from .experts import Evaluator, Recipe, Study, about_expert, expert
from .records import Records, numbers

RATES = (5e-5, 1e-4, 2e-4, 4e-4)
RATE_TASKS = ("cola", "sick")
"""Cheap tasks of different kinds, on which the learning rates are chosen at the full budget."""

console = Console(highlight=False)


def rate_records(study: Study) -> Records:
    """Dev scores by learning rate."""
    return Records(study.results / "rates.csv", ("optimizer", "task", "learning_rate"))


def learning_rates(study: Study, optimizer: str) -> None:
    """Trains at every rate of the same grid on `RATE_TASKS`, seed 0; these experts are kept too."""
    records, evaluate = rate_records(study), Evaluator(study)
    for task, rate in product(RATE_TASKS, RATES):
        if records.holds(optimizer=optimizer, task=task, learning_rate=rate):
            continue
        recipe = Recipe(task, optimizer, learning_rate=rate)
        trained = expert(study, recipe)
        score = evaluate.primary(trained.encoder, {task: trained.head}, "dev")[task]
        about = about_expert(study, recipe) or {}
        records.add(
            optimizer=optimizer,
            task=task,
            learning_rate=rate,
            dev=score,
            train_loss=about["loss"],
            seconds=about["seconds"],
            machine=about["machine"],
        )
        console.print(f"{recipe.name}: dev {score:.3f}, {about['seconds']:.0f} s")


def learning_rate(study: Study, optimizer: str) -> float:
    """The rate with the best mean dev score.

    Raises:
      ValueError: it has not been chosen yet.
    """
    rows = rate_records(study).where(optimizer=optimizer)
    means = {
        rate: np.mean(numbers([r for r in rows if float(r["learning_rate"]) == rate], "dev"))
        for rate in sorted({float(row["learning_rate"]) for row in rows})
    }
    if not means:
        raise ValueError(f"No learning rate for {optimizer} yet: run the stage train first.")
    return max(means, key=lambda rate: means[rate])


def recipe_for(study: Study, task: str, optimizer: str, seed: int) -> Recipe:
    """The recipe of one of the study's experts."""
    return Recipe(task, optimizer, seed, learning_rate(study, optimizer))


def expert_records(study: Study) -> Records:
    """Scores and costs of the experts."""
    return Records(study.results / "experts.csv", ("task", "optimizer", "seed", "metric"))


def train(study: Study, tasks: Sequence[str], optimizer: str, seed: int) -> None:
    """Trains one optimizer's experts, and scores each on dev and test."""
    records, evaluate = expert_records(study), Evaluator(study)
    for task in tasks:
        metrics = study.tasks[task].kind.metrics
        if records.holds(task=task, optimizer=optimizer, seed=seed, metric=metrics[-1]):
            continue
        recipe = recipe_for(study, task, optimizer, seed)
        trained = expert(study, recipe)
        about = about_expert(study, recipe) or {}
        dev, test = (
            evaluate(trained.encoder, {task: trained.head}, split)[task]
            for split in ("dev", "test")
        )
        for metric in metrics:
            records.add(
                task=task,
                optimizer=optimizer,
                seed=seed,
                metric=metric,
                learning_rate=recipe.learning_rate,
                dev=dev[metric],
                test=test[metric],
                steps=about["steps"],
                seconds=about["seconds"],
                machine=about["machine"],
            )
        console.print(
            f"{recipe.name}: {metrics[0]} dev {dev[metrics[0]]:.3f} test {test[metrics[0]]:.3f},"
            f" {about['seconds']:.0f} s"
        )
