r"""The published method, step by step, for comparison.

Algorithm 1 of Moayedikia and Troncoso, "Bridging Training and Merging Through Momentum-Aware
Optimization" (arXiv 2512.17109), for a matrix W (m, n), with W0 its initial value:

.. math::
    W &\leftarrow W (1 - \eta \lambda), \quad G \leftarrow G \min(1, c / \lVert G \rVert) \\
    \tilde M &= \beta_1 U \Sigma V^T + (1 - \beta_1) G + \gamma E \\
    U \Sigma V^T &= SVD_r(\tilde M), \quad E = \tilde M - U \Sigma V^T \\
    R &\leftarrow \beta_2 R + (1 - \beta_2) \textstyle\sum_j G_{ij}^2, \quad
    C \leftarrow \beta_2 C + (1 - \beta_2) \textstyle\sum_i G_{ij}^2 \\
    P_{ij} &= \big(R_i C_j / (\textstyle\sum R + \epsilon) + \epsilon_t\big)^{-1/2}, \quad
    \epsilon_t = \epsilon \max(1, \lVert G_{unclipped} \rVert / \lVert W \rVert) \\
    W &\leftarrow W - \eta P \odot U \Sigma V^T \\
    S &\leftarrow \alpha S + (1 - \alpha) (W - W_0)^2 \odot \sqrt{R C^T}
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from . import _moments as moments
from ._checks import Scalar, check_decay, check_integer, check_not_negative, check_width
from ._matrix import Layout, contract, divisor, paper_layout, reshard, sharding_of
from ._tree import at_least_float32, is_none, name_hash, named_leaves, to_entries, to_trees, unboxed


class ScaleByUmtamState(NamedTuple):
    """State of :func:`scale_by_umtam`: trees like the parameters, one per quantity.

    Attributes:
      count: Number of updates so far, int32.
      U: Left singular vectors of the momentum, (m, r).
      s: Its singular values, (r,).
      V: Its right singular vectors, (n, r).
      R: Moving average of the row sums of the squared, clipped gradient, (m,).
      C: The same of its column sums, (n,).
      error: E, what truncation left of the momentum, (m, n).
      base: W0, the parameters at the first step, (m, n).
      saliency: S, (m, n).
      mu: First moment of every leaf with fewer than two axes.
      nu: Its second moment.
    """

    count: Any
    U: Any
    s: Any
    V: Any
    R: Any
    C: Any
    error: Any
    base: Any
    saliency: Any
    mu: Any
    nu: Any


class _Matrix(NamedTuple):
    U: Any
    s: Any
    V: Any
    R: Any
    C: Any
    error: Any
    base: Any
    saliency: Any


class _Dense(NamedTuple):
    mu: Any
    nu: Any


_FIELDS = _Matrix._fields + _Dense._fields


def scale_by_umtam(
    rank: int = 32,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    gamma: Scalar = 0.9,
    eps: Scalar = 1e-8,
    alpha: Scalar = 0.99,
    grad_clip: Scalar = 1.0,
    learning_rate: optax.ScalarOrSchedule = 0.0,
    weight_decay: Scalar = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates by the published algorithm, Algorithm 1 of arXiv 2512.17109.

    The update is :math:`P \odot U \Sigma V^T` of the equations of :func:`umtam`, and the saliency
    :math:`S \leftarrow \alpha S + (1 - \alpha) (W - W_0)^2 \odot \sqrt{R C^T}`. Faithful means:
    dense E, S and W0, about 1.5 times AdamW's state; a full SVD of every matrix at every step,
    ``O(m n min(m, n))`` operations, for which a sharded matrix is gathered; and no bias correction
    of R, C or the momentum (which starts as eps times a random matrix), so that early steps are up
    to 6.5 times those of Adam. A leaf with more
    than two axes is the matrix (shape[0], rest); one with fewer, and complex leaves, get Adam's
    moments with bias correction. :func:`optax_moma.scale_by_moma` is the optimizer to train with.

    Args:
      rank: r >= 1 (at most min(m, n) are kept).
      b1: Decay of the momentum, in [0, 1).
      b2: Decay of the second moments, in [0, 1).
      gamma: Decay of the error buffer, in [0, 1).
      eps: Added to the second moments, inside the root.
      alpha: Decay of the saliency, in [0, 1).
      grad_clip: Largest norm of each leaf's gradient.
      learning_rate: The rate (or schedule) that the chain applies later on. The saliency is made of
        the weights after the step, and needs it; with 0, for want of it, of those before the step:
        a rate that is not the chain's would put it at weights that never were. It touches no step,
        save through ``weight_decay``.
      weight_decay: The decay that the chain applies later on, for the same reason. Published is
        :math:`\epsilon_t` with the norm of the decayed weights, so with both the rate enters a
        step, by a relative change of eps_t of their product.
      seed: Seed of the random initial U and V.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose update needs the params.

    Raises:
      ValueError: rank < 1, a decay outside [0, 1), a negative eps, grad_clip or weight_decay,
        params missing.
      TypeError: rank is not a Python integer (name it in ``static_args`` of inject_hyperparams), or
        a decay or eps is an array of a type narrower than float32, in which 0.999 is 1 (give
        inject_hyperparams ``hyperparam_dtype=jnp.float32``).

    Example:
      >>> import jax.numpy as jnp, optax_moma as om
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> tx = om.scale_by_umtam(rank=2)
      >>> state = tx.init(params)
      >>> state.U["kernel"].shape, state.error["kernel"].shape, state.base["kernel"].shape
      ((6, 2), (6, 4), (6, 4))

    Source: Moayedikia and Troncoso, arXiv 2512.17109, Algorithm 1.
    """
    rank = check_integer("rank", rank, lowest=1)
    for name, decay in (("b1", b1), ("b2", b2), ("gamma", gamma), ("alpha", alpha)):
        check_decay(name, decay)
    check_width("eps", eps)
    check_not_negative("eps", eps)
    check_not_negative("grad_clip", grad_clip)
    check_not_negative("weight_decay", weight_decay)

    def init_leaf(name: str, leaf: Any) -> _Matrix | _Dense | None:
        if leaf is None:
            return None
        wide = at_least_float32(leaf.dtype)
        layout = paper_layout(leaf)
        if layout is None:
            return _Dense(
                jnp.zeros_like(leaf, dtype=wide), jnp.zeros_like(leaf, dtype=jnp.finfo(wide).dtype)
            )
        m, n = layout.matrix_shape
        r = min(rank, m, n)
        key = jax.random.fold_in(jax.random.key(seed), name_hash(name))
        U, V = (
            jax.random.normal(k, (size, r), wide) / jnp.sqrt(size * r).astype(wide)
            for k, size in zip(jax.random.split(key), (m, n), strict=True)
        )
        s, R, C = (jnp.full((size,), eps, wide) for size in (r, m, n))
        dense = (jnp.zeros_like(leaf, dtype=wide) for _ in range(3))
        return _Matrix(U, s, V, R, C, *dense)

    def init(params: optax.Params) -> ScaleByUmtamState:
        params = unboxed(params)
        names, leaves = named_leaves(params, is_leaf=is_none)
        entries = [init_leaf(*args) for args in zip(names, leaves, strict=True)]
        return ScaleByUmtamState(jnp.zeros((), jnp.int32), **to_trees(params, entries, _FIELDS))

    def matrix_step(
        g: jax.Array, w: jax.Array, state: _Matrix, layout: Layout, count: jax.Array, rate: Any
    ) -> tuple[jax.Array, _Matrix]:
        wide = at_least_float32(g.dtype)
        U, s, V, R, C, E, W0, S = state
        # W0 is the parameter at the first step: at init it may be a shape without values.
        W0 = jnp.where(count == 0, w.astype(wide), W0)
        G, W, E = (_gathered(layout.to_matrix(x).astype(wide)) for x in (g, w, E))

        W = W * (1 - rate * weight_decay)
        norm, W_norm = jnp.linalg.norm(G), jnp.linalg.norm(W)
        G = G * jnp.minimum(1, grad_clip / divisor(norm))
        M = b1 * contract("mr,nr->mn", U * s[None], V) + (1 - b1) * G + gamma * E
        u, d, vt = jnp.linalg.svd(M, full_matrices=False)
        r = s.shape[0]
        # Beyond the numerical rank singular vectors are rounding noise: none are kept, nor is the
        # error that would be made of them.
        found = d > 10 * jnp.finfo(wide).eps * d[0]
        U, s, V = u[:, :r] * found[:r], d[:r] * found[:r], vt[:r].T * found[:r]
        low = contract("mr,nr->mn", U * s[None], V)
        E = jnp.where(jnp.any(found[r:]), M - low, 0)
        R = moments.ema(R, moments.row_sums(jnp.square(G)), b2)
        C = moments.ema(C, moments.col_sums(jnp.square(G)), b2)
        growth = jnp.where(W_norm > eps, jnp.maximum(1, norm / divisor(W_norm)), 1)
        v = R[:, None] * C / (jnp.sum(R) + eps)
        # A gradient that is zero everywhere leaves low = 0 over v = 0 when eps is 0.
        floor = v + eps * growth
        step = jnp.where(floor > 0, low * jax.lax.rsqrt(divisor(floor)), 0)
        step, E, H = (layout.from_matrix(x, g) for x in (step, E, jnp.sqrt(R[:, None] * C)))
        moved = w.astype(wide) * (1 - rate * weight_decay) - rate * step - W0
        S = moments.ema(S, jnp.square(moved) * H, alpha)
        return step.astype(g.dtype), _Matrix(U, s, V, R, C, E, W0, S)

    def dense_step(g: jax.Array, state: _Dense, count: jax.Array) -> tuple[jax.Array, _Dense]:
        G = g.astype(at_least_float32(g.dtype))
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(G))))
        G = G * jnp.minimum(1, grad_clip / divisor(norm))
        mu = moments.ema(state.mu, G, b1)
        nu = moments.ema(state.nu, jnp.square(jnp.abs(G)), b2)
        t = (count + 1).astype(nu.dtype)
        root = jnp.sqrt(nu / (1 - jnp.asarray(b2, nu.dtype) ** t)) + eps
        step = mu / (1 - jnp.asarray(b1, nu.dtype) ** t) / divisor(root)
        return step.astype(g.dtype), _Dense(mu, nu)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                "umtam needs the parameters, for its saliency: call update(grads, state, params)."
            )
        plain = unboxed(updates)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        leaves, treedef = jax.tree.flatten(updates, is_leaf=is_none)
        weights = treedef.flatten_up_to(params)
        views = [None if g is None else paper_layout(g) for g in leaves]
        old = to_entries(plain, state, (_Matrix, _Dense))
        steps, entries = [], []
        for g, w, view, entry in zip(leaves, weights, views, old, strict=True):
            if g is None:
                step, new = None, entry
            elif view is None:
                step, new = dense_step(g, entry, state.count)
            else:
                step, new = matrix_step(g, w, entry, view, state.count, rate)
            steps.append(step)
            entries.append(jax.tree.map(lambda x, y: x.astype(y.dtype), new, entry))
        trees = to_trees(plain, entries, _FIELDS)
        return treedef.unflatten(steps), ScaleByUmtamState(
            optax.safe_increment(state.count), **trees
        )

    return optax.GradientTransformationExtraArgs(init, update)


def umtam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 32,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    *,
    gamma: Scalar = 0.9,
    eps: Scalar = 1e-8,
    alpha: Scalar = 0.99,
    grad_clip: Scalar = 1.0,
    weight_decay: Scalar = 0.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""The optimizer of arXiv 2512.17109 as published, for comparison with :func:`moma`.

    .. math::
        \tilde M &= \beta_1 U \Sigma V^T + (1 - \beta_1) G + \gamma E, \quad
        U \Sigma V^T = SVD_r(\tilde M), \quad E = \tilde M - U \Sigma V^T \\
        W &\leftarrow W (1 - \eta \lambda) - \eta\, U \Sigma V^T \odot
        \big(R_i C_j / (\textstyle\sum R + \epsilon) + \epsilon_t\big)^{-1/2}

    with G the gradient of the leaf clipped to norm ``grad_clip``, R and C the moving averages of
    the row and column sums of G^2, and :math:`\epsilon_t = \epsilon \max(1, \lVert G_{unclipped}
    \rVert / \lVert W \rVert)`.

    What it costs: about 1.5 times AdamW's state and a full SVD of every matrix at every step; see
    :func:`scale_by_umtam`. With gamma = b1 and full rank, M + E is the dense moving average.

    Args:
      learning_rate: A number or a schedule.
      rank: r >= 1.
      b1: Decay of the momentum.
      b2: Decay of the second moments.
      gamma: Decay of the error buffer.
      eps: Added to the second moments, inside the root.
      alpha: Decay of the saliency.
      grad_clip: Largest norm of each leaf's gradient.
      weight_decay: Decoupled decay, multiplied by the learning rate.
      seed: Seed of the random initial U and V.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: An argument out of its range, or params missing in update.
      TypeError: rank is not a Python integer, or a decay or eps is an array of a type narrower than
        float32; see :func:`scale_by_umtam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_moma as om
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> tx = om.umtam(1e-2, rank=2)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> params = optax.apply_updates(params, updates)

    Source: Moayedikia and Troncoso, arXiv 2512.17109, Algorithm 1.
    """
    return optax.chain(
        scale_by_umtam(
            rank,
            b1,
            b2,
            gamma=gamma,
            eps=eps,
            alpha=alpha,
            grad_clip=grad_clip,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _gathered(x: jax.Array) -> jax.Array:
    """``x`` on every device: the SVD does not run on a sharded matrix."""
    sharding = sharding_of(x)
    return x if sharding is None else reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
