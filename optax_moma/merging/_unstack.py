"""Arithmetic on stacked experts, compiled as if the experts were separate arrays.

Steps are written on arrays (k, *shape), one expert after the other along the first axis. XLA fuses
elementwise arithmetic into one pass over memory, but a stack, or a slice of one, ends a fusion: on
a CPU an average of three experts then takes many times as long as it must. Here a function on
stacks is traced, and evaluated again with each stack as a list of its k slices, for as long as the
operations treat the slices alike. The operations on numbers are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

# Operations of one entry of every operand: all operands have one shape, or are scalars.
_ELEMENTWISE = frozenset(
    "abs add and atan2 bitcast_convert_type cbrt ceil clamp convert_element_type copy cos cosh div "
    "eq erf exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul "
    "ne neg not or pow rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
_REDUCTIONS = frozenset(
    "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum".split()
)


class _Slices(NamedTuple):
    """An array as the list of its slices along the first axis."""

    slices: tuple[Any, ...]


def unstacked(function: Callable[..., Any], k: int) -> Callable[..., Any]:
    """Returns a function of the same results that computes on slices of stacks where it can.

    Args:
      function: Maps trees of arrays to trees of arrays.
      k: The length of the stacks.
    """

    def evaluated(*arguments: Any) -> Any:
        flat, treedef = jax.tree.flatten(arguments)
        closed, shape = jax.make_jaxpr(
            lambda *flat: function(*treedef.unflatten(flat)), return_shape=True
        )(*flat)
        if "dot_general" in _names(closed.jaxpr):
            return function(*arguments)  # Matrices are multiplied a stack at a time.
        results = [_array(x) for x in _evaluate(closed.jaxpr, closed.consts, flat, k)]
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return evaluated


def _names(jaxpr: Any) -> Iterator[str]:
    """Gives the names of all operations, inner ones too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _names(inner)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")  # Versions of JAX have one or two types for it.


def _evaluate(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], k: int) -> list[Any]:
    values: dict[Any, Any] = {}

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for variables, given in ((jaxpr.constvars, consts), (jaxpr.invars, arguments)):
        values.update(zip(variables, given, strict=True))
    for equation in jaxpr.eqns:
        inputs = [value(atom) for atom in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, k)
        else:
            sliced = _sliced(equation, inputs, k)
            outputs = _bound(equation, map(_array, inputs)) if sliced is None else [sliced]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _bound(equation: Any, inputs: Any, **changed: Any) -> list[Any]:
    """Evaluates an operation as it is, but for some of its parameters."""
    primitive = equation.primitive
    params = primitive.get_bind_params({**equation.params, **changed})
    # Older versions of JAX give calls their functions as arguments.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with equation.ctx.manager:
        result = primitive.bind(*functions, *inputs, **params)
    return list(result) if primitive.multiple_results else [result]


def _sliced(equation: Any, inputs: list[Any], k: int) -> Any:
    """Returns the result of an operation that can be made on slices, or None."""
    name, params = equation.primitive.name, equation.params
    shape: tuple[int, ...] = getattr(equation.outvars[0].aval, "shape", ())
    one = lambda t, **changed: _bound(equation, [_slice(x, t) for x in inputs], **changed)[0]  # noqa: E731
    each = lambda **changed: _Slices(tuple(one(t, **changed) for t in range(k)))  # noqa: E731

    # What makes a stack: arrays side by side, or a number for each expert.
    if name == "stack" and params["axis"] == 0 and shape[:1] == (k,):
        return _Slices(tuple(map(_array, inputs)))
    if name == "concatenate" and params["dimension"] == 0 and shape[:1] == (len(inputs),) == (k,):
        return _Slices(tuple(_slice(x, 0) for x in inputs))
    if name == "broadcast_in_dim" and len(shape) > 1 and shape[0] == k:
        (x,), axes = inputs, params["broadcast_dimensions"]
        changed = {"shape": shape[1:], "broadcast_dimensions": tuple(a - 1 for a in axes if a)}
        changed["sharding"] = _of_slices(params["sharding"])
        if 0 in axes and equation.invars[0].aval.shape[0] == k:
            return each(**changed)
        x = _slice(_array(x), 0) if 0 in axes else _array(x)
        return _Slices(tuple(_bound(equation, [x], **changed)) * k)

    if name == "squeeze" and params["dimensions"] == (0,) and isinstance(inputs[0], _Slices):
        return inputs[0].slices[0]
    if k not in (len(x.slices) for x in inputs if isinstance(x, _Slices)):
        return None
    if name in _ELEMENTWISE:
        return each()
    if name in _REDUCTIONS and 0 not in params["axes"]:
        axes = tuple(axis - 1 for axis in params["axes"])
        return jnp.stack([one(t, axes=axes) for t in range(k)])
    if name == "reshape" and shape[:1] == (k,) and params["dimensions"] is None:
        return each(new_sizes=shape[1:], sharding=_of_slices(params["sharding"]))
    if name == "slice" and shape == (1, *equation.invars[0].aval.shape[1:]):
        return _Slices((inputs[0].slices[params["start_indices"][0]],))
    return None


def _of_slices(sharding: NamedSharding | None) -> NamedSharding | None:
    """Returns how slices along the first axis are sharded."""
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _slice(x: Any, t: int) -> Any:
    """Returns one slice of an operand; a scalar and a slice of length one belong to all."""
    if isinstance(x, _Slices):
        return x.slices[t if len(x.slices) > 1 else 0]
    if jnp.ndim(x) == 0:
        return x
    return jax.lax.index_in_dim(x, t if x.shape[0] > 1 else 0, keepdims=False)


def _array(x: Any) -> Any:
    return jnp.stack(x.slices) if isinstance(x, _Slices) else x
