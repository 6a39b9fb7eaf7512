"""Trees like the base that hold something for each floating-point leaf, and nothing for others."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_moma.merging._inputs import is_float
from optax_moma.merging._leaf import compute_dtype

Tree = Any


def each_float(
    f: Callable[..., Any],
    base: Tree,
    *trees: Tree,
    other: Callable[[Any], Any] = lambda _: optax.MaskedNode(),
) -> Tree:
    """Maps the base's floating-point leaves, and what trees like the base have in their places."""
    treedef = jax.tree.structure(base)
    columns = (treedef.flatten_up_to(tree) for tree in (base, *trees))
    rows = zip(*columns, strict=True)
    return treedef.unflatten([f(*row) if is_float(row[0]) else other(row[0]) for row in rows])


def wide(x: Any) -> jax.Array:
    """Returns an array in the dtype that it is merged in."""
    x = jnp.asarray(x)
    return x.astype(compute_dtype([x]))


def moved(base: Tree, delta: Tree) -> Tree:
    """Returns base + delta in the base's dtypes; leaves that are not floating point stay."""
    return each_float(
        lambda b, d: (wide(b) + d).astype(jnp.asarray(b).dtype), base, delta, other=jnp.asarray
    )
