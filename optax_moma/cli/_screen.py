"""What the command line shows: tables, plans, errors, numbers with their units."""

import json
import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, NoReturn

import typer
from rich import filesize
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def fail(message: str, problems: Sequence[str] = ()) -> NoReturn:
    """Prints an error to stderr and exits with code 2.

    Args:
      message: What cannot be done.
      problems: Why, one text each.
    """
    console = new_console(stderr=True)
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    show_bullets(console, "-", problems)
    raise typer.Exit(2)


def new_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a pipe or a file, as wide as a line needs."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=1000)


def show_json(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns; a head that ends with > is right-aligned, the first may wrap."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        right = head.endswith(">")
        table.add_column(
            escape(head.removesuffix(">")),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right and i > 0,
        )
    for row in rows:
        table.add_row(*map(escape, row))
    new_console().print(table)


def show_bullets(console: Console, bullet: str, texts: Sequence[str]) -> None:
    table = Table.grid(padding=(0, 1))
    for text in texts:
        table.add_row(bullet, escape(text))
    console.print(table)


def show_plan(found: Any, leaves: bool) -> None:
    console = new_console()
    number = lambda x, form: "" if x is None else format(x, form)  # noqa: E731
    rows = [
        (
            model.name,
            number(model.step, ","),
            in_bytes(model.bytes),
            ", ".join(model.dtypes),
            number(model.drift, ".4f"),
            number(model.cosine, ".4f"),
            _coverage(found, model),
            number(model.gradients, ","),
        )
        for model in found.models
    ]
    heads = [
        "model",
        "step>",
        "bytes>",
        "dtypes",
        "drift>",
        "cosine>",
        "curvature",
        "gradients>",
    ]
    told = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    show_table([heads[i] for i in told], [[row[i] for i in told] for row in rows])
    used = [rule for rule in found.rules if rule.names or rule.match != "(no rule)"]
    if used:
        console.print()
        rules = [(rule.match, f"{len(rule.names)}", rule.action) for rule in used]
        show_table(["rule", "leaves>", "what is done"], rules)
        for rule in used if leaves else ():
            console.print(f"\n[bold]{escape(rule.match)}[/]")
            for glob, names in leaf_lines(dict.fromkeys(rule.names), False):
                many = f"  ({len(names)})" if names[1:] else ""
                console.print(f"  {escape(glob)}{many}", soft_wrap=True)
    if found.leaves and not found.problems:
        console.print(
            f"\n{counted(found.leaves, 'leaf')} of {found.parameters:,} numbers: reads "
            f"{in_bytes(found.read_bytes)} in {counted(found.passes, 'pass')}, writes "
            f"{in_bytes(found.write_bytes)}, takes about {in_bytes(found.peak_bytes)} of memory.",
        )
    console.print()
    for warning in found.warnings:
        show_bullets(console, "[yellow]warning:[/]", [warning])
    for problem in found.problems:
        show_bullets(console, "[bold red]problem:[/]", [problem])
    if not found.problems:
        console.print("[green]The merge can start.[/]")
    else:
        problems = counted(len(found.problems), "problem")
        console.print(f"\n{problems}: the merge cannot start.")


STEP = "step, for a list of them"


def kind_of_method(name: str, method: Any) -> str:
    """What methods are grouped by: what they need, or that they are only a step of one."""
    from optax_moma.merging._steps import Chain

    if signature(method, eval_str=True).return_annotation is not Chain:
        return STEP
    if "." in name:
        return "as other libraries do"
    contract = method().contract
    if contract.gram:
        return "not in a recipe"  # It needs data.
    needs = [what for what in ("base", "curvature") if getattr(contract, what)]
    return f"with {' and '.join(needs)}" if needs else "without a base"


def options_of(method: Any) -> dict[str, dict[str, Any]]:
    """The options of a method by name: whether one is required, or else its default."""
    options = signature(method).parameters.values()
    return {
        x.name: {"required": True} if x.default is x.empty else {"default": x.default}
        for x in options
    }


def show_method(name: str, options: dict[str, dict[str, Any]], documentation: str) -> None:
    """Prints a method as a recipe names it with all its options, and what it says of itself."""
    written = {
        option: json.dumps(x["default"]).strip('"') if "default" in x else "..."
        for option, x in options.items()
    }
    recipe = ", ".join(f"{option}: {text}" for option, text in {"name": name, **written}.items())
    console = new_console()
    console.print(f"[bold]method: {{{escape(recipe)}}}[/]\n", soft_wrap=True)
    console.print(escape(documentation), soft_wrap=True)


def _coverage(found: Any, model: Any) -> str:
    """Whose moments, and for how many of the leaves that need them."""
    if model.curvature is None:
        return ""
    covered, wanted = found.coverage.get(model.name, (0, 0))
    return f"{model.curvature.split(' (')[0]} {covered}/{wanted}"


def curvature_text(found: Any) -> str:
    if found.curvature is None:
        return "none"
    text = f"{found.curvature}: {found.covered} of {counted(found.wanted, 'leaf')}"
    return text if found.gradients is None else f"{text}, {found.gradients:,} gradients"


def leaf_lines(leaves: dict[str, Any], every: bool) -> list[tuple[str, list[str]]]:
    """The lines of a list of leaves: what differs in numbers only, and is of a kind, is on one."""
    from optax_moma._globs import collapsed

    if every:
        return [(name, [name]) for name in leaves]
    kinds: dict[Any, list[str]] = {}
    for name, kind in leaves.items():
        kinds.setdefault(kind, []).append(name)
    order = {name: i for i, name in enumerate(leaves)}
    lines = [line for names in kinds.values() for line in collapsed(names).items()]
    return sorted(lines, key=lambda line: order[line[1][0]])


def size_row(leaves: dict[str, Any], part: str, names: list[str]) -> tuple[str, ...]:
    import jax.numpy as jnp

    counts = {name: math.prod(leaves[name][0]) for name in names}
    size = sum(n * jnp.dtype(leaves[name][1]).itemsize for name, n in counts.items())
    dtypes = ", ".join(sorted({leaves[name][1] for name in names}))
    return part, f"{len(names):,}", f"{sum(counts.values()):,}", in_bytes(size), dtypes


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "()"


def counted(count: int, what: str) -> str:
    plural = {"leaf": "leaves", "pass": "passes"}.get(what, what + "s")
    return f"{count:,} {what if count == 1 else plural}"


def in_bytes(count: int) -> str:
    return filesize.decimal(count)
