"""Forks of one run: from a shared prefix, two branches that see the data in different orders.

All settings of one optimizer and batch size, all pairs and both branches of each are one compiled
program: what differs between them are numbers, and `jax.vmap` runs over those.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_moma as om
from optax_moma.diagnostics import log_noise_scale, noise_scale, two_batch_noise

from .problems import Params, Problem

B1 = 0.9
WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""
RANK = 16
SMALLEST = 64
"""Matrices with a smaller side get Adam's moments in moma."""
PROBES = 32
"""Batches of the exact estimate."""


class Setting(NamedTuple):
    """How a branch is trained. ``noise`` is what the paper says it comes to."""

    optimizer: str
    batch: int
    schedule: str
    learning_rate: float
    momentum: float
    weight_decay: float

    @property
    def noise(self) -> float:
        """The proxy eta / (B (1 - mu)); the averages of Adam and moma do not lengthen a step."""
        return self.learning_rate / self.batch / (1 - self.momentum)


class Measured(NamedTuple):
    """What a branch tells at some steps, each (..., checks).

    Attributes:
      logged: variance of the mini-batch gradient, by `log_noise_scale`.
      moments: the same by `noise_scale`, from the state alone.
      exact: the same by `two_batch_noise`, from PROBES batches at these params.
      adaptive: effective noise of the preconditioned gradient, by `log_noise_scale`.
      rate: the learning rate.
      square: ``||E g||^2``, exact.
    """

    logged: jax.Array
    moments: jax.Array
    exact: jax.Array
    adaptive: jax.Array
    rate: jax.Array
    square: jax.Array


def schedule(kind: str, peak: Any, steps: int, share: float = WARMUP) -> optax.Schedule:
    """A linear rise over a share of the steps, then a cosine to zero, or constant."""
    warmup = max(1, round(share * steps))
    rise = lambda count: jnp.minimum((count + 1) / warmup, 1)  # noqa: E731
    if kind == "constant":
        return lambda count: peak * rise(count)
    if kind != "cosine":
        raise ValueError(f"schedule must be 'cosine' or 'constant', got {kind!r}.")
    fall = optax.cosine_decay_schedule(1.0, steps - warmup)
    return lambda count: peak * rise(count) * fall(jnp.maximum(count - warmup, 0))


def beside(
    tx: optax.GradientTransformation, observer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Steps by ``tx``; the observer sees the same gradients and only keeps its state."""

    def init(params: Any) -> Any:
        return tx.init(params), observer.init(params)

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        updates, first = tx.update(gradients, state[0], params)
        return updates, (first, observer.update(gradients, state[1], params)[1])

    return optax.GradientTransformation(init, update)


def optimizer(setting: Setting, rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer, which logs its noise. SGD keeps no second moments: Adam's are kept beside."""
    if setting.optimizer == "sgd":
        tx = optax.chain(
            optax.add_decayed_weights(setting.weight_decay), optax.sgd(rate, setting.momentum)
        )
        tx = beside(tx, optax.scale_by_adam(B1))
    elif setting.optimizer == "adamw":
        tx = optax.adamw(rate, B1, weight_decay=setting.weight_decay)
    elif setting.optimizer == "moma":
        tx = om.moma(
            rate,
            RANK,
            B1,
            min_dim_size_to_factor=SMALLEST,
            weight_decay=setting.weight_decay,
            orthogonal_block_size=None,
        )
    else:
        raise ValueError(f"optimizer must be sgd, adamw or moma, got {setting.optimizer!r}.")
    momentum = setting.momentum if setting.optimizer == "sgd" else 0.0
    return log_noise_scale(tx, rate, b1=B1, momentum=momentum)


def orders(examples: int, pairs: Sequence[int], steps: int, batch: int) -> np.ndarray:
    """(pairs, 2, steps, batch): rows of the data; every branch goes through it in its own order."""
    epochs = -(-steps * batch // examples)

    def one(pair: int, branch: int) -> np.ndarray:
        rng = np.random.default_rng((pair, branch, batch))
        rows = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
        return rows[: steps * batch].reshape(steps, batch)

    return np.array([[one(pair, branch) for branch in (0, 1)] for pair in pairs], np.int32)


def train(
    problem: Problem,
    settings: Sequence[Setting],
    starts: Params,
    rows: np.ndarray,
    checks: int,
) -> tuple[Params, Measured]:
    """Trains every setting from every start, in every order.

    Args:
      problem: model and data.
      settings: of one optimizer, batch size and schedule.
      starts: params with a leading axis of pairs.
      rows: from `orders`, (pairs, branches, steps, batch).
      checks: how often, in equal parts of training, the noise is measured.

    Returns:
      Params and measures with leading axes (settings, pairs, branches).
    """
    kinds = {s[:3] for s in settings}
    if len(kinds) != 1:
        raise ValueError(f"settings must share optimizer, batch and schedule, got {kinds}.")
    steps, batch = rows.shape[2:]
    if steps % checks:
        raise ValueError(f"{steps} steps cannot be cut into {checks} equal parts.")
    examples = len(jax.tree.leaves(problem.train)[0])
    rng = np.random.default_rng(0)
    probes = rng.integers(0, examples, (checks, PROBES, batch)).astype(np.int32)
    numbers = np.array([s[3:] for s in settings], np.float32)
    one = partial(_branch, problem.loss, settings[0])
    over_branches = jax.vmap(one, (None, None, 0, None, None))
    over_pairs = jax.vmap(over_branches, (None, 0, 0, None, None))
    over_settings = jax.vmap(over_pairs, (0, None, None, None, None))
    return jax.jit(over_settings)(numbers, starts, rows, probes, problem.train)


def _branch(
    loss: Any, kind: Setting, numbers: jax.Array, start: Params, rows: Any, probes: Any, data: Any
) -> tuple[Params, Measured]:
    steps, batch = rows.shape
    setting = kind._replace(learning_rate=numbers[0], momentum=numbers[1], weight_decay=numbers[2])
    rate = schedule(kind.schedule, setting.learning_rate, steps)
    tx = optimizer(setting, rate)
    gradient = lambda params, i: jax.grad(loss)(params, jax.tree.map(lambda x: x[i], data))  # noqa: E731

    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(gradient(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry: Any, given: Any) -> Any:
        (params, state), _ = jax.lax.scan(step, carry, given[0])
        exact = two_batch(lambda i: gradient(params, i), given[1])
        now = noise_scale(state.inner, 0.0, b1=B1)
        # The rate of the step before, which the last logged scale was made with.
        count = optax.tree.get_all_with_path(state.inner, "count")[0][1]
        measured = Measured(
            state.noise.variance,
            now.variance,
            exact.trace / batch,
            state.noise.adaptive,
            rate(count - 1),
            exact.mean_square,
        )
        return (params, state), measured

    parts = rows.reshape(len(probes), -1, batch)
    (params, _), measured = jax.lax.scan(stretch, (start, tx.init(start)), (parts, probes))
    return params, measured


def two_batch(gradient: Any, probes: jax.Array) -> Any:
    """The exact noise from batches ``probes`` (count, batch), one of them in memory at a time."""
    square = lambda g: optax.tree.norm(g, squared=True)  # noqa: E731

    def add(carry: Any, i: jax.Array) -> Any:
        g = gradient(i)
        return (carry[0] + square(g), jax.tree.map(jnp.add, carry[1], g)), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, probes[0]))
    (squares, total), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), probes)
    count, batch = probes.shape
    return two_batch_noise(squares / count, square(total) / count**2, batch, count * batch)
