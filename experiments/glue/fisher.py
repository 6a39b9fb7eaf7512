"""The reference: curvature of an expert computed from examples, after training.

The Fisher is F = mean over x of E_{y ~ p(y|x)} [(d log p(y|x) / d w)^2], exact for each example and
class; a regression counts as a Gaussian of unit variance. The Grams are RegMean's.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from experiments.records import Records
from optax_moma import merging
from optax_moma.demo.encoder import Params
from optax_moma.demo.training import save

from .experts import (
    Expert,
    Recipe,
    Study,
    about_expert,
    expert,
    lengths,
    machine,
    outputs,
    size,
    training_examples,
)

EXAMPLES = 128


def one_by_one(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Texts as batches of one, as long as the text: few shapes, so that few are compiled."""
    for text, length in zip(tokens, lengths(tokens), strict=True):
        yield text[None, :length]


def exact_fisher(graph: Any, trained: Expert, tokens: np.ndarray, classes: int) -> Params:
    """The encoder's diagonal Fisher on texts (n, length)."""

    def apply(encoder: Params, texts: jax.Array) -> jax.Array:
        out = outputs(graph, {"encoder": encoder, "head": trained.head}, texts)
        return out[:, 0] if classes == 1 else out[:, :classes]

    return merging.diagonal_fisher(
        apply,
        trained.encoder,
        one_by_one(tokens),
        likelihood="normal" if classes == 1 else "categorical",
    )


def grams_of(study: Study, recipe: Recipe) -> Any:
    """The Grams of what every kernel of a recipe's expert reads, on the Fisher's examples."""
    trained, graph = expert(study, recipe), nnx.graphdef(study.encoder)
    tokens = training_examples(study.tasks[recipe.task], recipe).tokens[:EXAMPLES]

    def apply(encoder: Params, texts: jax.Array) -> jax.Array:
        return outputs(graph, {"encoder": encoder, "head": trained.head}, texts)

    return merging.input_grams(apply, trained.encoder, [tokens], mask=lambda t: t != 0)


def fisher_of(study: Study, recipe: Recipe) -> Params:
    """The Fisher of a recipe's expert on its first training examples: loaded, or computed."""
    path = study.folder / "fisher" / recipe.name
    about = {"recipe": recipe._asdict(), "examples": EXAMPLES}
    found = str(path.absolute())
    if not (
        ocp.is_orbax_checkpoint(found)
        and (ocp.metadata(found).custom_metadata or {}).items() >= about.items()
    ):
        start = time.monotonic()
        task = study.tasks[recipe.task]
        tokens = training_examples(task, recipe).tokens[:EXAMPLES]
        graph = nnx.graphdef(study.encoder)
        computed = exact_fisher(graph, expert(study, recipe), tokens, task.kind.classes)
        jax.block_until_ready(computed)
        save(path, computed, about | {"seconds": time.monotonic() - start})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), study.base
    )
    return ocp.load(found, like)


def record(study: Study, recipe: Recipe) -> None:
    """What the Fisher cost, beside the curvature that the optimizer had anyway."""
    key = {"task": recipe.task, "optimizer": recipe.optimizer, "seed": recipe.seed}
    records = Records(study.results / "fisher.csv", tuple(key))
    if records.holds(**key):
        return
    computed = fisher_of(study, recipe)
    path = str((study.folder / "fisher" / recipe.name).absolute())
    about = about_expert(study, recipe) or {}
    records.add(
        **key,
        examples=EXAMPLES,
        seconds=float((ocp.metadata(path).custom_metadata or {})["seconds"]),
        training_seconds=about["seconds"],
        fisher_bytes=size(computed),
        curvature_bytes=size(expert(study, recipe).statistics.curvature),
        machine=machine(),
    )
