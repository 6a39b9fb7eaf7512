"""Pytrees of parameters: plain arrays whatever wraps them, and one name per leaf."""

import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike


def unboxed(tree: Any) -> Any:
    """The tree with plain arrays where Flax keeps NNX Variables or Linen metadata boxes.

    Both are pytree nodes that carry a sharding annotation made for the parameter's shape. A tree
    built by mapping over them would hand that annotation to factors of another shape, so optimizer
    states are built on the plain tree. Whoever passes a box has imported Flax: it is looked up, not
    imported.
    """
    boxes = tuple(
        getattr(sys.modules[module], name)
        for module, name in (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
        if hasattr(sys.modules.get(module), name)
    )
    if not boxes:
        return tree
    is_box = lambda x: isinstance(x, boxes)  # noqa: E731
    return jax.tree.map(lambda x: _content(x) if is_box(x) else x, tree, is_leaf=is_box)


def _content(box: Any) -> Any:
    leaves = jax.tree.leaves(box, is_leaf=is_none)
    return leaves[0] if leaves else optax.MaskedNode()  # another optimizer's leaf


def is_none(x: Any) -> bool:
    """Whether ``x`` is None, which Optax allows in place of a leaf."""
    return x is None


def key_name(key: Any) -> str:
    """The name of one step of a key path: 'kernel' for ['kernel'] and .kernel, '0' for [0]."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text: ``encoder/layer_0/kernel``; the empty string for a bare array."""
    return "/".join(key_name(key) for key in path)


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any]]:
    """The names and the leaves of a tree, in the order of ``jax.tree.leaves``."""
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return [path_name(path) for path, _ in flat], [leaf for _, leaf in flat]


def leaves_like(treedef: Any, reference: str, argument: str, tree: Any) -> list[Any]:
    """The parts of ``tree`` at the leaves of another; the names are those of an error's message."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"{argument} is not a tree like {reference}: {error}") from error


def fitting_leaves(
    reference: str,
    like: Any,
    argument: str,
    tree: Any,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    shape_of: Callable[[Any], tuple[int, ...]] = np.shape,
) -> list[Any]:
    """The leaves of ``tree``, which must have the structure and the shapes of another."""
    names, leaves = named_leaves(like, is_leaf)
    found = leaves_like(jax.tree.structure(like, is_leaf=is_leaf), reference, argument, tree)
    for name, x, y in zip(names, leaves, found, strict=True):
        if shape_of(x) != shape_of(y):
            raise ValueError(
                f"leaf {name!r} has shape {shape_of(x)} in {reference} and {shape_of(y)} in"
                f" {argument}: pass trees of one model."
            )
    return found


def name_hash(name: str) -> int:
    """A hash of a leaf's or an expert's name that every process and Python version agrees on."""
    return zlib.crc32(name.encode())


def at_least_float32(dtype: DTypeLike) -> Any:
    """The type in which a leaf of this type is computed with, and its state kept."""
    return jnp.promote_types(jax.dtypes.canonicalize_dtype(dtype), jnp.float32)


def wide(x: Any) -> jax.Array:
    """``x`` as an array of the type in which it is computed with."""
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype))


def to_trees(params: Any, entries: list[Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """One tree like ``params`` per field, from one entry (a NamedTuple, or None) per leaf.

    A leaf whose entry lacks the field gets an ``optax.MaskedNode``, which holds no array.
    """
    treedef = jax.tree.structure(params, is_leaf=is_none)
    return {
        field: treedef.unflatten([getattr(entry, field, optax.MaskedNode()) for entry in entries])
        for field in fields
    }


def to_entries(params: Any, state: Any, forms: tuple[type, ...]) -> list[Any]:
    """The inverse of :func:`to_trees`: one entry per leaf, of the first form that it fits.

    The state says which form that is, not the leaf: a gradient may be None.
    """
    treedef = jax.tree.structure(params, is_leaf=is_none)
    fields = [field for form in forms for field in form._fields]
    columns = {field: treedef.flatten_up_to(getattr(state, field)) for field in fields}

    def entry(i: int) -> Any:
        held = [f for f in forms if not isinstance(columns[f._fields[0]][i], optax.MaskedNode)]
        form = [*held, forms[-1]][0]
        return form(*(columns[field][i] for field in form._fields))

    return [entry(i) for i in range(treedef.num_leaves)]
