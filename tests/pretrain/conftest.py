"""A small corpus of made-up text, and a run small enough for a test."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

NEEDED = ("datasets", "flax", "grain", "orbax", "pyarrow", "tokenizers")
collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]
else:
    from experiments.pretrain import train

SOURCES = {"letters": 60, "essays": 40}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Two sources of documents in which some words follow others."""
    path = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(60)]
    follows = rng.integers(0, len(words), (len(words), 3))
    for source, count in SOURCES.items():
        documents = []
        for _ in range(count):
            word, text = rng.integers(len(words)), []
            for _ in range(rng.integers(30, 400)):
                word = rng.choice(follows[word])
                text.append(words[word])
            documents.append("\n".join(" ".join(text[i : i + 9]) for i in range(0, len(text), 9)))
        (path / f"{source}.txt").write_text("\n\x1e\n".join(documents))
    return path


@pytest.fixture(scope="session")
def small(corpus, tmp_path_factory) -> "train.Config":
    """A run of seconds: one device unless a mesh is given."""
    return train.Config(
        out=str(tmp_path_factory.mktemp("runs") / "default"),
        corpus=str(corpus),
        vocabulary=320,
        width=64,
        layers=1,
        heads=2,
        length=32,
        optimizer="moma:rank=4,min_dim_size_to_factor=32",
        lr=5e-3,
        steps=8,
        validate=4,
        log_every=4,
        mesh="1,1,1",
    )


@pytest.fixture
def new_run(small, tmp_path):
    """A run in a folder of its own, with some settings changed; they share one tokenizer."""
    tokenizer = str(Path(small.out).parent / "bpe320.json")

    def change(name: str = "run", **changes) -> "train.Config":
        return dataclasses.replace(small, out=str(tmp_path / name), tokenizer=tokenizer, **changes)

    return change
