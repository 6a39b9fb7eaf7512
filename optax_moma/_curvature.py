"""The bridge from training to merging: curvature read from the state of an optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import Scalar, listing
from ._matrix import Layout, default_layouts, divisor, layouts, paper_layout
from ._moments import Factored, estimate
from ._tree import fitting_leaves, named_leaves, unboxed, wide

Curvature = jax.Array | Factored


class Source(NamedTuple):
    """A part of an optimizer's state that knows second moments.

    Attributes:
      kind: Which optimizer's it is.
      tables: For each field with one array per leaf, the arrays by the leaf's name.
      scalars: The fields that hold one number.
    """

    kind: str
    tables: dict[str, dict[str, Any]]
    scalars: dict[str, Any]


# The fields by which a state is known, whatever its container: a NamedTuple, or the dictionary that
# a checkpoint gives back when it is restored without the optimizer's code. The first match counts.
KNOWN_BY = {
    "moma": ("U", "s", "V", "R", "C", "mu_weight", "nu_weight"),
    "umtam": ("U", "s", "V", "R", "C", "base"),
    "adafactor": ("count", "v_row", "v_col", "v"),
    "adam": ("count", "mu", "nu"),
    "rms": ("count", "nu"),
}
# States with the fields of Adam's whose nu is no average of g^2: of (g - m)^2, of ||g||^2 per leaf,
# of a diagonal of the Hessian, of the gradient's square in a subspace.
OTHER_NU = {"GaLoreState", "ScaleByBeliefState", "ScaleByNovogradState", "SophiaState"}


def curvature_from(
    opt_state: Any,
    params: Any,
    *,
    b2: Scalar = 0.999,
    missing: Scalar | None = None,
    weight_dimension_numbers: Any = None,
) -> Any:
    r"""The curvature that an optimizer's state holds: a bias-corrected estimate of E[g^2] per leaf.

    For each leaf: ``v / (1 - b2^t)``, with v the moving average of squared gradients. Where the
    state keeps it as row and column sums, :math:`v_{ij} = R_i C_j / \sum R`, it comes back as
    :class:`Factored` and stays m + n numbers.

    Args:
      opt_state: The state of ``moma``, ``umtam``, Adafactor, Adam or an optimizer with Adam's
        second moment (AdamW, NAdam, RAdam, AMSGrad, LAMB; RMSProp with ``bias_correction``,
        schedule-free AdamW), anywhere inside ``chain``, ``partition``, ``masked``,
        ``inject_hyperparams``, ``MultiSteps`` and the like, or an ``nnx.Optimizer``; also what a
        checkpoint restores without a template, as lists and dictionaries. AdaBelief, NovoGrad and
        Sophia keep something else under the same names, and are refused, but not from such a
        checkpoint, which does not tell them from Adam. Adamax, Yogi and ADOPT cannot be told from
        it at all, for their state is of Adam's type: what comes back is their own nu, divided by
        ``1 - b2^t``. RMSProp without bias correction does not count its steps, GaLore knows them
        in a subspace only: both are refused.
      params: The parameters that the state belongs to (shapes are enough).
      b2: Decay of the second moments, for bias correction: ``decay`` of RMSProp, whose default is
        0.9. ``moma`` records its own and Adafactor needs none: it is not read for their states.
      weight_dimension_numbers: What ``moma`` was given, if it was given any. A square matrix
        whose axes were swapped cannot be told from one whose axes were not.
      missing: Curvature of leaves that no state covers, such as frozen ones. None: an error.

    Returns:
      A tree like ``params``; at each leaf an array of its shape or a :class:`Factored`, float32 (or
      float64).

    Raises:
      ValueError: No curvature is found, or not for every leaf, or with shapes that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_moma as om
      >>> params = {"kernel": jnp.ones((128, 256)), "bias": jnp.zeros(256)}
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), om.moma(1e-3, rank=4))
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> curvature = om.curvature_from(state, params)
      >>> curvature["kernel"].row.shape, curvature["kernel"].col.shape, curvature["bias"].shape
      ((128, 1), (1, 256), (256,))

    Source: Adam's second moment as curvature: Li et al., "Squisher", arXiv 2507.18807; its factored
    form: Mahdavinia and Mahdavi, "OTA-Merging", arXiv 2509.11167.
    """
    params = unboxed(params)
    found_in = list(sources(opt_state))
    if not found_in:
        raise ValueError(
            "no curvature found in opt_state: it holds no state of moma, umtam, Adafactor or an"
            f" optimizer with Adam's second moment, only {_describe(opt_state)}. Pass the whole"
            " state of the optimizer that trained these parameters, not a part of it."
        )
    names, leaves = named_leaves(params)
    axes: list[Layout | None] = [None] * len(leaves)
    if weight_dimension_numbers is not None:
        axes = layouts(params, weight_dimension_numbers, min_dim_size_to_factor=1)
    found = [
        _leaf_curvature(name, leaf, found_in, layout, b2)
        for name, leaf, layout in zip(names, leaves, axes, strict=True)
    ]
    uncovered = [name for name, v in zip(names, found, strict=True) if v is None]
    if uncovered and missing is None:
        raise ValueError(
            f"opt_state holds no curvature for {len(uncovered)} of {len(names)} leaves:"
            f" {listing(uncovered)}. If they were frozen pass missing=0.0; if params are of"
            " another model, pass those that the optimizer was initialised with."
        )
    filled = [
        jnp.broadcast_to(jnp.asarray(missing, jnp.float32), leaf.shape) if v is None else v
        for leaf, v in zip(leaves, found, strict=True)
    ]
    return jax.tree.structure(params).unflatten(filled)


def saliency(params: Any, base: Any, curvature: Any, *, power: Scalar = 1.0) -> Any:
    r"""How much each parameter's change matters: ``(w - w0)^2 * v^power``.

    With power 1 it is twice the second-order estimate of what the loss would rise by if the entry
    went back to its base value; 1/2 is the tempered form of the paper, between that and magnitude.

    Args:
      params: The trained parameters w.
      base: What they were trained from, w0, a tree like ``params``.
      curvature: v, a tree like ``params``, of arrays or :class:`Factored`; see
        :func:`curvature_from`.
      power: Exponent of the curvature, >= 0; 0 is plain squared magnitude.

    Returns:
      A tree like ``params``, in float32 (or float64).

    Raises:
      ValueError: The trees differ in structure or in the shape of a leaf.

    Example:
      >>> import jax.numpy as jnp, optax_moma as om
      >>> v = {"w": om.Factored(row=jnp.array([[1.0], [4.0]]), col=jnp.array([[1.0, 1.0]]))}
      >>> w0, w = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[1.0, 2.0], [1.0, 0.0]])}
      >>> om.saliency(w, w0, v)["w"].tolist()
      [[1.0, 4.0], [4.0, 0.0]]

    Source: LeCun et al., "Optimal Brain Damage", 1989; the factored curvature: arXiv 2512.17109.
    """
    params, base = unboxed(params), unboxed(base)
    columns = [
        fitting_leaves("params", params, argument, tree, shape_of=shape_of)
        for argument, tree in (("base", base), ("curvature", curvature))
    ]
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [
            jnp.square(jnp.abs(wide(w) - w0)) * dense(v, power)
            for w, w0, v in zip(leaves, *columns, strict=True)
        ]
    )


def dense(v: Curvature, power: Scalar = 1.0) -> jax.Array:
    """``v**power`` as one array of the leaf's shape."""
    if isinstance(v, Factored):
        return v.row**power * v.col**power
    return v**power


def shape_of(v: Curvature) -> tuple[int, ...]:
    """The shape of the leaf that ``v`` describes."""
    if isinstance(v, Factored):
        return jnp.broadcast_shapes(v.row.shape, v.col.shape)
    return np.shape(v)


def _children(node: Any) -> dict[str, Any]:
    """The named parts of one container; empty for anything that is not one."""
    if hasattr(node, "_asdict"):
        return node._asdict()
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, list | tuple):
        return {str(i): value for i, value in enumerate(node)}
    return {}


def sources(opt_state: Any) -> Iterator[Source]:
    """Every part of a state, or of an ``nnx.Optimizer``, that knows second moments, in order."""
    return _sources(_plain(opt_state))


def _plain(opt_state: Any) -> Any:
    """The state without Flax's wrappers, and of an ``nnx.Optimizer`` what it holds."""
    return unboxed(getattr(opt_state, "opt_state", opt_state))


def _sources(node: Any) -> Iterator[Source]:
    if type(node).__name__ in OTHER_NU:
        return
    fields = _children(node)
    for kind, known_by in KNOWN_BY.items():
        if all(field in fields for field in known_by):
            scalars = {"count", "mu_weight", "nu_weight"} & fields.keys()
            # A masked leaf has no array here, nor in a checkpoint.
            tables = {
                field: dict(zip(*named_leaves(tree), strict=True))
                for field, tree in fields.items()
                if field not in scalars
            }
            yield Source(kind, tables, {field: fields[field] for field in scalars})
            return
    for child in fields.values():
        yield from _sources(child)


def _leaf_curvature(
    name: str,
    leaf: Any,
    found_in: list[Source],
    layout: Layout | None,
    b2: Scalar,
) -> Curvature | None:
    """The first estimate that any part of the state holds of this leaf."""
    for kind, tables, scalars in found_in:
        part = {field: table[name] for field, table in tables.items() if name in table}
        if kind == "adafactor":
            v = _adafactor(leaf, part.get("v_row"), part.get("v_col"), part.get("v"))
        else:
            weight = _ema_weight(scalars, b2)
            if "nu" in part:
                v = wide(part["nu"]) / weight
            elif "R" in part:
                R, C = wide(part["R"]), wide(part["C"])
                axes = paper_layout(leaf) if kind == "umtam" else layout
                v = _factored(name, leaf, R, C, weight, axes)
            else:
                continue
        if v is None:
            continue
        if shape_of(v) != leaf.shape:
            raise ValueError(
                f"leaf {name!r} has shape {leaf.shape} in params but {shape_of(v)} in opt_state:"
                " pass the parameters that this state was trained with."
            )
        return v
    return None


def _ema_weight(scalars: Mapping[str, Any], b2: Scalar) -> jax.Array:
    """Total weight of the moving average: recorded by moma, 1 - b2^count for the others."""
    if "nu_weight" in scalars:
        weight = jnp.asarray(scalars["nu_weight"])
    else:
        weight = 1 - b2 ** jnp.asarray(scalars["count"], jnp.result_type(float))
    return divisor(weight)


def _factored(
    name: str, leaf: Any, R: jax.Array, C: jax.Array, weight: jax.Array, layout: Layout | None
) -> Factored:
    for candidate in [layout] if layout else default_layouts(leaf):
        *batch, m, n = candidate.matrix_shape
        if R.shape == (*batch, m) and C.shape == (*batch, n):
            return estimate(R, C, weight, candidate)
    raise ValueError(
        f"leaf {name!r} of shape {leaf.shape} has R {R.shape} and C {C.shape} in opt_state, which"
        " do not fit: pass the weight_dimension_numbers that the optimizer was given, and the"
        " parameters that it was initialised with."
    )


def _adafactor(leaf: Any, v_row: Any, v_col: Any, v: Any) -> Curvature | None:
    """Optax's Adafactor keeps means over the largest axis (v_row) and the second largest (v_col).

    It needs no bias correction: its first decay is zero.
    """
    if v is not None and v.shape == leaf.shape:
        return wide(v)
    if v_row is None or v_col is None or v_row.ndim != leaf.ndim - 1:
        return None if v is None else wide(v)
    second, largest = (int(axis) for axis in np.argsort(leaf.shape)[-2:])
    row = jnp.expand_dims(wide(v_row), largest)
    col = jnp.expand_dims(wide(v_col), second)
    mean = jnp.mean(row, axis=second, keepdims=True)
    return Factored(row / divisor(mean), col)


def _describe(opt_state: Any) -> str:
    kinds = {type(node).__name__ for node in _nodes(_plain(opt_state))}
    return ", ".join(sorted(kinds)) or "nothing"


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in _children(node).values():
        yield from _nodes(child)
