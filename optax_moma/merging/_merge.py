"""merge: one method, k experts, leaf by leaf."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_moma import _globs
from optax_moma.merging._contract import Contract, Step, SummaryStep
from optax_moma.merging._inputs import (
    Checked,
    MergeError,
    Path,
    checked_inputs,
    count_not_finite,
    is_float,
    path_text,
)
from optax_moma.merging._leaf import LeafInputs, merged_dtype, stable_id, task_vectors
from optax_moma.merging._unstack import unstacked

Tree = Any


def merge(
    method: Step | list[tuple[str, Step]],
    experts: Sequence[Tree] | Mapping[str, Tree],
    *,
    base: Tree | None = None,
    curvature: Sequence[Tree] | Mapping[str, Tree] | None = None,
    weights: Sequence[float] | Mapping[str, float] | jax.Array | np.ndarray | None = None,
    key: jax.Array | None = None,
) -> Tree:
    """Merges experts into one model.

    merged = base + method(expert_1 - base, ..., expert_k - base), leaf by leaf.

    A pure function: it can be jitted, and differentiated with respect to the numbers of the
    method, the weights and the params. All is computed in float32 (float64 for float64 leaves) and
    cast once, at the end. Leaves that are not floating point are copied; they must be equal in all
    models, whatever the method: take others out, as ``nnx.state(model, nnx.Param)`` of Flax NNX
    does with keys of random numbers. Experts given by name are merged in the order of their names.

    Sharded leaves stay sharded, and have the bits of a merge on one device, whatever the sharding
    (the last bits may differ where ``merge`` itself is inside a ``jit``, and where a method needs
    leaves whole, see ``Contract``, that are spread over several processes).

    Args:
      method: A method such as ``ties(0.2)``, or a ``chain`` of steps; or a list of methods by globs
        of leaf paths, ``[("embed/**", average()), ("**", moma())]``, of which each leaf takes the
        first that matches. ``*`` stands for anything within one part of a path, ``**`` for any
        parts, ``?`` for one character, ``{a,b}`` and ``{0..3}`` for one of several.
      experts: Trees of params, a list or a dict by name.
      base: The params that the experts were fine-tuned from.
      curvature: A tree per expert, a list or a dict as ``experts`` is. It has, for every leaf of
        the params, an array of its shape, or a ``Factored`` pair, that estimates E[g**2]. Leaves
        that a method averages without it may go without, or have None: for ``moma``, biases.
      weights: A number per expert, 1 by default.
      key: A random key, for methods that draw. The draws depend on the key, the leaf's path and
        the expert's name (its index in a list).

    Returns:
      A tree like the base (else the first expert), in the base's dtypes (else those that hold all
      the experts'). A bfloat16 base has float32 experts' merge rounded to bfloat16, an average too,
      and small task vectors may be lost: cast the base to float32 first to keep them.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if anything else is wrong with the inputs, with all that is wrong in one message;
        or if a merged leaf is not finite, as float16 may overflow. Values are checked where arrays
        have any, so not under ``jax.jit``.

    Example:
      >>> from optax_moma.merging import average, task_arithmetic
      >>> base = {"w": jnp.zeros(2)}
      >>> experts = {"math": {"w": jnp.array([1., 0.])}, "code": {"w": jnp.array([0., 2.])}}
      >>> merge(task_arithmetic(0.5), experts, base=base)
      {'w': Array([0.5, 1. ], dtype=float32)}
      >>> methods = [("head/**", average()), ("**", task_arithmetic(1.0))]
      >>> trees = [{"head": {"w": 2.0 * x["w"]}, "w": x["w"]} for x in experts.values()]
      >>> merge(methods, trees, base={"head": {"w": jnp.zeros(2)}, "w": jnp.zeros(2)})
      {'head': {'w': Array([1., 2.], dtype=float32)}, 'w': Array([1., 2.], dtype=float32)}
    """
    if isinstance(method, list):
        paths, treedef, parts = _parts(method, experts, base, curvature, weights, key)
    else:
        whole = checked_inputs(_contract_of(method), experts, base, curvature, weights, key)
        paths, treedef, parts = whole.paths, whole.treedef, [(method, whole)]
    merged = {}
    for step, inputs in parts:
        merged |= _merged(step, inputs, key)
    check_merged(merged)
    return jax.tree_util.tree_unflatten(treedef, [merged[path] for path in paths])


def _merged(method: Step, inputs: Checked, key: jax.Array | None) -> dict[Path, jax.Array]:
    """Merges leaf by leaf, in the order of the paths."""
    reference = inputs.experts[0] if inputs.base is None else inputs.base
    ids = np.array([stable_id(name) for name in inputs.names])
    averaged = [path for path in inputs.paths if is_float(reference[path])]
    method = prepared(method, lambda: (_leaf_inputs(inputs, p, key, ids) for p in averaged))
    return {
        path: merge_sharded(method, _leaf_inputs(inputs, path, key, ids))
        if is_float(reference[path])
        else jnp.asarray(reference[path])
        for path in inputs.paths
    }


def _contract_of(method: Any) -> Contract:
    if not isinstance(getattr(method, "contract", None), Contract):
        raise TypeError(
            f"method must be a merge method such as average() or chain(...), got {method!r}. "
            "Was the factory passed without calling it?"
        )
    return method.contract


def _parts(
    methods: list[tuple[str, Step]],
    experts: Any,
    base: Any,
    curvature: Any,
    weights: Any,
    key: Any,
) -> tuple[list[Path], Any, list[tuple[Step, Checked]]]:
    """Returns all paths, their tree, and each method with the inputs of the leaves it merges."""
    whole = checked_inputs(Contract(combines=True), experts, base, None, None, None)
    glob_of = _globs.assigned([glob for glob, _ in methods], [path_text(p) for p in whole.paths])
    parts, problems = [], []
    for glob, method in methods:
        contract = _contract_of(method)
        known = curvature if contract.curvature else None
        only = {path for path in whole.paths if glob_of[path_text(path)] == glob}
        try:
            found = checked_inputs(contract, experts, base, known, weights, key, only)
        except MergeError as error:
            problems += error.problems
        else:
            parts.append((method, found))
    if problems:
        raise MergeError("Cannot merge,", list(dict.fromkeys(problems)))
    return whole.paths, whole.treedef, parts


def check_merged(leaves: Mapping[Path, jax.Array]) -> None:
    """Raises if there is anything but finite numbers in merged leaves that have values."""
    known = [path for path, x in leaves.items() if is_float(x) and not isinstance(x, Tracer)]
    counts = jax.device_get([count_not_finite(leaves[path]) for path in known])
    problems = [
        f"{path_text(path)}: {count} values of {leaves[path].dtype} that are not finite after the "
        "merge; lower its scale, raise its ridge, or merge into a wider dtype"
        for path, count in zip(known, counts, strict=True)
        if count
    ]
    if problems:
        raise MergeError("The merge failed,", problems)


@jax.jit
def merge_leaf(method: Step, inputs: LeafInputs) -> jax.Array:
    """Merges one leaf by a method that is ``prepared``: all arithmetic of a merge is here."""

    def merged(method: Step, inputs: LeafInputs) -> jax.Array:
        leaf = task_vectors(inputs)
        if leaf.delta.size:
            leaf = method(leaf)
        delta = (leaf.weight * leaf.delta)[0]
        whole = delta if leaf.base is None else leaf.base + delta
        return whole.astype(merged_dtype(inputs))

    return unstacked(merged, len(inputs.experts))(method, inputs)


def merge_sharded(method: Step, inputs: LeafInputs) -> jax.Array:
    """Merges one leaf by a method that is ``prepared``, and leaves it as it is sharded."""
    like = inputs.experts[0] if inputs.base is None else inputs.base
    arrays = [x for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array)]
    if (
        not method.contract.whole
        or any(isinstance(x, Tracer) or not x.is_fully_addressable for x in arrays)
        or all(len(x.sharding.device_set) == 1 for x in arrays)
    ):
        return merge_leaf(method, inputs)
    device = min(arrays[0].sharding.device_set, key=lambda device: device.id)
    with jax.sharding.set_mesh(jax.sharding.Mesh([device], "one")):
        merged = merge_leaf(method, jax.device_put(inputs, device))
    return jax.device_put(merged, like.sharding)


def prepared(method: Step, leaves: Callable[[], Iterable[LeafInputs]]) -> Step:
    """Returns the method after the passes over all leaves that it asks for, if any.

    Args:
      method: A method.
      leaves: Called once per pass, gives the inputs of every floating-point leaf in any order. A
        summary is a sum of integers, so neither the order nor where the leaves are read from
        changes it.

    Returns:
      A method that maps every leaf on its own (``contract.passes`` is 0).

    Raises:
      ValueError: if the leaves have more entries than a summary can count, 2**32.
    """
    while method.contract.passes:
        counts, entries = None, 0
        for inputs in leaves():
            entries += int(np.prod(np.shape(inputs.experts[0]), dtype=np.int64))
            if entries >= 1 << 32:
                raise ValueError(
                    "A global threshold counts up to 2**32 entries, and the model has more; use "
                    'scope="leaf".'
                )
            counts = _counted(cast(SummaryStep, method), inputs, counts)
        if counts is None:
            return method
        method = _refined(cast(SummaryStep, method), counts)
    return method


@jax.jit
def _counted(method: SummaryStep, inputs: LeafInputs, counts: Any) -> Any:
    found = method.count(task_vectors(inputs))
    return found if counts is None else jax.tree.map(jnp.add, counts, found)


@jax.jit
def _refined(method: SummaryStep, counts: Any) -> SummaryStep:
    return method.refine(counts)


def _leaf_inputs(
    inputs: Checked, path: Path, key: jax.Array | None, expert_ids: np.ndarray
) -> LeafInputs:
    return LeafInputs(
        experts=tuple(leaves[path] for leaves in inputs.experts),
        base=None if inputs.base is None else inputs.base[path],
        curvature=(
            None
            if inputs.curvature is None
            else tuple(leaves.get(path) for leaves in inputs.curvature)
        ),
        weights=inputs.weights,
        key=key,
        path_id=stable_id(path_text(path)),
        expert_ids=expert_ids,
    )
