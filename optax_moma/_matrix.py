"""A leaf seen as a stack of matrices, ``x W = y``: m rows of fan-in, n columns of fan-out.

Everything above works on arrays of shape (*batch, m, n). This page decides which axes of a leaf are
which, moves them there and back, and keeps the shardings of explicit meshes on the way.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._tree import is_none, named_leaves


class Layout(NamedTuple):
    """Which axes of a leaf of this shape are stacked, rows (fan-in) and columns (fan-out)."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(*batch, m, n)."""
        m, n = (math.prod(self.shape[i] for i in axes) for axes in (self.rows, self.cols))
        return (*(self.shape[i] for i in self.batch), m, n)

    @property
    def side(self) -> int:
        """The shorter side of each matrix."""
        return min(self.matrix_shape[-2:])

    def to_matrix(self, x: jax.Array) -> jax.Array:
        """The leaf as an array of shape (*batch, m, n)."""
        x = jnp.transpose(_drop_minor_shardings(x, self), self.batch + self.rows + self.cols)
        return reshape(x, self.matrix_shape, self._matrix_spec(x))

    def from_matrix(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse of :meth:`to_matrix`; an explicit sharding comes back as that of ``like``."""
        order = self.batch + self.rows + self.cols
        shape = tuple(self.shape[i] for i in order)
        x = reshape(x, shape, self._leaf_spec(x))
        x = jnp.transpose(x, tuple(order.index(i) for i in range(len(order))))
        return reshard(x, sharding_of(like))

    def rows_in_leaf(self, r: jax.Array) -> jax.Array:
        """A quantity per row, (*batch, m), laid out to broadcast against the leaf."""
        return self._in_leaf(r, self.cols)

    def cols_in_leaf(self, c: jax.Array) -> jax.Array:
        """A quantity per column, (*batch, n), laid out to broadcast against the leaf."""
        return self._in_leaf(c, self.rows)

    def _in_leaf(self, x: jax.Array, missing: tuple[int, ...]) -> jax.Array:
        order = self.batch + self.rows + self.cols
        sizes = tuple(1 if i in missing else self.shape[i] for i in order)
        return jnp.transpose(x.reshape(sizes), tuple(order.index(i) for i in range(len(order))))

    def row_sharding(self, leaf: Any, *, minor: bool) -> NamedSharding | None:
        """Sharding of a (*batch, m) array, or (*batch, m, r) if ``minor``, as the leaf's rows."""
        return self._factor_sharding(leaf, self.rows, minor)

    def col_sharding(self, leaf: Any, *, minor: bool) -> NamedSharding | None:
        """Sharding of a (*batch, n) array, or (*batch, n, r), laid as the leaf's columns."""
        return self._factor_sharding(leaf, self.cols, minor)

    def batch_sharding(self, leaf: Any) -> NamedSharding | None:
        """Sharding of a (*batch, r) array."""
        return self._factor_sharding(leaf, (), True)

    def _factor_sharding(
        self, leaf: Any, axes: tuple[int, ...], minor: bool
    ) -> NamedSharding | None:
        sharding = sharding_of(leaf)
        if sharding is None:
            return None
        spec = _padded(sharding.spec, len(self.shape))
        kept = [spec[i] for i in (*self.batch, *axes[:1])] + [None] * minor
        return NamedSharding(sharding.mesh, PartitionSpec(*kept))

    def _matrix_spec(self, transposed: jax.Array) -> tuple[Any, ...]:
        b, r = len(self.batch), len(self.rows)
        spec = spec_of(transposed)
        return (*spec[:b], spec[b], spec[b + r])

    def _leaf_spec(self, matrix: jax.Array) -> tuple[Any, ...]:
        *batch, row, col = spec_of(matrix)
        return (
            *batch, row, *([None] * (len(self.rows) - 1)), col, *([None] * (len(self.cols) - 1))
        )  # fmt: skip


def layouts(
    params: Any, dimension_numbers: Any, min_dim_size_to_factor: int
) -> list[Layout | None]:
    """The layout of every leaf of ``params``, in order; None for a leaf that is kept dense.

    Args:
      params: A tree of arrays (or ShapeDtypeStructs).
      dimension_numbers: None, for the rule below; one spec with ``reduction_axis`` (fan-in) and
        ``output_axis`` (fan-out), each an axis or several, such as
        ``optax.contrib.MuonDimensionNumbers``; a tree of them, possibly a prefix of ``params``,
        with None at leaves that are no matrices (leaves of fewer than two axes are none in any
        case); or a callable from ``params`` to one of these.
        Axes that are not named stack independent matrices.
      min_dim_size_to_factor: A matrix with fewer rows or columns than this is kept dense.

    Without dimension numbers a two-dimensional leaf is its own matrix. A leaf with more axes is the
    finest stack whose matrices reach ``min_dim_size_to_factor`` both ways: as many axes as can be
    are taken off its front to stack, and the rest is cut in two where the halves are most nearly
    square. When in doubt it stacks, for two matrices kept apart cost a little state, and two that
    are taken for one share directions that they do not have in common.
    """
    names, leaves = named_leaves(params, is_leaf=is_none)
    if not leaves:  # a tree without leaves, Optax's placeholder among them, fits any numbers
        return []
    if callable(dimension_numbers) and not _is_spec(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    if dimension_numbers is None:
        return [
            next((x for x in default_layouts(leaf) if x.side >= min_dim_size_to_factor), None)
            for leaf in leaves
        ]
    spread = _broadcast(dimension_numbers, params)
    axes = [_named_axes(*args) for args in zip(spread, names, leaves, strict=True)]
    found = [_layout(*pair) for pair in zip(leaves, axes, strict=True)]
    return [x if x and x.side >= min_dim_size_to_factor else None for x in found]


_Axes = tuple[tuple[int, ...], tuple[int, ...]] | None


def default_layouts(leaf: Any) -> list[Layout]:
    """The layouts that the rule without dimension numbers chooses from, the finest stack first."""
    if leaf is None or leaf.ndim < 2:
        return []
    cuts = (_square_cut(leaf.shape, stacked) for stacked in reversed(range(leaf.ndim - 1)))
    return [layout for axes in cuts if (layout := _layout(leaf, axes))]


def paper_layout(leaf: Any) -> Layout | None:
    """The published view of a leaf as one matrix: its first axis against all others."""
    axes = tuple(range(leaf.ndim))
    return _layout(leaf, (axes[:1], axes[1:]) if leaf.ndim > 1 else None)


def _layout(leaf: Any, axes: _Axes) -> Layout | None:
    """The layout with these rows and columns; None for a leaf that cannot be factored."""
    if axes is None or 0 in leaf.shape or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return None
    rows, cols = axes
    batch = tuple(i for i in range(leaf.ndim) if i not in rows + cols)
    return Layout(tuple(leaf.shape), batch, rows, cols)


def _square_cut(shape: tuple[int, ...], stacked: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes after the first ``stacked``, cut in two where the halves are most nearly square."""
    axes = tuple(range(stacked, len(shape)))
    size = lambda half: math.prod(shape[i] for i in half)  # noqa: E731
    cuts = [(axes[:i], axes[i:]) for i in range(1, len(axes))]
    return max(cuts, key=lambda halves: min(map(size, halves)))


def _named_axes(spec: Any, name: str, leaf: Any) -> _Axes:
    if spec is None or leaf is None or leaf.ndim < 2:
        return None
    rows, cols = (
        tuple(_axis(i, name, leaf, spec) for i in ([axis] if np.ndim(axis) == 0 else axis))
        for axis in (spec.reduction_axis, spec.output_axis)
    )
    if not rows or not cols or len({*rows, *cols}) < len(rows) + len(cols):
        raise ValueError(
            f"weight_dimension_numbers {spec} do not fit leaf {name!r} of shape {leaf.shape}:"
            " reduction_axis and output_axis must each name at least one axis, and no axis twice."
        )
    return rows, cols


def _axis(axis: int, name: str, leaf: Any, spec: Any) -> int:
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"weight_dimension_numbers {spec} name axis {axis} of leaf {name!r}, whose shape is"
            f" {leaf.shape}. Name axes that exist, or give None for a leaf that is no matrix."
        )
    return axis % leaf.ndim


def _is_spec(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _broadcast(dimension_numbers: Any, params: Any) -> list[Any]:
    """One spec (or None) per leaf of ``params``, from a tree that may be a prefix of it."""

    def spread(spec: Any, subtree: Any) -> Any:
        if spec is not None and not _is_spec(spec):
            raise TypeError(
                f"weight_dimension_numbers hold {spec!r} where a spec with reduction_axis and"
                " output_axis (such as optax.contrib.MuonDimensionNumbers) or None is expected."
            )
        return [spec] * len(jax.tree.leaves(subtree, is_leaf=is_none))

    stop = lambda x: x is None or _is_spec(x)  # noqa: E731
    try:
        lists = jax.tree.map(spread, dimension_numbers, params, is_leaf=stop)
    except ValueError as error:
        raise ValueError(
            "weight_dimension_numbers must be a tree like the parameters, or a prefix of it:"
            f" {error}"
        ) from error
    return jax.tree.leaves(lists, is_leaf=stop)


# Explicit meshes (sharding in types): the sharding is part of an array's type and never guessed.
# Everywhere else these functions do nothing, and the compiler propagates shardings by itself.


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding in an array's type; None where the mesh is not explicit."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def reshard(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """``x`` with this sharding in its type, if one is given and it is not there already."""
    if sharding is None or jax.typeof(x).sharding == sharding:
        return x
    return jax.sharding.reshard(x, sharding)


def contract(
    subscripts: str,
    a: jax.Array,
    b: jax.Array,
    precision: jax.lax.Precision | None = jax.lax.Precision.HIGHEST,
) -> jax.Array:
    """``einsum`` over the last axes in full float32 precision, batched over all axes before them.

    TPUs multiply matrices in bfloat16 by default, which destroys orthogonality, hence the highest
    precision where nothing else is said. On an explicit mesh the axes that remain keep their
    sharding, and those summed over end in an all-reduce.
    """
    inputs, output = subscripts.split("->")
    letters = inputs.split(",")
    batch = "abcdefgh"[: a.ndim - len(letters[0])]
    letters, output = [batch + x for x in letters], batch + output
    sharding = sharding_of(a) or sharding_of(b)
    if sharding is not None:
        axes: dict[str, Any] = {}
        for names, x in zip(letters, (a, b), strict=True):
            for name, axis in zip(names, spec_of(x), strict=True):
                axes[name] = axes.get(name) or axis
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*(axes[name] for name in output)))
    return jnp.einsum(
        f"{','.join(letters)}->{output}",
        a,
        b,
        precision=precision,
        out_sharding=sharding,
    )


def divisor(x: jax.Array) -> jax.Array:
    """``x``, and one where it is not positive: a divisor that leaves null what is null."""
    return jnp.where(x > 0, x, 1)


def unshared(x: Any) -> Any:
    """``x`` (an array or several), whose uses the compiler does not share with the original's.

    Two reductions of one elementwise expression, such as the row and the column sums of ``G**2``,
    would otherwise have it stored, as a temporary of the leaf's size that costs more to write and
    read again than to compute twice.
    """
    return jax.lax.optimization_barrier(x)


def _padded(spec: Iterable[Any], ndim: int) -> tuple[Any, ...]:
    axes = tuple(spec)
    return (*axes, *([None] * (ndim - len(axes))))


def spec_of(x: jax.Array) -> tuple[Any, ...]:
    """The mesh axes in an array's type, axis by axis; all None where the mesh is not explicit."""
    sharding = sharding_of(x)
    return _padded(sharding.spec if sharding else (), x.ndim)


def reshape(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...]) -> jax.Array:
    """``x`` in another shape; ``spec`` says how it lies on an explicit mesh then."""
    if x.shape == shape:
        return x
    sharding = sharding_of(x)
    if sharding is None:
        return x.reshape(shape)
    return jax.lax.reshape(
        x, shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec))
    )


def _drop_minor_shardings(x: jax.Array, layout: Layout) -> jax.Array:
    """Of axes that are merged only the first may stay sharded: gather the others."""
    sharding = sharding_of(x)
    if sharding is None:
        return x
    minor = (*layout.rows[1:], *layout.cols[1:])
    spec = [None if i in minor else axis for i, axis in enumerate(spec_of(x))]
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
