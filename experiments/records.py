"""Results as CSV files that grow line by line, so that a stage goes on where it was stopped."""

import csv
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


class Records:
    """One CSV file: lines with the same columns, known by some of them.

    Attributes:
      rows: All lines so far, as text.
    """

    def __init__(self, path: Path, key: tuple[str, ...]):
        """Reads what is there; ``key`` names the columns that tell lines apart."""
        self.path, self.key = path, key
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))
        self._known = {self._id(row) for row in self.rows}

    def _id(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_text(row[name]) for name in self.key)

    def holds(self, **key: Any) -> bool:
        """Whether there is a line with this key."""
        return self._id(key) in self._known

    def add(self, **row: Any) -> None:
        """Appends a line, at once and whole, with the command that made it."""
        line = {name: _text(value) for name, value in (row | {"command": command()}).items()}
        if self.rows and list(line) != list(self.rows[0]):
            raise ValueError(
                f"{self.path} has the columns {list(self.rows[0])}, not {list(line)}: it was"
                " written by another version; move it away and run again."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, line, lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerow(line)
        self.rows.append(line)
        self._known.add(self._id(line))

    def where(self, **equal: Any) -> list[dict[str, str]]:
        """The lines with these values."""
        wanted = {name: _text(value) for name, value in equal.items()}
        return [row for row in self.rows if all(row[n] == v for n, v in wanted.items())]


def replace(path: Path, key: Sequence[str], row: Mapping[str, Any]) -> None:
    """Writes a line to a CSV file, in place of the one with the same values of ``key``, if any."""
    rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {tuple(old[name] for name in key): old for old in csv.DictReader(file)}
    rows[tuple(str(row[name]) for name in key)] = row
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())


def numbers(rows: Iterable[Mapping[str, str]], column: str) -> list[float]:
    """One column as numbers."""
    return [float(row[column]) for row in rows]


def command() -> str:
    """The command line as one would type it, without the machine's folders."""
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [Path(sys.argv[0]).name]
    arguments = sys.argv[1:]
    if "--results" in arguments:
        place = arguments.index("--results")
        arguments = arguments[:place] + arguments[place + 2 :]
    return shlex.join(["python", *program, *arguments])


def machine() -> str:
    """What a time was measured on: the devices, with their number if there are several."""
    count, device = jax.device_count(), jax.devices()[0]
    several = f"{count} x " if count > 1 else ""
    kind = f"{device.platform} {device.device_kind}"
    return f"{several}{kind}, {os.cpu_count()} cores, {platform.machine()}"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
