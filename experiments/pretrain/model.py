"""A decoder in the manner of GPT-2: learned positions, pre-norm blocks, GELU, a tied head.

Every parameter names its axes (``embed``, ``mlp``, ...); RULES says which mesh axis each name lies
on. A model is used as a pure function of its parameters, a plain tree of arrays:

    init, apply = functional(config)
    logits = apply(init(jax.random.key(0)), tokens)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor", "vocab": "tensor"}
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a decoder, and how it computes.

    Attributes:
      vocabulary: tokens.
      width: size of the residual stream.
      layers: blocks.
      heads: attention heads; 0 for one per 64 of the width.
      length: longest sequence.
      dtype: what activations are computed in; parameters are float32.
      scan: stacks the blocks' parameters and runs one compiled block ``layers`` times.
      remat: recomputes a block's activations in the backward pass.
    """

    vocabulary: int = 4096
    width: int = 128
    layers: int = 4
    heads: int = 0
    length: int = 256
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        """Refuses heads that do not share the width evenly."""
        if self.width % self.head_count:
            raise ValueError(f"{self.head_count} heads do not divide a width of {self.width}.")

    @property
    def head_count(self) -> int:
        """The attention heads."""
        return self.heads or max(1, self.width // 64)


def gpt2(**changes: Any) -> Config:
    """GPT-2 small: 124 M parameters; its 50,257 tokens rounded up so that shards are even."""
    sizes = {"vocabulary": 50304, "width": 768, "layers": 12, "length": 1024}
    return Config(**(sizes | changes))


def normal(*axes: str | None, scale: float = 1.0) -> nnx.Initializer:
    """GPT-2's initialisation, for a parameter whose axes have these names."""
    return nnx.with_metadata(nnx.initializers.normal(0.02 * scale), axes=axes)


def zeros(axis: str) -> nnx.Initializer:
    """A bias along the axis of this name."""
    return nnx.with_metadata(nnx.initializers.zeros_init(), axes=(axis,))


def norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalisation with scale and bias."""
    ones = nnx.with_metadata(nnx.initializers.ones_init(), axes=("embed",))
    return nnx.LayerNorm(
        config.width, dtype=config.dtype, scale_init=ones, bias_init=zeros("embed"), rngs=rngs
    )


def linear(
    config: Config, sizes: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs, scale: float = 1
) -> nnx.Linear:
    """x W + b, with fan-in and fan-out of these sizes and names."""
    return nnx.Linear(
        *sizes,
        dtype=config.dtype,
        kernel_init=normal(*axes, scale=scale),
        bias_init=zeros(axes[1]),
        rngs=rngs,
    )


class Block(nnx.Module):
    """Causal attention and a two-layer perceptron, each added to the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Query, key and value are apart: each is one matrix to the optimizer, and to a mesh."""
        width, hidden = config.width, 4 * config.width
        depth = 1 / math.sqrt(2 * config.layers)  # two additions a block keep the stream's size
        self.heads = config.head_count
        self.norm1, self.norm2 = norm(config, rngs), norm(config, rngs)
        self.query, self.key, self.value = (
            linear(config, (width, width), ("embed", "heads"), rngs) for _ in range(3)
        )
        self.out = linear(config, (width, width), ("heads", "embed"), rngs, depth)
        self.up = linear(config, (width, hidden), ("embed", "mlp"), rngs)
        self.down = linear(config, (hidden, width), ("mlp", "embed"), rngs, depth)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, length, width) -> the same."""
        y = self.norm1(x)
        q, k, v = (
            spread(f(y).reshape(*y.shape[:2], self.heads, -1), None, "heads", None)
            for f in (self.query, self.key, self.value)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = spread(x + self.out(y.reshape(x.shape)), None, None)
        hidden = spread(jax.nn.gelu(self.up(self.norm2(x))), None, "mlp")
        return spread(x + self.down(hidden), None, None)


class Decoder(nnx.Module):
    """Tokens (batch, length) -> logits (batch, length, vocabulary) in float32."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        """Blocks are a list, or with ``scan`` one block whose parameters are stacked."""
        self.config = config
        self.tokens = nnx.Embed(
            config.vocabulary,
            config.width,
            dtype=config.dtype,
            embedding_init=normal("vocab", "embed"),
            rngs=rngs,
        )
        self.positions = nnx.Embed(
            config.length,
            config.width,
            dtype=config.dtype,
            embedding_init=normal(None, "embed"),
            rngs=rngs,
        )
        if config.scan:
            stack = nnx.vmap(lambda r: Block(config, r), axis_size=config.layers)
            self.blocks = stack(rngs.split(config.layers))
        else:
            self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = norm(config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, length) -> (batch, length, vocabulary)."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = spread(x, None, None)
        graph, params = (
            nnx.split(self.blocks)
            if self.config.scan
            else (None, list(map(nnx.split, self.blocks)))
        )

        def block(graph: Any, x: jax.Array, params: Any) -> jax.Array:
            return nnx.merge(graph, params)(x)

        if self.config.remat:
            block = jax.checkpoint(block, static_argnums=0)
        if self.config.scan:
            x, _ = jax.lax.scan(lambda x, p: (block(graph, x, p), None), x, params)
        else:
            for graph, part in params:
                x = block(graph, x, part)
        logits = self.tokens.attend(self.norm(x))
        return spread(logits.astype(jnp.float32), None, "vocab")


def spread(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays activations on the mesh in use: rows of the batch over BATCH_AXES, then named axes."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = P(BATCH_AXES, *(RULES.get(axis) if axis else None for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def functional(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``init(key) -> params`` and ``apply(params, tokens) -> logits``."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    return init, apply


def partition_specs(config: Config) -> Any:
    """A tree like the parameters of PartitionSpecs: their axes' names looked up in RULES."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    specs = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata("axes")
        stacked = [None] * (len(variable.shape) - len(axes))
        specs[path] = P(*stacked, *(RULES.get(axis) if axis else None for axis in axes))
    return nnx.traversals.unflatten_mapping(specs)
