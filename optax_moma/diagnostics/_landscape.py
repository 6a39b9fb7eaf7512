"""The loss between models: along the line that joins two, and over the plane of their task vectors.

Models are merged by the merges themselves, so that whatever cannot be merged is refused here too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..merging import average, merge, task_arithmetic

Tree = Any
Evaluate = Callable[[Tree], Any]


class Curve(NamedTuple):
    """Values between two models: see :func:`interpolation_curve`.

    Attributes:
      alphas: Shares of the second model, (n,).
      values: What ``evaluate`` returned, each number as an array (n,).
    """

    alphas: jax.Array
    values: Any


class Plane(NamedTuple):
    """Values over two task vectors: see :func:`task_arithmetic_plane`.

    Attributes:
      scales: Multiples of a task vector, (n,).
      values: What ``evaluate`` returned, each number as an array (n, n): the first task vector's
        multiple varies along the first axis.
    """

    scales: jax.Array
    values: Any


def interpolation_curve(
    a: Tree, b: Tree, evaluate: Evaluate, alphas: int | Sequence[float] | jax.Array = 11
) -> Curve:
    r"""Evaluate the models on the line that joins two.

    :math:`evaluate((1 - \alpha) a + \alpha b)` for each alpha.

    Args:
      a: Params of the first model.
      b: Params of the second, a tree like ``a``.
      evaluate: From params to a number, or to a tree of numbers such as ``{"loss": ...,
        "accuracy": ...}``. It is called once for each alpha, so jit it.
      alphas: Shares of ``b``, from 0 to 1, or how many at equal distances.

    Returns:
      A :class:`Curve`.

    Raises:
      ValueError: The models do not fit or are not finite, or an alpha is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import barrier, interpolation_curve
      >>> loss = lambda p: jnp.sum((p["w"] ** 2 - 1) ** 2)  # minima at -1 and 1
      >>> curve = interpolation_curve({"w": jnp.array([-1.0])}, {"w": jnp.array([1.0])}, loss, 3)
      >>> curve.values.tolist(), float(barrier(*curve))
      ([0.0, 1.0, 0.0], 1.0)

    Source: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020.
    """
    shares = np.linspace(0, 1, alphas) if isinstance(alphas, int) else np.asarray(alphas)
    if shares.ndim != 1 or not shares.size or not np.all((shares >= 0) & (shares <= 1)):
        raise ValueError(
            f"alphas must be at least one number, all from 0 to 1 (or how many), got {alphas}."
        )
    found = [evaluate(merge(average(), [a, b], weights=[float(1 - x), float(x)])) for x in shares]
    return Curve(jnp.asarray(shares, jnp.float32), _stacked(found, shares.shape))


def barrier(alphas: jax.Array, losses: jax.Array) -> jax.Array:
    r"""How high the loss rises between two models, above the line that joins their losses.

    :math:`\max_\alpha \big[L(\alpha) - (1 - \alpha) L(0) - \alpha L(1)\big]`: zero if it never
    does. Of accuracies, pass the negatives.

    Args:
      alphas: Shares of the second model, ascending from 0 to 1, (n,).
      losses: Losses, (n,).

    Returns:
      The barrier.

    Raises:
      ValueError: The alphas do not reach from 0 to 1, or are not as many as the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import barrier
      >>> float(barrier(jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 4.0, 2.0])))
      2.5

    Source: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020.
    """
    alphas, losses = _curve(alphas, losses)
    return jnp.max(losses - (1 - alphas) * losses[0] - alphas * losses[-1])


def midpoint_gain(alphas: jax.Array, values: jax.Array) -> jax.Array:
    r"""What the average of two models gains over them: ``A(1/2) - (A(0) + A(1)) / 2``.

    Args:
      alphas: Shares of the second model, ascending from 0 to 1 with 1/2 among them, (n,).
      values: Accuracies (or any score), (n,).

    Returns:
      The gain, in the unit of the values.

    Raises:
      ValueError: 0, 1/2 or 1 is missing, or the lengths differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import midpoint_gain
      >>> float(midpoint_gain(jnp.array([0.0, 0.5, 1.0]), jnp.array([70.0, 74.0, 72.0])))
      3.0

    Source: arXiv 2510.04686 reports merges by it.
    """
    alphas, values = _curve(alphas, values)
    middle = np.flatnonzero(np.isclose(alphas, 0.5, atol=1e-6))
    if not middle.size:
        raise ValueError("alphas hold no 1/2: take an odd number of them.")
    return values[middle[0]] - (values[0] + values[-1]) / 2


def task_arithmetic_plane(
    base: Tree,
    a: Tree,
    b: Tree,
    evaluate: Evaluate,
    scales: Sequence[float] | jax.Array = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> Plane:
    r"""Evaluate the base plus multiples of two task vectors.

    :math:`evaluate(w_0 + \lambda_a (a - w_0) + \lambda_b (b - w_0))` for all pairs of scales.

    Args:
      base: Params w0 that both were trained from.
      a: Params of the first model.
      b: Params of the second.
      evaluate: From params to a number or a tree of numbers; called n^2 times.
      scales: The n multiples, of any sign.

    Returns:
      A :class:`Plane`.

    Raises:
      ValueError: The models do not fit or are not finite, or there is no scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.diagnostics import task_arithmetic_plane
      >>> base, a, b = ({"w": jnp.array(w)} for w in ([0.0, 0.0], [1.0, 0.0], [0.0, 2.0]))
      >>> task_arithmetic_plane(base, a, b, lambda p: p["w"].sum(), [0.0, 1.0]).values.tolist()
      [[0.0, 2.0], [1.0, 3.0]]

    Source: Ilharco et al., "Editing Models with Task Arithmetic", 2023.
    """
    steps = np.asarray(scales)
    if steps.ndim != 1 or not steps.size or not np.all(np.isfinite(steps)):
        raise ValueError(f"scales must be at least one finite number, got {scales}.")
    found = [
        evaluate(merge(task_arithmetic(1.0), [a, b], base=base, weights=[float(x), float(y)]))
        for x in steps
        for y in steps
    ]
    return Plane(jnp.asarray(steps, jnp.float32), _stacked(found, steps.shape * 2))


def _stacked(found: list[Any], shape: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]).reshape(shape), *found)


def _curve(alphas: Any, values: Any) -> tuple[jax.Array, jax.Array]:
    alphas, values = jnp.asarray(alphas), jnp.asarray(values)
    if alphas.ndim != 1 or alphas.shape != values.shape:
        raise ValueError(
            f"alphas and values must be as many numbers, got shapes {alphas.shape} and"
            f" {values.shape}: of a tree of values pass one."
        )
    known = np.asarray(alphas)
    if known[0] != 0 or known[-1] != 1 or np.any(np.diff(known) <= 0):
        raise ValueError(f"alphas must ascend from 0 to 1, got {known.tolist()}.")
    return alphas, values
