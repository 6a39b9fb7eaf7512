"""The whole way: train experts, merge them, tune, test, and leave the results in a folder."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import optax_moma
from optax_moma import merging
from optax_moma.demo import training
from optax_moma.demo.encoder import Params, load_pretrained, pad
from optax_moma.demo.files import default_cache
from optax_moma.demo.report import (
    BASE,
    EXPERTS,
    Comparison,
    Row,
    draw,
    mean,
    notes,
    shares,
    table,
    write_csv,
)
from optax_moma.demo.tasks import Split, make_tasks, read_texts
from optax_moma.demo.training import Expert, Problem, Settings

QUICK = Settings(train=128, dev=32, test=128, length=16, batch=16)
"""A sixteenth of the training, on the shortest texts."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""The grid for every method that has a scale."""
SAVED = "moma"
"""The merge that is written as a checkpoint."""


def methods() -> dict[str, merging.Step]:
    """The merges that are compared, each at scale 1."""
    return {
        "average": merging.average(),
        "task arithmetic": merging.task_arithmetic(scale=1.0),
        "TIES": merging.ties(),
        "OTA": merging.ota(),
        "moma": merging.moma(),
    }


def load_problem(cache: Path, settings: Settings) -> Problem:
    """The pretrained MiniLM and the four tasks, on the texts that fit into ``settings.length``.

    Args:
      cache: folder of the downloaded files.
      settings: sizes and seed.

    Raises:
      optax_moma.demo.files.FetchError: a file is absent and cannot be downloaded.
    """
    encoder, tokenizer = load_pretrained(cache)
    texts = read_texts(cache)
    ids = [encoding.ids for encoding in tokenizer.encode_batch([t.text for t in texts])]
    # Three texts in four fit into 32 tokens. They are enough, so that none need be cut.
    fits = [i for i, text in enumerate(ids) if len(text) <= settings.length]
    sizes: dict[Split, int] = {
        "train": settings.train,
        "dev": settings.dev,
        "test": settings.test,
    }
    tasks = make_tasks([texts[i] for i in fits], sizes, settings.seed)
    return Problem(encoder, pad([ids[i] for i in fits], settings.length), tasks)


def run(problem: Problem, settings: Settings, output: Path, console: Console) -> Comparison:
    """Trains the experts that ``output`` does not hold yet, merges and compares them.

    Args:
      problem: encoder, corpus and tasks.
      settings: for training; experts in ``output`` that had other settings are trained anew.
      output: folder for the checkpoints ``base``, ``experts/*`` and ``merged``, ``table.csv`` and
        ``figure.png``.
      console: where progress and the table are printed.

    Returns:
      The comparison that is printed and written.

    Raises:
      ValueError: a task has less than one batch of examples to train on.
    """
    output.mkdir(parents=True, exist_ok=True)
    base = nnx.to_pure_dict(nnx.state(problem.encoder))
    training.save(output / "base", base, {})
    experts = train_experts(problem, settings, output / "experts", console)
    comparison, merged = compare(problem, base, experts, console)
    heads = {name: expert.params["head"] for name, expert in experts.items()}
    about = {"method": SAVED, "scale": comparison.rows[-1].scale, **settings._asdict()}
    training.save(output / "merged", {"encoder": merged, "heads": heads}, about)
    write_csv(comparison, output / "table.csv")
    draw(comparison, output / "figure.png")
    console.print()
    console.print(table(comparison))
    console.print(notes(comparison), style="dim", highlight=False)
    return comparison


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<20}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def train_experts(
    problem: Problem, settings: Settings, folder: Path, console: Console
) -> dict[str, Expert]:
    """One expert per task, by the task's name: found in ``folder``, or trained and saved there."""
    step = training.make_step(problem, settings)
    total = training.steps(problem, settings)
    experts = {}
    console.print("[bold]Fine-tuning one expert per task[/bold] (the first step compiles)")
    with _bars(console) as progress:
        for i, task in enumerate(problem.tasks):
            bar = progress.add_task(task.title, total=total, note="")
            expert = training.find_expert(folder / task.name, problem, settings, step)
            if expert is None:
                expert = training.new_expert(problem, settings, i, step)
                for batch in training.batches(problem, settings, i):
                    expert, loss = step.update(expert, *batch)
                    progress.update(bar, advance=1, note=f"loss {loss:.3f}")
                training.save(folder / task.name, expert, settings._asdict())
            else:
                progress.update(bar, completed=total, note="trained before")
            progress.stop_task(bar)
            experts[task.name] = expert
    return experts


@jax.jit
def along(base: Params, merged: Params, scale: float) -> Params:
    """base + scale (merged - base): another scale of a merge, without merging again."""
    return jax.tree.map(lambda b, m: b + scale * (m - b), base, merged)


def compare(
    problem: Problem, base: Params, experts: Mapping[str, Expert], console: Console
) -> tuple[Comparison, Params]:
    """Merges by every method, tunes its scale on the dev split, and scores it on the test split.

    The scale is the one of `SCALES` at which the mean share of the experts' dev scores is largest.
    The average has no scale.

    Returns:
      The comparison, and the encoder merged by the method `SAVED`.
    """
    embed_rows = training.make_embedder(problem)
    encoders = {name: expert.params["encoder"] for name, expert in experts.items()}
    heads = {name: expert.params["head"] for name, expert in experts.items()}
    curvature = {
        name: optax_moma.curvature_from(expert.opt_state, expert.params)["encoder"]
        for name, expert in experts.items()
    }

    def scores(encoder: Params, split: Split) -> dict[str, float]:
        return training.evaluate(embed_rows, encoder, heads, problem.tasks, split)

    def expert_scores(split: Split) -> dict[str, float]:
        return {
            task.name: training.evaluate(embed_rows, encoders[task.name], heads, [task], split)[
                task.name
            ]
            for task in problem.tasks
        }

    tuning: dict[str, list[float]] = {}
    saved = base
    console.print("[bold]Merging, tuning the scale on dev, scoring on test[/bold]")
    with _bars(console) as progress:
        bar = progress.add_task("base, experts", total=3, note="")
        rows = [Row(BASE, None, scores(base, "test"))]
        progress.advance(bar)
        rows.append(Row(EXPERTS, None, expert_scores("test")))
        progress.advance(bar)
        on_dev = expert_scores("dev")
        progress.advance(bar)
        progress.stop_task(bar)
        for name, method in methods().items():
            bar = progress.add_task(
                name, total=1 if name == "average" else 1 + len(SCALES), note=""
            )
            merged = optax_moma.merge(method, encoders, base=base, curvature=curvature)
            scale = None
            if name != "average":
                tuning[name] = []
                for candidate in SCALES:
                    found = scores(along(base, merged, candidate), "dev")
                    tuning[name].append(mean(shares(found, on_dev)))
                    progress.advance(bar)
                scale = SCALES[int(np.argmax(tuning[name]))]
                merged = along(base, merged, scale)
            rows.append(Row(name, scale, scores(merged, "test")))
            kept = mean(shares(rows[-1].scores, rows[1].scores))
            progress.update(bar, advance=1, note=f"keeps {100 * kept:.1f} %")
            progress.stop_task(bar)
            if name == SAVED:
                saved = merged
    return Comparison(problem.tasks, rows, SCALES, tuning), saved


def recorded_gradients(
    count: int, *, cache: Path | None = None, task: int = 0, settings: Settings | None = None
) -> list[Params]:
    """The encoder's gradients in the first steps of training an expert, as the demo trains it.

    Args:
      count: how many steps; a tree like the encoder's params for each.
      cache: folder of the downloaded files, by default that of the demo.
      task: index of the task, 0 to 3.
      settings: the demo's by default.

    Raises:
      optax_moma.demo.files.FetchError: a file is absent and cannot be downloaded.
    """
    settings = settings or Settings()
    problem = load_problem(cache or default_cache(), settings)
    return gradients(problem, settings, task, count)


def gradients(problem: Problem, settings: Settings, task: int, count: int) -> list[Params]:
    """As `recorded_gradients`, for any problem."""
    step = training.make_step(problem, settings)
    expert = training.new_expert(problem, settings, task, step)
    gradient, update = jax.jit(step.gradient), jax.jit(step.apply)
    recorded = []
    for _, batch in zip(range(count), training.batches(problem, settings, task), strict=False):
        _, grads = gradient(expert.params, *batch)
        expert = update(expert, grads)
        recorded.append(grads["encoder"])
    return recorded
