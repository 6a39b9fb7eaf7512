"""How low a loss gets when padding is counted: what a published 2.03 on FineWeb is made of.

    python -m experiments.pretrain.padding           # two runs; fills RESULTS.md
    python -m experiments.pretrain.padding --quick   # the same in seconds, to see that it works

The authors' script (arXiv 2512.17109) fills every document up to one length with the end token,
counts that in the loss, and calls validation the last training batch, read again after the update.
Here one model is trained on the same texts, packed and padded, and its loss is read in both ways.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from experiments import pages
from experiments.records import machine

from . import model
from .data import END, Batches, Corpus, encode, find_tokenizer, open_corpus
from .program import program_for
from .side import side_study
from .train import Config

CONFIG = Config(
    vocabulary=1024, width=128, layers=4, length=512, batch=4, lanes=1, steps=300, lr=2e-3,
    optimizer="moma_clipped:rank=16",
)  # fmt: skip
QUICK = dataclasses.replace(CONFIG, vocabulary=512, layers=1, length=64, steps=20)
DOCUMENTS = 16
"""Held-out documents read of every source."""
COLUMNS = (
    "trained on", "padding, %", "last batch", "held out", "held out, text alone", "machine"
)  # fmt: skip

BLOCK = pages.Block(
    "padding",
    "Padding in the loss",
    lambda rows, _: pages.table(COLUMNS[:-1], [[row[c] for c in COLUMNS[:-1]] for row in rows]),
)


def padded(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[np.ndarray]:
    """Rows (length + 1,) of one text each, cut, or filled up with the end token."""
    end = tokenizer.token_to_id(END)
    for text in texts:
        tokens = encode(tokenizer, text)[: length + 1]
        yield np.pad(tokens, (0, length + 1 - len(tokens)), constant_values=end)


def is_text(tokens: jax.Array, end: int) -> jax.Array:
    """Which targets, ``tokens[:, 1:]``, are text, or the one end token behind it."""
    left = jnp.cumsum((tokens != end)[:, ::-1], axis=1)[:, ::-1]
    return left[:, :-1] > 0


def losses(config: Config, corpus: Corpus, tokenizer: Tokenizer, kind: str) -> list[float]:
    """Trains on packed or padded rows: share of padding, and the loss in every way."""
    sizes, end = config.sizes(), tokenizer.token_to_id(END)
    program = program_for(sizes, config.optimizer, config.lr, config.steps, config.mesh)
    _, apply = model.functional(sizes)

    @jax.jit
    def sums(params: Any, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of all positions, and of those of text: the sum of the loss, and how many they are."""
        logits = apply(params, row[None, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, row[None, 1:])
        counted = jnp.stack([jnp.ones_like(entropy), is_text(row[None], end)])
        return jnp.sum(entropy * counted, axis=(1, 2)), jnp.sum(counted, axis=(1, 2))

    with jax.set_mesh(program.mesh):
        batches = Batches(
            corpus, tokenizer, program.batch, config.batch, config.length, 1, config.seed
        )
        rows = padded(corpus.lane(0, 1, config.seed), tokenizer, config.length)
        state, batch = program.init(jax.random.key(config.seed)), np.zeros(0)
        for _ in range(config.steps):
            full = kind == "packed"
            batch = next(batches) if full else np.stack(list(islice(rows, config.batch)))
            state, *_ = program.step(state, jnp.asarray(batch))
        batches.close()
        held_out = (d for source in corpus.held_out.values() for d in islice(source, DOCUMENTS))
        read = [sums(state.params, row) for row in padded(held_out, tokenizer, config.length)]
        loss, count = (np.sum([part[i] for part in read], axis=0) for i in (0, 1))
        last = np.mean(program.losses(state.params, jnp.asarray(batch)))
    whole, text = loss / count
    return [100 * (1 - count[1] / count[0]), float(last), float(whole), float(text)]


def rows(quick: bool, folder: Path) -> Iterator[list[str]]:
    """Trains twice: rows of COLUMNS."""
    config = QUICK if quick else CONFIG
    corpus = open_corpus(config.corpus, config.length)
    tokenizer = find_tokenizer(corpus, config.vocabulary, folder / f"bpe{config.vocabulary}.json")
    for kind in ("packed", "padded"):
        found = losses(config, corpus, tokenizer, kind)
        yield [kind, *(f"{x:.3f}" for x in found), machine()]


if __name__ == "__main__":
    side_study(__doc__, BLOCK, COLUMNS, rows)
