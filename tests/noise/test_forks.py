"""The study's training in one program against plain loops, and its exact estimate against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from experiments.noise import forks
from experiments.noise.forks import Setting

PLAIN = {
    "sgd": lambda s, rate: optax.chain(
        optax.add_decayed_weights(s.weight_decay), optax.sgd(rate, s.momentum)
    ),
    "adamw": lambda s, rate: optax.adamw(rate, weight_decay=s.weight_decay),
    "moma": lambda s, rate: om.moma(
        rate,
        forks.RANK,
        min_dim_size_to_factor=forks.SMALLEST,
        weight_decay=s.weight_decay,
        orthogonal_block_size=None,
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_all_settings_at_once_are_what_each_is_alone(name, problem):
    momentum = 0.5 if name == "sgd" else 0.0
    settings = [Setting(name, 8, "cosine", rate, momentum, 0.01) for rate in (1e-3, 1e-2)]
    rows = forks.orders(320, (0, 1), 6, 8)
    starts = jax.vmap(lambda seed: problem.init(jax.random.key(seed)))(jnp.arange(2))
    ends, measured = forks.train(problem, settings, starts, rows, 2)
    assert measured.logged.shape == (2, 2, 2, 2)
    s, p, b = 1, 0, 1
    rate = forks.schedule("cosine", settings[s].learning_rate, 6)
    tx = PLAIN[name](settings[s], rate)
    params = problem.init(jax.random.key(p))
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(problem.loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for i in rows[p, b]:
        batch = jax.tree.map(lambda x, i=i: x[i], problem.train)
        params, state = step(params, state, batch)
    found = jax.tree.map(lambda x: x[s, p, b], ends)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, params)
    np.testing.assert_allclose(measured.rate[s, p, b], [rate(2), rate(5)], rtol=1e-5)


def test_exact_noise_is_the_sample_variance_of_batch_means():
    """Of gradients that are the examples themselves."""
    x = np.random.default_rng(0).normal(1, 2, (60, 5))
    probes = np.arange(60).reshape(12, 5)
    found = forks.two_batch(lambda i: {"w": jnp.asarray(x, jnp.float32)[i].mean(0)}, probes)
    means = x.reshape(12, 5, 5).mean(1)
    np.testing.assert_allclose(found.trace / 5, means.var(0, ddof=1).sum(), rtol=1e-4)


def test_orders_are_permutations_of_their_own():
    rows = forks.orders(20, (0, 1), 10, 4)
    assert rows.shape == (2, 2, 10, 4)
    flat = rows.reshape(4, 40)
    for one in flat:
        assert sorted(one[:20]) == sorted(one[20:]) == list(range(20))
    assert len({tuple(one) for one in flat}) == 4


def test_schedules():
    cosine, constant = (forks.schedule(kind, 2.0, 100) for kind in ("cosine", "constant"))
    np.testing.assert_allclose([cosine(0), constant(0)], [0.4, 0.4])  # 5 steps of warm-up
    np.testing.assert_allclose([constant(4), constant(99)], [2, 2])
    np.testing.assert_allclose(cosine(52), 1 + np.cos(np.pi * 47 / 95), rtol=1e-4)
    with pytest.raises(ValueError, match="schedule must be"):
        forks.schedule("linear", 1.0, 10)


def test_the_proxy():
    assert Setting("sgd", 32, "cosine", 0.1, 0.9, 0.0).noise == pytest.approx(0.1 / 32 / 0.1)


def test_settings_of_two_programs_are_refused(problem):
    two = [Setting("sgd", 8, kind, 0.1, 0.0, 0.0) for kind in ("cosine", "constant")]
    with pytest.raises(ValueError, match="must share optimizer, batch and schedule"):
        forks.train(problem, two, None, np.zeros((1, 2, 4, 8), int), 1)
    with pytest.raises(ValueError, match="4 steps cannot be cut into 3"):
        forks.train(problem, two[:1], None, np.zeros((1, 2, 4, 8), int), 3)
    with pytest.raises(ValueError, match="optimizer must be"):
        forks.optimizer(two[0]._replace(optimizer="lion"), lambda _: 0.1)
