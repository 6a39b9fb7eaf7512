"""What a step of linearised fine-tuning costs beside an ordinary one, on the same batch."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.noise.images import SIDE
from experiments.noise.problems import CLASSES, classify, init_classifier
from optax_moma.continual import linearize
from optax_moma.demo.encoder import Config, Encoder

from .streams import WIDTHS
from .texts import LENGTH, encoder_of

BATCH = {"classifier": 256, "MiniLM": 32}


def cases(batch: dict[str, int], config: Config) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, apply function, params and inputs: the classifier, and MiniLM with random weights."""
    rng = np.random.default_rng(0)
    x = rng.random((batch["classifier"], SIDE, SIDE), np.float32)
    yield "classifier", classify, init_classifier(jax.random.key(0), WIDTHS), x
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    tokens = rng.integers(103, config.vocabulary, (batch["MiniLM"], LENGTH)).astype(np.int32)
    params = nnx.to_pure_dict(nnx.state(encoder))
    yield "MiniLM", encoder_of(nnx.graphdef(encoder)), params, tokens


def step(apply: Any, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """One step of AdamW on a loss of the first outputs: what is trained on does not matter here."""
    tx = optax.adamw(1e-4)

    def loss(params: Any) -> jax.Array:
        outputs = apply(params, x)[:, :CLASSES]
        labels = jnp.arange(len(outputs)) % CLASSES
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def measure(
    rounds: int, batch: dict[str, int] = BATCH, config: Config | None = None
) -> Iterator[dict[str, Any]]:
    """By model: median milliseconds of both steps, taken in turns, and the median of the ratios.

    Args:
      rounds: how often each is timed.
      batch: examples of a step, by model.
      config: of the encoder, MiniLM by default.
    """
    for name, apply, params, x in cases(batch, config or Config()):
        state = optax.adamw(1e-4).init(params)
        run = jax.jit(step)
        kinds: dict[str, Callable[[], Any]] = {
            "ordinary": partial(run, jax.tree_util.Partial(apply), params, state, x),
            "linear": partial(run, linearize(apply, params), params, state, x),
        }
        for call in kinds.values():
            jax.block_until_ready(call())  # compiles
        seconds = [{kind: _timed(call) for kind, call in kinds.items()} for _ in range(rounds)]
        yield {
            "model": name,
            "batch": len(x),
            "rounds": rounds,
            "ordinary_ms": 1e3 * statistics.median(s["ordinary"] for s in seconds),
            "linear_ms": 1e3 * statistics.median(s["linear"] for s in seconds),
            "ratio": statistics.median(s["linear"] / s["ordinary"] for s in seconds),
        }


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin
