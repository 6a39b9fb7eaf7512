"""`umtam` against a float64 NumPy transcription of Algorithm 1, and its identities."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om

STEPS = 20
SHAPES = {"wide": (6, 9), "tall": (9, 6), "convolution": (4, 3, 5), "bias": (7,), "scale": ()}
MATRIX_FIELDS = ("s", "R", "C", "error", "base", "saliency")


def draws(shape: tuple[int, ...], seed: int, dtype=np.float64) -> list[np.ndarray]:
    """A mean and noise around it, one array per step."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=shape)
    return [np.asarray(mean + rng.normal(size=shape), dtype) for _ in range(STEPS)]


def tree_draws(dtype) -> tuple[dict, list[dict]]:
    columns = {name: draws(shape, i, dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    params = {
        name: draws(shape, 50 + i, dtype)[0] for i, (name, shape) in enumerate(SHAPES.items())
    }
    return params, [{name: column[t] for name, column in columns.items()} for t in range(STEPS)]


def run(tx, params, grads, state=None):
    """The updates of every step, then the parameters and the state at the end."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return updates, optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    trajectory = []
    for g in grads:
        updates, params, state = step(params, state, g)
        trajectory.append(updates)
    return trajectory, params, state


def published_matrix(W, grads, U, s, V, rate, *, b1, b2, gamma, eps, alpha, grad_clip, decay):
    """Algorithm 1 on one matrix, step by step in float64."""
    U, s, V = (np.asarray(x, np.float64) for x in (U, s, V))
    W = np.array(W, np.float64).reshape(len(W), -1)
    (m, n), r = W.shape, len(s)
    R, C, E, S, W0 = np.full(m, eps), np.full(n, eps), 0 * W, 0 * W, W.copy()
    for t, G in enumerate(np.asarray(grads, np.float64).reshape(-1, m, n)):
        eta = rate(t)
        W = W * (1 - eta * decay)
        norm, W_norm = np.linalg.norm(G), np.linalg.norm(W)
        G = G * min(1, grad_clip / norm)
        M = b1 * U @ np.diag(s) @ V.T + (1 - b1) * G + gamma * E
        u, d, vt = np.linalg.svd(M)
        U, s, V = u[:, :r], d[:r], vt[:r].T
        low = U @ np.diag(s) @ V.T
        E = M - low
        R = b2 * R + (1 - b2) * (G * G).sum(axis=1)
        C = b2 * C + (1 - b2) * (G * G).sum(axis=0)
        v = np.outer(R, C) / (R.sum() + eps)
        eps_t = eps * max(1, norm / W_norm) if W_norm > eps else eps
        W = W - eta * low / np.sqrt(v + eps_t)
        S = alpha * S + (1 - alpha) * (W - W0) ** 2 * np.sqrt(np.outer(R, C))
    return {"params": W, "low": low, "s": s, "R": R, "C": C, "error": E, "base": W0, "saliency": S}


def published_vector(w, grads, rate, *, b1, b2, eps, grad_clip, decay, **_):
    """What the published code does to leaves that are no matrices: Adam, clipped leaf by leaf."""
    w = np.array(w, np.float64)
    mu, nu = 0 * w, 0 * w
    for t, g in enumerate(np.asarray(grads, np.float64)):
        g = g * min(1, grad_clip / np.linalg.norm(g))
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        step = mu / (1 - b1 ** (t + 1)) / (np.sqrt(nu / (1 - b2 ** (t + 1))) + eps)
        w = w * (1 - rate(t) * decay) - rate(t) * step
    return {"params": w, "mu": mu, "nu": nu}


def assert_close(actual, desired, rtol, what=""):
    """Relative to the largest entry: of a small one only the absolute error is meaningful."""
    actual, desired = np.asarray(actual, np.float64).ravel(), np.asarray(desired).ravel()
    error = np.abs(actual - desired).max() / np.abs(desired).max()
    assert error <= rtol, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("grad_clip", [0.7, 1e3], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("x64", [False, True], ids=["float32", "x64"])
def test_twenty_steps_are_those_published(x64, grad_clip):
    rtol, dtype = (1e-9, np.float64) if x64 else (1e-5, np.float32)
    numbers = {
        "b1": 0.85, "b2": 0.98, "gamma": 0.7, "eps": 1e-5, "alpha": 0.9, "grad_clip": grad_clip
    }  # fmt: skip
    # Optax's schedules are float32 whatever the mode.
    schedule = lambda count: 0.05 - 0.04 * jnp.minimum(count, 15) / 15
    with jax.enable_x64(True) if x64 else nullcontext():
        params, grads = tree_draws(dtype)
        tx = om.umtam(schedule, rank=3, weight_decay=0.1, **numbers)
        params = jax.tree.map(jnp.asarray, params)
        start = tx.init(params)
        _, moved, (state, *_) = run(tx, params, grads)
        assert {x.dtype for x in jax.tree.leaves((moved, state._replace(count=moved)))} == {
            np.dtype(dtype)
        }
        moved, state = jax.tree.map(np.asarray, (moved, state))
    rate = lambda t: 0.05 - 0.04 * min(t, 15) / 15

    assert state.count == STEPS
    for name, shape in SHAPES.items():
        steps = [g[name] for g in grads]
        if len(shape) < 2:
            want = published_vector(params[name], steps, rate, decay=0.1, **numbers)
            for field in ("mu", "nu"):
                assert_close(getattr(state, field)[name], want[field], rtol, (name, field))
        else:
            first = (start[0].U[name], start[0].s[name], start[0].V[name])
            want = published_matrix(params[name], steps, *first, rate, decay=0.1, **numbers)
            U, s, V = state.U[name], state.s[name], state.V[name]
            assert_close(U * s @ V.T, want["low"], rtol, (name, "U s V^T"))
            assert_close(U.T @ U, np.eye(3), rtol, (name, "U"))
            assert_close(V.T @ V, np.eye(3), rtol, (name, "V"))
            for field in MATRIX_FIELDS:
                assert_close(getattr(state, field)[name], want[field], rtol, (name, field))
        assert_close(moved[name], want["params"], rtol, (name, "params"))


def test_the_rate_that_saliency_is_told_touches_no_step():
    """But through weight_decay, as published: eps_t goes by the norm of the decayed weights."""
    params, *grads = draws((6, 9), 6, np.float32)
    steps = lambda **told: run(om.scale_by_umtam(2, eps=1e-2, **told), jnp.asarray(params), grads)
    (plain, _, start), (told, _, end) = steps(), steps(learning_rate=0.3)
    for a, b in zip(told, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert np.any(end.saliency != start.saliency)
    decayed, *_ = steps(learning_rate=0.3, weight_decay=1.0)
    assert np.max(np.abs(np.asarray(decayed[0]) / plain[0] - 1)) > 1e-3


@pytest.mark.parametrize("rank", [2, 6], ids=["low rank", "full rank"])
def test_with_gamma_equal_to_b1_momentum_and_error_are_the_dense_average(rank):
    grads = draws((6, 9), 3, np.float32)
    tx = om.scale_by_umtam(rank=rank, b1=0.9, gamma=0.9, grad_clip=1e9)
    first = tx.init(jnp.ones((6, 9)))
    _, _, state = run(tx, jnp.ones((6, 9)), grads)
    average = np.asarray(first.U * first.s @ first.V.T, np.float64)
    for g in grads:
        average = 0.9 * average + 0.1 * g
    assert_close(state.U * state.s @ state.V.T + state.error, average, 1e-5)
    if rank == 6:
        assert np.abs(state.error).max() < 1e-5


def permuted(state, rows, cols):
    return state._replace(U=state.U[rows], V=state.V[cols])


def test_permutations_commute():
    params, *grads = draws((6, 9), 4, np.float32)
    rng = np.random.default_rng(0)
    rows, cols = rng.permutation(6), rng.permutation(9)
    shuffle = lambda x: jnp.asarray(x)[rows][:, cols]
    tx = om.scale_by_umtam(rank=3, learning_rate=0.1)
    plain, _, state = run(tx, jnp.asarray(params), grads)
    start = permuted(tx.init(jnp.asarray(params)), rows, cols)
    mixed, _, mixed_state = run(tx, shuffle(params), [shuffle(g) for g in grads], start)
    for a, b in zip(mixed, plain, strict=True):
        assert_close(a, shuffle(b), 1e-4)
    assert_close(mixed_state.saliency, shuffle(state.saliency), 1e-4)
    assert_close(mixed_state.R, state.R[rows], 1e-5)


def test_transposition_commutes():
    params, *grads = draws((6, 9), 5, np.float32)
    tx = om.scale_by_umtam(rank=3, learning_rate=0.1)
    plain, _, state = run(tx, jnp.asarray(params), grads)
    first, start = tx.init(jnp.asarray(params)), tx.init(jnp.asarray(params.T))
    start = start._replace(U=first.V, V=first.U)
    turned, _, turned_state = run(tx, jnp.asarray(params.T), [g.T for g in grads], start)
    for a, b in zip(turned, plain, strict=True):
        assert_close(a, np.asarray(b).T, 1e-4)
    assert_close(turned_state.R, state.C, 1e-4)
    assert_close(turned_state.saliency, np.asarray(state.saliency).T, 1e-4)


def test_the_base_is_the_weight_at_the_first_step():
    """`init` may see shapes only."""
    params = {"w": jnp.full((3, 4), 2.0)}
    tx = om.umtam(0.1, rank=2)
    state = tx.init(jax.eval_shape(lambda: params))
    _, _, state = run(tx, params, [{"w": np.ones((3, 4), np.float32)}] * 3, state)
    np.testing.assert_array_equal(state[0].base["w"], params["w"])


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradients_move_nothing(eps):
    params = {"w": jnp.zeros((3, 4)), "b": jnp.zeros(4)}
    zero, one = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params)
    updates, moved, state = run(om.umtam(0.1, rank=2, eps=eps), params, [zero, zero, one])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((moved, state)))
    # As published, the momentum starts at eps times a random matrix, and P at eps^(-1/2).
    for early in updates[:2]:
        for x in jax.tree.leaves(early):
            np.testing.assert_allclose(x, np.zeros(x.shape), atol=0.1 * eps**0.5)
    assert all(np.all(x < -1e-3) for x in jax.tree.leaves(updates[2]))


BAD = [
    ({"rank": 0}, ValueError, "rank"),
    ({"rank": 2.5}, TypeError, "rank"),
    ({"rank": True}, TypeError, "rank"),
    ({"rank": "4"}, TypeError, "rank"),
    ({"b1": 1.0}, ValueError, "b1"),
    ({"b1": -0.1}, ValueError, "b1"),
    ({"b2": 1.5}, ValueError, "b2"),
    ({"b2": float("nan")}, ValueError, "b2"),
    ({"gamma": 1.0}, ValueError, "gamma"),
    ({"alpha": -1}, ValueError, "alpha"),
    ({"eps": -1e-8}, ValueError, "eps"),
    ({"grad_clip": -1.0}, ValueError, "grad_clip"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ({"b2": jnp.bfloat16(0.999)}, TypeError, "b2"),
    ({"alpha": jnp.float16(0.99)}, TypeError, "alpha"),
    ({"eps": jnp.float16(1e-8)}, TypeError, "eps"),
]


@pytest.mark.parametrize(("kwargs", "error", "name"), BAD, ids=str)
def test_bad_arguments_are_named(kwargs, error, name):
    for factory in (om.scale_by_umtam, lambda **kwargs: om.umtam(1e-3, **kwargs)):
        with pytest.raises(error, match=rf"\b{name}\b"):
            factory(**kwargs)


def test_params_are_needed():
    params = {"w": jnp.ones((3, 4))}
    tx = om.umtam(1e-3, rank=2)
    with pytest.raises(ValueError, match="parameters"):
        tx.update(params, tx.init(params))


def test_traced_numbers_are_not_checked():
    params = jnp.asarray(draws((3, 4), 0, np.float32)[0])

    @jax.jit
    def step(b1, gamma):
        tx = om.scale_by_umtam(2, b1, gamma=gamma)
        return tx.update(params, tx.init(params), params)[0]

    tx = om.scale_by_umtam(2, 0.8, gamma=0.7)
    assert_close(step(0.8, 0.7), tx.update(params, tx.init(params), params)[0], 1e-5)
    assert np.any(step(0.8, 0.7) != step(0.9, 0.7))
    assert step(1.5, -2.0).shape == (3, 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_state_in_float32(dtype):
    params = {"w": jnp.ones((4, 3), dtype), "b": jnp.ones(3, dtype)}
    updates, _, state = run(om.scale_by_umtam(rank=2), params, [params, params])
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state._replace(count=None))} == {jnp.dtype("float32")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact, *_ = run(om.scale_by_umtam(rank=2), wide, [wide, wide])
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert_close(a, b, float(jnp.finfo(dtype).eps))
