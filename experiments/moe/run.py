"""Layers that merge experts: what they cost, and what they learn at rates of their own.

    python -m experiments.moe.run cost layer    # time and memory of a step; large, largest, ...
    python -m experiments.moe.run language      # every variant on OPTAX_MOMA_DATA/lm
    python -m experiments.moe.run text trec     # MiniLM on a task of experiments/glue; or sst2
    python -m experiments.moe.run report        # tables, figures, RESULTS.md

Each variant is trained at the same grid of learning rates, and at its best one with three seeds.
Every stage writes its lines as they come and goes on where it was stopped.
"""

from pathlib import Path
from typing import Annotated, Literal

import jax
import typer

from experiments.pages import add_report
from experiments.records import Records
from optax_moma.demo.files import default_cache

from . import cost as costs
from . import language as languages
from . import text as texts
from . import training
from .report import BLOCKS
from .variants import VARIANTS

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
HERE = Path(__file__).parent
Results = Annotated[Path, typer.Option(file_okay=False, help="Folder of the CSV files.")]
Variants = Annotated[
    list[str], typer.Option("--variant", help="Repeat for several; all by default.")
]
ALL, FOR_TEXT = list(VARIANTS), texts.VARIANTS


@app.callback()
def compiled() -> None:
    """Keeps compiled programs, so that a stage that goes on does not compile again."""
    jax.config.update("jax_compilation_cache_dir", str(default_cache() / "moe" / "compiled"))


@app.command()
def cost(
    setup: Annotated[Literal["layer", "large", "largest", "language", "text"], typer.Argument()],
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each layer, in turn.")] = 10,
    results: Results = HERE / "results",
) -> None:
    """Times the steps of all variants, in turns, on one layer or in a model of the study."""
    costs.run(setup, results, rounds)


@app.command()
def language(variant: Variants = ALL, results: Results = HERE / "results") -> None:
    """Trains every variant of a small language model."""
    records = Records(results / "language.csv", training.KEY)
    training.study(languages.language(default_cache() / "moe"), records, variant)


@app.command()
def text(
    task: Annotated[Literal["trec", "sst2"], typer.Argument()],
    variant: Variants = FOR_TEXT,
    results: Results = HERE / "results",
) -> None:
    """Fine-tunes MiniLM with every variant in place of its last feed-forward network."""
    records = Records(results / f"{task}.csv", training.KEY)
    training.study(texts.load(task, default_cache()), records, variant)


add_report(app, HERE, BLOCKS)


if __name__ == "__main__":
    app()
