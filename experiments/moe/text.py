"""Text tasks: MiniLM with its last feed-forward network upcycled into experts.

All below the last layer stays as it is, so that its states are computed once; the last layer and a
fresh head are trained.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.glue import tasks
from optax_moma.demo.encoder import Encoder, Layer, embed, load_pretrained
from optax_moma.moe import Dense

from .training import Batch, Problem, Scores
from .variants import Sizes, Stack, Variant

EXAMPLES = tasks.Sizes(train=1024, dev=250, test=500)
LENGTH, BATCH, EPOCHS, RANK = 32, 32, 1, 2
"""Texts are cut after LENGTH tokens."""
VARIANTS = [
    "dense",
    "soft",
    "domain, metric",
    "domain, r identities",
    "domain, scale r",
    "sparse, top 2",
]
"""Domain merging is soft merging; masks are left to the language model; a shared base takes two
layers."""


class Classifier(nnx.Module):
    """States below the last layer -> logits, and what the router did."""

    def __init__(self, variant: Variant, layer: Layer, classes: int, rank: int, rngs: nnx.Rngs):
        """A copy of the layer, with the feed-forward network of a variant, and a head."""
        own = nnx.clone(layer)
        self.attention, self.attention_norm = own.attention, own.attention_norm
        self.ffn_norm = own.ffn_norm
        pair = tuple(Dense(x.kernel[...], x.bias[...]) for x in (layer.up, layer.down))
        width, hidden = layer.up.kernel.shape
        sizes = Sizes(width, hidden, rank, activation=partial(nnx.gelu, approximate=False))
        self.stack = Stack(variant, sizes, 1, rngs=rngs, upcycled=[pair])
        self.head = nnx.Linear(width, classes, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

    def __call__(
        self, states: jax.Array, tokens: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits (batch, classes), the router's loss, and how even its gates are."""
        mask = tokens != 0
        x = self.attention_norm(states + self.attention(states, mask))
        routed = self.stack(0, x, self.stack.start(), mask=mask, key=key)
        x = self.ffn_norm(x + routed.y)
        return self.head(embed(lambda *_: x, tokens)), routed.loss, routed.evenness


def answers(
    classifier: Classifier, batch: Batch, key: jax.Array | None = None
) -> tuple[Scores, jax.Array]:
    """Loss and accuracy of every text, how even the gates are; and the router's loss."""
    logits, loss, evenness = classifier(batch["states"], batch["tokens"], key)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    right = (jnp.argmax(logits, -1) == batch["labels"]).astype(jnp.float32)
    rows = {"loss": entropy, "accuracy": right}
    return rows | {"evenness": jnp.broadcast_to(evenness, entropy.shape)}, loss


def lower_states(encoder: Encoder, tokens: np.ndarray) -> np.ndarray:
    """The states that the last layer gets, (texts, LENGTH, width)."""
    lower = nnx.clone(encoder)
    lower.layers = nnx.List(list(lower.layers)[:-1])
    graph, params = nnx.split(lower)
    run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens, tokens != 0))
    padded = np.pad(tokens, ((0, -len(tokens) % BATCH), (0, 0)), mode="edge")
    found = [run(params, part) for part in np.split(padded, len(padded) // BATCH)]
    return np.concatenate(found)[: len(tokens)]


def text(task: tasks.Task, encoder: Encoder, rank: int = RANK, epochs: int = EPOCHS) -> Problem:
    """One task as a problem."""

    def part(split: tasks.Split) -> Batch:
        tokens = task.splits[split].tokens[:, :LENGTH]
        labels = task.splits[split].targets.astype(np.int32)
        return {"tokens": tokens, "labels": labels, "states": lower_states(encoder, tokens)}

    train = part("train")
    count = len(train["labels"]) // BATCH * BATCH

    def batches(seed: int) -> list[Batch]:
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(train["labels"]))[:count] for _ in range(epochs)]
        places = np.concatenate(orders).reshape(-1, BATCH)
        return [{name: x[rows] for name, x in train.items()} for rows in places]

    last = encoder.layers[len(encoder.layers) - 1]
    return Problem(
        name=task.name,
        make=lambda v, seed: Classifier(v, last, task.kind.classes, rank, nnx.Rngs(seed)),
        forward=answers,
        batches=batches,
        dev=part("dev"),
        test=part("test"),
        rates=(1e-3, 2e-3, 4e-3),
        score="loss",
    )


def load(name: str, cache: Path) -> Problem:
    """A task of the study of experiments/glue, on the pretrained encoder.

    Raises:
      tasks.DataError: the examples are absent.
      optax_moma.demo.files.FetchError: the encoder is absent and cannot be downloaded.
    """
    encoder, tokenizer = load_pretrained(cache)
    return text(tasks.load_tasks([name], tokenizer, EXAMPLES)[0], encoder)
