"""Pages of results: tables and figures from CSV files, between marks in a page of prose."""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, str]


class Block(NamedTuple):
    """A table of a page: the CSV file it is made from, its heading, and what makes it."""

    file: str
    title: str
    make: Callable[[list[Row], Path], str]


def write_report(results: Path, page: Path, blocks: Mapping[str, Block]) -> None:
    """Writes figures beside the CSV files and fills the page's tables, leaving its prose alone.

    A table stands between ``<!-- name -->`` and ``<!-- end name -->``; a page that does not exist
    is made with a heading and the tables.
    """
    made = {}
    for name, (file, title, make) in blocks.items():
        path = results / f"{file}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            made[name] = (title, make(rows, results))
    text = page.read_text("utf-8") if page.exists() else "# Results\n"
    for name, (title, block) in made.items():
        framed = f"<!-- {name} -->\n{block}\n<!-- end {name} -->"
        found = re.compile(f"<!-- {name} -->.*<!-- end {name} -->", re.DOTALL)
        if found.search(text):
            text = found.sub(lambda _, framed=framed: framed, text)
        else:
            text = f"{text.rstrip()}\n\n## {title}\n\n{framed}\n"
    page.write_text(text, "utf-8")


def add_report(app: typer.Typer, study: Path, blocks: Mapping[str, Block]) -> None:
    """Gives a study's command line the command ``report``."""

    @app.command()
    def report(
        results: Annotated[
            Path, typer.Option(file_okay=False, help="Folder of the CSV files.")
        ] = study / "results",
        page: Annotated[
            Path, typer.Option(dir_okay=False, help="The page whose tables are filled.")
        ] = study / "RESULTS.md",
    ) -> None:
        """Draws the figures and fills the tables of RESULTS.md from the CSV files."""
        write_report(results, page, blocks)
        typer.echo(f"{page}: {len(blocks)} tables")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(values: Sequence[float], digits: int = 1, factor: float = 100.0, sign: str = "") -> str:
    """Mean and, of several values, their standard error; with ``sign="+"`` a plus, too."""
    x = factor * np.asarray(values, np.float64)
    if not len(x):
        return ""
    mean = f"{x.mean():{sign}.{digits}f}"
    return mean if len(x) == 1 else f"{mean} ± {x.std(ddof=1) / np.sqrt(len(x)):.{digits}f}"


def unique(rows: Iterable[Row], column: str) -> list[str]:
    """The values of a column in their order."""
    return list(dict.fromkeys(row[column] for row in rows))


def pick(rows: Iterable[Row], column: str, **equal: str) -> list[float]:
    """Numbers of one column, of the lines with these values."""
    return [float(row[column]) for row in rows if all(row[k] == v for k, v in equal.items())]


def save(figure: Figure, path: Path) -> str:
    figure.savefig(path, dpi=120)
    return f"![{path.stem}](results/{path.name})"


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
