"""How far models are from their base and from each other: weights, curvature, features."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp

from .._curvature import dense, shape_of
from .._matrix import divisor
from .._moments import Factored
from .._tree import fitting_leaves, unboxed, wide

Tree = Any


def drift(params: Tree, base: Tree) -> Tree:
    """How far each leaf has gone from the base: ``||w - w0|| / ||w0||``.

    Args:
      params: The trained parameters w.
      base: What they were trained from, w0, a tree like ``params``.

    Returns:
      A tree like ``params``, a number at each leaf; of a base leaf that is zero, ``||w||``.

    Raises:
      ValueError: The trees differ in structure or in the shape of a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import drift
      >>> drift({"w": jnp.array([3.0, 3.0])}, {"w": jnp.array([3.0, 4.0])})
      {'w': Array(0.2, dtype=float32)}
    """
    return _by_leaf(_drift, base, [params], "base", ["params"])


def sign_conflict(experts: Sequence[Tree], base: Tree) -> Tree:
    r"""The share of the task vectors' magnitude that is lost when they are added, leaf by leaf.

    :math:`1 - \sum |\sum_t d_t| / \sum \sum_t |d_t|` with :math:`d_t = w_t - w_0`. 0: all signs
    agree; of two, 1: they cancel out.

    Args:
      experts: At least two models.
      base: What they were trained from, w0.

    Returns:
      A tree like ``base``, a number at each leaf; 0 where no expert moved.

    Raises:
      ValueError: Fewer than two experts, or trees that differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import sign_conflict
      >>> experts = [{"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([1.0, -1.0])}]
      >>> sign_conflict(experts, {"w": jnp.zeros(2)})
      {'w': Array(0.5, dtype=float32)}

    Source: the interference that TIES resolves, Yadav et al., arXiv 2306.01708.
    """
    names = _several("experts", experts)
    return _by_leaf(_conflict, base, experts, "base", names)


def curvature_overlap(curvatures: Sequence[Tree]) -> Tree:
    r"""How far models need the same entries, leaf by leaf.

    The mean, over pairs of models, of the cosine between the roots of their curvatures,
    :math:`\sum \sqrt{v_s v_t} / \sqrt{\sum v_s \sum v_t}`. 1: they need the same entries; 0:
    never the same ones.

    Args:
      curvatures: A tree of arrays or :class:`optax_moma.Factored` for each of at least two models;
        see :func:`optax_moma.curvature_from`.

    Returns:
      A tree like each of them, a number at each leaf. A leaf without curvature overlaps with none.

    Raises:
      ValueError: Fewer than two curvatures, or trees that differ in structure or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import curvature_overlap
      >>> curvature_overlap([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([9.0, 16.0])}])
      {'w': Array(0.6, dtype=float32)}
    """
    names = _several("curvatures", curvatures)
    return _by_leaf(_overlap, curvatures[0], curvatures[1:], names[0], names[1:])


def cka(x: jax.Array, y: jax.Array) -> jax.Array:
    r"""Linear centred kernel alignment of two models' features of the same examples.

    :math:`\lVert Y^T X \rVert^2 / (\lVert X^T X \rVert \lVert Y^T Y \rVert)`, the columns of X and
    Y centred. 1: equal up to rotation and scale; with fewer examples than features it is near 1 for
    any two models, so take many.

    Args:
      x: Features of the first model, (examples, p).
      y: Features of the second, (examples, q).

    Returns:
      A number from 0 to 1; 0 if one of them is constant.

    Raises:
      ValueError: They are no two matrices with as many rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_moma.diagnostics import cka
      >>> x = jax.random.normal(jax.random.key(0), (50, 3))
      >>> float(cka(x, 2 * x[:, ::-1]).round(4))
      1.0

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"cka takes features of shapes (examples, p) and (examples, q), got {x.shape} and"
            f" {y.shape}: flatten what has more axes."
        )
    X, Y = (_centred(wide(a)) for a in (x, y))
    cross, own_x, own_y = (_norm_of_product(a, b) for a, b in ((X, Y), (X, X), (Y, Y)))
    return cross**2 / divisor(own_x * own_y)


def _centred(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=0)
    return x / divisor(jnp.max(jnp.abs(x)))


def _norm_of_product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.linalg.norm(jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST))


@jax.jit
def _drift(base: jax.Array, params: jax.Array) -> jax.Array:
    w0 = wide(base)
    moved = jnp.linalg.norm((params.astype(w0.dtype) - w0).ravel())
    return moved / divisor(jnp.linalg.norm(w0.ravel()))


@jax.jit
def _conflict(base: jax.Array, *experts: jax.Array) -> jax.Array:
    w0 = wide(base)
    deltas = [expert.astype(w0.dtype) - w0 for expert in experts]
    total = sum(jnp.sum(jnp.abs(d)) for d in deltas)
    lost = total - jnp.sum(jnp.abs(sum(deltas)))
    return lost / divisor(jnp.asarray(total))


@jax.jit
def _overlap(*curvatures: Any) -> jax.Array:
    lengths = [jnp.sqrt(jnp.sum(dense(v))) for v in curvatures]
    roots = [dense(v, 0.5) / divisor(n) for v, n in zip(curvatures, lengths, strict=True)]
    pairs = [jnp.sum(x * y) for x, y in combinations(roots, 2)]
    return sum(pairs[1:], pairs[0]) / len(pairs)


def _several(argument: str, trees: Sequence[Tree]) -> list[str]:
    if len(trees) < 2:
        raise ValueError(f"{argument} must be at least two trees, got {len(trees)}.")
    return [f"{argument}[{i}]" for i in range(len(trees))]


def _by_leaf(
    number: Any, first: Tree, others: Sequence[Tree], first_label: str, labels: Sequence[str]
) -> Tree:
    """``number`` of the leaves at each place of several trees that have the same ones."""
    first, others = unboxed(first), [unboxed(tree) for tree in others]
    is_leaf = lambda x: isinstance(x, Factored)  # noqa: E731
    leaves, treedef = jax.tree.flatten(first, is_leaf=is_leaf)
    columns = [
        fitting_leaves(first_label, first, label, tree, is_leaf=is_leaf, shape_of=shape_of)
        for label, tree in zip(labels, others, strict=True)
    ]
    return treedef.unflatten([number(*x) for x in zip(leaves, *columns, strict=True)])
