"""What one training step takes: time, temporary memory, parameters.

One feed-forward network of 256 x 1024 with 4 experts on 8,192 tokens of random states, on twice
(``large``) and four times as many (``largest``); and the two models of the study, at the study's
sizes. In each setup all variants take their steps in turns, so that other work on the machine meets
them alike.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.records import Records, machine
from optax_moma.demo import encoder

from . import language, text
from .training import TX, Batch, build
from .variants import VARIANTS, Sizes, Stack, parameters

LAYERS = {
    "dense": ("dense", 1),
    "soft": ("soft", 1),
    "domain": ("domain", 1),
    "domain, metric of rank 1": ("domain, metric", 1),
    "domain, metric of rank 4": ("domain, metric", 4),
    "domain, metric of rank 8": ("domain, metric", 8),
    "ties": ("ties", 1),
    "ties, metric of rank 4": ("ties, metric", 4),
    "dare": ("dare", 1),
    "dare, metric of rank 4": ("dare, metric", 4),
    "sparse, top 2": ("sparse, top 2", 1),
}
"""Of the layer alone: the variant, and the rank of its metric."""


class Setup(NamedTuple):
    """One comparison.

    Attributes:
      makes: the modules, by name.
      forward: as of a `Problem`.
      batch: what every step gets.
    """

    makes: dict[str, Callable[[], nnx.Module]]
    forward: Callable[..., Any]
    batch: Batch


def layer(width: int = 256, hidden: int = 1024, batch: int = 16, length: int = 512) -> Setup:
    """One network that fits random targets, in two segments a sequence."""
    x, y = jax.random.normal(jax.random.key(0), (2, batch, length, width))

    def forward(stack: Stack, batch: Batch, key: jax.Array) -> Any:
        routed = stack(0, batch["x"], stack.start(), key=key)
        return {"loss": (routed.y - batch["y"]) ** 2}, routed.loss

    def make(variant: str, rank: int) -> Stack:
        sizes = Sizes(width, hidden, rank, length // 2)
        return Stack(VARIANTS[variant], sizes, 1, rngs=nnx.Rngs(0))

    makes = {name: partial(make, *about) for name, about in LAYERS.items()}
    return Setup(makes, forward, {"x": x, "y": y})


def language_model() -> Setup:
    """The study's decoder, on random tokens."""
    shape = (language.BATCH, language.CONFIG.length + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, language.CONFIG.vocabulary)
    make = lambda v: language.Decoder(v, language.CONFIG, language.SEGMENT, nnx.Rngs(0))  # noqa: E731
    makes = {name: partial(make, v) for name, v in VARIANTS.items()}
    return Setup(makes, language.next_tokens, {"tokens": tokens})


def classifier() -> Setup:
    """The study's classifier, on random states."""
    config = encoder.Config()
    like = encoder.Layer(config, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(0), (text.BATCH, text.LENGTH, config.width))
    tokens = jnp.ones((text.BATCH, text.LENGTH), jnp.int32)
    batch = {"states": states, "tokens": tokens, "labels": tokens[:, 0]}
    make = lambda v: text.Classifier(v, like, 6, text.RANK, nnx.Rngs(0))  # noqa: E731
    makes = {n: partial(make, v) for n, v in VARIANTS.items() if n in text.VARIANTS}
    return Setup(makes, text.answers, batch)


SETUPS: dict[str, Callable[[], Setup]] = {
    "layer": layer,
    "large": partial(layer, batch=32),
    "largest": partial(layer, batch=64),
    "language": language_model,
    "text": classifier,
}


class Steps(NamedTuple):
    """A variant's compiled step, on its way.

    Attributes:
      parameters: how many numbers are learned.
      temporaries: bytes that a step needs besides what it is given and gives.
      seconds: of the steps so far.
    """

    parameters: int
    temporaries: int
    seconds: Iterator[float]


def steps(make: Callable[[], nnx.Module], setup: Setup) -> Steps:
    """Compiles a variant's step and takes the first."""
    module, key, rate = make(), jax.random.key(0), jnp.float32(1e-3)
    params = jax.tree.map(jnp.copy, nnx.split(module)[1])
    state = TX.init(params)
    program = build(make, setup.forward).step
    compiled = program.lower(params, state, setup.batch, key, rate).compile()

    def run(params: Any, state: Any) -> Iterator[float]:
        while True:
            begun = time.perf_counter()
            params, state, loss = compiled(params, state, setup.batch, key, rate)
            jax.block_until_ready((params, state, loss))
            yield time.perf_counter() - begun

    seconds = run(params, state)
    next(seconds)
    return Steps(parameters(module), compiled.memory_analysis().temp_size_in_bytes, seconds)


def measure(name: str, setup: Setup, records: Records, rounds: int) -> Table:
    """Adds a line for each variant of a setup."""
    running = {variant: steps(make, setup) for variant, make in setup.makes.items()}
    turns = [{v: next(own.seconds) for v, own in running.items()} for _ in range(rounds)]
    times = {v: 1e3 * np.array([turn[v] for turn in turns]) for v in running}
    table = Table(name, "parameters", "temporaries, MB", "step, ms", "of soft", "of soft, median")
    for variant, own in times.items():
        ratios = [float(f(own) / f(times["soft"])) for f in (np.min, np.median)]
        count, temporaries, _ = running[variant]
        records.add(
            variant=variant,
            parameters=count,
            temporaries_mb=temporaries / 1e6,
            milliseconds=float(np.min(own)),
            of_soft=ratios[0],
            of_soft_median=ratios[1],
            rounds=rounds,
            machine=machine(),
        )
        cells = (f"{temporaries / 1e6:.0f}", f"{np.min(own):.1f}", *(f"{r:.2f}" for r in ratios))
        table.add_row(variant, f"{count:,}", *cells)
    return table


def run(name: str, results: Path, rounds: int) -> None:
    """Measures every variant of a setup, prints the table and writes its CSV file anew."""
    path = results / f"cost_{name}.csv"
    path.unlink(missing_ok=True)
    Console().print(measure(name, SETUPS[name](), Records(path, ("variant",)), rounds))
