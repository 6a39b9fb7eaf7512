"""The Grams of what every kernel reads, from any apply function: the curvature that RegMean needs.

The function is traced to a jaxpr, and an interpreter evaluates that. It knows which variables hold
a parameter, as it is or with its axes moved; where one of them meets activations in a matrix
product or a convolution, it adds up the Gram of the activations.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal  # pyright: ignore[reportPrivateImportUsage]

from optax_moma._tree import named_leaves

Tree = Any


class Kernel(NamedTuple):
    """What is known of a variable that holds a leaf with its axes moved, and nothing else done.

    Attributes:
      leaf: The leaf's place among the leaves of the params.
      shape: The leaf's shape.
      view: An array of bytes in the shape of the variable that is never read. It is a view of one
        that is laid out as the leaf is, so its strides tell where an axis comes from.
    """

    leaf: int
    shape: tuple[int, ...]
    view: np.ndarray


class GramSum(NamedTuple):
    """What is added up for a leaf: sum of z z^T over rows z, (*stack, m, m), and their number."""

    gram: jax.Array
    rows: jax.Array


class Context(NamedTuple):
    """What does not change on the way: the leaves' names, and the weights of the rows."""

    names: Sequence[str]
    mask: jax.Array | None


Found = dict[int, GramSum]
Evaluated = tuple[list[Any], Sequence[Kernel | None], Found]


def input_grams(
    apply: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], jax.Array] | None = None,
) -> Tree:
    """Collects the Gram of the inputs of every kernel: the ``curvature`` for ``regmean``.

    G = sum_r w_r z_r z_r^T / sum_r w_r over all rows z_r, of size fan-in, that the kernel is
    multiplied with in ``apply(params, batch)``: over batches, examples, positions, and over all
    places that use the kernel.

    Works for any function that JAX can trace. A kernel is a leaf that is contracted with
    activations in a matrix product or a convolution (its patches are the rows) over its leading
    axes: (fan-in, fan-out), (width, heads, size), (heads, size, width), (height, width, in, out),
    or stacks of such matrices, by a ``scan`` over layers or a batched product. It may be cast,
    transposed and reshaped on the way there, inside ``jit``, ``checkpoint``, ``scan``, and
    functions with custom derivatives. Leaves that are used in other ways have no Gram: embeddings
    that are looked up, biases, kernels contracted over their trailing axes, computed from other
    leaves, or used inside ``while_loop`` or ``cond``.

    Args:
      apply: The model: a function of params and a batch. What it returns does not matter. It is
        compiled once, as by ``jax.jit``: what it takes from outside is fixed by then.
      params: The params of one expert.
      batches: Batches of its data, whatever ``apply`` takes; they need not be of one size. Each
        new shape compiles once.
      mask: A function of a batch that returns a weight for each row, 0 for padding, in the shape
        of the leading axes of the activations, such as (batch, length). Where activations have
        lost axes of the mask, as after pooling, an example has the greatest of its weights. All
        rows count the same by default.

    Returns:
      A tree like ``params``: at each kernel G in float32, of shape (fan-in, fan-in) or, for a
      stack of matrices, (*stack, fan-in, fan-in), with fan-in the product of the axes that are
      contracted; None at all other leaves.

    Raises:
      TypeError: if ``batches`` is one batch.
      ValueError: if there is no batch, no kernel is found, a mask does not fit the activations or
        leaves no row, or a leaf is a stack of matrices in one place and one matrix in another.

    Example:
      >>> from optax_moma.merging import input_grams, merge, regmean
      >>> apply = lambda params, x: jax.nn.relu(x @ params["kernel"]) + params["bias"]
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> grams = input_grams(apply, params, [jnp.array([[1., 0.], [1., 2.]])])
      >>> grams["kernel"].tolist(), grams["bias"]
      ([[1.0, 1.0], [1.0, 2.0]], None)
      >>> merge(regmean(), [params, params], curvature=[grams, grams])["kernel"].shape
      (2, 3)

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models"
    (arXiv 2212.09849), section 3; the idea of an interpreter of jaxprs is that of JAX's own
    transformations.
    """
    names, leaves = named_leaves(params)
    treedef = jax.tree.structure(params)
    collect = _collect(apply, mask, treedef, tuple(names))
    found = None
    for batch in checked_batches(batches):
        new = collect(leaves, batch)
        found = new if found is None else _sum(found, new, names)
    if found is None:
        raise ValueError("batches: there is none; pass at least one. Was a generator used up?")
    if not found:
        raise ValueError(
            "apply: it contracts none of the params' leaves with activations over their leading "
            f"axes. The leaves are {', '.join(names)}: does the function use the params that it "
            "is given, and are kernels (fan-in, fan-out)?"
        )
    empty = [names[i] for i, gram in found.items() if not np.all(gram.rows)]
    if empty:
        raise ValueError(f"mask: it leaves no row for {', '.join(empty)}; are all batches padding?")
    means = {i: g.gram / jnp.expand_dims(g.rows, (-2, -1)) for i, g in found.items()}
    return treedef.unflatten([means.get(i) for i in range(len(leaves))])


def checked_batches(batches: Any) -> Iterable[Any]:
    """Returns batches that can be iterated over.

    Raises:
      TypeError: if it is a single batch: an array, a dict, or no iterable at all.
    """
    if isinstance(batches, (Mapping, str, np.ndarray, jax.Array)) or not hasattr(
        batches, "__iter__"
    ):
        raise TypeError(
            f"batches must be a list or another iterable of batches, got {type(batches).__name__}."
            " Is it a single batch? Then put it into a list."
        )
    return batches


# Bounded, so that functions and what they hold do not stay in memory for good.
@lru_cache(maxsize=16)
def _collect(
    apply: Callable[[Tree, Any], Any], mask: Any, treedef: Any, names: tuple[str, ...]
) -> Callable[[list[Any], Any], Found]:
    """Returns the compiled function of leaves and a batch that finds what the batch adds."""

    def on_leaves(leaves: list[jax.Array], batch: Any) -> Any:
        return apply(treedef.unflatten(leaves), batch)

    @jax.jit
    def collect(leaves: list[jax.Array], batch: Any) -> Found:
        closed = jax.make_jaxpr(on_leaves)(leaves, batch)
        data = jax.tree.leaves(batch)
        known = [_kernel(i, jnp.shape(x)) for i, x in enumerate(leaves)] + [None] * len(data)
        weights = None if mask is None else jnp.asarray(mask(batch), jnp.float32)
        return _evaluate(closed, [*leaves, *data], known, Context(names, weights))[2]

    return collect


def _evaluate(
    closed: ClosedJaxpr, args: Sequence[Any], kernels: Sequence[Kernel | None], context: Context
) -> Evaluated:
    """Evaluates a jaxpr and returns its outputs, which of them are kernels, and the Grams found."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    held = dict(zip(jaxpr.invars, kernels, strict=True))
    found: Found = {}

    def value(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else values[v]

    def kernel(v: Any) -> Kernel | None:
        return None if isinstance(v, Literal) else held.get(v)

    for eqn in jaxpr.eqns:
        known = [kernel(v) for v in eqn.invars]
        outputs, moved, new = _step(eqn, [value(v) for v in eqn.invars], known, context)
        found = _sum(found, new, context.names)
        values.update(zip(eqn.outvars, outputs, strict=True))
        held.update(zip(eqn.outvars, moved, strict=True))
    return [value(v) for v in jaxpr.outvars], [kernel(v) for v in jaxpr.outvars], found


# Primitives that do nothing but call the jaxpr in their parameters.
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip


def _step(eqn: Any, inputs: list[Any], known: list[Kernel | None], context: Context) -> Evaluated:
    """Evaluates one equation."""
    name, first = eqn.primitive.name, known[0] if known else None
    nothing = [None] * len(eqn.outvars)
    if any(known) and name == "scan":
        return _scan(eqn, inputs, known, context)
    if any(known) and name in _CALLS:
        inner = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
        return _evaluate(_closed(inner), inputs, known, context)
    params = eqn.primitive.get_bind_params(eqn.params)
    # Older versions of JAX give calls their functions as arguments.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
    if name == "dot_general" and sum(k is not None for k in known) == 1:
        return outputs, nothing, _gram(*_dot_rows(params, inputs, known), context)
    if name == "conv_general_dilated" and first is None and known[1] is not None:
        groups = params["feature_group_count"] * params["batch_group_count"]
        rows = _patches(params, inputs[0], known[1]) if groups == 1 else None
        return outputs, nothing, {} if rows is None else _gram(*rows, context)
    if first is None:
        return outputs, nothing, {}
    return outputs, [_moved(eqn, first), *nothing[1:]], {}


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def _kernel(index: int, shape: tuple[int, ...]) -> Kernel:
    # The system gives memory to pages that are touched, and these never are.
    return Kernel(index, tuple(shape), np.empty(shape, np.int8))


def _moved(eqn: Any, kernel: Kernel) -> Kernel | None:
    """Returns the kernel after an operation that moves its axes, or None after any other."""
    view = kernel.view
    match eqn.primitive.name:
        case "convert_element_type" | "reduce_precision" | "copy" | "sharding_constraint":
            return kernel
        case "transpose":
            view = view.transpose(eqn.params["permutation"])
        case "reshape" | "squeeze" | "expand_dims" | "broadcast_in_dim":
            if math.prod(eqn.outvars[0].aval.shape) != view.size:
                return None
            view = view.reshape(eqn.outvars[0].aval.shape)
        case _:
            return None
    return kernel._replace(view=view) if np.may_share_memory(view, kernel.view) else None


Rows = tuple[Kernel, Any, Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


def _dot_rows(params: Any, inputs: list[Any], known: list[Kernel | None]) -> Rows:
    """Returns kernel and activations of a product, their stacked and their contracted axes."""
    contracted, stacked = params["dimension_numbers"]
    side = 0 if known[1] is None else 1
    kernel, z, other = known[side], inputs[1 - side], 1 - side
    assert kernel is not None
    return kernel, z, stacked[side], stacked[other], contracted[side], contracted[other]


def _patches(params: Any, x: jax.Array, kernel: Kernel) -> Rows:
    """Returns what ``_dot_rows`` does, of a convolution: its activations are the patches."""
    axes = params["dimension_numbers"]
    _, fan_in, *window = axes.rhs_spec
    window_shape = [kernel.view.shape[a] for a in window]
    x = jnp.transpose(x, axes.lhs_spec)
    # (batch, channels * window, *positions), channels first.
    z = jax.lax.conv_general_dilated_patches(
        x,
        window_shape,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    z = jnp.moveaxis(z, 1, -1)
    z = z.reshape(*z.shape[:-1], x.shape[1], *window_shape)
    last = range(z.ndim - 1 - len(window), z.ndim)
    return kernel, z, (), (), (fan_in, *window), last


def _gram(
    kernel: Kernel,
    z: jax.Array,
    stacked: Sequence[int],
    stacked_z: Sequence[int],
    contracted: Sequence[int],
    contracted_z: Sequence[int],
    context: Context,
) -> Found:
    """Returns the Gram of activations, its axes in the order in which they lie in the leaf."""
    strides, sizes = kernel.view.strides, kernel.view.shape

    def outermost_first(axes: Sequence[int]) -> list[int]:
        return sorted(range(len(axes)), key=lambda i: -strides[axes[i]])

    stack, rows = outermost_first(stacked), outermost_first(contracted)
    leading = [stacked[i] for i in stack] + [contracted[i] for i in rows]
    rest = sorted(set(range(len(sizes))) - set(leading), key=lambda a: -strides[a])
    if not contracted or not kernel.view.transpose([*leading, *rest]).flags.c_contiguous:
        return {}  # Not contracted, or not over its leading axes.
    count, fan_in = (math.prod(sizes[a] for a in axes) for axes in (stacked, contracted))
    products = [math.prod(kernel.shape[:i]) for i in range(len(kernel.shape))]
    if count not in products or count * fan_in not in products:
        return {}  # A reshape cuts one of the leaf's axes in two.
    free = [a for a in range(z.ndim) if a not in (*stacked_z, *contracted_z)]
    shape = tuple(z.shape[a] for a in free)
    z = jnp.transpose(z, [stacked_z[i] for i in stack] + free + [contracted_z[i] for i in rows])
    z = z.astype(jnp.float32).reshape(count, *shape, fan_in)
    weight = jnp.broadcast_to(_row_weights(context, shape, kernel), shape)
    gram = jnp.einsum("s...i,s...j->sij", weight[..., None] * z, z, precision="highest")
    gram = gram.reshape(*kernel.shape[: products.index(count)], fan_in, fan_in)
    return {kernel.leaf: GramSum(gram, jnp.sum(weight))}


def _row_weights(context: Context, shape: tuple[int, ...], kernel: Kernel) -> jax.Array:
    """Returns the weights of rows of this shape, which broadcast against them."""
    mask = context.mask
    if mask is None:
        return jnp.ones(())
    if shape[: mask.ndim] == mask.shape:
        weight = mask
    elif shape[:1] == (mask.size,):
        weight = mask.ravel()
    elif shape[:1] == mask.shape[:1]:
        weight = jnp.max(mask, axis=range(1, mask.ndim))
    else:
        raise ValueError(
            f"mask: its shape is {mask.shape}, but {context.names[kernel.leaf]} is multiplied with "
            f"activations whose leading axes are {shape}; return (batch,) or (batch, length)."
        )
    return jnp.expand_dims(weight, range(weight.ndim, len(shape)))


def _scan(eqn: Any, inputs: list[Any], known: list[Kernel | None], context: Context) -> Evaluated:
    """Evaluates a scan: Grams of leaves it loops over are stacked, those of others added up."""
    inner = _closed(eqn.params["jaxpr"])
    # Versions of JAX tell in different ways what is looped over; all take an axis off it.
    last = len(inputs) - _looped(eqn.invars, inner.jaxpr.invars)
    first = last - (len(eqn.outvars) - _looped(eqn.outvars, inner.jaxpr.outvars))
    consts, init, xs = inputs[:first], inputs[first:last], inputs[last:]
    layers = [
        _kernel(k.leaf, k.shape[1:])
        if k is not None and k.view.shape == k.shape and k.view.flags.c_contiguous
        else None
        for k in known[last:]
    ]
    stacked = {k.leaf for k in layers if k is not None}
    held = [*known[:first], *[None] * len(init), *layers]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any], Found, Found]:
        outputs, _, found = _evaluate(inner, [*consts, *carry, *x], held, context)
        shared = {i: gram for i, gram in found.items() if i not in stacked}
        own = {i: gram for i, gram in found.items() if i in stacked}
        return outputs[: len(init)], outputs[len(init) :], shared, own

    def step(state: tuple[list[Any], Found], x: list[Any]) -> tuple[Any, Any]:
        carry, outputs, shared, own = body(state[0], x)
        return (carry, jax.tree.map(jnp.add, state[1], shared)), (outputs, own)

    x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(body, init, x)[2])
    (carry, shared), (outputs, own) = jax.lax.scan(
        step, (init, zeros), xs, eqn.params["length"], eqn.params["reverse"]
    )
    return [*carry, *outputs], [None] * len(eqn.outvars), {**shared, **own}


def _looped(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(o.aval.ndim > i.aval.ndim for o, i in zip(outer, inner, strict=True))


def _sum(one: Found, two: Found, names: Sequence[str]) -> Found:
    both = one.keys() & two.keys()
    if mixed := [names[i] for i in both if one[i].gram.shape != two[i].gram.shape]:
        raise ValueError(
            f"apply: {', '.join(mixed)} is contracted with activations as a stack of matrices in "
            "one place and as a single matrix in another; leave it out of the params."
        )
    return {**one, **two, **{i: jax.tree.map(jnp.add, one[i], two[i]) for i in both}}
