"""Blockwise int8: an array kept as small integers with one scale per block of its last axis."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._matrix import divisor, reshard, sharding_of, spec_of

BLOCK = 128
_LARGEST = 127


class Blocks(NamedTuple):
    """``values * scale``, with one scale for every 128 entries along the last axis.

    On a mesh the values lie as the array does. Every device along the last axis holds all scales of
    its rows: blocks need not end where devices do. Where they do, nothing but scales travels.

    Attributes:
      values: int8, (..., n).
      scale: float32, (..., ceil(n / 128)): the largest magnitude of the block over 127.
    """

    values: jax.Array
    scale: jax.Array


def quantize(x: jax.Array) -> Blocks:
    """The nearest representable array: each entry is off by at most half its block's scale."""
    scale = _largest(x) / _LARGEST
    values = jnp.round(x * _per_entry(1 / divisor(scale), x))
    return Blocks(values.astype(jnp.int8), scale.astype(jnp.float32))


def dequantize(x: Blocks, dtype: Any) -> jax.Array:
    """The array that ``x`` stands for."""
    return x.values.astype(dtype) * _per_entry(x.scale.astype(dtype), x.values)


def _largest(x: jax.Array) -> jax.Array:
    """The largest magnitude of each block, by windows: a block may lie on several devices."""
    n, sharding = x.shape[-1], sharding_of(x)
    blocks = -(-n // BLOCK)
    # An explicit mesh wants as many windows on each device.
    devices = 1 if sharding is None else _devices(sharding, spec_of(x)[-1])
    windows = -(-blocks // devices) * devices
    sizes, before = (1,) * (x.ndim - 1) + (BLOCK,), [(0, 0)] * (x.ndim - 1)
    padding = [*before, (0, windows * BLOCK - n)]
    found = jax.lax.reduce_window(jnp.abs(x), -jnp.inf, jax.lax.max, sizes, sizes, padding)
    return reshard(found, _whole_rows(x))[..., :blocks]


def _per_entry(scale: jax.Array, like: jax.Array) -> jax.Array:
    spread = jnp.repeat(scale, BLOCK, axis=-1, out_sharding=_whole_rows(like))
    return reshard(spread[..., : like.shape[-1]], sharding_of(like))


def _whole_rows(x: jax.Array) -> NamedSharding | None:
    """The sharding of x with its last axis in one place, on an explicit mesh."""
    sharding = sharding_of(x)
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*spec_of(x)[:-1], None))


def _devices(sharding: NamedSharding, axis: Any) -> int:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(sharding.mesh.shape[name] for name in names)
