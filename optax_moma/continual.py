r"""Continual merging: one task after the other is trained in tangent space, merged, and corrected.

A stream of two tasks, each trained from the merge so far by ``moma``, merged by the curvature that
its state holds. What is kept between tasks does not grow with their number, and Orbax saves it:

>>> import tempfile
>>> import jax, jax.numpy as jnp, optax
>>> from orbax.checkpoint import v1 as ocp
>>> import optax_moma as om
>>> from optax_moma import continual
>>> def apply(params, x):
...     return jnp.tanh(x @ params["up"]) @ params["down"]
>>> keys = jax.random.split(jax.random.key(0), 4)
>>> base = {"up": jax.random.normal(keys[0], (8, 16)), "down": jnp.ones((16, 2)) / 16}
>>> tasks = []
>>> for n, key in enumerate(keys[2:]):  # each task reads its own half of the inputs
...     x = jax.random.normal(key, (64, 8)) * jnp.repeat(jnp.arange(2) == n, 4)
...     tasks.append((x, x @ jax.random.normal(keys[1], (8, 2))))
>>> model = continual.linearize(apply, base)
>>> def loss(params, task):
...     return jnp.mean((model(params, task[0]) - task[1]) ** 2)
>>> tx = om.moma(0.03, rank=2, min_dim_size_to_factor=2)
>>> @jax.jit
... def step(params, opt_state, task):
...     updates, opt_state = tx.update(jax.grad(loss)(params, task), opt_state, params)
...     return optax.apply_updates(params, updates), opt_state
>>> def train(params, task):
...     opt_state = tx.init(params)
...     for _ in range(100):
...         params, opt_state = step(params, opt_state, task)
...     return params, om.curvature_from(opt_state, params)
>>> method = om.merging.running_mean()
>>> with tempfile.TemporaryDirectory() as folder:
...     for n, stage in enumerate(continual.stages(method, base, tasks, train)):
...         ocp.save(f"{folder}/{n}", stage.state)
...     state = ocp.load(f"{folder}/1", method.init(base))
>>> merged = method.params(state)
>>> [bool(loss(merged, task) < 0.5 * loss(base, task)) for task in tasks]
[True, True]

Other ways to go through a stream: ``merging.opcm``, ``merging.perturb_and_merge``, the running
average ``running_mean(power=0)``; sequential fine-tuning, which forgets, is
``running_mean(1.0, power=0)``, and with :func:`ewc` in the loss it is elastic weight consolidation.

Source: Phan et al. 2025, "Toward a Holistic Approach to Continual Model Merging"
(arXiv 2509.23592).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import Partial

from ._checks import check_finite, check_not_negative, check_positive
from ._tree import at_least_float32, fitting_leaves, named_leaves
from .merging import _metric
from .merging._contract import Contract
from .merging._input_grams import checked_batches
from .merging._inputs import MergeError, checked_inputs, is_float
from .merging._sequential import Sequential, State
from .merging._trees import wide

Tree = Any
Distance = Literal["l1", "l2"]


def linearize(
    apply: Callable[..., Any], base: Tree, *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Replaces a model by its first-order Taylor expansion in the params, around the base.

    :math:`f(w, x) = apply(w_0, x) + J(x) (w - w_0)`, J the Jacobian of ``apply`` at the base w0: a
    model like ``apply``, to be trained from the base by any Optax optimizer, and linear in its
    params. So the outputs of a merge with shares that sum to one are the same mix of outputs.

    A training step takes 5/3 of the matrix products of ordinary fine-tuning (its forward pass 3
    instead of 1, one of them for the base; backward 2 in both) and, besides, the base's memory.

    Args:
      apply: A function of params, and of whatever else, that returns an array or a tree of arrays.
        It is differentiated in forward mode, which ``jax.custom_vjp`` does not allow. Dropout and
        the like should be off.
      base: The params w0.
      has_aux: Whether ``apply`` returns a pair (output, aux). Aux, updated batch statistics for
        example, is that of the base, not expanded.

    Returns:
      A function of params and the other arguments of ``apply``. Leaves that are not floating point
      are used as they are in the params it gets; outputs that are not are those of the base. It is
      a pytree of the base's leaves: as an argument of a jitted function it is not compiled into the
      program, which pays for large models. Differences are taken in float32 at least, then cast to
      the base's dtype: params in float32 lose nothing to a base in bfloat16. It raises a ValueError
      for params of another structure or other shapes than the base.

    Raises:
      ValueError: The base is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.continual import linearize
      >>> f = linearize(lambda params, x: x * params["w"] ** 2, {"w": jnp.array(3.0)})
      >>> float(f({"w": jnp.array(3.5)}, 1.0))  # 9 + 6 * 0.5
      12.0

    Source: arXiv 2509.23592; Ortiz-Jimenez et al. 2023, "Task Arithmetic in the Tangent Space"
    (arXiv 2305.12827).
    """
    check_finite("base", _learnable(base))
    # Nested, so that two expansions of one function are one to the cache of compiled programs.
    return Partial(_expanded_with_aux if has_aux else _expanded, Partial(apply), base)


def _expanded(apply: Any, base: Tree, params: Tree, *args: Any, **kwargs: Any) -> Any:
    without = lambda *a, **k: (apply(*a, **k), None)  # noqa: E731
    return _expanded_with_aux(without, base, params, *args, **kwargs)[0]


def _expanded_with_aux(apply: Any, base: Tree, params: Tree, *args: Any, **kwargs: Any) -> Any:
    treedef, fixed = jax.tree.structure(base), jax.tree.leaves(base)
    leaves = fitting_leaves("base", base, "params", params)
    moves = [i for i, w0 in enumerate(fixed) if _is_inexact(w0)]
    at = [jnp.asarray(fixed[i]) for i in moves]
    along = [_difference(leaves[i], w0) for i, w0 in zip(moves, at, strict=True)]

    def of_the_moved(moved: list[jax.Array]) -> Any:
        known = dict(zip(moves, moved, strict=True))
        tree = treedef.unflatten([known.get(i, leaf) for i, leaf in enumerate(leaves)])
        return apply(tree, *args, **kwargs)

    output, change, aux = jax.jvp(of_the_moved, (at,), (along,), has_aux=True)
    no_change = lambda dy: dy.dtype == jax.dtypes.float0  # noqa: E731
    return jax.tree.map(lambda y, dy: y if no_change(dy) else y + dy, output, change), aux


def _difference(w: Any, w0: jax.Array) -> jax.Array:
    w = jnp.asarray(w)
    dtype = at_least_float32(jnp.promote_types(w.dtype, w0.dtype))
    return (w.astype(dtype) - w0.astype(dtype)).astype(w0.dtype)


class Corrected(NamedTuple):
    """What ``correct`` returns.

    Attributes:
      params: The corrected params, a tree like the merged ones.
      distances: The distance before each step, float32 of shape (steps,).
    """

    params: Tree
    distances: np.ndarray


def correct(
    features: Callable[[Tree, Any], jax.Array],
    params: Tree,
    target: Tree,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
    *,
    distance: Distance = "l1",
    trainable: Callable[[str], bool] | None = None,
) -> Corrected:
    r"""Moves a merged model's features towards another model's, by gradient descent.

    :math:`\min_w \sum_{batches} \mathrm{mean} |features(w, x) - features(w_{target}, x)|`, or the
    mean of the squares, one step per batch, starting from the merge. Needs inputs of the newest
    task only, and no labels.

    The authors take the merge before the newest task as the target; the model fine-tuned on the
    newest task is the other choice. They train the last projection alone, for one pass, with
    ``optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-7))``.

    Args:
      features: A function of params and a batch that returns an array.
      params: The merged params.
      target: The params whose features are the goal.
      batches: One batch of inputs per step. Each new shape compiles once.
      optimizer: An Optax transformation. It gets a tree with None for leaves that are not trained.
      distance: "l1", the mean of absolute differences, or "l2", of squared ones.
      trainable: A function from a leaf's path, such as ``head/kernel``, to whether it is trained;
        all that are floating point by default.

    Returns:
      The corrected params, and the distance at each step.

    Raises:
      TypeError: ``batches`` is one batch.
      ValueError: There is no batch, no leaf to train, the trees differ, anything is not finite, or
        ``features`` returns no array.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_moma.continual import correct
      >>> features = lambda params, x: x @ params["w"]
      >>> merged, previous = {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}
      >>> done = correct(features, merged, previous, [jnp.eye(2)] * 3, optax.sgd(0.5))
      >>> done.params["w"].tolist(), done.distances.tolist()
      ([[0.75], [0.75]], [1.0, 0.75, 0.5])

    Source: arXiv 2509.23592.
    """
    if distance not in ("l1", "l2"):
        raise ValueError(f"distance must be 'l1' or 'l2', got {distance!r}.")
    for argument, tree in (("params", params), ("target", target)):
        check_finite(argument, _learnable(tree))
    fitting_leaves("params", params, "target", target)
    learned = _learnable(params, trainable)
    if not jax.tree.leaves(learned):
        raise ValueError(
            "trainable: it chooses no leaf that is floating point; the leaves are "
            f"{', '.join(named_leaves(params)[0])}."
        )
    # An expansion by linearize is a Partial already: its base is no constant of the program.
    call = features if isinstance(features, Partial) else Partial(features)
    step, opt_state, distances = _correction(optimizer, distance), optimizer.init(learned), []
    for batch in checked_batches(batches):
        if not distances:
            _check_features(jax.eval_shape(call, params, batch))
        learned, opt_state, value = step(call, learned, opt_state, params, target, batch)
        distances.append(value)
    if not distances:
        raise ValueError("batches: there is none; each batch is one step of the optimizer.")
    history = np.asarray(jnp.stack(distances), np.float32)
    if not np.all(np.isfinite(history)):
        n = int(np.argmin(np.isfinite(history)))
        raise ValueError(
            f"features: the distance is {history[n]} at step {n}; look at the batch there, or lower"
            " the learning rate."
        )
    corrected = _merged_leaves(params, learned)
    check_finite("the corrected params", _learnable(corrected))
    return Corrected(corrected, history)


# Bounded, so that optimizers and what they hold do not stay in memory for good.
@lru_cache(maxsize=16)
def _correction(
    optimizer: optax.GradientTransformation, distance: Distance
) -> Callable[..., tuple[Tree, Any, jax.Array]]:
    """Returns the compiled function that takes one step of the correction."""

    def apart(features: Any, learned: Tree, params: Tree, target: Tree, batch: Any) -> jax.Array:
        gap = features(_merged_leaves(params, learned), batch) - features(target, batch)
        gap = gap.astype(at_least_float32(gap.dtype))
        return jnp.mean(jnp.abs(gap) if distance == "l1" else jnp.square(gap))

    @jax.jit
    def step(
        features: Any, learned: Tree, opt_state: Any, params: Tree, target: Tree, batch: Any
    ) -> tuple[Tree, Any, jax.Array]:
        loss = partial(apart, features)
        value, grads = jax.value_and_grad(loss)(learned, params, target, batch)
        updates, opt_state = optimizer.update(grads, opt_state, learned)
        return optax.apply_updates(learned, updates), opt_state, value

    return step


def _check_features(found: Any) -> None:
    if not hasattr(found, "shape") or not jnp.issubdtype(found.dtype, jnp.floating):
        what = f"an array of {found.dtype}" if hasattr(found, "shape") else type(found).__name__
        raise ValueError(
            f"features: it must return one floating-point array, it returns {what}; concatenate"
            " the features of several layers."
        )


def correct_linear(
    kernel: jax.Array, hidden: jax.Array, target: jax.Array, strength: float | jax.Array
) -> jax.Array:
    r"""Corrects the last linear layer of a merged model in closed form: ridge around the merge.

    :math:`\arg\min_P |H P - Z|^2 + \lambda |P - P_0|^2
    = P_0 + (H^T H + \lambda I)^{-1} H^T (Z - H P_0)`, sums over all examples, so that
    :math:`\lambda` counts examples: against n of them whose inputs have variance 1,
    :math:`\lambda = n` goes half the way. Computed in float32 (float64 for float64 inputs).

    Args:
      kernel: P0, the merged layer's kernel, (fan-in, fan-out). A bias is one more row of it; give
        ``hidden`` a column of ones then.
      hidden: H, what the merged model gives the layer to read, (..., fan-in).
      target: Z, the target model's outputs of the layer for the same examples, (..., fan-out).
      strength: :math:`\lambda`, above 0: the greater, the nearer to P0.

    Returns:
      P, in the shape and dtype of ``kernel``.

    Raises:
      ValueError: Shapes do not fit, there is no example, an input is not finite, or the strength is
        not positive, or lost to rounding beside H^T H.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.continual import correct_linear
      >>> hidden, target = jnp.eye(2), jnp.array([[2.0], [4.0]])
      >>> correct_linear(jnp.zeros((2, 1)), hidden, target, 1.0).tolist()
      [[1.0], [2.0]]

    Source: the closed-form counterpart of :func:`correct`, ours; Hoerl and Kennard, "Ridge
    Regression", 1970.
    """
    check_positive("strength", strength)
    kernel, hidden, target = (jnp.asarray(x) for x in (kernel, hidden, target))
    shapes = f"kernel {kernel.shape}, hidden {hidden.shape} and target {target.shape}"
    if kernel.ndim != 2 or hidden.ndim < 1 or hidden.shape[:-1] != target.shape[:-1]:
        raise ValueError(
            "correct_linear takes a kernel (fan-in, fan-out), and hidden (..., fan-in) and target"
            f" (..., fan-out) of the same examples, got {shapes}."
        )
    if (hidden.shape[-1:], target.shape[-1:]) != (kernel.shape[:1], kernel.shape[1:]):
        raise ValueError(f"The layer cannot read hidden or give target: {shapes}.")
    if not hidden.size:
        raise ValueError(f"hidden: there is no example, its shape is {hidden.shape}.")
    check_finite("correct_linear", {"kernel": kernel, "hidden": hidden, "target": target})
    corrected = _ridge(kernel, hidden, target, strength)
    if not isinstance(corrected, Tracer) and not jnp.all(jnp.isfinite(corrected)):
        raise ValueError(
            f"strength: {strength} is not positive, or too little to make H^T H + strength I"
            f" invertible in {jnp.promote_types(kernel.dtype, jnp.float32)}; take more."
        )
    return corrected


@jax.jit
def _ridge(kernel: jax.Array, hidden: jax.Array, target: jax.Array, c: Any) -> jax.Array:
    dtype = at_least_float32(jnp.result_type(kernel, hidden, target))
    P = kernel.astype(dtype)
    H, Z = (x.astype(dtype).reshape(-1, x.shape[-1]) for x in (hidden, target))
    product = partial(jnp.matmul, precision="highest")
    A = product(H.T, H) + c * jnp.eye(len(P), dtype=dtype)
    # The solution does not change with the unit of A; Cholesky factors of small ones underflow.
    unit = _metric.nonzero(jnp.max(jnp.abs(A)))
    lower = jax.scipy.linalg.cho_factor(A / unit, lower=True)
    return (P + jax.scipy.linalg.cho_solve(lower, product(H.T, Z - product(H, P)) / unit)).astype(
        kernel.dtype
    )


def ewc(
    base: Tree, curvature: Tree, strength: float | jax.Array = 1.0
) -> Callable[[Tree], jax.Array]:
    r"""Elastic weight consolidation: a penalty that holds what earlier tasks need.

    :math:`\frac{\lambda}{2} \sum_i v_i (w_i - w_{0,i})^2`, to be added to the loss of the next
    task. With several earlier tasks, add their penalties; or one with the newest params and the sum
    of the curvatures (online EWC), which are in the state of ``running_mean`` as its ``weight``.

    Args:
      base: Params w0 that the last task left.
      curvature: v, a tree as ``merge`` takes it for an expert; see
        :func:`optax_moma.curvature_from` and :func:`optax_moma.merging.diagonal_fisher`. None at
        leaves that are not floating point.
      strength: :math:`\lambda`, at least 0. Where v is a mean over single examples and the loss a
        mean too, the ratio of their numbers, earlier to new, is what Bayes' rule asks for; the
        moments of an optimizer are those of batches, and :math:`\lambda` is tuned over decades.

    Returns:
      A pure function from params to the penalty, a number in float32 at least. It is a pytree of
      the base, the curvature and the strength, so that it can be an argument of a jitted function.

    Raises:
      ValueError: The curvature is of another structure or other shapes, negative or not finite, the
        base is not finite, or the strength is negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_moma.continual import ewc
      >>> penalty = ewc({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 3.0])}, strength=2.0)
      >>> float(penalty({"w": jnp.array([1.0, 2.0])}))
      13.0

    Source: Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"
    (arXiv 1612.00796), equation 3; online: Schwarz et al. 2018 (arXiv 1805.06370).
    """
    check_not_negative("strength", strength)
    contract = Contract(curvature=True, combines=True)
    try:
        inputs = checked_inputs(contract, {"base": base}, None, {"base": curvature}, None, None)
    except MergeError as error:
        raise MergeError("Cannot make a penalty,", error.problems) from None
    assert inputs.curvature is not None
    found = [inputs.curvature[0].get(path) for path in inputs.paths]
    return Partial(_penalty, base, found, strength)


def _penalty(base: Tree, curvature: list[Any], strength: Any, params: Tree) -> jax.Array:
    leaves = fitting_leaves("base", base, "params", params)
    total = jnp.zeros(())
    for w, w0, v in zip(leaves, jax.tree.leaves(base), curvature, strict=True):
        if is_float(w0):
            d = wide(w) - wide(w0)
            row, col = _metric.factors(v, d.dtype)
            total = total + jnp.sum(row * d * col * d)
    return strength / 2 * total


class Stage(NamedTuple):
    """Where a stream stands after a task: see :func:`stages`.

    Attributes:
      params: The merged params, corrected if there is a correction.
      state: The state of the sequential merge.
    """

    params: Tree
    state: State


def stages(
    method: Sequential,
    base: Tree,
    tasks: Iterable[Any],
    train: Callable[[Tree, Any], tuple[Tree, Tree | None]],
    correction: Callable[[Tree, Tree, Tree, Any], Tree] | None = None,
    *,
    start: Stage | None = None,
) -> Iterator[Stage]:
    """Goes through a stream of tasks: trains on each from the merge so far, and merges.

    For each task: expert, curvature = train(params, task); state = method.update(state, expert,
    curvature); params = method.params(state), then corrected. Task vectors are taken from the base
    for all tasks. What a correction changes is trained on from, but does not enter the state.

    Args:
      method: A sequential merge: ``merging.running_mean()``, ``merging.opcm()``, ...
      base: The params before the first task.
      tasks: Anything that ``train`` knows how to train on; one at a time is held.
      train: From params and a task to the trained params and their curvature, None if the method
        needs none.
      correction: From the merged params, those before the task, the trained ones and the task to
        corrected params, by :func:`correct` for example.
      start: The last stage of an earlier run, to go on from.

    Yields:
      A :class:`Stage` after each task, lazily: nothing runs before it is asked for.

    Returns:
      An iterator.

    Raises:
      ValueError: There is no task, ``start`` holds values that are not finite, ``train`` does not
        return a pair, or the method finds a fault in what it returns, such as a curvature of
        another structure or values that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.continual import stages
      >>> from optax_moma.merging import running_mean
      >>> train = lambda params, task: ({"w": params["w"] + task}, None)
      >>> found = stages(running_mean(power=0), {"w": jnp.zeros(1)}, [1.0, 4.0], train)
      >>> [stage.params["w"].tolist() for stage in found]
      [[1.0], [3.0]]

    Source: arXiv 2509.23592.
    """
    if start is not None:
        check_finite("start", _learnable(start))
    params, state = (base, method.init(base)) if start is None else start
    task = nothing = object()
    for task in tasks:
        trained = train(params, task)
        if not isinstance(trained, tuple) or len(trained) != 2:
            raise ValueError(
                "train: it must return a pair, the trained params and their curvature (or None),"
                f" it returns {type(trained).__name__}."
            )
        expert, curvature = trained
        state, previous = method.update(state, expert, curvature), params
        params = method.params(state)
        if correction is not None:
            params = correction(params, previous, expert, task)
        yield Stage(params, state)
    if task is nothing:
        raise ValueError("tasks: the stream is empty. Was a generator used up?")


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(x), jnp.inexact)


def _learnable(tree: Tree, chosen: Callable[[str], bool] | None = None) -> Tree:
    """The tree with None for leaves that are not floating point, or not chosen by name."""
    names, leaves = named_leaves(tree)
    keep = [
        _is_inexact(x) and (not chosen or chosen(n)) for n, x in zip(names, leaves, strict=True)
    ]
    return jax.tree.structure(tree).unflatten(
        [x if kept else None for x, kept in zip(leaves, keep, strict=True)]
    )


def _merged_leaves(tree: Tree, some: Tree) -> Tree:
    """The tree with the leaves of another of its structure that has None for the rest."""
    treedef = jax.tree.structure(tree)
    columns = jax.tree.leaves(tree), treedef.flatten_up_to(some)
    return treedef.unflatten([a if b is None else b for a, b in zip(*columns, strict=True)])
