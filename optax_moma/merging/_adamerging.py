"""AdaMerging: coefficients learned by gradient descent through the merge, without labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_moma.merging import _steps
from optax_moma.merging._contract import Step, check_number
from optax_moma.merging._input_grams import checked_batches
from optax_moma.merging._inputs import Checked, Leaves, Path, checked_inputs, is_float, path_text
from optax_moma.merging._merge import merge

Tree = Any


class AdaMerged(NamedTuple):
    """What ``adamerging`` returns.

    Attributes:
      params: The merged params, a tree like the base (else the first expert).
      coefficients: For each group of leaves, by name, one number for each expert, by name.
      losses: The loss before each step, float32 of shape (steps,).
    """

    params: Tree
    coefficients: dict[str, dict[str, float]]
    losses: np.ndarray


def entropy(logits: jax.Array) -> jax.Array:
    """Computes the mean entropy of predictions: - mean_x sum_c p_c log p_c, p = softmax(logits).

    Args:
      logits: An array (..., classes).

    Returns:
      A number in nats.

    Example:
      >>> entropy(jnp.zeros((5, 4)))
      Array(1.3862944, dtype=float32)

    Source: Wang et al. 2021, "Tent" (arXiv 2006.10726), as the loss of AdaMerging.
    """
    logp = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(logp) * logp, axis=-1))


def adamerging(
    loss: Callable[[Tree, Any], jax.Array],
    experts: Sequence[Tree] | Mapping[str, Tree],
    batches: Iterable[Any],
    *,
    base: Tree | None = None,
    method: Step | None = None,
    curvature: Sequence[Tree] | Mapping[str, Tree] | None = None,
    key: jax.Array | None = None,
    group: Callable[[str], str] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    init: float = 0.3,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> AdaMerged:
    """Learns how much of each expert goes into each layer, by gradient descent on a loss.

    c = argmin_c sum over batches of loss(merged(c), batch), with, for a leaf in group g,
    merged(c) = base + sum_t c_{g,t} d_t, d_t = expert_t - base, or any other method, whose
    ``weights`` are c_g. One step per batch; the coefficients are clipped to ``bounds`` where they
    are used.

    AdaMerging is this with the sum of the ``entropy`` of all tasks' predictions on unlabelled
    inputs: ``loss = lambda params, batch: sum(entropy(apply[t](params, x)) for t, x in
    batch.items())``. With labels and their cross entropy, a few examples may be enough.
    AdaMerging++ takes ``method=chain(trim(0.2), elect(), total())``.

    Args:
      loss: A function of params and a batch that returns a number.
      experts: Trees of params, a list or a dict by name.
      batches: One batch per step, in the paper 1000 of 16 inputs of every task. Each new shape
        compiles once.
      base: The params that the experts were fine-tuned from, if the method needs them.
      method: A method for ``merge``, ``total()`` by default.
      curvature: What the method needs of it, as in ``merge``.
      key: A random key, if the method draws; every step draws the same.
      group: A function from a leaf's path, such as ``layers/0/kernel``, to the name of its group.
        A group per leaf by default: layer-wise AdaMerging. ``lambda path: "all"`` makes it
        task-wise.
      optimizer: An Optax transformation, ``optax.adam(1e-3)`` by default.
      init: The coefficients' first value.
      bounds: The range of the coefficients, or None. The published code clips to [0, 1].

    Returns:
      The merged params, the coefficients, and the loss of each step.

    Raises:
      TypeError: if ``batches`` is one batch or an argument of the wrong type.
      ValueError: if there is no batch, the loss is no number or not finite, the method has a
        global threshold, or anything is wrong with the inputs of the merge.

    Example:
      >>> base, expert = {"w": jnp.zeros((2, 2))}, {"w": jnp.eye(2)}
      >>> loss = lambda params, x: entropy(x @ params["w"])
      >>> found = adamerging(loss, [expert], [jnp.eye(2)] * 50, base=base,
      ...                    optimizer=optax.adam(0.1))
      >>> found.coefficients, found.params["w"].tolist()
      ({'w': {'0': 1.0}}, [[1.0, 0.0], [0.0, 1.0]])

    Source: Yang et al. 2024, "AdaMerging" (arXiv 2310.02575).
    """
    method = _steps.total() if method is None else method
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    check_number("init", init)
    if method.contract.passes:
        raise ValueError(
            "method: it has a global threshold, which no group of leaves knows by itself; use "
            'scope="leaf".'
        )
    inputs = checked_inputs(method.contract, experts, base, curvature, None, key)
    groups: dict[str, list[Path]] = {}
    copied = {}
    for path in inputs.paths:
        name = path_text(path)
        if is_float(inputs.experts[0][path]):
            groups.setdefault(name if group is None else group(name), []).append(path)
        else:
            copied[name] = inputs.experts[0][path]
    models = {name: _arguments(inputs, paths) for name, paths in groups.items()}

    def clipped(coefficients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda c: c if bounds is None else jnp.clip(c, *bounds), coefficients)

    @jax.jit
    def merged(coefficients: dict[str, jax.Array], models: Any, copied: dict[str, Any]) -> Tree:
        leaves = dict(copied)
        for name, c in clipped(coefficients).items():
            weights: dict[str, Any] = dict(zip(inputs.names, c, strict=True))
            leaves |= merge(method, weights=weights, key=key, **models[name])
        return jax.tree.unflatten(inputs.treedef, [leaves[path_text(p)] for p in inputs.paths])

    def objective(coefficients: Any, models: Any, copied: dict[str, Any], batch: Any) -> jax.Array:
        return loss(merged(coefficients, models, copied), batch)

    @jax.jit
    def step(coefficients: Any, state: Any, models: Any, copied: dict[str, Any], batch: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(coefficients, models, copied, batch)
        updates, state = optimizer.update(grads, state, coefficients)
        return optax.apply_updates(coefficients, updates), state, value

    coefficients: Any = {name: jnp.full(len(inputs.names), init, jnp.float32) for name in groups}
    state, losses = optimizer.init(coefficients), []
    for batch in checked_batches(batches):
        if not losses:
            _check_loss(jax.eval_shape(objective, coefficients, models, copied, batch))
        coefficients, state, value = step(coefficients, state, models, copied, batch)
        losses.append(value)
    if not losses:
        raise ValueError("batches: there is none; each batch is one step of the optimizer.")
    history = np.asarray(jnp.stack(losses), np.float32)
    if not np.all(np.isfinite(history)):
        n = int(np.argmin(np.isfinite(history)))
        raise ValueError(
            f"loss: it is {history[n]} at step {n}; look at the batch and at the loss there, or "
            "lower the learning rate."
        )
    return AdaMerged(
        merged(coefficients, models, copied),
        {
            name: dict(zip(inputs.names, map(float, c), strict=True))
            for name, c in clipped(coefficients).items()
        },
        history,
    )


def _arguments(inputs: Checked, paths: Sequence[Path]) -> dict[str, Any]:
    """Returns the arguments of ``merge`` for some of the leaves, which keep their names."""

    def part(leaves: Leaves) -> dict[str, Any]:
        return {path_text(path): leaves[path] for path in paths if path in leaves}

    def parts(models: Sequence[Leaves]) -> dict[str, Any]:
        return dict(zip(inputs.names, map(part, models), strict=True))

    return {
        "experts": parts(inputs.experts),
        "base": None if inputs.base is None else part(inputs.base),
        "curvature": None if inputs.curvature is None else parts(inputs.curvature),
    }


def _check_loss(value: Any) -> None:
    shape = getattr(value, "shape", None)
    if shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        found = type(value).__name__ if shape is None else f"{value.dtype} of shape {shape}"
        raise ValueError(f"loss: it must return one floating-point number, it returns {found}.")
