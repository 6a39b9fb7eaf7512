"""Language modelling: a small decoder on the corpus of experiments/pretrain."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.pretrain import data, model
from experiments.pretrain.program import make_mesh

from .training import Batch, Problem, Scores
from .variants import Sizes, Stack, Variant

CONFIG = model.Config(vocabulary=1024, width=64, layers=2, heads=2, length=128)
SEGMENT, BATCH, STEPS = 32, 8, 300
HELD_OUT = 32
"""Sequences of each source, half of them to choose rates with and half to report on."""


class Block(nnx.Module):
    """The attention half of the block of experiments/pretrain; its other half is in the stack."""

    def __init__(self, config: model.Config, rngs: nnx.Rngs):
        """Query, key, value, and what is added to the stream."""
        sizes = config.width, config.width
        self.heads = config.heads
        self.norm1, self.norm2 = model.norm(config, rngs), model.norm(config, rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(*sizes, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) -> the same."""
        y = self.norm1(x)
        q, k, v = (
            f(y).reshape(*y.shape[:2], self.heads, -1) for f in (self.query, self.key, self.value)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.reshape(x.shape))


class Decoder(nnx.Module):
    """Tokens (batch, length) -> logits (batch, length, vocabulary), and what routers did."""

    def __init__(self, variant: Variant, config: model.Config, segment: int, rngs: nnx.Rngs):
        """The sizes of ``config``, with the feed-forward networks of a variant."""
        embedding = lambda rows: nnx.Embed(  # noqa: E731
            rows,
            config.width,
            embedding_init=nnx.initializers.normal(config.width**-0.5),
            rngs=rngs,
        )
        self.tokens, self.positions = embedding(config.vocabulary), embedding(config.length)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        sizes = Sizes(config.width, 4 * config.width, segment=segment)
        self.stack = Stack(variant, sizes, config.layers, rngs=rngs)
        self.norm = model.norm(config, rngs)

    def __call__(
        self, tokens: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits, the routers' loss, and how even their gates are."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        base, losses, evenness = self.stack.start(), [], []
        for i, block in enumerate(self.blocks):
            x = block(x)
            own = None if key is None else jax.random.fold_in(key, i)
            routed = self.stack(i, block.norm2(x), base, key=own)
            x, base = x + routed.y, routed.base
            losses.append(routed.loss)
            evenness.append(routed.evenness)
        logits = self.tokens.attend(self.norm(x))
        return logits, sum(losses, jnp.zeros(())), jnp.mean(jnp.stack(evenness))


def next_tokens(
    decoder: Decoder, batch: Batch, key: jax.Array | None = None
) -> tuple[Scores, jax.Array]:
    """The cross entropy of every sequence, how even the gates are; and the routers' loss."""
    tokens = batch["tokens"]
    logits, loss, evenness = decoder(tokens[:, :-1], key)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    rows = jnp.mean(entropy, axis=1)
    return {"loss": rows, "evenness": jnp.broadcast_to(evenness, rows.shape)}, loss


def language(
    cache: Path,
    corpus: str = "",
    config: model.Config = CONFIG,
    segment: int = SEGMENT,
    batch: int = BATCH,
    steps: int = STEPS,
) -> Problem:
    """The problem on a corpus; its tokenizer is kept in ``cache``.

    Raises:
      ValueError: there is no corpus; the message says what to set.
    """
    text = data.open_corpus(corpus, config.length)
    tokenizer = data.find_tokenizer(text, config.vocabulary, cache / f"bpe{config.vocabulary}.json")
    sources = data.validation(text, tokenizer, config.length, HELD_OUT)
    sharding = NamedSharding(make_mesh("-1,1,1"), P())

    def batches(seed: int) -> list[Batch]:
        lanes = data.Batches(text, tokenizer, sharding, batch, config.length, 1, seed)
        found = [{"tokens": np.asarray(next(lanes))} for _ in range(steps)]
        lanes.close()
        return found

    return Problem(
        name="language",
        make=lambda variant, seed: Decoder(variant, config, segment, nnx.Rngs(seed)),
        forward=next_tokens,
        batches=batches,
        dev={"tokens": np.concatenate([x[0::2] for x in sources.values()])},
        test={"tokens": np.concatenate([x[1::2] for x in sources.values()])},
        rates=(4e-3, 8e-3, 1.6e-2),
        score="loss",
    )
