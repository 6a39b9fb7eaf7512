"""The noise of gradients: against sample variances in NumPy, and against the truth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from optax_moma.diagnostics import log_noise_scale, noise_scale, two_batch_noise

B1, B2, RATE = 0.8, 0.95, 0.5
SHAPES = {"bias": (7,), "layer": {"kernel": (12, 9)}}
SIZE = 7 + 12 * 9


def draws(count: int = 6, mean: float = 0.5, deviation: float = 1.0, seed: int = 0) -> list[dict]:
    """Gradients of one mean, each entry with this standard deviation."""
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    means = jax.tree.map(lambda s: mean * rng.normal(size=s), SHAPES, is_leaf=is_shape)
    draw = lambda m: jnp.asarray(m + deviation * rng.normal(size=m.shape), jnp.float32)
    return [jax.tree.map(draw, means) for _ in range(count)]


PARAMS = jax.tree.map(lambda g: jnp.zeros_like(g), draws(1)[0])

OPTIMIZERS = {
    "adam": lambda: optax.adamw(RATE, B1, B2),
    "moma": lambda **k: om.moma(RATE, 9, B1, B2, min_dim_size_to_factor=8, **k),
    "umtam": lambda: om.umtam(RATE, 3, B1, B2, gamma=B1, grad_clip=1e9),
}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def weights(count: int, decay: float) -> np.ndarray:
    w = decay ** np.arange(count - 1, -1, -1)
    return w / w.sum()


def train(tx, grads, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        state = update(g, state, params)[1]
    return state


def moments(grads: list[dict]) -> tuple[np.ndarray, np.ndarray, float]:
    """m, v, and the sum of squared weights of m."""
    g = np.stack([flat(x) for x in grads])
    w1, w2 = weights(len(g), B1), weights(len(g), B2)
    return w1 @ g, w2 @ g**2, float(np.sum(w1**2))


def test_adam_is_the_formula_in_numpy():
    grads = draws()
    m, v, kappa = moments(grads)
    found = noise_scale(train(OPTIMIZERS["adam"](), grads), RATE, b1=B1, b2=B2)
    S = (v.sum() - m @ m) / (1 - kappa)
    np.testing.assert_allclose(found.variance, S, rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, v.sum() - S, rtol=1e-4)
    np.testing.assert_allclose(found.scale, RATE * S, rtol=1e-5)
    np.testing.assert_allclose(found.adaptive, RATE * np.sum(1 - m**2 / v) / (1 - kappa), rtol=1e-5)


def test_umtam_keeps_the_dense_average_in_two_parts():
    """Only the second moments of single entries, in ``adaptive``, are of rank one."""
    grads = draws()
    m, v, kappa = moments(grads)
    found = noise_scale(train(OPTIMIZERS["umtam"](), grads), RATE, b1=B1, b2=B2)
    np.testing.assert_allclose(found.variance, (v.sum() - m @ m) / (1 - kappa), rtol=1e-4)
    v_of = lambda g: np.asarray(g["layer"]["kernel"], np.float64) ** 2
    kernel = np.tensordot(weights(len(grads), B2), np.stack([v_of(g) for g in grads]), axes=1)
    v[7:] = (np.outer(kernel.sum(1), kernel.sum(0)) / kernel.sum()).ravel()
    np.testing.assert_allclose(found.adaptive, RATE * np.sum(1 - m**2 / v) / (1 - kappa), rtol=1e-4)


@pytest.mark.parametrize("rank", [9, 2])
def test_moma_divides_its_momentum_by_the_preconditioner(rank):
    """The matrices of the state multiplied out, of whole rank and of less: there without kappa."""
    grads = draws()
    state = train(om.scale_by_moma(rank, B1, B2, min_dim_size_to_factor=8), grads)
    m, v, kappa = moments(grads)
    M = np.asarray(
        (state.U["layer"]["kernel"] * state.s["layer"]["kernel"]) @ state.V["layer"]["kernel"].T,
        np.float64,
    )
    M = M / (1 - B1 ** len(grads))
    R, C = (np.asarray(x["layer"]["kernel"], np.float64) for x in (state.R, state.C))
    factored = np.outer(R, C) / R.sum() / (1 - B2 ** len(grads))
    own = kappa if rank == 9 else 0
    variance = (v[:7].sum() - m[:7] @ m[:7]) / (1 - kappa)
    variance += (v[7:].sum() - np.sum(M**2 * factored)) / (1 - own)
    share = np.sum(1 - m[:7] ** 2 / v[:7]) / (1 - kappa) + np.sum(1 - M**2) / (1 - own)
    found = noise_scale(state, RATE, b1=B1, b2=B2)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-4)
    np.testing.assert_allclose(found.adaptive, RATE * share, rtol=1e-4)


def test_stacked_matrices_are_added_up():
    g = np.random.default_rng(0).normal(size=(5, 3, 8, 10)).astype(np.float32)
    state = train(om.scale_by_moma(4, B1, B2, min_dim_size_to_factor=8), list(g), g[0])
    U, s, V, R, C = (np.asarray(x, np.float64) for x in state[3:8])
    M = np.einsum("bmr,br,bnr->bmn", U, s, V) / (1 - B1**5)
    v = np.einsum("bm,bn,b->bmn", R, C, 1 / R.sum(1)) / (1 - B2**5)
    found = noise_scale(state, RATE, b1=B1, b2=B2)
    np.testing.assert_allclose(found.mean_square, np.sum(M**2 * v), rtol=1e-4)
    total = weights(5, B2) @ np.sum(np.float64(g) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(found.variance + found.mean_square, total, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam", "umtam"])
def test_logged_is_the_sample_variance_in_the_window_of_the_momentum(name):
    """sum_i w_i ||g_i - m||^2 / (1 - sum w_i^2), though the noise falls on the way."""
    grads = draws(20) + draws(20, deviation=0.2, seed=1)
    tx = log_noise_scale(OPTIMIZERS[name](), RATE, b1=B1, b2=B2)
    found = train(tx, grads).noise
    g = np.stack([flat(x) for x in grads])
    w = weights(len(g), B1)
    m = w @ g
    S = np.sum(w * np.sum((g - m) ** 2, axis=1)) / (1 - np.sum(w**2))
    np.testing.assert_allclose(found.variance, S, rtol=1e-3)
    np.testing.assert_allclose(found.scale, RATE * found.variance, rtol=1e-6)


@pytest.mark.parametrize(
    ("tx", "rtol"),
    [
        (optax.scale_by_adam(), 0.05),
        (om.scale_by_moma(9, min_dim_size_to_factor=8), 0.05),
        (om.scale_by_moma(2, min_dim_size_to_factor=8), 0.1),
    ],
    ids=["adam", "moma of full rank", "moma of rank 2"],
)
def test_finds_the_true_variance(tx, rtol):
    """Averaged over 30 short runs: the share of noise in the average is accounted for."""
    runs = [noise_scale(train(tx, draws(8, 0.1, 2.0, seed=i)), 1.0) for i in range(30)]
    found = np.mean([float(run.variance) for run in runs])
    np.testing.assert_allclose(found, 4 * SIZE, rtol=rtol)


def test_one_gradient_has_no_spread():
    tx = log_noise_scale(OPTIMIZERS["moma"](), RATE)
    for state in (tx.init(PARAMS), train(tx, draws(1))):
        np.testing.assert_array_equal(jax.tree.leaves(state.noise), np.zeros(4))
        np.testing.assert_array_equal(noise_scale(state.inner, RATE), np.zeros(4))


def test_equal_gradients_have_none():
    grads = draws(1) * 5
    found = noise_scale(train(OPTIMIZERS["adam"](), grads), RATE, b1=B1, b2=B2)
    total = np.sum(flat(grads[0]) ** 2)
    np.testing.assert_allclose(found.mean_square, total, rtol=1e-5)
    assert found.variance < 1e-4 * total


def test_a_leaf_without_gradient_counts_nothing():
    grads = draws()
    with_dead = [g | {"pooler": jnp.zeros((9, 9))} for g in grads]
    for name in ("adam", "moma"):  # umtam's second moments start above zero
        tx = OPTIMIZERS[name]()
        found = noise_scale(train(tx, with_dead, with_dead[0]), RATE, b1=B1, b2=B2)
        want = noise_scale(train(tx, grads), RATE, b1=B1, b2=B2)
        np.testing.assert_allclose(found, want, rtol=1e-5)


def test_heavy_ball():
    state = train(OPTIMIZERS["adam"](), draws())
    plain, by_one, by_two = (
        noise_scale(state, RATE, momentum=0.9 if p else 0.0, momentum_power=p) for p in (0, 1, 2)
    )
    np.testing.assert_allclose([by_one.scale / plain.scale, by_two.scale / plain.scale], [10, 100])
    assert by_two.variance == plain.variance


# As a transformation


def test_logging_changes_no_update_and_follows_a_schedule():
    schedule, grads = optax.linear_schedule(1.0, 0.0, 10), draws()
    tx = optax.adamw(schedule, B1, B2)
    logged = log_noise_scale(tx, schedule, b1=B1, b2=B2)
    plain_state, state = tx.init(PARAMS), logged.init(PARAMS)
    for t, g in enumerate(grads):
        want, plain_state = tx.update(g, plain_state, PARAMS)
        updates, state = logged.update(g, state, PARAMS)
        np.testing.assert_array_equal(flat(updates), flat(want))
        np.testing.assert_allclose(
            state.noise.scale, float(schedule(t)) * state.noise.variance, rtol=1e-6
        )


def test_logging_sees_what_the_optimizer_sees():
    """Clipping inside the wrapper or before it: the gradients that the moments are made of."""
    grads = draws()
    options = {"b1": B1, "b2": B2}
    adam, clip = OPTIMIZERS["adam"](), optax.clip_by_global_norm(3.0)
    inside = train(log_noise_scale(optax.chain(clip, adam), RATE, **options), grads).noise
    before = train(optax.chain(clip, log_noise_scale(adam, RATE, **options)), grads)[1].noise
    np.testing.assert_allclose(inside, before, rtol=1e-5)
    assert inside.variance < 9


def test_accumulation_inside_equals_accumulation_outside():
    grads, options = draws(8), {"b1": B1, "b2": B2}
    adam = OPTIMIZERS["adam"]()
    inside = log_noise_scale(optax.MultiSteps(adam, 2).gradient_transformation(), RATE, **options)
    outside = optax.MultiSteps(log_noise_scale(adam, RATE, **options), 2)
    found = train(inside, grads).noise
    want = train(outside.gradient_transformation(), grads).inner_opt_state.noise
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_curvature_is_still_found_and_the_state_scans():
    grads = draws()
    tx = log_noise_scale(OPTIMIZERS["moma"](), RATE, b1=B1, b2=B2)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)

    def step(state, g):
        state = tx.update(g, state, PARAMS)[1]
        return state, state.noise.scale

    state, trace = jax.lax.scan(step, tx.init(PARAMS), stacked)
    assert om.curvature_from(state, PARAMS)["layer"]["kernel"].row.shape == (12, 1)
    assert trace[0] == 0 and jnp.all(trace[1:] > 0) and trace[-1] == state.noise.scale


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_logging_of_a_tree_without_leaves(name):
    """Optax's map_params runs init on one; there is no noise, and no fault."""
    tx = log_noise_scale(OPTIMIZERS[name](), RATE)
    updates, state = jax.jit(tx.update)({}, tx.init({}), {})
    assert updates == {} and not np.any(state.noise)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init({}))
    trained = train(tx, draws(2))
    same = optax.tree.map_params(tx, lambda x: x, trained)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_of_a_partition_are_added():
    grads = draws()
    labels = {"bias": "a", "layer": {"kernel": "b"}}
    make = OPTIMIZERS["adam"]
    found = noise_scale(train(optax.partition({"a": make(), "b": make()}, labels), grads), RATE)
    np.testing.assert_allclose(found, noise_scale(train(make(), grads), RATE), rtol=1e-5)


# Two batches


def test_two_batches_give_the_sample_variance():
    """With all micro-batches of one batch the estimate is the unbiased variance of their mean."""
    g = np.random.default_rng(0).normal(1.0, 2.0, size=(6, 50))  # six batches of 4 examples each
    found = two_batch_noise(np.mean(np.sum(g**2, 1)), np.sum(np.mean(g, 0) ** 2), 4, 24)
    variance = np.var(g, axis=0, ddof=1).sum()
    np.testing.assert_allclose(found.trace, 4 * variance, rtol=1e-5)
    np.testing.assert_allclose(found.mean_square, np.sum(g.mean(0) ** 2) - variance / 6, rtol=1e-5)
    np.testing.assert_allclose(found.simple, found.trace / found.mean_square)


def loss(params, x, y, size):
    """The mean over the first ``size`` examples."""
    hidden = jnp.tanh(x @ params["in"])
    each = optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], y)
    return jnp.sum(each * (jnp.arange(len(x)) < size)) / size


@pytest.mark.parametrize("name", ["adam", "moma"])
def test_ranks_training_as_the_exact_estimate_does(name):
    """Over six batch sizes and the course of training, on a small network."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)
    y = jnp.argmax(x @ rng.normal(size=(16, 8)) + rng.normal(size=(512, 8)), axis=1)
    start = {
        k: jnp.asarray(rng.normal(size=s) / 4) for k, s in (("in", (16, 24)), ("out", (24, 8)))
    }
    square = lambda g: optax.tree.norm(g, squared=True)
    tx = optax.adam(0.02) if name == "adam" else om.moma(0.02, 4, min_dim_size_to_factor=8)
    tx = log_noise_scale(tx, 0.02)

    def exact(params, size):
        each = jax.vmap(jax.grad(loss), (None, 0, 0, None))(params, x[:, None], y[:, None], 1)
        whole = square(jax.tree.map(lambda g: jnp.mean(g, 0), each))
        return two_batch_noise(jnp.mean(jax.vmap(square)(each)), whole, 1, len(x)).trace / size

    def run(size):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (64,), 0, len(x))
            g = jax.grad(loss)(params, x[rows], y[rows], size)
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        def ten_steps(carry, key):
            carry, _ = jax.lax.scan(step, carry, jax.random.split(key, 10))
            return carry, (carry[1].noise.variance, exact(carry[0], size))

        keys = jax.random.split(jax.random.key(0), 12)
        return jax.lax.scan(ten_steps, (start, tx.init(start)), keys)[1]

    found, want = (
        np.asarray(x)[:, 2:].ravel() for x in jax.jit(jax.vmap(run))(2 ** jnp.arange(1, 7))
    )
    assert stats.spearmanr(found, want).statistic > 0.9
    assert 0.7 < np.median(found / want) < 1.4


# Errors


@pytest.mark.parametrize("tx", [optax.sgd(0.1, momentum=0.9), optax.adafactor(0.1)])
def test_states_without_both_moments(tx):
    with pytest.raises(ValueError, match=r"no first and second moments.*two_batch_noise"):
        noise_scale(tx.init(PARAMS), 0.1)
    with pytest.raises(ValueError, match="no first and second moments"):
        log_noise_scale(tx, 0.1).init(PARAMS)


def test_a_state_that_is_not_finite_is_named():
    bad = draws()
    bad[-1]["layer"]["kernel"] = bad[-1]["layer"]["kernel"].at[0, 0].set(jnp.nan)
    for name in ("adam", "moma"):
        state = train(OPTIMIZERS[name](), bad[:1] + bad[-1:])
        with pytest.raises(ValueError, match=r"opt_state .* not finite .*layer/kernel"):
            noise_scale(state, RATE)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"b1": 0.0}, "b1 must be positive"),
        ({"b2": 1.0}, "b2 must lie in"),
        ({"momentum": 1.0}, "momentum must lie in"),
        ({"momentum_power": -1}, "momentum_power must not be negative"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        noise_scale(OPTIMIZERS["adam"]().init(PARAMS), RATE, **kwargs)
    with pytest.raises(ValueError, match=message):
        log_noise_scale(OPTIMIZERS["adam"](), RATE, **kwargs)


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (0, 4)])
def test_batch_sizes_that_tell_nothing(sizes):
    with pytest.raises(ValueError, match="small_size must be positive and less than big_size"):
        two_batch_noise(1.0, 1.0, *sizes)
