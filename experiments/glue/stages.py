"""The stages of the study: each reads what is cached and adds lines to CSV files."""

import json
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import combinations, product
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from experiments.records import Records, machine, numbers
from optax_moma.demo.encoder import Params
from optax_moma.demo.pipeline import along
from optax_moma.diagnostics import barrier, interpolation_curve

from . import measures, merges, saliency
from .experts import Evaluator, Expert, Recipe, Study, about_expert, expert
from .fisher import fisher_of, grams_of
from .fisher import record as record_fisher
from .merges import Choice, Method
from .multitask import multitask
from .multitask import recipe_of as joint_recipe
from .tasks import Examples

RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
RATE_TASKS = ("sick", "trec")
"""Cheap tasks of different kinds, on which the learning rates are chosen at the full budget."""
SETS: Sequence[tuple[str, ...]] = (
    ("sst2", "cola", "mrpc", "rte", "sick", "trec", "sts", "ag_news"),
    ("sst2", "mrpc", "sick", "trec"),
    ("cola", "rte", "sts", "ag_news"),
    ("sst2", "ag_news"),
    ("cola", "trec"),
    ("mrpc", "rte"),
    ("sick", "sts"),
)
"""The experts that are merged: all, two fours, four pairs, alike and unlike."""
Reported = Literal["held", "test"]
"""Where results are shown: the half of dev on which nothing is tuned, or test."""

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


# ----------------------------------------------------------------------------------------- fisher


def fisher(study: Study, tasks: Sequence[str], optimizer: str, seed: int) -> None:
    """The exact Fisher of each expert, and what it costs."""
    for task in tasks:
        record_fisher(study, recipe_for(study, task, optimizer, seed))
        console.print(f"Fisher of {task}, {optimizer}, seed {seed}")


# ----------------------------------------------------------------------------------------- select


def halves(study: Study) -> Study:
    """The study with dev cut in two: ``tune`` and ``held``."""

    def cut(examples: Examples) -> tuple[Examples, Examples]:
        half = len(examples.targets) // 2
        return Examples(*(x[:half] for x in examples)), Examples(*(x[half:] for x in examples))

    tasks = {}
    for name, task in study.tasks.items():
        tune, held = cut(task.splits["dev"])
        tasks[name] = task._replace(splits={**task.splits, "tune": tune, "held": held})
    return study._replace(tasks=tasks)


def select(
    study: Study,
    tasks: Sequence[str],
    optimizer: str,
    seed: int,
    chosen: Mapping[str, saliency.Score],
    split: Literal["dev", "test"],
) -> None:
    """Keeps a part of each task vector by each score; nothing is tuned."""
    key = ("task", "optimizer", "seed", "split", "score", "scope", "density")
    records, evaluate = Records(study.results / "select.csv", key), Evaluator(study)
    for task in tasks:
        recipe = recipe_for(study, task, optimizer, seed)
        ours = {"task": task, "optimizer": optimizer, "seed": seed, "split": split}
        densities = saliency.DENSITIES
        todo = {
            name: scopes
            for name in chosen
            if (
                scopes := [
                    scope
                    for scope in ("tensor", "global")
                    if not records.holds(**ours, score=name, scope=scope, density=densities[-1])
                ]
            )
        }
        if not todo:
            continue
        trained, base = expert(study, recipe), study.base
        truth = fisher_of(study, recipe)
        evaluated = partial(_one, evaluate, task, trained.head, split)
        ends = cache(
            lambda trained=trained, evaluated=evaluated: {
                "expert_value": evaluated(trained.encoder),
                "base_value": evaluated(study.base),
            }
        )
        for name, scopes in todo.items():
            scores = chosen[name](trained, base, truth)
            if scores is None:
                continue
            for scope in scopes:
                models = saliency.kept(trained.encoder, base, scores, densities, scope)
                for density, model in zip(densities, models, strict=True):
                    if not records.holds(**ours, score=name, scope=scope, density=density):
                        records.add(
                            **ours,
                            score=name,
                            scope=scope,
                            density=density,
                            value=evaluated(model),
                            **ends(),
                            machine=machine(),
                        )
        console.print(f"selection: {recipe.name}")


def _one(evaluate: Evaluator, task: str, head: Params, split: Any, encoder: Params) -> float:
    return evaluate.primary(encoder, {task: head}, split)[task]


# ------------------------------------------------------------------------------------------ merge


def shares(scores: Mapping[str, float], experts: Mapping[str, float]) -> dict[str, float]:
    """score / the expert's score, by task."""
    return {task: scores[task] / experts[task] for task in scores}


def merge(
    study: Study,
    optimizer: str,
    seed: int,
    methods: Mapping[str, Method],
    sets: Sequence[tuple[str, ...]],
    split: Reported,
    file: str,
) -> None:
    """Merges by every method, at its defaults and tuned, and scores each task with its own head."""
    setting = ("optimizer", "seed", "experts", "method")
    records = Records(study.results / f"{file}.csv", (*setting, "tuned", "split", "task"))
    tuning = Records(study.results / f"{file}_tuning.csv", (*setting, "setting", "scale"))
    evaluate, base = Evaluator(halves(study)), study.base

    for names in sets:
        label = {"optimizer": optimizer, "seed": seed, "experts": "+".join(names)}
        todo = [
            name
            for name in ("base", "experts", *methods)
            for tuned in ((False, True) if name in methods else (False,))
            if not records.holds(**label, method=name, tuned=tuned, split=split, task=names[-1])
        ]
        if not todo:
            continue
        recipes = {name: recipe_for(study, name, optimizer, seed) for name in names}
        experts = {name: expert(study, recipe) for name, recipe in recipes.items()}
        heads = {name: own.head for name, own in experts.items()}
        fisher = cache(lambda name, recipes=recipes: fisher_of(study, recipes[name]))
        grams = cache(lambda name, recipes=recipes: grams_of(study, recipes[name]))
        ceiling = {part: _own_scores(evaluate, experts, part) for part in ("tune", split)}
        record = partial(_record, records, label, split, ceiling[split])
        record("base", evaluate.primary(base, heads, split))
        record("experts", ceiling[split])
        for name in (name for name in methods if name in todo):
            method = methods[name]
            curvature = merges.given(method, experts, fisher, grams)
            start = time.monotonic()
            plain = jax.block_until_ready(merges.merged(method, {}, experts, base, curvature))
            seconds = time.monotonic() - start
            record(name, evaluate.primary(plain, heads, split), seconds=seconds)
            choice, whole = _tuned(
                tuning, label | {"method": name}, method, experts, heads, base, curvature,
                evaluate, ceiling["tune"],
            )  # fmt: skip
            scores = evaluate.primary(along(base, whole, choice.scale), heads, split)
            record(name, scores, tuned=True, choice=choice, seconds=seconds)
            share = np.mean(list(shares(scores, ceiling[split]).values()))
            console.print(
                f"{len(names)} of {optimizer}, seed {seed}: {name} {choice.setting} scale"
                f" {choice.scale}: {100 * share:.1f} % on {split}"
            )


def _own_scores(evaluate: Evaluator, experts: Mapping[str, Expert], split: Any) -> dict[str, float]:
    """What every expert scores on its own task."""
    return {
        name: _one(evaluate, name, own.head, split, own.encoder) for name, own in experts.items()
    }


def _record(
    records: Records,
    label: Mapping[str, Any],
    split: str,
    best: Mapping[str, float],
    method: str,
    scores: Mapping[str, float],
    *,
    tuned: bool = False,
    choice: Choice | None = None,
    seconds: float = 0.0,
) -> None:
    """Adds a line for every task's score, with its share of the expert's."""
    found = {"method": method, "tuned": tuned, "split": split}
    for task, score in scores.items():
        if not records.holds(**label, **found, task=task):
            records.add(
                **label,
                **found,
                task=task,
                setting=json.dumps(choice.setting) if choice else "default",
                scale=choice.scale if choice else 1.0,
                score=score,
                share=score / best[task],
                seconds=seconds,
                machine=machine(),
            )


def _tuned(
    tuning: Records,
    label: dict[str, Any],
    method: Method,
    experts: Mapping[str, Expert],
    heads: Mapping[str, Params],
    base: Params,
    curvature: Any,
    evaluate: Evaluator,
    ceiling: Mapping[str, float],
) -> tuple[Choice, Params]:
    """The best point of a method's grid, read from the records or found."""

    def score(encoder: Params) -> float:
        found = evaluate.primary(encoder, heads, "tune")
        return float(np.mean(list(shares(found, ceiling).values())))

    if not tuning.where(**label):
        points = [choice for choice, _ in merges.tried(method, experts, base, curvature, score)]
        for choice in points:
            tuning.add(
                **label,
                setting=json.dumps(choice.setting),
                scale=choice.scale,
                score=choice.score,
            )
    rows = tuning.where(**label)
    row = max(rows, key=lambda row: float(row["score"]))
    choice = Choice(json.loads(row["setting"]), float(row["scale"]), float(row["score"]))
    return choice, merges.merged(method, choice.setting, experts, base, curvature)


def together(study: Study, optimizer: str, seed: int, split: Reported) -> None:
    """One model trained on all tasks with their data: at the experts' rate, and at its own best."""
    names, method = SETS[0], "one model of all tasks (data)"
    label = {"optimizer": optimizer, "seed": seed, "experts": "+".join(names)}
    setting = ("optimizer", "seed", "experts", "method")
    records = Records(study.results / "merges.csv", (*setting, "tuned", "split", "task"))
    tuning = Records(study.results / "merges_tuning.csv", (*setting, "setting", "scale"))
    if records.holds(**label, method=method, tuned=True, split=split, task=names[-1]):
        return
    evaluate = Evaluator(halves(study))
    experts = {name: expert(study, recipe_for(study, name, optimizer, seed)) for name in names}
    ceiling = {part: _own_scores(evaluate, experts, part) for part in ("tune", split)}

    def scores(rate: float, part: Any) -> dict[str, float]:
        return evaluate.primary(*multitask(study, joint_recipe(names, optimizer, seed, rate)), part)

    for rate in RATES:
        line = label | {"method": method, "setting": json.dumps({"learning_rate": rate})}
        if not tuning.holds(**line, scale=1.0):
            share = np.mean(list(shares(scores(rate, "tune"), ceiling["tune"]).values()))
            tuning.add(**line, scale=1.0, score=float(share))
            console.print(f"all tasks, {optimizer}, rate {rate:g}: {100 * share:.1f} % on tune")
    row = max(tuning.where(**label, method=method), key=lambda row: float(row["score"]))
    best = json.loads(row["setting"])["learning_rate"]
    for tuned, rate in ((False, learning_rate(study, optimizer)), (True, best)):
        choice = Choice({"learning_rate": rate}, 1.0, float(row["score"]))
        found = scores(rate, split)
        _record(records, label, split, ceiling[split], method, found, tuned=tuned, choice=choice)


# ------------------------------------------------------------------------------------- statistics


def correlations(study: Study, tasks: Sequence[str], optimizer: str, seed: int) -> None:
    """Rank correlation of every estimate with the exact Fisher, leaf by leaf."""
    key = ("task", "optimizer", "seed", "kind", "estimate", "leaf")
    records = Records(study.results / "correlations.csv", key)
    for task in tasks:
        if records.where(task=task, optimizer=optimizer, seed=seed):
            continue
        recipe = recipe_for(study, task, optimizer, seed)
        rows = list(
            measures.agreements(expert(study, recipe), study.base, fisher_of(study, recipe))
        )
        for kind, estimate, leaf, rho, entries in rows:
            records.add(
                task=task,
                optimizer=optimizer,
                seed=seed,
                kind=kind,
                estimate=estimate,
                leaf=leaf,
                rho=rho,
                entries=entries,
            )
        console.print(f"correlations: {recipe.name}")


POINTS = 5
"""Where the line between two experts is scored, ends included."""


def pairs(study: Study, tasks: Sequence[str], optimizer: str, seed: int) -> None:
    """Overlap and conflict of every pair of experts, and the barrier between them on dev."""
    records = Records(study.results / "pairs.csv", ("optimizer", "seed", "a", "b"))
    evaluate, base = Evaluator(study), study.base
    recipes = {name: recipe_for(study, name, optimizer, seed) for name in tasks}
    for a, b in combinations(tasks, 2):
        if records.holds(optimizer=optimizer, seed=seed, a=a, b=b):
            continue
        one, other = expert(study, recipes[a]), expert(study, recipes[b])
        heads = {a: one.head, b: other.head}
        ceiling = {
            name: _one(evaluate, name, own.head, "dev", own.encoder)
            for name, own in ((a, one), (b, other))
        }

        def score(encoder: Params, heads: Any = heads, ceiling: Any = ceiling) -> float:
            found = shares(evaluate.primary(encoder, heads, "dev"), ceiling)
            return float(np.mean(list(found.values())))

        curve = interpolation_curve(one.encoder, other.encoder, score, POINTS)
        records.add(
            optimizer=optimizer,
            seed=seed,
            a=a,
            b=b,
            **measures.conflict(one.encoder, other.encoder, base),
            overlap_optimizer=measures.overlap(
                one.statistics.curvature, other.statistics.curvature
            ),
            overlap_fisher=measures.overlap(
                fisher_of(study, recipes[a]), fisher_of(study, recipes[b])
            ),
            path=" ".join(f"{value:.4f}" for value in curve.values),
            barrier=float(barrier(curve.alphas, -curve.values)),
        )
        console.print(f"pair: {a}, {b} of {optimizer}, seed {seed}")
