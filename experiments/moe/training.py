"""Training one variant at one learning rate, and the plan of rates and seeds.

Every variant has the same grid of rates, a factor of two apart, on seed 0: where the best lies at
the grid's end, the next rate is tried too. The best rate by the score on ``dev`` is then run with
the other seeds. ``test`` is reported, and chooses nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

from experiments.pretrain.optimizers import CLIP, schedule
from experiments.records import Records, machine

from .variants import VARIANTS, Variant, parameters

Batch = Mapping[str, Any]
"""Arrays with one row for each sequence."""
Scores = dict[str, jax.Array]
KEY = ("variant", "learning_rate", "seed")
AUXILIARY = 1e-2
"""Weight of the routers' loss."""
SEEDS = (0, 1, 2)
FURTHEST = 2
"""How many rates beyond each end of the grid may be tried."""
console = Console(highlight=False)


class Problem(NamedTuple):
    """What variants are compared on.

    Attributes:
      name: of its CSV file.
      make: (variant, seed) -> the module.
      forward: (module, batch, key or None) -> scores of every row, and the routers' loss.
      batches: seed -> the batches of a whole training, the same for all variants.
      dev: what rates are chosen on.
      test: what is reported.
      rates: the grid, ascending.
      score: name of the score that chooses, which should be low.
    """

    name: str
    make: Callable[[Variant, int], nnx.Module]
    forward: Callable[..., tuple[Scores, jax.Array]]
    batches: Callable[[int], Sequence[Batch]]
    dev: Batch
    test: Batch
    rates: tuple[float, ...]
    score: str


class Program(NamedTuple):
    """A variant's compiled functions, for every rate and seed.

    Attributes:
      step: (params, optimizer's state, batch, key, rate) -> (params, state, loss); both donated.
      scores: (params, batch) -> scores of every row.
    """

    step: Callable[..., tuple[Any, Any, jax.Array]]
    scores: Callable[..., Scores]


TX = optax.chain(optax.clip_by_global_norm(CLIP), optax.scale_by_adam(b2=0.99))
"""Without weight decay, which would pull a metric's factors towards zero."""


def build(make: Callable[[], nnx.Module], forward: Callable[..., Any]) -> Program:
    """Of modules that are made alike; compiles nothing yet."""
    graph = nnx.graphdef(nnx.eval_shape(make))

    def step(params: Any, state: Any, batch: Batch, key: jax.Array, rate: jax.Array) -> Any:
        def total(params: Any) -> tuple[jax.Array, jax.Array]:
            scores, auxiliary = forward(nnx.merge(graph, params), batch, key)
            loss = jnp.mean(scores["loss"])
            return loss + AUXILIARY * auxiliary, loss

        grads, loss = jax.grad(total, has_aux=True)(params)
        updates, state = TX.update(grads, state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), state, loss

    scores = lambda params, batch: forward(nnx.merge(graph, params), batch)[0]  # noqa: E731
    return Program(jax.jit(step, donate_argnums=(0, 1)), jax.jit(scores))


def evaluate(program: Program, params: Any, data: Batch, rows: int) -> dict[str, float]:
    """Means of the scores over all rows of ``data``, computed ``rows`` at a time."""
    count = len(next(iter(data.values())))
    found: list[Scores] = []
    for start in range(0, count, rows):
        places = np.minimum(np.arange(start, start + rows), count - 1)
        scores = program.scores(params, {name: x[places] for name, x in data.items()})
        found.append({name: x[: count - start] for name, x in scores.items()})
    return {name: float(np.mean(np.concatenate([f[name] for f in found]))) for name in found[0]}


def train(
    problem: Problem, program: Program, variant: Variant, rate: float, seed: int
) -> dict[str, Any]:
    """One training; its scores on dev and test, infinite where it diverged."""
    batches = problem.batches(seed)
    rates = np.asarray(jax.vmap(schedule(rate, len(batches)))(jnp.arange(len(batches))))
    module = problem.make(variant, seed)
    size = parameters(module)
    params = jax.tree.map(jnp.copy, nnx.split(module)[1])  # steps eat them, models share them
    state, key = TX.init(params), jax.random.key(seed)
    begun, losses = time.perf_counter(), []
    for i, batch in enumerate(batches):
        params, state, loss = program.step(
            params, state, batch, jax.random.fold_in(key, i), rates[i]
        )
        losses.append(loss)
    losses = np.asarray(jax.device_get(losses))
    seconds = time.perf_counter() - begun
    rows = len(next(iter(batches[0].values())))
    results = {"steps": len(batches), "train": float(np.mean(losses[-20:]))}
    for split, data in (("dev", problem.dev), ("test", problem.test)):
        scores = evaluate(program, params, data, rows)
        finite = np.isfinite(scores["loss"])
        results |= {f"{split}_{n}": x if finite else float("inf") for n, x in scores.items()}
    return results | {"parameters": size, "seconds": seconds}


def best_rate(records: Records, problem: Problem, name: str) -> float:
    """The rate of seed 0 with the best score on dev."""
    rows = records.where(variant=name, seed=0)
    return float(min(rows, key=lambda r: float(r[f"dev_{problem.score}"]))["learning_rate"])


def plan(records: Records, problem: Problem, name: str) -> Iterator[tuple[float, int]]:
    """Rates and seeds of a variant, as results decide them."""
    yield from ((rate, 0) for rate in problem.rates)
    low, high = problem.rates[0], problem.rates[-1]
    for _ in range(FURTHEST):
        best = best_rate(records, problem, name)
        if np.isclose(best, high):
            high *= 2
            yield high, 0
        elif np.isclose(best, low):
            low /= 2
            yield low, 0
    best = best_rate(records, problem, name)
    yield from ((best, seed) for seed in SEEDS[1:])


def study(problem: Problem, records: Records, names: Sequence[str] = tuple(VARIANTS)) -> None:
    """Runs what is missing of the plan of every variant, one line of the CSV file each."""
    for name in names:
        program = build(partial(problem.make, VARIANTS[name], 0), problem.forward)
        for rate, seed in plan(records, problem, name):
            if records.holds(variant=name, learning_rate=rate, seed=seed):
                continue
            found = train(problem, program, VARIANTS[name], rate, seed)
            records.add(variant=name, learning_rate=rate, seed=seed, **found, machine=machine())
            console.print(
                f"{problem.name:9} {name:21} rate {rate:<8g} seed {seed}"
                f"  dev {found[f'dev_{problem.score}']:.4f}  {found['seconds']:.0f} s"
            )
