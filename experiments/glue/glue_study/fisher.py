"""The reference: the exact diagonal Fisher of an expert, from examples.

F = mean over x of E_{y ~ p(y|x)} [(d log p(y|x) / d w)^2]: one gradient per example and class,
squared before anything is summed. A regression counts as a Gaussian of unit variance.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

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
from .records import Records

EXAMPLES = 256


def exact_fisher(graph: Any, trained: Expert, tokens: np.ndarray, classes: int) -> Params:
    """The encoder's diagonal Fisher on texts (n, length)."""
    add = _adder(graph, classes)
    total = jax.tree.map(jnp.zeros_like, trained.encoder)
    longest = lengths(tokens)
    for length in np.unique(longest):
        total = add(total, trained.encoder, trained.head, tokens[longest == length, :length])
    return jax.tree.map(lambda x: x / len(tokens), total)


@cache
def _adder(graph: Any, classes: int) -> Callable[..., Params]:
    def log_likelihood(
        encoder: Params, head: Params, text: jax.Array, label: jax.Array
    ) -> jax.Array:
        out = outputs(graph, {"encoder": encoder, "head": head}, text[None])[0]
        # A Gaussian's score is its noise, of unit variance, times the gradient of its mean.
        return out[0] if classes == 1 else jax.nn.log_softmax(out[:classes])[label]

    @jax.jit
    def add(total: Params, encoder: Params, head: Params, texts: jax.Array) -> Params:
        def one(total: Params, text: jax.Array) -> tuple[Params, None]:
            def label(y: jax.Array, total: Params) -> Params:
                value, g = jax.value_and_grad(log_likelihood)(encoder, head, text, y)
                share = 1.0 if classes == 1 else jnp.exp(value)
                return jax.tree.map(lambda t, x: t + share * jnp.square(x), total, g)

            return jax.lax.fori_loop(0, classes, label, total), None

        return jax.lax.scan(one, total, texts)[0]

    return add


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
