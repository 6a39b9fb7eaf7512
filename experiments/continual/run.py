"""Tasks that come one after the other: which ways to go through them keep what was learned?

    python -m experiments.continual.run tune classes      # every method's numbers, on dev
    python -m experiments.continual.run study classes     # three orders, on test
    python -m experiments.continual.run tune domains      # the same for digits of other sources
    python -m experiments.continual.run study domains
    python -m experiments.continual.run tune text         # and for MiniLM on four text tasks
    python -m experiments.continual.run study text
    python -m experiments.continual.run cost              # linearised training beside ordinary
    python -m experiments.continual.run report            # tables, figures, RESULTS.md

All stages go on where they were stopped. Images are Fashion-MNIST (Debian's package
dataset-fashion-mnist, or OPTAX_MOMA_DATA), MNIST's test images (OPTAX_MOMA_DATA/vision/mnist_t10k)
and scikit-learn's digits; texts are those of experiments/glue.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from experiments.pages import add_report
from experiments.records import Records, machine

from . import stages, worlds
from .cost import measure
from .report import BLOCKS
from .streams import open_stream
from .texts import open_texts

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
HERE = Path(__file__).parent
Stream = Annotated[Literal["classes", "domains", "text"], typer.Argument()]
Results = Annotated[Path, typer.Option(file_okay=False, help="Folder of the CSV files.")]


def open_world(stream: str) -> worlds.World:
    """The model and the data of a stream."""
    if stream == "text":
        return open_texts()
    return worlds.Pictures(open_stream(stream), worlds.EPOCHS[stream])


@app.command()
def tune(stream: Stream, results: Results = HERE / "results") -> None:
    """Chooses every method's learning rate and number, on dev, in the first order."""
    stages.tune(open_world(stream), results)


@app.command()
def study(stream: Stream, results: Results = HERE / "results") -> None:
    """Goes through the stream by every method as tuned, in three orders; accuracy on test."""
    stages.report(open_world(stream), results)


@app.command()
def cost(
    rounds: Annotated[int, typer.Option(min=1, help="How often each step is timed.")] = 15,
    results: Results = HERE / "results",
) -> None:
    """Times a step of linearised fine-tuning beside an ordinary one."""
    records = Records(results / "cost.csv", ("model", "batch", "rounds"))
    shown = Table("model", "ordinary, ms", "linearised, ms", "ratio")
    for row in measure(rounds):
        records.add(**row, machine=machine())
        times = (row["ordinary_ms"], row["linear_ms"])
        shown.add_row(row["model"], *(f"{t:.1f}" for t in times), f"{row['ratio']:.2f}")
    stages.console.print(shown)


add_report(app, HERE, BLOCKS)


if __name__ == "__main__":
    app()
