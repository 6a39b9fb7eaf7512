"""What is trained and merged: a small image classifier, and a small language model on bytes."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.pretrain import data as text
from experiments.pretrain.model import Config, functional

from .images import SIDE, Split, fashion

Params = Any
CLASSES = 10
WIDTHS = (128, 64)
"""Hidden layers of the classifier."""


class Problem(NamedTuple):
    """A model and its data.

    Attributes:
      name: what the results call it.
      init: from a key to params.
      loss: from params and a batch, a tree like ``train`` with fewer rows, to the mean loss.
      train: a tree of arrays whose first axis is examples.
      dev: examples to choose on, or None.
      test: examples to report on.
      score: from params and examples to the share of right answers, and the mean loss.
    """

    name: str
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Any], jax.Array]
    train: Any
    dev: Any
    test: Any
    score: Callable[[Params, Any], dict[str, jax.Array]]


# --------------------------------------------------------------------------------------- images


def standardised(x: jax.Array) -> jax.Array:
    """Each row with mean 0 and variance 1: the layer before it is scale-invariant."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)


def init_classifier(key: jax.Array, widths: tuple[int, ...] = WIDTHS) -> Params:
    """Kernels with variance 2 / fan-in, and biases."""
    sizes = (SIDE * SIDE, *widths, CLASSES)
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return {
        f"layer{i}": {
            "kernel": jnp.sqrt(2 / m) * jax.random.normal(key, (m, n)),
            "bias": jnp.zeros(n),
        }
        for i, ((m, n), key) in enumerate(zip(shapes, keys, strict=True))
    }


def features(params: Params, x: jax.Array) -> jax.Array:
    """(batch, SIDE, SIDE) -> the last hidden layer, (batch, width)."""
    x = x.reshape(len(x), -1)
    for i in range(len(params) - 1):
        layer = params[f"layer{i}"]
        x = jax.nn.gelu(standardised(x @ layer["kernel"] + layer["bias"]))
    return x


def classify(params: Params, x: jax.Array) -> jax.Array:
    """(batch, SIDE, SIDE) -> logits (batch, CLASSES)."""
    head = params[f"layer{len(params) - 1}"]
    return features(params, x) @ head["kernel"] + head["bias"]


def _results(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"score": jnp.mean(jnp.argmax(logits, -1) == labels), "loss": jnp.mean(loss)}


def image_score(params: Params, examples: Any) -> dict[str, jax.Array]:
    """Accuracy and cross entropy."""
    return _results(classify(params, examples["x"]), examples["y"])


def image_problem(split: Split) -> Problem:
    """A perceptron of two hidden layers."""
    as_tree = lambda part: {"x": jnp.asarray(part.x), "y": jnp.asarray(part.y)}  # noqa: E731
    return Problem(
        "fashion",
        init_classifier,
        lambda params, batch: image_score(params, batch)["loss"],
        *map(as_tree, split),
        jax.jit(image_score),
    )


# ---------------------------------------------------------------------------------------- language

LENGTH = 64
DECODER = Config(vocabulary=256, width=64, layers=2, heads=2, length=LENGTH)
TRAINING_BYTES = 4_000_000
HELD_OUT = 32
"""Sequences of each source."""


def byte_sequences(texts: Any, size: int) -> np.ndarray:
    """The first bytes of texts, joined by zeros: (size // (LENGTH + 1), LENGTH + 1)."""
    found, length = [], 0
    for item in texts:
        found.append(item.encode())
        length += len(found[-1]) + 1
        if length >= size:
            break
    whole = np.frombuffer(b"\0".join(found), np.uint8)
    count = min(len(whole), size) // (LENGTH + 1)
    return whole[: count * (LENGTH + 1)].reshape(count, LENGTH + 1)


def language_score(apply: Callable[..., jax.Array], params: Params, examples: Any) -> Any:
    """How often the next byte is the likeliest one, and the cross entropy in nats."""
    tokens = examples["tokens"].astype(jnp.int32)
    return _results(apply(params, tokens[:, :-1]), tokens[:, 1:])


def language_problem(corpus: text.Corpus, config: Config = DECODER) -> Problem:
    """A decoder on bytes of the corpus that experiments/pretrain reads."""
    init, apply = functional(config)
    train = byte_sequences(corpus.sample(), TRAINING_BYTES)
    held_out = [
        byte_sequences(documents, HELD_OUT * (LENGTH + 1)) for documents in corpus.held_out.values()
    ]
    score = partial(language_score, apply)
    return Problem(
        "language",
        init,
        lambda params, batch: score(params, batch)["loss"],
        {"tokens": jnp.asarray(train)},
        None,
        {"tokens": jnp.asarray(np.concatenate(held_out))},
        jax.jit(score),
    )


def open_problem(name: str) -> Problem:
    """``fashion`` or ``language``."""
    if name == "fashion":
        return image_problem(fashion())
    return language_problem(text.open_corpus("", LENGTH))
