"""Four tasks of different nature, made from short texts that people rated.

The texts are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text" (ICWSM 2014): tweets and sentences of movie reviews, product reviews
and newspaper editorials, each rated by some twenty people from -4 to 4.
"""

import html
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from optax_moma.demo.files import TEXTS, fetch

SOURCES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
"""Where a text comes from, and how its files are called."""

Split = Literal["train", "dev", "test"]
SHARES: Mapping[Split, float] = {"train": 0.7, "dev": 0.1, "test": 0.2}


class Text(NamedTuple):
    """A text and the mean and standard deviation of its ratings.

    Texts of one group (sentences of one review or editorial) must stay in one split.
    """

    text: str
    source: str
    group: str
    rating: float
    spread: float


class Examples(NamedTuple):
    """``rows`` of a corpus and their ``targets``: class numbers, or real values."""

    rows: np.ndarray
    targets: np.ndarray


class Task(NamedTuple):
    """A task on a corpus; ``classes`` is 1 for a regression."""

    name: str
    title: str
    classes: int
    splits: Mapping[Split, Examples]

    @property
    def metric(self) -> str:
        """What `score` computes."""
        return "Pearson r" if self.classes == 1 else "accuracy"


def read_texts(cache: Path) -> list[Text]:
    """All texts, without the duplicates, in the order of the files.

    Raises:
      optax_moma.demo.files.FetchError: the archive is absent and cannot be downloaded.
    """
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fetch(TEXTS, cache)) as outer:
        archive = io.BytesIO(_read(outer, inner))
    with tarfile.open(fileobj=archive) as tar:
        texts: list[Text] = []
        for source, stem in SOURCES.items():
            truth = _read(tar, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8-sig")
            votes = _read(tar, f"hutto_ICWSM_2014/{stem}_anonDataRatings.txt").decode("utf-8-sig")
            texts.extend(parse(source, truth, votes))
    return deduplicate(texts)


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise ValueError(f"{name} in {tar.name} is not a regular file.")
    return file.read()


def parse(source: str, truth: str, votes: str) -> Iterator[Text]:
    """Joins a source's texts with the ratings that each received.

    The mean and the spread are both taken from the single ratings: the means beside the texts
    differ from them for some tweets.

    Args:
      source: what to call the source.
      truth: lines ``id, mean rating, text``, tab-separated.
      votes: lines ``id, mean, standard deviation, [rating, ...]``, tab-separated.
    """
    ratings = {fields[0]: json.loads(fields[3]) for fields in _lines(votes)}
    for name, _, text in _lines(truth):
        group = f"{source} {name.split('_')[0]}"
        mean, spread = float(np.mean(ratings[name])), float(np.std(ratings[name]))
        yield Text(html.unescape(text), source, group, mean, spread)


def _lines(table: str) -> Iterator[list[str]]:
    return (line.split("\t") for line in re.split(r"\r?\n", table) if line)


def deduplicate(texts: Iterable[Text]) -> list[Text]:
    """Keeps the first of the texts that have the same letters and digits; drops empty ones.

    >>> make = lambda text: Text(text, "tweets", "tweets 1", 0.0, 0.0)
    >>> [t.text for t in deduplicate(map(make, ["So good!", "so  GOOD", "...", "not so good"]))]
    ['So good!', 'not so good']
    """
    first: dict[str, Text] = {}
    for text in texts:
        key = " ".join(re.findall(r"\w+", text.text.casefold()))
        if key:
            first.setdefault(key, text)
    return list(first.values())


def split_groups(groups: Sequence[str], rng: np.random.Generator) -> dict[Split, np.ndarray]:
    """Deals whole groups out to train, dev and test, in the proportions of `SHARES`.

    Args:
      groups: the group of each text.
      rng: decides the order; the same state gives the same splits.

    Returns:
      By split, the indices into ``groups``, in random order.
    """
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    place = rng.permutation(len(names))[members]
    cuts = np.cumsum(list(SHARES.values())) * len(names)
    part = np.searchsorted(cuts, place, side="right")
    rows = rng.permutation(len(groups))
    return {split: rows[part[rows] == i] for i, split in enumerate(SHARES)}


def make_tasks(texts: Sequence[Text], sizes: Mapping[Split, int], seed: int) -> list[Task]:
    """The demo's four tasks on a corpus.

    Every text has one split for all tasks, so that no expert trains on a text that another task
    is tested on.

    Args:
      texts: the corpus, without duplicates.
      sizes: the most examples that a task takes from each split; fewer where texts are lacking.
      seed: decides splits and order.

    Returns:
      polarity of movie reviews (2 classes; texts rated between -0.5 and 0.5 left out), rating of
      tweets (regression), source of a text (4 classes, equally many of each), and disagreement
      of the raters of editorials (regression on their ratings' standard deviation).
    """
    rng = np.random.default_rng(seed)
    order: dict[str, dict[Split, np.ndarray]] = {}
    for source in SOURCES:
        own = np.array([i for i, t in enumerate(texts) if t.source == source], np.int64)
        splits = split_groups([texts[i].group for i in own], rng)
        order[source] = {split: own[rows] for split, rows in splits.items()}
    rating = np.array([t.rating for t in texts], np.float32)
    spread = np.array([t.spread for t in texts], np.float32)
    number = np.array([list(SOURCES).index(t.source) for t in texts], np.float32)

    def examples(split: Split, sources: Iterable[str], target: np.ndarray, size: int) -> Examples:
        rows = np.concatenate([order[s][split][:size] for s in sources])
        return Examples(rows, target[rows])

    def polarity(split: Split) -> Examples:
        rows = order["movies"][split]
        rows = rows[np.abs(rating[rows]) > 0.5][: sizes[split]]
        return Examples(rows, (rating[rows] > 0).astype(np.float32))

    return [
        Task("polarity", "Movie polarity", 2, {s: polarity(s) for s in SHARES}),
        Task(
            "rating",
            "Tweet rating",
            1,
            {s: examples(s, ["tweets"], rating, sizes[s]) for s in SHARES},
        ),
        Task(
            "source",
            "Text source",
            len(SOURCES),
            {s: examples(s, SOURCES, number, sizes[s] // len(SOURCES)) for s in SHARES},
        ),
        Task(
            "dissent",
            "Editorial dissent",
            1,
            {s: examples(s, ["editorials"], spread, sizes[s]) for s in SHARES},
        ),
    ]


def score(task: Task, outputs: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of the largest of the first ``classes`` outputs, or Pearson's r of the first.

    Args:
      task: the task.
      outputs: (n, >= classes) outputs of a head.
      targets: (n,) targets.

    Returns:
      A number in [0, 1], or in [-1, 1] for a regression (0 where the outputs are constant).
    """
    if task.classes > 1:
        return float(np.mean(np.argmax(outputs[:, : task.classes], axis=1) == targets))
    x = outputs[:, 0].astype(np.float64) - np.mean(outputs[:, 0], dtype=np.float64)
    y = targets.astype(np.float64) - np.mean(targets, dtype=np.float64)
    norm = np.sqrt(np.sum(x**2) * np.sum(y**2))
    return float(np.sum(x * y) / norm) if norm > 0 else 0.0


def standard_error(task: Task, value: float, count: int) -> float:
    """Of a `score` on n texts: sqrt(p (1 - p) / n), or for a regression (1 - r^2) / sqrt(n - 1)."""
    if task.classes > 1:
        return float(np.sqrt(value * (1 - value) / count))
    return float((1 - value**2) / np.sqrt(count - 1))
