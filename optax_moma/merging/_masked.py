"""Merges that keep every expert: one task vector for all, and one bit per entry for each.

In the formulas t runs over the experts, d_t = expert_t - base, and all products are entrywise.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_moma._tree import named_leaves
from optax_moma.merging import _metric
from optax_moma.merging._contract import Contract
from optax_moma.merging._inputs import checked_inputs, is_float
from optax_moma.merging._leaf import sum_experts
from optax_moma.merging._masks import checked_threshold, own_entries
from optax_moma.merging._steps import Number
from optax_moma.merging._trees import Tree, each_float, moved, wide


class MaskedExperts(NamedTuple):
    """Several experts as one task vector, with a mask and a number for each.

    It has the size of one model, and one bit per entry and expert.

    Attributes:
      delta: The common task vector, a tree like the base in its dtypes, without the leaves that are
        not floating point.
      masks: For each expert, by name, a tree with the mask of every leaf, eight entries to a byte.
      scales: For each expert, by name, the factor of its part of the task vector.
    """

    delta: Tree
    masks: dict[str, Tree]
    scales: dict[str, jax.Array]


class _Leaf(NamedTuple):
    """One leaf of k experts: the common vector, masks as bits, and sums to scale them by, (k,)."""

    delta: jax.Array
    masks: jax.Array
    whole: jax.Array
    kept: jax.Array


def emr(experts: Sequence[Tree] | Mapping[str, Tree], *, base: Tree) -> MaskedExperts:
    """Elects one task vector for all experts, and gives each a mask and a scale.

    s = sign(sum_t d_t), -1 at zero; d = s max_t |d_t|, over the d_t of sign s;
    m_t = [d_t has sign s]; r_t = sum |d_t| / sum |m_t d|, both over the whole model.
    Then expert_t is nearly base + r_t m_t d, which ``masked_expert`` returns.

    In the sums of r_t all entries count alike, as in the paper; in the authors' code all leaves do.

    Args:
      experts: Trees of params, a list or a dict by name.
      base: The params that the experts were fine-tuned from.

    Returns:
      ``MaskedExperts``.

    Raises:
      ValueError: if something is wrong with the inputs, as in ``merge``.

    Example:
      >>> from optax_moma.merging import emr, masked_expert
      >>> base = {"w": jnp.zeros(2)}
      >>> experts = {"a": {"w": jnp.array([1., 2.])}, "b": {"w": jnp.array([2., -1.])}}
      >>> merged = emr(experts, base=base)
      >>> merged.delta, merged.masks["b"]
      ({'w': Array([2., 2.], dtype=float32)}, {'w': Array([128], dtype=uint8)})
      >>> masked_expert(merged, "a", base=base)
      {'w': Array([1.5, 1.5], dtype=float32)}

    Source: Huang et al. 2024, "EMR-Merging" (arXiv 2405.17461).
    """
    return _masked(_elected, experts, base)


@jax.jit
def _elected(x: jax.Array) -> _Leaf:
    sign = jnp.where(sum_experts(x) > 0, 1, -1).astype(x.dtype)
    masks = x * sign > 0
    delta = sign * jnp.max(jnp.where(masks, jnp.abs(x), 0), axis=0)
    return _Leaf(delta, _packed(masks), _total(jnp.abs(x)), _total(masks * jnp.abs(delta)))


def tall_masks(
    experts: Sequence[Tree] | Mapping[str, Tree],
    *,
    base: Tree,
    threshold: Number | np.ndarray = 0.4,
) -> MaskedExperts:
    """Adds the task vectors up, and gives each expert a mask of what is its own in the sum.

    d = sum_t d_t; m_t = [|d_t| > threshold * |d - d_t|]; all scales are 1. Then expert_t is nearly
    base + m_t d, which ``masked_expert`` returns. What several masks keep is the merge
    ``chain(consensus(threshold), total(), scale(0.3))``.

    Args:
      experts: Trees of params, a list or a dict by name.
      base: The params that the experts were fine-tuned from.
      threshold: How large an expert's entry must be relative to all others' sum, at least 0; the
        authors tune it on each task's validation data, from 0.2 to 0.6: an array (k,), in the order
        of the experts' names.

    Returns:
      ``MaskedExperts``.

    Raises:
      ValueError: if the threshold is negative, or something is wrong with the inputs, as in
        ``merge``.

    Example:
      >>> from optax_moma.merging import masked_expert, tall_masks
      >>> experts = [{"w": jnp.array([3., 0.1])}, {"w": jnp.array([0.1, 1.])}]
      >>> merged = tall_masks(experts, base={"w": jnp.zeros(2)})
      >>> masked_expert(merged, "0", base={"w": jnp.zeros(2)})
      {'w': Array([3.1, 0. ], dtype=float32)}

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and
    Compression" (arXiv 2405.07813), equation 3.
    """
    number = checked_threshold(threshold)
    return _masked(lambda x: _own(x, number), experts, base)


@jax.jit
def _own(x: jax.Array, threshold: Number) -> _Leaf:
    nothing = jnp.zeros(x.shape[0], x.dtype)
    return _Leaf(sum_experts(x), _packed(own_entries(x, threshold)), nothing, nothing)


def masked_expert(merged: MaskedExperts, name: str, *, base: Tree) -> Tree:
    """Returns one of the experts that ``emr`` or ``tall_masks`` have merged, as they keep it.

    expert_t = base + r_t m_t d.

    Args:
      merged: The merged experts.
      name: The expert's name; its index as a string if they were given as a list.
      base: The base that they were merged with.

    Returns:
      A tree like the base. Leaves that are not floating point are the base's.

    Raises:
      ValueError: if there is no such expert, or it is another base.

    Example:
      >>> from optax_moma.merging import masked_expert, tall_masks
      >>> base = {"w": jnp.ones(2)}
      >>> merged = tall_masks({"math": {"w": jnp.array([2., 3.])}}, base=base)
      >>> masked_expert(merged, "math", base=base)
      {'w': Array([2., 3.], dtype=float32)}
    """
    if name not in merged.masks:
        near = difflib.get_close_matches(str(name), list(merged.masks), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(merged.masks)}"
        raise ValueError(f"There is no expert {name!r}; {hint}")
    shapes = [
        {name: np.shape(x) for name, x in zip(*named_leaves(tree), strict=True) if is_float(x)}
        for tree in (base, merged.delta)
    ]
    if shapes[0] != shapes[1]:
        wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        raise ValueError(
            f"This is not the base that the experts were merged with: {', '.join(wrong)} "
            "differ in name or shape."
        )
    scale = merged.scales[name]

    def part(_: jax.Array, delta: jax.Array, bits: jax.Array) -> jax.Array:
        mask = jnp.unpackbits(bits, count=delta.size).reshape(delta.shape)
        return scale.astype(wide(delta).dtype) * mask * wide(delta)

    return moved(base, each_float(part, base, merged.delta, merged.masks[name]))


def _masked(leaf: Callable[[jax.Array], _Leaf], experts: Any, base: Tree) -> MaskedExperts:
    inputs = checked_inputs(Contract(base=True, combines=True), experts, base, None, None, None)
    leaves = [
        leaf(jnp.stack([wide(e[path]) for e in inputs.experts]) - wide(b)) if is_float(b) else None
        for path, b in zip(inputs.paths, jax.tree.leaves(base), strict=True)
    ]

    def tree(get: Callable[[_Leaf], jax.Array]) -> Tree:
        found = [optax.MaskedNode() if x is None else get(x) for x in leaves]
        return inputs.treedef.unflatten(found)

    delta = each_float(lambda b, d: d.astype(jnp.asarray(b).dtype), base, tree(lambda x: x.delta))
    masks = {name: tree(lambda x, t=t: x.masks[t]) for t, name in enumerate(inputs.names)}
    zeros = jnp.zeros(len(inputs.names))
    whole = sum((x.whole for x in leaves if x is not None), start=zeros)
    kept = sum((x.kept for x in leaves if x is not None), start=zeros)
    scales = jnp.where(kept == 0, 1, whole / _metric.nonzero(kept))
    return MaskedExperts(delta, masks, dict(zip(inputs.names, scales, strict=True)))


def _packed(masks: jax.Array) -> jax.Array:
    return jnp.packbits(masks.reshape(masks.shape[0], -1), axis=1)


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))
