"""What curvature measured while training is worth for pruning and merging, on eight tasks.

    python experiments/glue/run.py train        # experts: minutes each, kept in the cache
    python experiments/glue/run.py fisher       # exact Fisher of each expert, with data
    python experiments/glue/run.py select       # keep a part of each task vector
    python experiments/glue/run.py merge        # every method, tuned on dev, reported on test
    python experiments/glue/run.py statistics   # correlations, overlaps, barriers, ablations
    python experiments/glue/run.py report       # tables, figures and RESULTS.md from the CSV files

Every stage goes on where it was stopped: experts lie in the cache (OPTAX_MOMA_CACHE, or the user's
cache folder), results in CSV files beside this one. Tasks are read from OPTAX_MOMA_DATA, or from
the Hugging Face hub where that is unset.
"""

from pathlib import Path
from typing import Annotated

import typer
from glue_study import stages
from glue_study.experts import open_study
from glue_study.tasks import KINDS, Sizes

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)

Tasks = Annotated[list[str], typer.Option("--task", help="Repeat for several; all by default.")]
Optimizers = Annotated[
    list[str], typer.Option("--optimizer", help="moma, adamw or umtam; repeat for several.")
]
Seeds = Annotated[list[int], typer.Option("--seed", min=0, help="Repeat for several.")]
Results = Annotated[
    Path,
    typer.Option(file_okay=False, envvar="OPTAX_MOMA_RESULTS", help="Folder of the CSV files."),
]

HERE = Path(__file__).parent / "results"
ALL, BOTH, FIRST = list(KINDS), ["moma", "adamw"], [0]


@app.command()
def train(
    task: Tasks = ALL,
    optimizer: Optimizers = BOTH,
    seed: Seeds = FIRST,
    results: Results = HERE,
) -> None:
    """Chooses each optimizer's learning rate on dev and trains the experts, seed by seed."""
    opened = open_study(ALL, Sizes(), results)
    for number in seed:
        for name in optimizer:
            stages.learning_rates(opened, name)
            stages.train(opened, task, name, number)


if __name__ == "__main__":
    app()
