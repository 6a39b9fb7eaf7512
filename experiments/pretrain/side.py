"""What the side studies share: a few runs that make one CSV file and one block of the page."""

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from experiments.pages import Block, write_report

HERE = Path(__file__).parent


def side_study(
    doc: str,
    block: Block,
    columns: Sequence[str],
    rows: Callable[[bool, Path], Iterable[Sequence[object]]],
) -> None:
    """The command line of a side study.

    Args:
      doc: what ``--help`` says.
      block: its block of the page; the CSV file has the block's name, and so has its place.
      columns: the CSV file's.
      rows: from whether it is to be quick, and the folder of tokenizers, to the file's rows. They
        are written once all are there. What was quick goes to a folder of its own.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="where RESULTS.md and results lie")
    args = parser.parse_args()
    out: Path = args.out or (HERE / "runs" / "quick" if args.quick else HERE)
    made = list(rows(args.quick, out / "runs"))
    path = out / "results" / f"{block.file}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *made])
    write_report(path.parent, out / "RESULTS.md", {block.file: block})
    print(f"wrote {path} and its table of {out / 'RESULTS.md'}")
