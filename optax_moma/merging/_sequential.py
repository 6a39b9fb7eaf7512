"""Merges of experts that come one at a time, in memory that does not grow with their number.

In the formulas t counts the experts, d_t = expert_t - base, v_t is the curvature, D_t the merged
task vector after expert t: params = base + D_t. All is kept in float32, for float64 leaves in
float64.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from optax_moma.merging import _metric
from optax_moma.merging._contract import Contract, check_number
from optax_moma.merging._gram import product, resolved, ridge_inverse
from optax_moma.merging._inputs import checked_inputs, is_float
from optax_moma.merging._leaf import Curvature
from optax_moma.merging._matrices import check_axes, gathered, layout_of
from optax_moma.merging._moma import gradients
from optax_moma.merging._spectral import svd
from optax_moma.merging._steps import Number
from optax_moma.merging._trees import Tree, each_float, moved, wide

State = Any


class Update(Protocol):
    """The type of ``Sequential.update``."""

    def __call__(self, state: State, expert: Tree, curvature: Tree | None = None) -> State:
        """Returns the state after one more expert."""
        ...


class Sequential(NamedTuple):
    """A merge of experts that come one at a time: pure functions, as an Optax optimizer is.

    The state is a NamedTuple of trees like the base, without the leaves that are not floating
    point, and of scalars. It can be saved by Orbax and restored into
    ``jax.eval_shape(method.init, base)``; all three functions can be jitted.

    Attributes:
      init: Maps the base, the params that all experts are fine-tuned from, to the state before the
        first expert.
      update: Maps the state, the params of the next expert and its curvature, a tree as ``merge``
        takes it, to the next state. Raises what ``merge`` raises for faulty inputs.
      params: Maps the state to the merged params, in the base's dtypes.

    Example:
      >>> from optax_moma.merging import running_mean
      >>> method = running_mean(power=0)
      >>> state = method.init({"w": jnp.zeros(2)})
      >>> for expert in ({"w": jnp.array([1., 0.])}, {"w": jnp.array([3., 2.])}):
      ...     state = method.update(state, expert)
      >>> method.params(state)
      {'w': Array([2., 1.], dtype=float32)}
    """

    init: Callable[[Tree], State]
    update: Update
    params: Callable[[State], Tree]


class RunningMean(NamedTuple):
    """The state of ``running_mean``.

    Attributes:
      base: The base.
      delta: D_t, the mean of the task vectors.
      weight: W_t, the sum of their weights; a scalar per leaf if they have no curvature.
      seen: t.
    """

    base: Tree
    delta: Tree
    weight: Tree
    seen: jax.Array


def running_mean(
    mixing: Number | None = None, power: Number = 1.0, *, normalize: bool = False
) -> Sequential:
    """Averages experts as they come, weighed by their curvature.

    W_t = (1 - a) W_{t-1} + a v_t**power, D_t = D_{t-1} + a v_t**power / W_t (d_t - D_{t-1}), with
    W_1 = v_1**power and a = mixing. Without a mixing rate W_t = W_{t-1} + v_t**power: after any
    number of experts, D_t is the mean with weights v_t**power, whatever their order.

    Where all curvature so far is zero, the experts have equal weights instead. With a mixing rate
    expert s keeps a share a (1 - a)**(t - s) of the say, the first one (1 - a)**(t - 1).

    Args:
      mixing: The say of the newest expert, from 0 to 1 (the authors take 0.3 to 0.6); by default
        all have the same.
      power: Exponent of the curvature, at least 0; 0 needs no curvature.
      normalize: Whether each curvature is divided by its mean over the leaf first, so that no task
        dominates for its loss scale, batch size or learning rate. The authors do not.

    Returns:
      A ``Sequential`` merge. Its state has the size of two models, three with curvature.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> from optax_moma.merging import running_mean
      >>> method = running_mean()
      >>> state = method.init({"w": jnp.zeros(2)})
      >>> state = method.update(state, {"w": jnp.ones(2)}, {"w": jnp.array([1., 3.])})
      >>> state = method.update(state, {"w": jnp.zeros(2)}, {"w": jnp.array([1., 1.])})
      >>> method.params(state)
      {'w': Array([0.5 , 0.75], dtype=float32)}

    Source: Phan et al. 2025, "Toward a Holistic Approach to Continual Model Merging"
    (arXiv 2509.23592), with Adam's second moments as curvature.
    """
    if mixing is not None:
        check_number("mixing", mixing, 0, 1)
    check_number("power", power, 0)
    curved = _metric.is_needed(power)

    def init(base: Tree) -> RunningMean:
        weight = (
            _zeros(base) if curved else each_float(lambda b: jnp.zeros((), wide(b).dtype), base)
        )
        return RunningMean(_arrays(base), _zeros(base), weight, jnp.zeros((), jnp.int32))

    def update(state: RunningMean, expert: Tree, curvature: Tree | None = None) -> RunningMean:
        arrival = _arrival(state.base, expert, curvature, curved)
        return _mixed(state, arrival, mixing, power, bool(normalize))

    def params(state: RunningMean) -> Tree:
        return moved(state.base, state.delta)

    return Sequential(init, update, params)


@partial(jax.jit, static_argnames="normalize")
def _mixed(
    state: RunningMean, arrival: Tree, mixing: Number | None, power: Number, normalize: bool
) -> RunningMean:
    seen = state.seen + 1
    old, new, equal = 1.0, 1.0, 1 / seen
    if mixing is not None:
        first = state.seen == 0
        old, new = jnp.where(first, 0.0, 1 - mixing), jnp.where(first, 1.0, mixing)
        equal = new

    def one(
        _: jax.Array, delta: jax.Array, weight: jax.Array, new_one: _Arrival
    ) -> tuple[jax.Array, jax.Array]:
        say = jnp.ones_like(weight)
        if new_one.curvature is not None and normalize and delta.size:
            say = _metric.relative_power([new_one.curvature], power, delta.dtype)[0]
        elif new_one.curvature is not None:
            row, col = _metric.factors(new_one.curvature, delta.dtype)
            say = row**power * col**power
        total = old * weight + new * say
        share = jnp.where(total == 0, equal, new * say / _metric.nonzero(total))
        return delta + share * (new_one.delta - delta), total

    delta, weight = _parts(2, one, state.base, state.delta, state.weight, arrival)
    return RunningMean(state.base, delta, weight, seen)


class RunningMoma(NamedTuple):
    """The state of ``running_moma``.

    Attributes:
      base: The base.
      mean: The mean of the task vectors.
      metric: B_t of matrices (stack, n, n), or zero.
      pull: P_t of matrices (stack, m, n), or zero.
      heard: How many experts had a say, by matrix of a stack; a number for other leaves.
    """

    base: Tree
    mean: Tree
    metric: Tree
    pull: Tree
    heard: Tree


def running_moma(
    scale: Number = 1.0, *, power: Number = 0.5, ridge: Number = 0.1, axes: str = "mn"
) -> Sequential:
    """Merges experts as they come by ``moma``: after any number of them, it is that merge.

    With G_t = d_t v_t**power and m_t = mean_{s <= t} d_s, for each matrix:
    B_t = B_{t-1} + G_t^T G_t / |G_t|**2; P_t = P_{t-1} + d_t G_t^T G_t / |G_t|**2;
    D_t = scale * (m_t + (P_t - m_t B_t) (B_t + c I)^-1), c = ridge * tr(B_t) / n.

    Needs a curvature unless its power is 0. All experts have the same weight.

    Args:
      scale: The factor of the merged task vector.
      power: Exponent of the curvature, at least 0.
      ridge: How much the solution is drawn to the mean, at least 0; see ``moma``.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A ``Sequential`` merge. Its state has the size of three models, and of an n x n metric for
      each matrix (m, n).

    Raises:
      ValueError: if a number is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import running_moma
      >>> method, v = running_moma(), {"w": jnp.ones((2, 2))}
      >>> state = method.init({"w": jnp.zeros((2, 2))})
      >>> for rows in ([[2., 0.], [2., 0.]], [[0., 0.], [0., 4.]]):
      ...     state = method.update(state, {"w": jnp.array(rows)}, v)
      >>> method.params(state)["w"].round(1)
      Array([[1.9, 0. ],
             [1.9, 3.8]], dtype=float32)

    Source: this library; see ``moma``.
    """
    check_number("power", power, 0)
    check_number("ridge", ridge, 0)
    check_axes(axes)

    def init(base: Tree) -> RunningMoma:
        def sums(b: jax.Array) -> tuple[jax.Array, ...]:
            layout, shapes = layout_of(axes, jnp.shape(b)), ((), (), ())
            if layout is not None and jnp.size(b):
                *stack, m, n = layout.matrix_shape
                k = math.prod(stack)
                shapes = ((k, n, n), (k, m, n), (k,))
            return tuple(jnp.zeros(shape, wide(b).dtype) for shape in shapes)

        return RunningMoma(_arrays(base), _zeros(base), *_parts(3, sums, base))

    def update(state: RunningMoma, expert: Tree, curvature: Tree | None = None) -> RunningMoma:
        arrival = _arrival(state.base, expert, curvature, _metric.is_needed(power), axes)
        return _added(state, arrival, power, axes)

    def params(state: RunningMoma) -> Tree:
        return moved(state.base, _running_solution(state, scale, ridge, axes))

    return Sequential(init, update, params)


@partial(jax.jit, static_argnames="axes")
def _added(state: RunningMoma, arrival: Tree, power: Number, axes: str) -> RunningMoma:
    def one(
        _: jax.Array, mean: Any, metric: Any, pull: Any, heard: Any, new: _Arrival
    ) -> tuple[jax.Array, ...]:
        if heard.ndim == 0:
            return mean + (new.delta - mean) / (heard + 1), metric, pull, heard + 1
        root = jnp.ones_like(mean)
        if new.curvature is not None:
            root = _metric.relative_power([new.curvature], power, mean.dtype)[0]
        m, d, root = (_matrices(x, axes) for x in (mean, new.delta, root))
        G, moved = jax.lax.map(lambda pair: gradients(*pair), (d, root))
        B = product(G.mT, G)
        heard = heard + moved
        share = jnp.where(moved, 1 / _metric.nonzero(heard), 0)
        mean = _back(m + share[:, None, None] * (d - m), mean, axes)
        return mean, metric + B, pull + product(d, B), heard

    fields = (state.mean, state.metric, state.pull, state.heard)
    return RunningMoma(state.base, *_parts(4, one, state.base, *fields, arrival))


@partial(jax.jit, static_argnames="axes")
def _running_solution(state: RunningMoma, scale: Number, ridge: Number, axes: str) -> Tree:
    def one(_: jax.Array, mean: Any, metric: Any, pull: Any, heard: Any) -> jax.Array:
        if heard.ndim == 0:
            return scale * mean
        m = _matrices(mean, axes)
        apart, least = pull - product(m, metric), resolved(ridge, m.shape[-1], m.dtype)
        ways = jax.lax.map(lambda x: ridge_inverse(x[0], x[1], least), (metric, apart.mT))
        return scale * _back(m + ways.mT, mean, axes)

    return each_float(one, state.base, state.mean, state.metric, state.pull, state.heard)


def _matrices(x: jax.Array, axes: str) -> jax.Array:
    """Returns the matrices of a leaf, (stack, m, n)."""
    layout = layout_of(axes, x.shape)
    assert layout is not None
    return layout.to_matrix(gathered(x)).reshape(-1, *layout.matrix_shape[-2:])


def _back(matrices: jax.Array, like: jax.Array, axes: str) -> jax.Array:
    """Returns the leaf whose matrices these are."""
    layout = layout_of(axes, like.shape)
    assert layout is not None
    return layout.from_matrix(matrices.reshape(layout.matrix_shape), like)


class Opcm(NamedTuple):
    """The state of ``opcm``.

    Attributes:
      base: The base.
      total: S_t, the sum of the projected task vectors.
      scale: lambda_t.
      norm: n_t, the mean norm of the task vectors.
      seen: t.
    """

    base: Tree
    total: Tree
    scale: jax.Array
    norm: jax.Array
    seen: jax.Array


def opcm(alpha: Number = 0.5, *, axes: str = "mn") -> Sequential:
    """Adds to the merge what of each expert is orthogonal to it, and rescales the sum.

    With the merge so far D_{t-1} = U S V^T and P = U^T d_t V, entries of P are set to zero on the
    diagonal and in the leading q x q block, q the number of singular values whose running share of
    the sum is at most ``alpha``: S_t = S_{t-1} + U P V^T (which keeps what of d_t lies outside of U
    and V), D_t = S_t / lambda_t, lambda_t = |S_t| / n_t, where n_t is the mean of |d_1| ... |d_t|
    and norms are those of whole models.

    Needs no curvature. Leaves that are no matrices are added unprojected. Directions in which the
    merge has not changed, their singular values being zero to rounding, are not projected out;
    there the published code takes directions that the decomposition chose at random.

    Args:
      alpha: Share of the merge's spectrum that is protected as a block, from 0 to 1.
      axes: Which leaves are matrices, as in ``tsv_m``.

    Returns:
      A ``Sequential`` merge. Its state has the size of two models.

    Raises:
      ValueError: if ``alpha`` is out of range, or ``axes`` name no matrices.

    Example:
      >>> from optax_moma.merging import opcm
      >>> method = opcm()
      >>> state = method.init({"w": jnp.zeros((2, 2))})
      >>> for row in ([[1., 0.], [0., 0.]], [[1., 0.], [0., 1.]]):
      ...     state = method.update(state, {"w": jnp.array(row)})
      >>> [f"{x:.3f}" for x in method.params(state)["w"].ravel()]
      ['0.854', '0.000', '0.000', '0.854']

    Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining" (arXiv 2501.09522).
    """
    check_number("alpha", alpha, 0, 1)
    check_axes(axes)

    def init(base: Tree) -> Opcm:
        zeros = _zeros(base)
        one = jnp.ones((), jnp.result_type(jnp.float32, *jax.tree.leaves(zeros)))
        return Opcm(_arrays(base), zeros, one, 0 * one, jnp.zeros((), jnp.int32))

    def update(state: Opcm, expert: Tree, curvature: Tree | None = None) -> Opcm:
        arrival = _arrival(state.base, expert, curvature, curved=False)
        return _projected(state, arrival, alpha, axes)

    def params(state: Opcm) -> Tree:
        return moved(state.base, jax.tree.map(lambda total: total / state.scale, state.total))

    return Sequential(init, update, params)


@partial(jax.jit, static_argnames="axes")
def _projected(state: Opcm, arrival: Tree, alpha: Number, axes: str) -> Opcm:
    def one(_: jax.Array, total: jax.Array, new: _Arrival) -> tuple[jax.Array, jax.Array]:
        if layout_of(axes, total.shape) is None or not total.size:
            return total + new.delta, new.delta
        pairs = tuple(_matrices(x, axes) for x in (total, new.delta))
        rest = jax.lax.map(lambda pair: _orthogonal(pair[0], pair[1], alpha), pairs)
        return total + _back(rest, total, axes), new.delta

    total, delta = _parts(2, one, state.base, state.total, arrival)
    seen = state.seen + 1
    norm = state.norm + (optax.tree.norm(delta) - state.norm) / seen
    scale = _metric.nonzero(optax.tree.norm(total) / _metric.nonzero(norm))
    return Opcm(state.base, total, scale, norm, seen)


def _orthogonal(merge: jax.Array, delta: jax.Array, alpha: Number) -> jax.Array:
    """Returns what is left of ``delta`` after the projection, both (m, n)."""
    u, s, vt = svd(merge)
    p = product(product(u.T, delta), vt.T)
    block = jnp.cumsum(s) <= alpha * jnp.sum(s)
    dropped = (block[:, None] & block) | jnp.eye(s.size, dtype=bool)
    return delta - product(product(u, jnp.where(dropped, p, 0)), vt)


class PerturbAndMerge(NamedTuple):
    """The state of ``perturb_and_merge``.

    Attributes:
      base: The base.
      delta: D_t.
      curvature: H_t, the sum of the curvatures.
      pull: b_t, the sum of v_t d_t.
      seen: t.
    """

    base: Tree
    delta: Tree
    curvature: Tree
    pull: Tree
    seen: jax.Array


def perturb_and_merge() -> Sequential:
    """Moves towards each expert by the step that raises the losses of all tasks least.

    D_t = D_{t-1} + a_t x_t, x_t = d_t - D_{t-1}; a_t, one number for the whole model, minimises
    sum_{s <= t} |D_t - d_s|^2 in the metrics v_s. With H_t = sum_s v_s and b_t = sum_s v_s d_s,
    which stand for the curvatures of all tasks that the authors keep:
    a_t = <x_t, b_t - H_t D_{t-1}> / <x_t, H_t x_t>. It is not clipped.

    Needs a curvature, not normalised: a task counts as much as its curvature is large. All
    curvatures times one number change nothing. Where x_t meets no curvature, a_t = 1 / t. The
    training with perturbations that the paper adds before the merge is not part of it.

    Returns:
      A ``Sequential`` merge. Its state has the size of four models.

    Example:
      >>> from optax_moma.merging import perturb_and_merge
      >>> method = perturb_and_merge()
      >>> state = method.init({"w": jnp.zeros(2)})
      >>> state = method.update(state, {"w": jnp.array([1., 0.])}, {"w": jnp.array([3., 1.])})
      >>> state = method.update(state, {"w": jnp.array([0., 0.])}, {"w": jnp.array([1., 1.])})
      >>> method.params(state)
      {'w': Array([0.75, 0.  ], dtype=float32)}

    Source: Qiu et al. 2025, "Train with Perturbation, Infer after Merging" (arXiv 2505.22389).
    """

    def init(base: Tree) -> PerturbAndMerge:
        zeros = _zeros(base)
        return PerturbAndMerge(_arrays(base), zeros, zeros, zeros, jnp.zeros((), jnp.int32))

    def update(
        state: PerturbAndMerge, expert: Tree, curvature: Tree | None = None
    ) -> PerturbAndMerge:
        return _nearest(state, _arrival(state.base, expert, curvature, curved=True))

    def params(state: PerturbAndMerge) -> Tree:
        return moved(state.base, state.delta)

    return Sequential(init, update, params)


@jax.jit
def _nearest(state: PerturbAndMerge, arrival: Tree) -> PerturbAndMerge:
    def one(
        _: jax.Array, curvature: jax.Array, pull: jax.Array, new: _Arrival
    ) -> tuple[jax.Array, jax.Array]:
        assert new.curvature is not None
        row, col = _metric.factors(new.curvature, pull.dtype)
        return curvature + row * col, pull + row * col * new.delta

    curvature, pull = _parts(2, one, state.base, state.curvature, state.pull, arrival)
    step = each_float(lambda _, d, new: new.delta - d, state.base, state.delta, arrival)
    seen = state.seen + 1
    # The ratio does not change with the units of curvature and steps; small ones would underflow.
    h, x = (_largest(tree) for tree in (curvature, step))
    unit = jax.tree.map(lambda s: s / x, step)
    bend = optax.tree.vdot(unit, jax.tree.map(lambda c, u: c / h * u, curvature, unit))
    ahead = jax.tree.map(lambda b, c, d: (b - c * d) / h / x, pull, curvature, state.delta)
    slope = optax.tree.vdot(unit, ahead)
    a = jnp.where(bend == 0, 1 / seen, slope / _metric.nonzero(jnp.asarray(bend)))
    delta = jax.tree.map(lambda d, s: d + a.astype(d.dtype) * s, state.delta, step)
    return PerturbAndMerge(state.base, delta, curvature, pull, seen)


def _largest(tree: Tree) -> jax.Array:
    return _metric.nonzero(jnp.asarray(optax.tree.norm(tree, ord=jnp.inf)))


class _Arrival(NamedTuple):
    """One leaf of the expert that has come: its task vector and its curvature."""

    delta: jax.Array
    curvature: Curvature | None


def _arrival(
    base: Tree, expert: Tree, curvature: Tree | None, curved: bool, axes: str | None = None
) -> Tree:
    """Returns a tree like the base, with an ``_Arrival`` per leaf, after a look at the inputs."""
    contract = Contract(base=True, curvature=curved, axes=axes, combines=True)
    given = None if curvature is None else [curvature]
    inputs = checked_inputs(contract, [expert], base, given, None, None)
    leaves = []
    for path, b in zip(inputs.paths, jax.tree.leaves(base), strict=True):
        x = inputs.experts[0][path]
        v = inputs.curvature[0].get(path) if inputs.curvature else None
        leaves.append(_Arrival(wide(x) - wide(b), v) if is_float(b) else optax.MaskedNode())
    return inputs.treedef.unflatten(leaves)


def _arrays(base: Tree) -> Tree:
    return jax.tree.map(jnp.asarray, base)


def _zeros(base: Tree) -> Tree:
    return each_float(lambda b: jnp.zeros_like(wide(b)), base)


def _parts(count: int, f: Callable[..., Any], base: Tree, *trees: Tree) -> tuple[Tree, ...]:
    """As ``each_float``, for a function that returns several things."""
    found = each_float(f, base, *trees, other=lambda _: (optax.MaskedNode(),) * count)
    treedef = jax.tree.structure(base)
    rows = treedef.flatten_up_to(found)
    return tuple(treedef.unflatten([row[i] for row in rows]) for i in range(count))
