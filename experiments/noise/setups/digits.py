"""AdamW on scikit-learn's digits: a setup that needs no download, and runs in seconds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.noise.forks import orders, schedule
from experiments.noise.images import Images, Split, digits
from experiments.noise.problems import Problem, image_problem


def setup(
    problem: Problem, rate: float, batch: int, steps: int, prefix: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``train`` and ``evaluate``: the noise multiplies the learning rate, after a shared prefix."""

    @jax.jit
    def run(params: Any, peak: jax.Array, rows: jax.Array, data: Any) -> Any:
        tx = optax.adamw(schedule("cosine", peak, len(rows)), weight_decay=0.01)

        def step(carry: Any, i: jax.Array) -> Any:
            params, state = carry
            batch = jax.tree.map(lambda x: x[i], data)
            updates, state = tx.update(jax.grad(problem.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

    examples = len(problem.train["y"])

    def train(noise: float, pair: int, branch: int) -> Any:
        start = problem.init(jax.random.key(pair))
        shared = orders(examples, [1000 + pair], prefix, batch)[0, 0]
        start = run(start, jnp.float32(rate), shared, problem.train)
        own = orders(examples, [pair], steps, batch)[0, branch]
        return run(start, jnp.float32(noise * rate), own, problem.train)

    def evaluate(params: Any) -> dict[str, Any]:
        dev, test = (problem.score(params, part) for part in (problem.dev, problem.test))
        return {"score": dev["score"], "test": test["score"]}

    return train, evaluate


def split() -> Split:
    """1,000 digits to train on, 300 to choose on, 497 to report on."""
    x, y = digits()
    order = np.random.default_rng(0).permutation(len(y))
    return Split(*(Images(x[i], y[i]) for i in np.split(order, (1000, 1300))))


train, evaluate = setup(image_problem(split()), rate=1e-3, batch=32, steps=300, prefix=100)
