"""At which noise of training do models merge best?

    python -m experiments.noise.run study fashion    # SGD, AdamW and moma on images
    python -m experiments.noise.run study language   # AdamW on a byte-level language model
    python -m experiments.noise.run sweep SETUP.py   # the recipe, for a training of your own
    python -m experiments.noise.run report           # tables, figures, RESULTS.md

Two branches go on from a shared prefix, with the data in different orders, and are averaged; the
gain is the average's accuracy less the mean of theirs. Every study goes on where it was stopped.
Images are Fashion-MNIST (Debian's package dataset-fashion-mnist, or OPTAX_MOMA_DATA), text is the
corpus of experiments/pretrain (OPTAX_MOMA_DATA/lm).
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from experiments.pages import add_report
from experiments.records import Records

from . import stages
from . import sweep as recipe
from .problems import open_problem
from .report import BLOCKS

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
HERE = Path(__file__).parent
Results = Annotated[Path, typer.Option(file_okay=False, help="Folder of the CSV files.")]
NOISES = [0.25, 1.0, 4.0, 16.0]
PLANS = {"fashion": stages.image_plan, "language": stages.language_plan}


@app.command()
def study(
    problem: Annotated[Literal["fashion", "language"], typer.Argument()],
    results: Results = HERE / "results",
) -> None:
    """Forks runs at every setting, measures their noise, and merges each pair."""
    stages.run(open_problem(problem), PLANS[problem](), results)


@app.command()
def sweep(
    setup: Annotated[Path, typer.Argument(help="A Python file with train and evaluate.")],
    noise: Annotated[list[float], typer.Option(help="Multiples of today's; repeat.")] = NOISES,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of branches at each noise.")] = 3,
    refine: Annotated[int, typer.Option(min=0, help="How often to look beside the best.")] = 1,
    results: Results = HERE / "results",
) -> None:
    """Finds the noise at which the models of your training merge best.

    SETUP.py defines train(noise, pair, branch) -> params, where noise multiplies the learning rate
    (or divides the batch), and evaluate(params) -> {"score": ...}, on data that may be tuned on.
    The two branches of a pair start alike and see the data in different orders.
    experiments/noise/setups/digits.py is an example that runs in seconds.
    """
    try:
        opened = recipe.load(setup)
    except recipe.SetupError as problem:
        raise typer.BadParameter(str(problem)) from None
    records = Records(results / f"sweep_{opened.name}.csv", recipe.KEY)
    recipe.sweep(opened, records, noise, pairs, refine, stages.console.print)
    recipe.show(recipe.summary(records, opened.name), stages.console)


add_report(app, HERE, BLOCKS)


if __name__ == "__main__":
    app()
