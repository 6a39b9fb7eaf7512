"""What merges are measured against: one encoder trained on all tasks at once, with all their data.

Its steps are those of the experts together: every task's batches, as often, in one random order.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from optax_moma.demo.encoder import Params
from optax_moma.demo.training import objective, save

from .experts import (
    NO_RATE,
    Recipe,
    Study,
    about_expert,
    batches,
    initial_params,
    optimizer,
    outputs,
    schedule,
    training_examples,
)


def recipe_of(tasks: Sequence[str], optimizer: str, seed: int, learning_rate: float) -> Recipe:
    """The recipe of an expert of all these tasks."""
    return Recipe("+".join(tasks), optimizer, seed, learning_rate)


def _start(study: Study, recipe: Recipe) -> Params:
    """The base, and the experts' first heads, one above the other."""
    each = [
        initial_params(study.encoder, recipe._replace(task=task)) for task in recipe.task.split("+")
    ]
    heads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params["head"] for params in each))
    return {"encoder": each[0]["encoder"], "head": heads}


@cache
def _update(graph: Any, recipe: Recipe) -> Any:
    """The compiled step; which task, rate and length of training are arguments."""

    def loss(params: Params, task: jax.Array, tokens: jax.Array, *examples: jax.Array) -> jax.Array:
        head = jax.tree.map(lambda leaf: leaf[task], params["head"])
        own = {"encoder": params["encoder"], "head": head}
        return objective(outputs(graph, own, tokens), *examples)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, opt_state: Any, numbers: Any, *batch: jax.Array) -> Any:
        tx = optimizer(recipe, schedule(*numbers))
        gradients = jax.grad(loss)(params, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return update


def train(study: Study, recipe: Recipe) -> Params:
    """The encoder, and the heads of all tasks, (tasks, ...)."""
    steps = [
        (index, *batch, study.tasks[task].kind.classes)
        for index, task in enumerate(recipe.task.split("+"))
        for batch in batches(
            training_examples(study.tasks[task], recipe), recipe._replace(task=task)
        )
    ]
    order = np.random.default_rng(recipe.seed).permutation(len(steps))
    numbers = tuple(
        jnp.float32(x)
        for x in (recipe.learning_rate, round(recipe.warmup * len(steps)), len(steps))
    )
    same = recipe._replace(task="", seed=0, learning_rate=0.0, epochs=0, train=0)
    update = _update(nnx.graphdef(study.encoder), same)
    params = _start(study, recipe)
    opt_state = jax.jit(optimizer(recipe, NO_RATE).init)(params)
    for i in order:
        index, tokens, targets, classes = steps[i]
        params, opt_state = update(
            params, opt_state, numbers, np.int32(index), tokens, targets, np.int32(classes)
        )
    return params


def multitask(study: Study, recipe: Recipe) -> tuple[Params, Mapping[str, Params]]:
    """The encoder and the head of every task: loaded, or trained and kept."""
    path = study.folder / "experts" / recipe.name
    if about_expert(study, recipe) is None:
        save(path, train(study, recipe), {"recipe": recipe._asdict(), "about": {}})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: _start(study, recipe)),
    )
    params = ocp.load(str(path.absolute()), shapes)
    heads = {
        task: jax.tree.map(lambda leaf, i=i: leaf[i], params["head"])
        for i, task in enumerate(recipe.task.split("+"))
    }
    return params["encoder"], heads
