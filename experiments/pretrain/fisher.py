"""How near the optimizer's statistics are to the Fisher, while a language model is trained.

    python -m experiments.pretrain.fisher            # two runs; fills RESULTS.md
    python -m experiments.pretrain.fisher --quick    # the same in seconds, to see that it works

At some steps of a run the diagonal of the Fisher is computed from held-out text, one sequence at a
time, with labels drawn from the model (which is exact but for the draw), and ranked against what
the optimizer knows at that step: F against its second moments v, and d^2 F, what a change d of the
parameters since the start matters, against d^2 v and d^2. Spearman's rho over each leaf's entries.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import optax_moma as om
from experiments import pages
from experiments.agreement import by_leaf
from experiments.records import machine
from optax_moma.merging import diagonal_fisher

from . import model
from .data import Batches, Corpus, find_tokenizer, open_corpus, validation
from .program import program_for
from .side import side_study
from .train import Config

CONFIG = Config(vocabulary=1024, width=128, layers=4, length=256, batch=8, steps=400)
QUICK = dataclasses.replace(CONFIG, vocabulary=512, layers=1, length=64, steps=8)
RATES = {"moma_clipped:rank=16": 4e-3, "adamw": 1e-3}
"""Each optimizer's best of the study."""
MOMENTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""When they are compared, in shares of the run."""
SEQUENCES = 32
"""Held-out sequences of every source from which the Fisher is computed."""
COLUMNS = ("optimizer", "step", "estimate", "leaf", "rho", "entries", "machine")
LABELS = {"v": "F, by v", "d^2 v": "d²F, by d²v", "d^2": "d²F, by d²"}
"""What is ranked against what, by the estimate's name in the CSV file."""


def followed(config: Config, corpus: Corpus, file: Path) -> Iterator[list[Any]]:
    """Trains once: rows of COLUMNS, but for the machine."""
    sizes, tokenizer = config.sizes(), find_tokenizer(corpus, config.vocabulary, file)
    program = program_for(sizes, config.optimizer, config.lr, config.steps, config.mesh)
    _, apply = model.functional(sizes)
    moments = {round(share * config.steps) for share in MOMENTS}
    held_out = validation(corpus, tokenizer, config.length, SEQUENCES).values()
    texts = np.concatenate([tokens[:, :-1] for tokens in held_out])
    with jax.set_mesh(program.mesh):
        batches = Batches(
            corpus, tokenizer, program.batch, config.batch, config.length, 1, config.seed
        )
        state = program.init(jax.random.key(config.seed))
        start = jax.tree.map(jnp.copy, state.params)
        for step in range(1, config.steps + 1):
            state, *_ = program.step(state, next(batches))
            if step in moments:
                key = jax.random.key(step)
                fisher = diagonal_fisher(apply, state.params, [texts], labels="sampled", key=key)
                for estimate, leaf, rho, entries in compared(state, start, fisher):
                    yield [config.optimizer, step, estimate, leaf, f"{rho:.4f}", entries]
        batches.close()


def compared(state: Any, start: Any, fisher: Any) -> Iterator[tuple[str, str, float, int]]:
    """(estimate, leaf, rho, entries) at one moment of training."""
    v = om.curvature_from(state.opt_state, state.params)
    moved = jax.tree.map(lambda w, w0: np.asarray(w != w0), state.params, start)
    matters = om.saliency(state.params, start, fisher)
    for estimate, tree, truth in (
        ("v", v, fisher),
        ("d^2 v", om.saliency(state.params, start, v), matters),
        ("d^2", om.saliency(state.params, start, v, power=0.0), matters),
    ):
        for leaf, rho, entries in by_leaf(tree, truth, moved):
            yield estimate, leaf, rho, entries


def _layer(row: pages.Row) -> int | None:
    """Which block a matrix belongs to; None for all other leaves."""
    parts = row["leaf"].split("/")
    return int(parts[1]) if parts[0] == "blocks" and parts[-1] == "kernel" else None


def shown(rows: Sequence[pages.Row], results: Path) -> str:
    """Mean rho of the blocks' matrices by step, and of every layer at the end: table, figure."""
    rows = [row for row in rows if _layer(row) is not None]
    steps = sorted({int(row["step"]) for row in rows})
    lines, figure = [], Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    depth = sorted({_layer(row) for row in rows})
    for optimizer, style in zip(pages.unique(rows, "optimizer"), ("-", "--"), strict=False):
        for (estimate, label), colour in zip(LABELS.items(), ("C0", "C3", "black"), strict=True):
            own = [r for r in rows if (r["optimizer"], r["estimate"]) == (optimizer, estimate)]
            found = [pages.pick(own, "rho", step=str(step)) for step in steps]
            lines.append([optimizer, label, *(pages.number(rho, 2, 1.0) for rho in found)])
            at_end = [row for row in own if int(row["step"]) == steps[-1]]
            layers = [pages.pick([r for r in at_end if _layer(r) == i], "rho") for i in depth]
            draw = {"color": colour, "ls": style, "marker": "o", "ms": 4}
            left.plot(steps, [np.mean(rho) for rho in found], **draw)
            right.plot(depth, [np.mean(r) for r in layers], label=f"{label} ({optimizer})", **draw)
    left.set(xlabel="step", ylabel="rank correlation", title="mean over the matrices of blocks")
    right.set(xlabel="block", title=f"at step {steps[-1]}", xticks=depth)
    right.legend(frameon=False, fontsize=8)
    pages.tidy(left)
    pages.tidy(right)
    table = pages.table(["optimizer", "ranked", *(f"step {step}" for step in steps)], lines)
    note = f"Mean over {len(found[-1])} matrices of blocks ± standard error."
    return "\n\n".join([table, note, pages.save(figure, results / "fisher.png")])


BLOCK = pages.Block("fisher", "Second moments against the Fisher", shown)


def rows(quick: bool, folder: Path) -> Iterator[list[Any]]:
    """Of all optimizers, rows of COLUMNS."""
    config = QUICK if quick else CONFIG
    corpus = open_corpus(config.corpus, config.length)
    for optimizer, rate in RATES.items():
        one = dataclasses.replace(config, optimizer=optimizer, lr=rate)
        for row in followed(one, corpus, folder / f"bpe{config.vocabulary}.json"):
            yield [*row, machine()]


if __name__ == "__main__":
    side_study(__doc__, BLOCK, COLUMNS, rows)
