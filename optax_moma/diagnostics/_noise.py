r"""The effective noise of training, from the moments that the optimizer keeps anyway.

A mini-batch gradient is ``g = E g + xi``; its variance, summed over all entries, is
``tr(Sigma) / B``, with Sigma the covariance of one example's gradient and B the batch. Training
moves as if at a temperature :math:`\eta\, tr(\Sigma) / B`, and models trained at a moderate one
merge best (arXiv 2510.04686).

An optimizer's bias-corrected moving averages :math:`\hat m` of g and :math:`\hat v` of g^2 hold
that variance. The average :math:`\hat m` still has a share kappa of it, the sum of its squared
weights, so that for a gradient whose mean and variance rest over the window

.. math::
    E \textstyle\sum \hat v = \lVert E g \rVert^2 + S, \quad
    E \lVert \hat m \rVert^2 = \lVert E g \rVert^2 + \kappa S, \quad
    \kappa = \frac{1 - b_1}{1 + b_1} \cdot \frac{1 + b_1^t}{1 - b_1^t}, \quad
    S = \frac{\sum \hat v - \lVert \hat m \rVert^2}{1 - \kappa} .

That is our derivation, not the paper's: there the noise is known only up to the proxy
:math:`\eta / (B (1 - \mu))`, in which tr(Sigma) counts as a constant.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._checks import Scalar, check_decay, check_finite, check_not_negative
from .._curvature import sources
from .._matrix import contract, divisor, paper_layout
from .._moments import ema
from .._tree import wide


class NoiseScale(NamedTuple):
    r"""The noise of mini-batch gradients, summed over all parameters. Four numbers.

    Attributes:
      scale: The effective noise scale, :math:`\eta / (1 - \mu)^p \cdot S`, S the variance.
      adaptive: The same for the preconditioned gradient :math:`g / \sqrt{\hat v}`, as Adam and moma
        step by it: :math:`\eta / (1 - \mu)^p \sum (1 - E[g]^2 / E[g^2])`. At most the learning rate
        times the number of parameters, and close to it where noise outweighs the gradient's mean.
      variance: S, the estimate of ``tr(Sigma) / B``.
      mean_square: The estimate of ``||E g||^2``.
    """

    scale: jax.Array
    adaptive: jax.Array
    variance: jax.Array
    mean_square: jax.Array


def noise_scale(
    opt_state: Any,
    learning_rate: Scalar,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    momentum: Scalar = 0.0,
    momentum_power: Scalar = 1,
    square: Scalar | None = None,
) -> NoiseScale:
    r"""The effective noise scale of training, read from an optimizer's state.

    :math:`\eta / (1 - \mu)^p \cdot S` with :math:`S = (\sum \hat v - \lVert \hat m \rVert^2) / (1 -
    \kappa)`, an estimate of tr(Sigma) / B, where kappa is the sum of the squared weights of the
    moving average m. The batch is not asked for: the gradients' spread already contains 1 / B, as
    it does augmentation and dropout.

    What the moments give, and what they do not. For Adam, and for moma's leaves that are no large
    matrices, they are all there. A matrix of moma has :math:`\sum \hat v` exactly, as the sum of C;
    its momentum is that of the *preconditioned* gradient, and of rank r: it is divided by today's
    preconditioner, and the part of the mean outside its subspace counts as noise, while of kappa S
    little is inside, so that no kappa is taken off. There ``variance`` is a little too small when
    noise fills the subspace, and too large by what truncation lost of the mean. Also, the window of
    v, 1 / (1 - b2) steps, is longer than that of m: while gradients shrink, S is too large and lags
    behind; :func:`log_noise_scale`, which sees every step, uses one window for both. Gradients that
    were clipped before they reached the optimizer have the noise of clipped gradients.

    Args:
      opt_state: The state of ``moma``, ``umtam`` (with gamma = b1), Adam or AdamW, anywhere inside
        ``chain``, ``partition`` and the like, as for :func:`optax_moma.curvature_from`.
      learning_rate: The learning rate eta of the last step.
      b1: Decay of the first moments, in (0, 1).
      b2: Decay of the second moments; ``moma`` records its own.
      momentum: mu, the momentum of a heavy ball (``optax.trace``) applied to these gradients, in
        [0, 1). The momentum of Adam, moma and umtam is an average and does not lengthen the step:
        leave 0.
      momentum_power: p. The classical result, and the paper as printed, is 1; reviews of its first
        version quote 2.
      square: ``E ||g||^2`` measured over the window of the first moments, in place of the sum of
        the second ones. ``adaptive`` does not use it.

    Returns:
      A :class:`NoiseScale`. All zero before the second step: one gradient has no spread.

    Raises:
      ValueError: The state holds no first and second moments of one gradient, or values that are
        not finite (where they are known: not under ``jax.jit``), or an argument is out of its
        range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_moma.diagnostics import noise_scale
      >>> tx, w = optax.adam(0.1), jnp.zeros(1000)
      >>> state = tx.init(w)
      >>> for key in jax.random.split(jax.random.key(0), 200):  # gradients of variance 4
      ...     _, state = tx.update(1 + 2 * jax.random.normal(key, w.shape), state)
      >>> noise = noise_scale(state, 0.1)
      >>> round(float(noise.variance), -3), round(float(noise.mean_square), -3)
      (4000.0, 1000.0)

    Source: Zhang et al., arXiv 2510.04686 (the effective noise); Smith and Le, "A Bayesian
    Perspective on Generalization and Stochastic Gradient Descent", 2018 (the heavy ball's factor);
    the estimate from moments is derived in this module's source.
    """
    _check(b1, b2, momentum, momentum_power)
    leaves = _leaves(opt_state, b1, b2)
    _check_moments(leaves)
    check_finite(
        "opt_state", {name: (leaf.second, leaf.mean_square) for name, leaf in leaves.items()}
    )
    if square is not None:
        check_not_negative("square", square)
    return _noise(list(leaves.values()), learning_rate, b1, momentum, momentum_power, square)


class LogNoiseScaleState(NamedTuple):
    """State of :func:`log_noise_scale`.

    Attributes:
      inner: The state of the optimizer.
      second: Sum of its second moments after the last step, before bias correction.
      square: Moving average of ``||g||^2`` with the weights of the first moments, uncorrected.
      noise: The :class:`NoiseScale` of the last step.
    """

    inner: Any
    second: jax.Array
    square: jax.Array
    noise: NoiseScale


def log_noise_scale(
    tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    momentum: Scalar = 0.0,
    momentum_power: Scalar = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Run an optimizer and keep the effective noise scale of its last step in the state.

    Updates are those of ``tx``. The estimate is that of :func:`noise_scale`, with both moments over
    the window of the first ones: what a step adds to the sum of second moments is the gradient's
    squared length, :math:`\lVert g_t \rVert^2 = (\sum v_t - b_2 \sum v_{t-1}) / (1 - b_2)`, as the
    optimizer saw it, after any clipping; it is averaged with the weights that b1 gives.

    Args:
      tx: The optimizer, or a chain that holds one: moma, umtam, Adam or AdamW.
      learning_rate: The rate, or the schedule, that ``tx`` steps by.
      b1: Decay of its first moments.
      b2: Decay of its second moments: here moma's is needed too.
      momentum: See :func:`noise_scale`.
      momentum_power: See :func:`noise_scale`.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its state has the last value as ``.noise``.

    Raises:
      ValueError: ``tx`` keeps no first and second moments of params that have leaves, or an
        argument is out of its range.

    Example:
      >>> import jax.numpy as jnp, optax, optax_moma as om
      >>> from optax_moma.diagnostics import log_noise_scale
      >>> tx = optax.chain(optax.clip(1.0), log_noise_scale(om.moma(1e-3), 1e-3))
      >>> params = {"kernel": jnp.ones((128, 256))}
      >>> state = tx.init(params)
      >>> for sign in (1.0, -1.0, 1.0):
      ...     updates, state = tx.update({"kernel": jnp.full((128, 256), sign)}, state, params)
      >>> bool(state[1].noise.variance > 0)
      True

    Source: see :func:`noise_scale`.
    """
    _check(b1, b2, momentum, momentum_power)
    tx = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> LogNoiseScaleState:
        inner = tx.init(params)
        if jax.tree.leaves(params):  # of Optax's placeholder there are no moments
            _check_moments(_leaves(inner, b1, b2))
        zeros = [jnp.zeros((), jnp.float32) for _ in range(6)]
        return LogNoiseScaleState(inner, zeros[0], zeros[1], NoiseScale(*zeros[2:]))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        leaves = list(_leaves(inner, b1, b2).values())
        if not leaves:
            return updates, state._replace(inner=inner)
        second = _total([leaf.second for leaf in leaves])
        # Accumulation inside tx leaves the moments as they are on most calls.
        stepped = second != state.second
        g_square = jnp.maximum(second - b2 * state.second, 0) / (1 - b2)
        square = jnp.where(stepped, ema(state.square, g_square, b1), state.square)
        count = leaves[0].steps
        rate = learning_rate(count - 1) if callable(learning_rate) else learning_rate
        corrected = square / divisor(leaves[0].weight)
        noise = _noise(leaves, rate, b1, momentum, momentum_power, corrected)
        new = LogNoiseScaleState(inner, second, square, noise)
        return updates, jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), new, state)

    return optax.GradientTransformationExtraArgs(init, update)


class TwoBatch(NamedTuple):
    """What gradients of two batch sizes tell: see :func:`two_batch_noise`.

    Attributes:
      trace: tr(Sigma), the variance of one example's gradient, summed over all entries.
      mean_square: ``||E g||^2``.
    """

    trace: jax.Array
    mean_square: jax.Array

    @property
    def simple(self) -> jax.Array:
        """The critical batch, ``tr(Sigma) / ||E g||^2``."""
        return self.trace / self.mean_square


def two_batch_noise(
    small_square: Scalar, big_square: Scalar, small_size: Scalar, big_size: Scalar
) -> TwoBatch:
    r"""The noise of gradients, exactly unbiased, from batches of two sizes at the same parameters.

    .. math::
        tr(\Sigma) = \frac{\lVert g_b \rVert^2 - \lVert g_B \rVert^2}{1 / b - 1 / B}, \quad
        \lVert E g \rVert^2 = \frac{B \lVert g_B \rVert^2 - b \lVert g_b \rVert^2}{B - b} .

    The check of :func:`noise_scale`: the variance there is ``trace / batch`` here. With data
    parallelism it is free: the small batch is a device's, the big one all devices'. Both estimates
    have no bias, so that a single pair may give negative numbers: average the squares over many.

    Args:
      small_square: Mean of ``||g||^2`` over gradients of the small batch,
        ``optax.tree.norm(g, squared=True)``.
      big_square: The same of the big batch.
      small_size: b, examples of the small batch.
      big_size: B, examples of the big batch, more than the small one's.

    Returns:
      A :class:`TwoBatch`; ``.simple`` is the critical batch of McCandlish et al.

    Raises:
      ValueError: The sizes are not positive and ascending.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_moma.diagnostics import two_batch_noise
      >>> g = 1 + 2 * jax.random.normal(jax.random.key(0), (64, 1000))  # 64 examples
      >>> found = two_batch_noise(jnp.mean(jnp.sum(g**2, 1)), jnp.sum(jnp.mean(g, 0) ** 2), 1, 64)
      >>> round(float(found.trace), -2), round(float(found.mean_square), -2)
      (4000.0, 1000.0)

    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.
    """
    known = not any(isinstance(x, jax.Array) for x in (small_size, big_size))
    if known and not 0 < small_size < big_size:
        raise ValueError(
            f"small_size must be positive and less than big_size, got {small_size} and {big_size}."
        )
    trace = jnp.asarray(small_square - big_square) / (1 / small_size - 1 / big_size)
    mean = jnp.asarray(big_size * big_square - small_size * small_square) / (big_size - small_size)
    return TwoBatch(trace, mean)


_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class _Leaf(NamedTuple):
    """The moments of one leaf, as sums.

    ``second`` is the sum of v, as stored; ``square`` the same, corrected for bias; ``mean_square``
    is ``||m||^2``, corrected; ``entries`` counts where v > 0, and ``share`` sums ``m^2 / v`` there.
    ``kappa`` is the part of the variance that is in m; ``steps`` and ``weight`` (of m) are those of
    the state that holds the leaf.
    """

    second: jax.Array
    square: jax.Array
    mean_square: jax.Array
    entries: jax.Array
    share: jax.Array
    kappa: jax.Array
    steps: jax.Array
    weight: jax.Array


def _check(b1: Scalar, b2: Scalar, momentum: Scalar, momentum_power: Scalar) -> None:
    for name, decay in (("b1", b1), ("b2", b2), ("momentum", momentum)):
        check_decay(name, decay)
    check_not_negative("momentum_power", momentum_power)
    if not isinstance(b1, jax.Array) and b1 == 0:
        raise ValueError("b1 must be positive: without an average no spread can be told from it.")


def _noise(
    leaves: list[_Leaf],
    learning_rate: Any,
    b1: Scalar,
    momentum: Scalar,
    momentum_power: Scalar,
    square: Scalar | None,
) -> NoiseScale:
    whole = _total([leaf.square for leaf in leaves])
    # What was measured for the sum over all leaves is spread as their second moments are.
    ratio = 1 if square is None else square / divisor(whole)
    excess = [_excess(ratio * x.square, x.mean_square, x.kappa, x.steps) for x in leaves]
    relative = [_excess(x.entries, x.share, x.kappa, x.steps) for x in leaves]
    variance, adaptive = (jnp.maximum(_total(x), 0) for x in (excess, relative))
    mean_square = jnp.where(leaves[0].steps > 1, jnp.maximum(ratio * whole - variance, 0), 0)
    effective = learning_rate / (1 - momentum) ** momentum_power
    return NoiseScale(effective * variance, effective * adaptive, variance, mean_square)


def _total(values: list[jax.Array]) -> jax.Array:
    return sum(values[1:], values[0])


def _excess(square: jax.Array, mean: jax.Array, kappa: jax.Array, steps: jax.Array) -> jax.Array:
    """The variance behind E[x^2] and an average's square; zero for a single x."""
    several = steps > 1
    return jnp.where(several, (square - mean) / jnp.where(several, 1 - kappa, 1), 0)


def _leaves(opt_state: Any, b1: Scalar, b2: Scalar) -> dict[str, _Leaf]:
    """The moments of every leaf for which some part of the state has both, by name."""
    found: dict[str, _Leaf] = {}
    for kind, tables, scalars in sources(opt_state):
        if kind == "adafactor":
            continue
        steps = jnp.asarray(scalars["count"])
        w1, w2 = (
            jnp.asarray(scalars.get(recorded, 1 - decay ** steps.astype(jnp.float32)))
            for recorded, decay in (("mu_weight", b1), ("nu_weight", b2))
        )
        w2, kappa = divisor(w2), (1 - b1) / (1 + b1) * (2 - w1) / divisor(w1)
        mu, nu = tables.get("mu", {}), tables.get("nu", {})
        for name in (mu.keys() & nu.keys()) - found.keys():
            sums = _dense_sums(mu[name], nu[name], w1, w2)
            found[name] = _Leaf(*sums, kappa, steps, w1)
        for name in tables.get("U", {}).keys() - found.keys():
            part = {field: table[name] for field, table in tables.items() if name in table}
            if kind == "umtam":
                sums, inside = _umtam_sums(part, w1, w2), kappa
            else:
                sums = _moma_sums(part, w1, w2)
                rank, m, n = (part[field].shape[-1] for field in ("s", "R", "C"))
                # Of the average's own noise next to nothing lies in a few directions.
                inside = jnp.zeros(()) if rank < min(m, n) else kappa
            found[name] = _Leaf(*sums, inside, steps, w1)
    return {name: found[name] for name in sorted(found)}


def _check_moments(leaves: Mapping[str, _Leaf]) -> None:
    if not leaves:
        raise ValueError(
            "opt_state holds no first and second moments of a gradient, from which its noise could"
            " be told. They are in the states of moma, umtam, Adam and AdamW; Adafactor has no"
            " momentum and SGD no second moment: two_batch_noise needs neither."
        )


def _dense_sums(mu: Any, nu: Any, w1: jax.Array, w2: jax.Array) -> _Sums:
    m, v = wide(mu) / divisor(w1), wide(nu)
    return _sums(jnp.sum(v), jnp.square(jnp.abs(m)), v / w2, w2)


def _sums(second: jax.Array, m_square: jax.Array, v: jax.Array, w2: jax.Array) -> _Sums:
    known = v > 0
    share = jnp.sum(jnp.where(known, m_square / divisor(v), 0))
    return second, second / w2, jnp.sum(m_square), jnp.sum(known, dtype=jnp.float32), share


def _moma_sums(part: Mapping[str, Any], w1: jax.Array, w2: jax.Array) -> _Sums:
    """With M = U s V^T the momentum of P * g, P^-2 = v = row col: ||m||^2 = sum v_ij M_ij^2."""
    U, s, V, R, C = (wide(part[field]) for field in ("U", "s", "V", "R", "C"))
    row, col = R / divisor(jnp.sum(R, axis=-1, keepdims=True)), C / w2
    s = s / divisor(w1)
    live = [jnp.sum(x > 0, axis=-1, dtype=jnp.float32) for x in (R, C)]
    left = contract("mr,ms->rs", U * row[..., None], U)
    right = contract("nr,ns->rs", V * col[..., None], V)
    mean = jnp.sum(left * right * s[..., :, None] * s[..., None, :])
    share = jnp.sum(jnp.square(s))
    second = jnp.sum(C)
    return second, second / w2, mean, jnp.sum(live[0] * live[1]), share


def _umtam_sums(part: Mapping[str, Any], w1: jax.Array, w2: jax.Array) -> _Sums:
    """With gamma = b1, U s V^T + E is the dense moving average of the (clipped) gradient."""
    U, s, V, R, C, error = (wide(part[field]) for field in ("U", "s", "V", "R", "C", "error"))
    layout = paper_layout(error)
    assert layout is not None
    M = (contract("mr,nr->mn", U * s, V) + layout.to_matrix(error)) / divisor(w1)
    v = R[:, None] * C / divisor(jnp.sum(R)) / w2
    return _sums(jnp.sum(C), jnp.square(M), v, w2)
