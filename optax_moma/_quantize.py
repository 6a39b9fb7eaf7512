"""Blockwise int8: an array kept as small integers with one scale per block of its last axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128
_LARGEST = 127


class Blocks(NamedTuple):
    """``values * scale``, with one scale for every 128 entries along the last axis.

    Attributes:
      values: int8, (..., n).
      scale: float32, (..., ceil(n / 128)): the largest magnitude of the block over 127.
    """

    values: jax.Array
    scale: jax.Array


def quantize(x: jax.Array) -> Blocks:
    """The nearest representable array: each entry is off by at most half its block's scale."""
    blocks = _blocks(x)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / _LARGEST
    values = jnp.round(blocks / jnp.where(scale > 0, scale, 1)[..., None])
    return Blocks(_unblocked(values, x.shape).astype(jnp.int8), scale.astype(jnp.float32))


def dequantize(x: Blocks, dtype: Any) -> jax.Array:
    """The array that ``x`` stands for."""
    values = _blocks(x.values.astype(dtype)) * x.scale[..., None].astype(dtype)
    return _unblocked(values, x.values.shape)


def _blocks(x: jax.Array) -> jax.Array:
    pad = -x.shape[-1] % BLOCK
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]
