"""What curvature measured while training is worth for pruning and merging, on eight tasks.

    python -m experiments.glue.run train        # experts: minutes each, kept in the cache
    python -m experiments.glue.run fisher       # exact Fisher of each expert, with data
    python -m experiments.glue.run select       # keep a part of each task vector
    python -m experiments.glue.run merge        # every method, tuned on dev, reported on test
    python -m experiments.glue.run together     # one model of all tasks, with all their data
    python -m experiments.glue.run ablate       # one step of moma's and umtam's merge taken out
    python -m experiments.glue.run statistics   # correlations, overlaps, conflicts, barriers
    python -m experiments.glue.run report       # tables, figures and RESULTS.md from the CSV files

Every stage goes on where it was stopped: experts lie in the cache (OPTAX_MOMA_CACHE, or the user's
cache folder), results in CSV files beside this one. Tasks are read from OPTAX_MOMA_DATA, or from
the Hugging Face hub where that is unset.
"""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from experiments.pages import add_report

from . import stages
from .experts import open_study
from .merges import ABLATIONS, METHODS
from .report import BLOCKS
from .saliency import SCORES
from .tasks import KINDS, Sizes

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)

Tasks = Annotated[list[str], typer.Option("--task", help="Repeat for several; all by default.")]
Optimizers = Annotated[
    list[str], typer.Option("--optimizer", help="moma, orthogonal, adamw or umtam; several.")
]
Seeds = Annotated[list[int], typer.Option("--seed", min=0, help="Repeat for several.")]
Methods = Annotated[list[str], typer.Option("--method", help="Names of the table; all by default.")]
Split = Annotated[Literal["held", "test"], typer.Option(help="Where results are shown.")]
Results = Annotated[
    Path,
    typer.Option(file_okay=False, envvar="OPTAX_MOMA_RESULTS", help="Folder of the CSV files."),
]

Entry = TypeVar("Entry")

HERE = Path(__file__).parent
ALL, BOTH, FIRST, SIZES, NONE = list(KINDS), ["moma", "adamw"], [0], [8, 4, 2], []


@app.command()
def train(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    results: Results = HERE / "results",
) -> None:
    """Chooses each optimizer's learning rate on dev and trains the experts, seed by seed."""
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.learning_rates(opened, name)
        stages.train(opened, task, name, number)


@app.command()
def fisher(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    results: Results = HERE / "results",
) -> None:
    """Computes the exact Fisher of each expert from examples, with time and bytes."""
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.fisher(opened, task, name, number)


@app.command()
def select(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    score: Annotated[list[str], typer.Option(help="As in the table; all by default.")] = NONE,
    split: Annotated[Literal["dev", "test"], typer.Option()] = "dev",
    results: Results = HERE / "results",
) -> None:
    """Keeps the top 1 to 90 % of each task vector by every score."""
    scores = chosen(SCORES, score)
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.select(opened, task, name, number, scores, split)


@app.command()
def merge(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    method: Methods = NONE,
    size: Annotated[list[int], typer.Option(help="How many experts: 2, 4 or 8.")] = SIZES,
    split: Split = "held",
    results: Results = HERE / "results",
) -> None:
    """Merges by every method, tuned on one half of dev; reports on the other half or on test.

    Of the study's sets of experts, those of the given tasks only.
    """
    methods = chosen(METHODS, method)
    opened = open_study(ALL, Sizes(), results)
    sets = [names for names in stages.SETS if len(names) in size and set(names) <= set(task)]
    if not sets:
        raise typer.BadParameter(f"no set of {size} experts within {task}; there are {stages.SETS}")
    for number, name in product(seed, optimizer):
        stages.merge(opened, name, number, methods, sets, split, "merges")


@app.command()
def together(
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    split: Split = "held",
    results: Results = HERE / "results",
) -> None:
    """Trains one model on all tasks, at every rate: what merges are measured against."""
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.together(opened, name, number, split)


@app.command()
def ablate(
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    method: Methods = NONE,
    split: Split = "held",
    results: Results = HERE / "results",
) -> None:
    """The same with one step of the merges of moma and umtam taken out, on all eight experts."""
    methods = chosen(ABLATIONS, method)
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.merge(opened, name, number, methods, stages.SETS[:1], split, "ablations")


@app.command()
def statistics(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    results: Results = HERE / "results",
) -> None:
    """Correlates every estimate with the exact Fisher; overlap, conflict, barrier of all pairs."""
    opened = open_study(ALL, Sizes(), results)
    for number, name in product(seed, optimizer):
        stages.correlations(opened, task, name, number)
        stages.pairs(opened, task, name, number)


add_report(app, HERE, BLOCKS)


def chosen(table: Mapping[str, Entry], names: list[str]) -> dict[str, Entry]:
    if unknown := [name for name in names if name not in table]:
        raise typer.BadParameter(f"unknown: {unknown}; the table has {list(table)}")
    return {name: table[name] for name in names or table}


if __name__ == "__main__":
    app()
