"""Factored second moments, against closed forms in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma import _moments as moments
from optax_moma._matrix import layouts

RNG = np.random.default_rng(0)
V = RNG.lognormal(sigma=2, size=(7, 5))  # squares of gradients


def sums(v: np.ndarray):
    return jnp.asarray(v.sum(-1), jnp.float32), jnp.asarray(v.sum(-2), jnp.float32)


def test_ema():
    np.testing.assert_allclose(moments.ema(jnp.array(2.0), jnp.array(10.0), 0.75), 4.0)


def test_sums():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(moments.row_sums(x), np.sum(np.asarray(x), axis=2))
    np.testing.assert_array_equal(moments.col_sums(x), np.sum(np.asarray(x), axis=1))


@pytest.mark.parametrize("weight", [1.0, 0.001])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_inverse_root(weight, scale):
    R, C = sums(V * scale)
    p, q = moments.inverse_root(R, C, weight, 0.0)
    v = np.outer(V.sum(1), V.sum(0)) / V.sum() * scale / weight
    np.testing.assert_allclose(p[:, None] * q, v**-0.5, rtol=1e-5)


def test_epsilon_is_relative_to_the_average_row_and_column():
    eps, weight = 0.1, 0.5
    R, C = sums(V)
    p, q = moments.inverse_root(R, C, weight, eps)
    rows, cols = V.sum(1) / V.sum(1).mean() + eps, V.sum(0) / V.sum(0).mean() + eps
    expected = (np.outer(rows, cols) * V.mean() / weight) ** -0.5
    np.testing.assert_allclose(p[:, None] * q, expected, rtol=1e-5)


def test_inverse_root_of_a_stack_is_that_of_its_matrices():
    v = RNG.lognormal(size=(3, 4, 5))
    p, q = moments.inverse_root(*sums(v), 0.3, 1e-3)
    for i in range(3):
        alone = moments.inverse_root(*sums(v[i]), 0.3, 1e-3)
        np.testing.assert_allclose(p[i], alone[0], rtol=1e-6)
        np.testing.assert_allclose(q[i], alone[1], rtol=1e-6)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_without_gradients_nothing_moves(eps):
    """0 times the preconditioner is 0, whatever epsilon."""
    p, q = moments.inverse_root(jnp.zeros(3), jnp.zeros(4), 0.5, eps)
    np.testing.assert_array_equal(p[:, None] * q, np.zeros((3, 4)))
    root = moments.dense_inverse_root(jnp.zeros(4), 0.5, eps)
    np.testing.assert_array_equal(root, np.zeros(4))


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_a_row_without_gradients_is_finite(eps):
    """A token that never occurred: its row of R is zero, and so is its row of G."""
    v = V.copy()
    v[2] = 0
    p, q = moments.inverse_root(*sums(v), 1.0, eps)
    step = jnp.sqrt(jnp.asarray(v, jnp.float32)) * p[:, None] * q
    assert np.all(np.isfinite(step)) and not np.any(step[2])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_dense_inverse_root(scale):
    v = V[0] * scale
    found = moments.dense_inverse_root(jnp.asarray(v, jnp.float32), 0.25, 0.0)
    np.testing.assert_allclose(found, (v / 0.25) ** -0.5, rtol=1e-5)
    found = moments.dense_inverse_root(jnp.asarray(v, jnp.float32), 0.25, 0.1)
    np.testing.assert_allclose(found, ((v + 0.1 * v.mean()) / 0.25) ** -0.5, rtol=1e-5)


def test_infinite_moments_are_those_of_entries_without_a_step():
    """The others step as if these had had no gradient."""
    v = V.copy()
    v[2] = v[:, 1] = 0
    R, C = sums(v)
    expected = moments.inverse_root(R, C, 0.5, 1e-8)
    p, q = moments.inverse_root(R.at[2].set(jnp.inf), C.at[1].set(jnp.inf), 0.5, 1e-8)
    assert p[2] == 0 and q[1] == 0
    others = np.arange(7) != 2, np.arange(5) != 1
    np.testing.assert_array_equal(p[others[0]], expected[0][others[0]])
    np.testing.assert_array_equal(q[others[1]], expected[1][others[1]])
    root = moments.dense_inverse_root(C.at[1].set(jnp.inf), 0.5, 1e-8)
    expected = moments.dense_inverse_root(C, 0.5, 1e-8)
    assert root[1] == 0
    np.testing.assert_array_equal(root[others[1]], expected[others[1]])


def test_estimate_keeps_the_row_and_column_sums():
    """Of all rank-one matrices this one has the sums of the average itself."""
    (layout,) = layouts(jnp.zeros(V.shape), None, 1)
    row, col = moments.estimate(*sums(V), 0.5, layout)
    assert row.shape == (7, 1) and col.shape == (1, 5)
    estimate = np.asarray(row * col, np.float64)
    np.testing.assert_allclose(estimate.sum(1), V.sum(1) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(estimate.sum(0), V.sum(0) / 0.5, rtol=1e-5)
    empty = moments.estimate(jnp.zeros(7), jnp.zeros(5), 1.0, layout)
    np.testing.assert_array_equal(empty.row * empty.col, np.zeros((7, 5)))
