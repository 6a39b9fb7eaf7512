"""Eight labelled text tasks of GLUE's kinds, from a folder or from the Hugging Face hub.

| task | kind | test split | metric |
|---|---|---|---|
| sst2 | sentiment | SST's own | accuracy |
| cola | acceptability | out of domain | accuracy (Matthews correlation beside it) |
| mrpc | paraphrase, pair | MRPC's own | accuracy (F1 beside it) |
| rte | entailment, pair | GLUE's dev | accuracy |
| sick | three-way inference, pair | SICK's own | accuracy |
| trec | question type, 6 classes | TREC's own | accuracy |
| sts | similarity, pair, regression | STS 2012-2015's own | Pearson (Spearman beside it) |
| ag_news | topic, 4 classes | AG's own | accuracy |

Test examples are read by the stages that report and by nothing that chooses. A task without a dev
split has one cut from its training examples, the same for every seed.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.agreement import correlation, rank_correlation
from optax_moma.demo.encoder import pad

Split = Literal["train", "dev", "test", "tune", "held"]
"""``tune`` and ``held`` are the halves of dev."""
Row = tuple[str | tuple[str, str], float]
"""A text, or a pair of texts, and its target."""
Rows = dict[Split, list[Row]]
LENGTH = 64
"""The most tokens of a text or pair; the longer text of a pair is cut first."""


class Kind(NamedTuple):
    """What is known of a task without its examples; ``classes`` is 1 for a regression."""

    title: str
    classes: int
    metrics: tuple[str, ...]


KINDS: Mapping[str, Kind] = {
    "sst2": Kind("SST-2", 2, ("accuracy",)),
    "cola": Kind("CoLA", 2, ("accuracy", "matthews")),
    "mrpc": Kind("MRPC", 2, ("accuracy", "f1")),
    "rte": Kind("RTE", 2, ("accuracy",)),
    "sick": Kind("SICK-E", 3, ("accuracy",)),
    "trec": Kind("TREC", 6, ("accuracy",)),
    "sts": Kind("STS", 1, ("pearson", "spearman")),
    "ag_news": Kind("AG News", 4, ("accuracy",)),
}
"""All tasks; the first metric of each is the one that is tuned, shared and averaged."""
OUTPUTS = max(kind.classes for kind in KINDS.values())
"""Outputs of every head, so that one compiled step serves all tasks."""


class Examples(NamedTuple):
    """``tokens`` (n, LENGTH), 0 after each text's end, and ``targets`` (n,)."""

    tokens: np.ndarray
    targets: np.ndarray


class Task(NamedTuple):
    """A task's kind and its examples, in random order and cut to the sizes of `Sizes`."""

    name: str
    kind: Kind
    splits: Mapping[Split, Examples]


class Sizes(NamedTuple):
    """The most examples that a task takes from each split."""

    train: int = 1500
    dev: int = 200
    test: int = 500


class DataError(Exception):
    """The examples are not where they should be; the message says what to do."""


def load_tasks(names: Sequence[str], tokenizer: Tokenizer, sizes: Sizes) -> list[Task]:
    """Reads tasks from ``$OPTAX_MOMA_DATA``, or from the Hugging Face hub where it is unset.

    Raises:
      DataError: the examples are in neither place.
    """
    folder = os.environ.get("OPTAX_MOMA_DATA")
    rows = {
        name: from_folder(name, Path(folder, "tasks")) if folder else from_hub(name)
        for name in names
    }
    return [make_task(name, rows[name], tokenizer, sizes) for name in names]


def make_task(name: str, rows: Rows, tokenizer: Tokenizer, sizes: Sizes) -> Task:
    """Cuts, shuffles and tokenises; the same examples for every seed of training."""
    rng = np.random.default_rng(0)
    train = [rows["train"][i] for i in rng.permutation(len(rows["train"]))]
    dev = [rows["dev"][i] for i in rng.permutation(len(rows["dev"]))] if "dev" in rows else []
    if not dev:
        dev, train = train[: sizes.dev], train[sizes.dev :]
    test = [rows["test"][i] for i in rng.permutation(len(rows["test"]))]
    tokenizer.enable_truncation(LENGTH, strategy="longest_first")
    splits: dict[Split, Examples] = {}
    for split, own, size in zip(("train", "dev", "test"), (train, dev, test), sizes, strict=True):
        texts, targets = zip(*own[:size], strict=True)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        splits[split] = Examples(pad(ids, LENGTH), np.array(targets, np.float32))
    return Task(name, KINDS[name], splits)


# ------------------------------------------------------------------------------- from a folder


def from_folder(name: str, folder: Path) -> Rows:
    """Reads one task from the public files, laid out as the README of this study says.

    Raises:
      DataError: a file is missing.
    """
    try:
        return _READERS[name](folder)
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing: OPTAX_MOMA_DATA must name a folder with the tasks of"
            " GLUE's kinds under tasks/ (experiments/glue/README.md lists the files and where the"
            " public originals are), or be unset to read them from the Hugging Face hub."
        ) from error


def _table(path: Path, **options: Any) -> Iterable[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.reader(file, **options)


def _tabs(path: Path, header: bool = True) -> list[list[str]]:
    rows = list(_table(path, delimiter="\t", quoting=csv.QUOTE_NONE))
    return rows[1:] if header else rows


def _labelled_lines(path: Path) -> list[Row]:
    lines = path.read_text("latin-1").splitlines()
    return [(line[1:].strip(), float(line[0])) for line in lines if line.strip()]


def _sst2(folder: Path) -> Rows:
    parts = ("train", "dev", "test")
    return {split: _labelled_lines(folder / "sst2" / f"{split}.txt") for split in parts}


def _trec(folder: Path) -> Rows:
    return {split: _labelled_lines(folder / "trec" / f"{split}.txt") for split in ("train", "test")}


def _cola(folder: Path) -> Rows:
    files: dict[Split, str] = {
        "train": "in_domain_train",
        "dev": "in_domain_dev",
        "test": "out_of_domain_dev",
    }
    return {
        split: [
            (row[3], float(row[1])) for row in _tabs(folder / "cola" / f"{file}.tsv", header=False)
        ]
        for split, file in files.items()
    }


def _mrpc(folder: Path) -> Rows:
    files: dict[Split, str] = {"train": "train", "dev": "val", "test": "test"}
    return {
        split: [((row[3], row[4]), float(row[0])) for row in _tabs(folder / "mrpc" / f"{file}.tsv")]
        for split, file in files.items()
    }


def _rte(folder: Path) -> Rows:
    files: dict[Split, str] = {"train": "train", "test": "dev"}
    names = {"0": 0.0, "1": 1.0, "entailment": 0.0, "not_entailment": 1.0}
    return {
        split: [
            ((row[0], row[1]), names[row[2]]) for row in _tabs(folder / "rte_glue" / f"{file}.tsv")
        ]
        for split, file in files.items()
    }


def _sick(folder: Path) -> Rows:
    files: dict[Split, str] = {"train": "train", "dev": "trial", "test": "test"}
    labels = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")
    return {
        split: [
            ((row[1], row[2]), float(labels.index(row[4])))
            for row in _tabs(folder / "sick" / f"{file}.txt")
        ]
        for split, file in files.items()
    }


def _sts(folder: Path) -> Rows:
    # STS holds pairs of MRPC's: whoever merges the two experts must not have trained on them.
    known = {
        _key(text) for rows in _mrpc(folder).values() for pair, _ in rows for text in pair
    }  # fmt: skip
    files: dict[Split, str] = {"train": "train", "dev": "val", "test": "test"}
    return {
        split: [
            ((row[1], row[2]), float(row[0]))
            for row in _tabs(folder / "sts_2012_2015" / f"{file}.tsv", header=False)
            if row[0] and not {_key(row[1]), _key(row[2])} & known
        ]
        for split, file in files.items()
    }


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _ag_news(folder: Path) -> Rows:
    files: dict[Split, str] = {"train": "dev", "test": "test"}
    return {
        split: [
            (row[1], float(row[0]) - 1)
            for row in list(_table(folder / "ag_news" / f"{file}.csv"))[1:]
        ]
        for split, file in files.items()
    }


_READERS: Mapping[str, Callable[[Path], Rows]] = {
    "sst2": _sst2,
    "cola": _cola,
    "mrpc": _mrpc,
    "rte": _rte,
    "sick": _sick,
    "trec": _trec,
    "sts": _sts,
    "ag_news": _ag_news,
}


# ----------------------------------------------------------------------------------- from the hub


class Hub(NamedTuple):
    """Where the Hugging Face hub keeps a task, and how its columns are called."""

    path: str
    config: str | None
    texts: tuple[str, ...]
    target: str
    splits: Mapping[Split, str]


# The labels of GLUE's test splits are not public: its validation splits are the test here.
_GLUE: Mapping[Split, str] = {"train": "train", "test": "validation"}
_OWN: Mapping[Split, str] = {"train": "train", "test": "test"}
_PAIR = ("sentence1", "sentence2")
HUB: Mapping[str, Hub] = {
    "sst2": Hub("nyu-mll/glue", "sst2", ("sentence",), "label", _GLUE),
    "cola": Hub("nyu-mll/glue", "cola", ("sentence",), "label", _GLUE),
    "mrpc": Hub("nyu-mll/glue", "mrpc", _PAIR, "label", _GLUE),
    "rte": Hub("nyu-mll/glue", "rte", _PAIR, "label", _GLUE),
    "sts": Hub("nyu-mll/glue", "stsb", _PAIR, "label", _GLUE),
    "sick": Hub(
        "RobZamp/sick",
        None,
        ("sentence_A", "sentence_B"),
        "label",
        {"train": "train", "dev": "validation", "test": "test"},
    ),
    "trec": Hub("CogComp/trec", None, ("text",), "coarse_label", _OWN),
    "ag_news": Hub("fancyzhx/ag_news", None, ("text",), "label", _OWN),
}


def from_hub(name: str, load: Callable[..., Any] | None = None) -> Rows:
    """Reads one task through Hugging Face ``datasets``.

    Args:
      name: the task.
      load: in place of ``datasets.load_dataset``.

    Raises:
      DataError: the package is not installed, or the hub does not answer.
    """
    path, config, columns, target, splits = HUB[name]
    try:
        if load is None:
            from datasets import load_dataset as load
        found = load(path, config)
    except (ImportError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): install 'datasets' and be online, or set"
            " OPTAX_MOMA_DATA to a folder with the tasks (experiments/glue/README.md)."
        ) from error
    return {
        split: [
            (row[columns[0]] if len(columns) == 1 else tuple(row[c] for c in columns), row[target])
            for row in found[theirs]
        ]
        for split, theirs in splits.items()
    }


# ------------------------------------------------------------------------------------ the metrics


def scores(kind: Kind, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """A task's metrics, for outputs (n, OUTPUTS) of its head and targets (n,).

    Matthews' coefficient is Pearson's of predicted and true classes, 0 or 1.
    """
    classes = np.argmax(outputs[:, : kind.classes], axis=1)
    hits = float(np.sum((classes == 1) & (targets == 1)))
    measures: dict[str, Callable[[], float]] = {
        "accuracy": lambda: float(np.mean(classes == targets)),
        "f1": lambda: 2 * hits / max(float(np.sum(classes == 1) + np.sum(targets == 1)), 1.0),
        "matthews": lambda: correlation(classes, targets),
        "pearson": lambda: correlation(outputs[:, 0], targets),
        "spearman": lambda: rank_correlation(outputs[:, 0], targets),
    }
    return {name: measures[name]() for name in kind.metrics}
