"""What a state weighs, and how it lies on a mesh: both read off shapes, before any array exists."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from ._tree import named_leaves, path_name, unboxed


class StateSize(NamedTuple):
    """Bytes of an optimizer's state.

    Attributes:
      total_bytes: All of it.
      by_field: Bytes per quantity, such as ``{'U': ..., 'R': ..., 'mu': ...}``, largest first.
    """

    total_bytes: int
    by_field: dict[str, int]


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
      >>> params = {"kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32)}
      >>> om.state_size(optax.adamw(1e-3), params).total_bytes
      18874372
      >>> om.state_size(om.moma(1e-3, rank=32), params).by_field["U"]
      98304
    """
    params = unboxed(params)
    state = jax.eval_shape(tx.init, params)
    param_paths = {path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]}
    fields: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        field = _field(path, param_paths)
        fields[field] = fields.get(field, 0) + leaf.size * leaf.dtype.itemsize
    by_size = dict(sorted(fields.items(), key=lambda item: -item[1]))
    return StateSize(sum(fields.values()), by_size)


def _field(path: tuple[Any, ...], param_paths: set[tuple[Any, ...]]) -> str:
    """The name of a NamedTuple's field that a path leads through, last before a parameter's."""
    spans = [(i, j) for i in range(len(path)) for j in range(i + 1, len(path) + 1)]
    start = next((i for i, j in spans if path[i:j] in param_paths), len(path))
    names = [key.name for key in path[:start] if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else path_name(path)


def state_partition_specs(
    tx: optax.GradientTransformation, params: Any, param_specs: Any
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
      param_specs: A tree like ``params`` of ``PartitionSpec``, or None for a replicated leaf.

    Returns:
      A tree like ``tx.init(params)`` of ``PartitionSpec``.

    Raises:
      ValueError: ``param_specs`` is not a tree like ``params``, or a spec has more axes than its
        leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax_moma as om
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32)}
      >>> specs = om.state_partition_specs(om.moma(1e-3), params, {"kernel": P("fsdp", "tensor")})
      >>> tuple(specs[0].U["kernel"]), tuple(specs[0].V["kernel"]), tuple(specs[0].C["kernel"])
      (('fsdp', None), ('tensor', None), ('tensor',))
    """
    params = unboxed(params)
    names, leaves = named_leaves(params)
    treedef = jax.tree.structure(params)
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)  # noqa: E731
    specs, spec_def = jax.tree.flatten(unboxed(param_specs), is_leaf=is_spec)
    if spec_def != treedef:
        raise ValueError(
            "param_specs must be a tree like params, with a PartitionSpec (or None) at every leaf:"
            f" it has structure {spec_def}, params have {treedef}."
        )
    specs = [spec or PartitionSpec() for spec in specs]
    for name, leaf, spec in zip(names, leaves, specs, strict=True):
        if len(spec) > len(leaf.shape):
            raise ValueError(
                f"the spec of leaf {name!r}, {spec}, has more axes than its shape {leaf.shape}."
            )
    # A mesh of one device per axis: every shape divides, and only the names matter.
    axes = sorted({axis for spec in specs for axis in _axis_names(spec)}) or ["unused"]
    mesh = AbstractMesh((1,) * len(axes), tuple(axes), axis_types=(AxisType.Explicit,) * len(axes))
    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    # The empty mesh first: a mesh that is in use outside may have axes of other sizes.
    none = AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, treedef.unflatten(abstract))
    return jax.tree.map(lambda x: x.sharding.spec if x.sharding else PartitionSpec(), state)


def _axis_names(spec: PartitionSpec) -> list[str]:
    parts = [part for part in spec if part is not None]
    return [name for part in parts for name in ([part] if isinstance(part, str) else part)]
