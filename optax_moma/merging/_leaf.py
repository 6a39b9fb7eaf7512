"""One leaf of a merge: what goes in, and the record that the steps of a method pass on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from optax_moma._matrix import reshard, sharding_of
from optax_moma._moments import Factored
from optax_moma._tree import name_hash

Curvature = jax.Array | Factored


class LeafInputs(NamedTuple):
    """Everything a merge needs to know of one leaf.

    Attributes:
      experts: The leaf in each of the k experts, all of one shape.
      base: The leaf in the base, or None.
      curvature: The leaf's curvature in each expert (dense or ``Factored``), or None. With a
        ``gram`` contract a matrix's Gram, and None for an expert that has none.
      weights: One number per expert, shape (k,).
      key: The merge's random key, or None.
      path_id: ``stable_id`` of the leaf's path, a uint32.
      expert_ids: ``stable_id`` of the experts' names, uint32 of shape (k,).
    """

    experts: tuple[jax.Array, ...]
    base: jax.Array | None
    curvature: tuple[Curvature | None, ...] | None
    weights: jax.Array | np.ndarray
    key: jax.Array | None
    path_id: jax.Array | np.uint32
    expert_ids: jax.Array | np.ndarray


class TaskVectors(NamedTuple):
    """The record that steps map: k task vectors of one leaf, and the say each has in the merge.

    Attributes:
      delta: Task vectors, expert - base, shape (k, *shape), float32 (float64 for float64 leaves).
        Without a base they are the experts' parameters. After a step that combines, k is 1.
      weight: Each expert's say at each entry, in the shape of ``delta``. Starts as the weights
        given by the user; masks and curvature multiply it.
      base: The base's leaf in the dtype of ``delta``, or None.
      curvature: One estimate per expert, as given (dense or ``Factored``), or None.
      keys: One random key per expert, shape (k,), or None.
    """

    delta: jax.Array
    weight: jax.Array
    base: jax.Array | None
    curvature: tuple[Curvature, ...] | None
    keys: jax.Array | None


def stable_id(text: str) -> np.uint32:
    """Returns a number that is the same for a text in every process and on every machine."""
    return np.uint32(name_hash(text))


def task_vectors(inputs: LeafInputs) -> TaskVectors:
    """Returns the record a chain starts from."""
    arrays = [jnp.asarray(x) for x in inputs.experts]
    base = None if inputs.base is None else jnp.asarray(inputs.base)
    dtype = compute_dtype(arrays if base is None else [*arrays, base])
    delta = jnp.stack([x.astype(dtype) for x in arrays])
    if base is not None:
        base = base.astype(dtype)
        delta = delta - base
    keys = None
    if inputs.key is not None:
        leaf_key = jax.random.fold_in(inputs.key, inputs.path_id)
        ids = jnp.asarray(inputs.expert_ids)
        keys = jax.lax.map(lambda i: jax.random.fold_in(leaf_key, i), ids)
    weight = per_expert(jnp.asarray(inputs.weights, dtype), delta) * jnp.ones_like(delta)
    curvature = None
    if inputs.curvature is not None and all(v is not None for v in inputs.curvature):
        curvature = tuple(v for v in inputs.curvature if v is not None)
    return TaskVectors(delta, weight, base, curvature, keys)


def combined(leaf: TaskVectors, delta: jax.Array) -> TaskVectors:
    """Returns the record of one merged task vector of the leaf's own shape."""
    delta = delta[None]
    return TaskVectors(delta, jnp.ones_like(delta), leaf.base, None, None)


def heard(leaf: TaskVectors) -> tuple[jax.Array, jax.Array]:
    """Returns the vectors without what masks took from them, and each expert's weight, (k,).

    For steps that look at a leaf as a whole: they know one weight per expert, the greatest.
    """
    say = jnp.max(leaf.weight, axis=tuple(range(1, leaf.weight.ndim)))
    return leaf.delta * (leaf.weight != 0), say


def per_expert(numbers: jax.Array, delta: jax.Array) -> jax.Array:
    """Returns k numbers in a shape that multiplies k task vectors."""
    return jnp.expand_dims(numbers, tuple(range(1, delta.ndim)))


def sum_experts(x: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """Returns the sum over the first axis, or of a list, term by term.

    XLA fuses a stack into ``jnp.sum(x, axis=0)`` in a way that takes a thousand times as long on a
    CPU; and this order of additions is the same on every device.
    """
    total = x[0]
    for t in range(1, len(x)):
        total = total + x[t]
    return total


def gathered(x: jax.Array) -> jax.Array:
    """Returns an array of an explicit mesh whole on every device, as a histogram takes it."""
    sharding = sharding_of(x)
    return x if sharding is None else reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def compute_dtype(arrays: Sequence[jax.Array]) -> jnp.dtype:
    """Returns the dtype a leaf is merged in: float64 if any array has it, else float32."""
    # Floats of 8 bits are promoted to nothing by themselves.
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x.dtype.itemsize > 1))


def merged_dtype(inputs: LeafInputs) -> jnp.dtype:
    """Returns the dtype of the merged leaf: the base's, else the one that holds all experts'."""
    if inputs.base is not None:
        return jnp.asarray(inputs.base).dtype
    return promoted([jnp.asarray(x).dtype for x in inputs.experts])


def promoted(dtypes: Sequence[jnp.dtype]) -> jnp.dtype:
    """Returns the dtype that holds all values; floats of 8 bits count beside no wider ones."""
    return jnp.result_type(*([d for d in dtypes if d.itemsize > 1] or dtypes))
