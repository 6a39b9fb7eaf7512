r"""`moma` as one might also have built it, to measure what each of its choices is worth.

    momentum of the preconditioned gradient, or preconditioning of the momentum
    Nesterov's momentum, or not
    the subspace renewed at each step, or at every k-th, or by several power iterations
    what the momentum loses to the truncation forgotten, or kept and fed back
    half of the gradient outside the subspace, or more or less of it

Plain code, for matrices alone: it forms what the library leaves implicit. With the library's
choices its updates are the library's.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_moma as om
from optax_moma import _moments as moments
from optax_moma._lowrank import Factors, orthonormalize
from optax_moma._orthogonal import orthogonal_factor

SMALLEST = 128
"""A leaf with fewer rows or columns is left to `moma` itself, which keeps Adam's moments of it."""


class Matrix(NamedTuple):
    """The momentum ``U diag(s) V^T``, what it lost, and the second moments R, C of a matrix."""

    factors: Factors
    error: Any
    R: jax.Array
    C: jax.Array


class Rounded(NamedTuple):
    """``values * scale``: int8, with a scale for every row."""

    values: jax.Array
    scale: jax.Array


class State(NamedTuple):
    """Number of updates, and a tree of Matrix."""

    count: jax.Array
    matrices: Any


def scale_by_variant(
    rank: int = 32,
    b1: float = 0.9,
    b2: float = 0.999,
    *,
    residual: float = 0.5,
    nesterov: bool = False,
    precondition: Literal["before", "after"] = "before",
    refresh: int = 1,
    power_iterations: int = 1,
    error_dtype: str | None = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""The update of ``om.scale_by_moma(rank, b1, b2)`` with other choices.

    Args:
      rank: Columns of the factors.
      b1: Decay of the momentum.
      b2: Decay of the second moments.
      residual: Multiplies what an update has outside the subspace.
      nesterov: Whether the momentum counts ``b1``, the gradient ``1 - b1``, inside the subspace;
        not with an error, which brings the momentum outside of it.
      precondition: The gradient before it enters the momentum, or momentum and residual after.
      refresh: The subspace is renewed at every so many steps, and kept in between: the momentum is
        then the projection of all gradients on it.
      power_iterations: How often a new subspace is brought nearer to that of the momentum.
      error_dtype: float32, bfloat16 or int8, to keep what the truncation takes from the momentum
        and add it to the next. The momentum then makes the step, ``residual`` times what it has
        outside the subspace: with 1, dense momentum, stored in two parts.
      learning_rate: Not used; `moma` takes it.
    """
    del learning_rate
    if nesterov and error_dtype is not None:
        raise ValueError("nesterov and error_dtype are not made to go together.")

    def init(params: Any) -> State:
        def one(leaf: Any) -> Matrix:
            m, n = leaf.shape
            V = jax.random.normal(jax.random.key(m * n), (n, min(rank, m, n))) / n**0.5
            factors = Factors(jnp.zeros((m, V.shape[1])), jnp.zeros(V.shape[1]), V)
            error = _stored(jnp.zeros_like(leaf), error_dtype)
            return Matrix(factors, error, jnp.zeros(m), jnp.zeros(n))

        return State(jnp.zeros((), jnp.int32), jax.tree.map(one, params))

    def update(updates: Any, state: State, params: Any = None, **extra: Any) -> tuple[Any, State]:
        del params, extra
        count = state.count + 1
        w1, w2 = 1 - b1**count, 1 - b2**count

        def one(G: jax.Array, old: Matrix) -> tuple[jax.Array, Matrix]:
            (U, s, V), error, R, C = old
            R = moments.ema(R, jnp.sum(G**2, 1), b2)
            C = moments.ema(C, jnp.sum(G**2, 0), b2)
            p, q = moments.inverse_root(R, C, w2, 1e-8)
            P = p[:, None] * q
            target = P * G if precondition == "before" else G
            whole = b1 * ((U * s) @ V.T + _restored(error, G.dtype)) + (1 - b1) * target
            X = V
            for _ in range(power_iterations):
                Q = jnp.where(state.count % refresh == 0, orthonormalize(whole @ X), U)
                X = whole.T @ Q
            Z, inside = X, Q @ (Q.T @ target)
            held = Q @ Z.T
            momentum, outside = held / w1, target - inside
            if error_dtype is not None:
                outside = (whole - held) / w1
            if nesterov:
                momentum = b1 * momentum + (1 - b1) * inside
            step = momentum + residual * outside
            step = step if precondition == "before" else P * step
            s = jnp.linalg.norm(Z, axis=0)
            V = jnp.where(s > 0, Z / jnp.maximum(s, jnp.finfo(s.dtype).tiny), V)
            error = _stored(whole - held, error_dtype)
            return orthogonal_factor(step, 128, max(step.shape) ** 0.5), Matrix(
                Factors(Q, s, V), error, R, C
            )

        leaves, treedef = jax.tree.flatten(updates)
        with jax.default_matmul_precision("highest"):
            pairs = [
                one(*x) for x in zip(leaves, treedef.flatten_up_to(state.matrices), strict=True)
            ]
        return treedef.unflatten([x for x, _ in pairs]), State(
            count, treedef.unflatten([x for _, x in pairs])
        )

    def labels(params: Any) -> Any:
        large = lambda x: x.ndim == 2 and min(x.shape) >= SMALLEST  # noqa: E731
        return jax.tree.map(lambda x: "matrix" if large(x) else "other", params)

    matrices = optax.GradientTransformationExtraArgs(init, update)
    return optax.partition({"matrix": matrices, "other": om.scale_by_moma(1, b1, b2)}, labels)


def _stored(x: jax.Array, dtype: str | None) -> Any:
    if dtype != "int8":
        return None if dtype is None else x.astype(dtype)
    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    return Rounded(jnp.round(x / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale)


def _restored(error: Any, dtype: Any) -> Any:
    if isinstance(error, Rounded):
        return error.values * error.scale
    return 0 if error is None else error.astype(dtype)
