"""One leaf of a merge of checkpoints: what was read of it in, the merged array out."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import merging
from ..merging._inputs import MergeError, is_float
from ..merging._leaf import LeafInputs, compute_dtype, stable_id
from ..merging._merge import check_merged, merge_leaf, merge_sharded
from ._job import Job, Layer, Part, unequal_copies
from ._recipe import key_of, output_dtype

Array = jax.Array | np.ndarray

Models = Mapping[str, np.ndarray]
"""A leaf in every model that was read, by the model's label."""
Curvature = Mapping[str, Any]
"""A leaf's curvature by expert, None where there is none."""


def merged_leaf(
    job: Job, part: Part, method: Any, name: str, models: Models, curvature: Curvature
) -> Array:
    """Merges one leaf of a part, in the dtype and the sharding that it is written with.

    Raises:
      ValueError: if anything is wrong with the values.
    """
    if part.keep is not None:
        leaf = _kept(job, part.keep, name, models[part.keep])
    elif not is_float(job.merged_leaf(part, name)):
        leaf = _copied(job, name, models)
    else:
        leaf = _merged(job, part, method, name, models, curvature)
    dtype = job.merged_leaf(part, name).dtype
    if leaf.dtype != dtype and not is_float(leaf):
        # Integers are copied, also those of 64 bits, which JAX cuts down to 32.
        return next(iter(models.values()))
    merged = jax.device_put(leaf.astype(dtype), job.saved_sharding(part, name))
    if is_float(merged) and not job.recipe.allow_nonfinite and not _clean([merged]):
        check_merged({(name,): merged})
    return merged


def leaf_inputs(
    job: Job, part: Part, name: str, models: Models, curvature: Curvature
) -> LeafInputs:
    """Returns a leaf as the merge takes it, wide enough for the dtype that the recipe asks for.

    Raises:
      MergeError: if the curvature is not what the method needs.
    """
    names = sorted(job.experts)
    checked = _curvature(job, part, name, models, curvature)
    experts: list[Any] = [models[expert] for expert in names]
    base: Any = models.get("base")
    if output_dtype(job.recipe) is not None:
        # The merge is rounded to the base's dtype, or to that of all experts together.
        own: Any = job.merged_leaf(part, name)
        wide = lambda x: jnp.asarray(x).astype(compute_dtype([own, x]))  # noqa: E731
        if base is None:
            experts[0] = wide(experts[0])
        else:
            base = wide(base)
    return LeafInputs(
        experts=tuple(experts),
        base=base,
        curvature=None if checked is None else tuple(checked[expert] for expert in names),
        weights=np.array([part.weights[expert] for expert in names]),
        key=key_of(job.recipe),
        path_id=stable_id(name),
        expert_ids=np.array([stable_id(expert) for expert in names]),
    )


def _kept(job: Job, keep: str, name: str, leaf: np.ndarray) -> jax.Array:
    x = jnp.asarray(leaf)
    if is_float(x) and not job.recipe.allow_nonfinite and not bool(jnp.all(jnp.isfinite(x))):
        count = int(jnp.sum(~jnp.isfinite(x)))
        raise ValueError(
            f"{job.models[keep].label}, {name}: {count} values that are not finite; leave the "
            "model out, or let them through with allow_nonfinite: true"
        )
    return x


def _copied(job: Job, name: str, models: Models) -> jax.Array:
    problems = unequal_copies(job, {label: {name: x} for label, x in models.items()})
    if problems:
        raise MergeError("Cannot merge,", problems)
    return jnp.asarray(next(iter(models.values())))


def _merged(
    job: Job, part: Part, method: Any, name: str, models: Models, curvature: Curvature
) -> jax.Array:
    assert part.method is not None
    inputs = leaf_inputs(job, part, name, models, curvature)
    # A negative second moment is as wrong as an infinite one.
    estimates = [
        x if np.min(x, initial=0) >= 0 else np.float32(np.nan)
        for x in jax.tree.leaves(inputs.curvature)
    ]
    checked = [] if job.recipe.allow_nonfinite else models.values()
    if _clean([*checked, *estimates]):
        if not part.layers:
            return merge_sharded(method, _spread(inputs, job.saved_sharding(part, name)))
        layers = enumerate(part.layers)
        return jnp.stack([merge_leaf(x.method, _layer(inputs, i, x, name)) for i, x in layers])
    # Something is wrong: the merge in memory knows what to say.
    found = (
        None
        if inputs.curvature is None
        else zip(sorted(job.experts), inputs.curvature, strict=True)
    )
    return merging.merge(
        method,
        {expert: {name: models[expert]} for expert in job.experts},
        base={name: models["base"]} if "base" in models else None,
        curvature=None if found is None else {expert: {name: v} for expert, v in found},
        weights=part.weights,
        key=key_of(job.recipe),
    )[name]


def _curvature(
    job: Job, part: Part, name: str, models: Models, curvature: Curvature
) -> dict[str, Any] | None:
    """Returns the curvature of a leaf by expert, None for a method that needs none.

    Raises:
      MergeError: if it is zero for experts that were trained there, and the recipe does not say
        what else it is.
    """
    if part.method is None or not part.method.contract.curvature:
        return None
    found = {expert: curvature.get(expert) for expert in job.experts}
    problems = []
    for expert, v in found.items():
        zero = v is not None and not all(np.any(x) for x in jax.tree.leaves(v))
        if not zero or not _was_trained(job, expert, models):
            continue
        missing, leaf = job.curvature[expert].missing, job.reference.leaves[name]
        found[expert] = np.full(leaf.shape, missing or 0, np.float32)
        if missing is None:
            problems.append(
                f"the curvature of expert {expert!r}, {name}: all zero, though the leaf was "
                "trained; if by weight decay alone, give it one with curvature: {missing: 0.0}"
            )
    if problems:
        raise MergeError("Cannot merge,", problems)
    return found


def _was_trained(job: Job, expert: str, models: Models) -> bool:
    """Whether a leaf differs from the base, or without one from another expert's."""
    others = ["base"] if "base" in models else [e for e in job.experts if e != expert]
    return any(not np.array_equal(models[expert], models[other]) for other in others)


def _clean(arrays: list[Any]) -> bool:
    """Whether all numbers are finite: by their bits, several times as fast as by arithmetic.

    Read as integers, no finite number reaches the infinity of its sign.
    """
    for x in map(np.asarray, arrays):
        bits = f"{8 * x.itemsize}"
        signed, unsigned = x.view(f"int{bits}"), x.view(f"uint{bits}")
        infinity, minus = np.array([np.inf, -np.inf], x.dtype).view(unsigned.dtype)
        if np.max(signed, initial=0) >= infinity or np.max(unsigned, initial=0) >= minus:
            return False
    return True


def _layer(inputs: LeafInputs, i: int, layer: Layer, name: str) -> LeafInputs:
    """Returns one layer of a stack as a leaf of its own."""
    # Of a factored curvature one factor may be the same for all layers.
    stacked = (inputs.experts, inputs.base, inputs.curvature)
    experts, base, curvature = jax.tree.map(lambda x: x[i if len(x) > 1 else 0], stacked)
    return inputs._replace(
        experts=experts,
        base=base,
        curvature=curvature,
        weights=np.array([layer.weights[expert] for expert in sorted(layer.weights)]),
        path_id=stable_id(f"{name}/{i}"),
    )


def _spread(inputs: LeafInputs, sharding: NamedSharding | None) -> LeafInputs:
    """Returns the inputs of a leaf on the devices that it was saved from."""
    if sharding is None:
        return inputs
    # The same mesh, but its axes are not in the types.
    mesh = Mesh(np.asarray(sharding.mesh.devices), sharding.mesh.axis_names)
    shape = inputs.experts[0].shape

    def put(x: Any) -> Any:
        # The factors of a curvature are small.
        spec = sharding.spec if x.shape == shape else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    spread = jax.tree.map(put, (inputs.experts, inputs.base, inputs.curvature))
    return inputs._replace(experts=spread[0], base=spread[1], curvature=spread[2])
