"""What a state weighs, and how it lies on a mesh: both read off shapes, before any array exists."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ._checks import listing
from ._curvature import sources
from ._tree import is_none, path_name, unboxed


class StateSize(NamedTuple):
    """Bytes of an optimizer's state.

    Attributes:
      total_bytes: All of it.
      by_field: Bytes per quantity, such as ``{'U': ..., 'R': ..., 'mu': ...}``, largest first.
      matrices: The shape (*stacked, m, n) in which ``moma`` or ``umtam`` sees each leaf that it
        factors, by the leaf's path. Leaves that are not in it are kept entry by entry.
    """

    total_bytes: int
    by_field: dict[str, int]
    matrices: dict[str, tuple[int, ...]]


def state_size(tx: optax.GradientTransformation, params: Any) -> StateSize:
    """The bytes that ``tx`` will hold for these parameters, from shapes alone.

    Every array of ``tx.init(params)`` counts ``size * itemsize``; no array is made.

    Args:
      tx: Any optimizer, ours or another.
      params: A tree of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      A :class:`StateSize`. Fields are named as in the state's NamedTuples; fields of the same name
      in several parts of a chain are added.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_moma as om
      >>> array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> params = {"up": array(768, 3072), "query": array(768, 12, 64), "bias": array(3072)}
      >>> om.state_size(optax.adamw(1e-3), params).total_bytes
      23617540
      >>> size = om.state_size(om.moma(1e-3, rank=32), params)
      >>> size.by_field["U"], size.matrices
      (196608, {'query': (768, 768), 'up': (768, 3072)})
    """
    state = jax.eval_shape(tx.init, params)
    param_paths = _paths(params)
    fields: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        field = _field(path, param_paths)
        fields[field] = fields.get(field, 0) + leaf.size * leaf.dtype.itemsize
    by_size = dict(sorted(fields.items(), key=lambda item: -item[1]))
    matrices = {
        name: (*R.shape, tables["C"][name].shape[-1])
        for _, tables, _ in sources(state)
        for name, R in tables.get("R", {}).items()
    }
    return StateSize(sum(fields.values()), by_size, matrices)


def _paths(params: Any) -> dict[tuple[Any, ...], int]:
    """Each leaf's place, by its path with Flax's boxes and without: optimizers keep either."""
    flat = [
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
        for tree in (params, unboxed(params))
    ]
    return {path: i for leaves in flat for i, (path, _) in enumerate(leaves)}


def _field(path: tuple[Any, ...], param_paths: Collection[tuple[Any, ...]]) -> str:
    """The name of a NamedTuple's field that a path leads through, last before a parameter's."""
    fields = path[: _start_of_parameter(path, param_paths)]
    names = [key.name for key in fields if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else path_name(path)


def _start_of_parameter(
    path: tuple[Any, ...], param_paths: Collection[tuple[Any, ...]]
) -> int | None:
    """Where in the path of a state's array, at its end, the path of its parameter begins.

    It is in the tree of a named field: that of a list's first leaf is not in the first link of a
    chain, nor is a leaf named mu the field of this name.
    """
    in_a_field = lambda i: not isinstance(path[i - 1], jax.tree_util.SequenceKey)  # noqa: E731
    starts = range(1, len(path) + 1)
    return next((i for i in starts if in_a_field(i) and path[i:] in param_paths), None)


def state_partition_specs(
    tx: optax.GradientTransformation,
    params: Any,
    param_specs: Any,
    *,
    spread_over: Mesh | AbstractMesh | None = None,
) -> optax.OptState:
    """How the state of ``tx`` lies on a mesh when the parameters lie as ``param_specs`` say.

    For ``moma`` a matrix (m, n) with spec P(row, col) has U (m, r) as P(row, None), V (n, r) as
    P(col, None), R (m,) as P(row), C (n,) as P(col), and s replicated; stacked axes keep theirs.
    The specs come from running ``init`` on abstract arrays with shardings in their types, the very
    code that lays out the state on an explicit mesh, so they hold for any optimizer
    that runs there.

    Args:
      tx: An optimizer.
      params: A tree of arrays or of ``jax.ShapeDtypeStruct``.
      param_specs: A tree like ``params`` of ``PartitionSpec`` or ``NamedSharding``, or None for a
        replicated leaf.
      spread_over: None; or a mesh, of which only the sizes are read. Then every array also lies
        over those mesh axes of its parameter along which it would be copied, as far as its sizes
        divide: U above as P((row, col), None). So a state waits from one step to the next at its
        smallest. An update computes with the layout above: a step moves the state there, which
        gathers thin arrays, and its results back, which moves nothing (on explicit meshes by
        ``jax.sharding.reshard``, on others by ``jax.lax.with_sharding_constraint``).

    Returns:
      A tree like ``tx.init(params)`` of ``PartitionSpec``.

    Raises:
      ValueError: ``param_specs`` is not a tree like ``params``, a spec has more axes than its leaf,
        or one that ``spread_over`` lacks.

    Example:
      >>> import jax, jax.numpy as jnp, optax_moma as om
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
      >>> specs = om.state_partition_specs(om.moma(1e-3), params, {"kernel": P("fsdp", "tensor")})
      >>> tuple(specs[0].U["kernel"]), tuple(specs[0].V["kernel"]), tuple(specs[0].C["kernel"])
      (('fsdp', None), ('tensor', None), ('tensor',))
      >>> mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
      >>> specs = om.state_partition_specs(
      ...     om.moma(1e-3), params, {"kernel": P("fsdp", "tensor")}, spread_over=mesh
      ... )
      >>> tuple(specs[0].U["kernel"]), tuple(specs[0].C["kernel"])
      ((('fsdp', 'tensor'), None), (('tensor', 'fsdp'),))
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(unboxed(params), is_leaf=is_none)
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec | NamedSharding)  # noqa: E731
    specs, spec_def = jax.tree.flatten(unboxed(param_specs), is_leaf=is_spec)
    if spec_def != treedef:
        raise ValueError(
            "param_specs must be a tree like params, with a PartitionSpec (or None) at every leaf:"
            f" it has structure {spec_def}, params have {treedef}."
        )
    specs = [x.spec if isinstance(x, NamedSharding) else x or PartitionSpec() for x in specs]
    for (path, leaf), spec in zip(flat, specs, strict=True):
        if leaf is not None and len(spec) > len(leaf.shape):
            raise ValueError(
                f"the spec of leaf {path_name(path)!r}, {spec}, has more axes than its shape"
                f" {leaf.shape}."
            )
        unknown = {*_axis_names(spec)} - {*spread_over.shape} if spread_over else None
        if unknown:
            raise ValueError(
                f"the spec of leaf {path_name(path)!r}, {spec}, names {listing(sorted(unknown))},"
                f" which the mesh spread_over, {spread_over}, does not have."
            )
    # A mesh of one device per axis: every shape divides, and only the names matter.
    axes = sorted({axis for spec in specs for axis in _axis_names(spec)}) or ["unused"]
    mesh = AbstractMesh((1,) * len(axes), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    abstract = [
        None  # as Optax allows in place of a leaf
        if leaf is None
        else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for (_, leaf), spec in zip(flat, specs, strict=True)
    ]
    # The empty mesh first: a mesh that is in use outside may have axes of other sizes.
    none = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(mesh):
        boxed = jax.tree.structure(params, is_leaf=is_none).unflatten(abstract)
        state = jax.eval_shape(tx.init, boxed)
    state_specs = jax.tree.map(lambda x: x.sharding.spec if x.sharding else PartitionSpec(), state)
    if spread_over is None:
        return state_specs
    axes_of = {path: _axis_names(specs[i]) for path, i in _paths(params).items()}

    def spread(path: tuple[Any, ...], x: Any, spec: PartitionSpec) -> PartitionSpec:
        start = _start_of_parameter(path, axes_of)
        axes = [] if start is None else axes_of[path[start:]]
        return _spread(x.shape, spec, axes, spread_over.shape)

    return jax.tree.map_with_path(spread, state, state_specs)


def _spread(
    shape: tuple[int, ...], spec: PartitionSpec, axes: list[str], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec with the axes that it leaves out, each on the longest dimension that divides."""
    parts = [_axis_names([part]) for part in (*spec, *[None] * (len(shape) - len(spec)))]
    longest_first = sorted(range(len(shape)), key=lambda i: -shape[i])
    for axis in axes:
        for i in longest_first if axis not in _axis_names(spec) else ():
            if shape[i] % math.prod(sizes[name] for name in (*parts[i], axis)) == 0:
                parts[i].append(axis)
                break
    return PartitionSpec(*(tuple(part) if len(part) > 1 else (*part, None)[0] for part in parts))


def _axis_names(spec: Iterable[Any]) -> list[str]:
    parts = [part for part in spec if part is not None]
    return [name for part in parts for name in ([part] if isinstance(part, str) else part)]
