"""The basis and the warm-started subspace step, against NumPy's QR and SVD."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_moma import _lowrank
from optax_moma._lowrank import Factors

orthonormalize = jax.jit(_lowrank.orthonormalize)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def with_singular_values(m: int, s: np.ndarray, seed: int = 0) -> np.ndarray:
    r = len(s)
    return np.linalg.qr(gaussian(m, r, seed=seed))[0] * s @ np.linalg.qr(gaussian(r, r, seed=9))[0]


def projection_error(Q) -> float:
    """How far the eigenvalues of Q^T Q are from being zeros and ones."""
    e = np.linalg.eigvalsh(np.swapaxes(Q, -1, -2) @ Q)
    return float(np.abs(e * (1 - e)).max())


def rank(Q) -> int:
    return int(np.sum(np.linalg.eigvalsh(np.asarray(Q).T @ Q) > 0.5))


Y = gaussian(40, 6)
HARD = {
    "plain": (Y, 6),
    "one column": (Y[:, :1], 1),
    "square": (gaussian(6, 6), 6),
    "duplicates": (Y[:, [0, 1, 0, 2, 1, 1]], 3),
    "negated": (Y[:, [0, 1, 2, 0]] * [1, 1, 1, -3], 3),
    "zero columns": (Y * [1, 0, 1, 1, 0, 1], 4),
    "all zero": (0 * Y, 0),
    "rank one": (np.outer(Y[:, 0], gaussian(6)), 1),
    "column scales": (Y * 10.0 ** np.array([0, -15, 9, -6, 12, -12]), 6),
    "tiny": (Y * 1e-18, 6),
    "huge": (Y * 1e17, 6),
    "condition 1e3": (with_singular_values(40, np.logspace(0, -3, 6)), 6),
}


@pytest.mark.parametrize("name", HARD)
def test_basis(name):
    """Q Q^T projects on the span: orthogonal to 1e-5, and nothing of the input is lost."""
    matrix, independent = HARD[name]
    Q = np.asarray(orthonormalize(jnp.asarray(matrix, jnp.float32)), np.float64)
    assert projection_error(Q) < 1e-5
    assert rank(Q) == independent
    unit = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    assert np.linalg.norm(unit - Q @ (Q.T @ unit), axis=0).max() < 1e-3  # sqrt(r eps): the shift


@pytest.mark.parametrize(("m", "r", "k"), [(64, 8, 4), (64, 16, 8), (100, 32, 16)])
def test_dependent_columns_leave_a_projection(m, r, k):
    """Products of Gaussians, r columns of rank k: gradients of batches smaller than the rank."""
    stack = np.stack([gaussian(m, k, seed=i) @ gaussian(k, r, seed=99 + i) for i in range(50)])
    Q = np.asarray(orthonormalize(jnp.asarray(stack, jnp.float32)), np.float64)
    assert np.all(np.isfinite(Q))
    assert max(projection_error(q) for q in Q) < 1e-5


@pytest.mark.parametrize(("m", "r"), [(64, 8), (256, 32)])
def test_condition_1e8_leaves_a_projection(m, r):
    stack = np.stack([with_singular_values(m, np.logspace(0, -8, r), seed=i) for i in range(20)])
    Q = np.asarray(orthonormalize(jnp.asarray(stack, jnp.float32)), np.float64)
    assert max(projection_error(q) for q in Q) < 1e-5


@pytest.mark.parametrize("r", [1, 2, 7, 32, 33, 100, 128])
def test_triangular_factors_and_inverses_are_those_of_lapack(r):
    """By blocks and products only, in both precisions, for one matrix and a stack of them."""
    with jax.enable_x64(True):
        gram = np.stack([x.T @ x for x in (gaussian(2 * r, r, seed=i) for i in range(2))])
        L = _lowrank._cholesky(jnp.asarray(gram))
        np.testing.assert_allclose(L, np.linalg.cholesky(gram), rtol=0, atol=1e-12 * np.sqrt(r))
        for inverse in (_lowrank._inverse_by_products, _lowrank._inverse_by_solve):
            np.testing.assert_allclose(inverse(L), np.linalg.inv(L), rtol=0, atol=1e-11)
        single = _lowrank._cholesky(jnp.asarray(gram[0], jnp.float32))
        np.testing.assert_allclose(single, np.linalg.cholesky(gram[0]), rtol=0, atol=1e-5 * r)


@pytest.mark.parametrize("r", [48, 96])
def test_more_columns_than_a_block_with_dependent_ones(r):
    """Half of the columns depend on others: their pivots are rounding, in either half."""
    half = gaussian(300, r // 2, seed=3)
    for Y in (half @ gaussian(r // 2, r, seed=4), np.repeat(half, 2, axis=1)):
        Q = np.asarray(orthonormalize(jnp.asarray(Y, jnp.float32)), np.float64)
        assert projection_error(Q) < 1e-5
        assert rank(Q) == r // 2
        unit = Y / np.linalg.norm(Y, axis=0)
        assert np.linalg.norm(unit - Q @ (Q.T @ unit), axis=0).max() < 2e-3  # sqrt(r eps)


@pytest.mark.parametrize("r", [3, 4, 8])
def test_a_tall_matrix_of_low_rank_has_a_basis(r):
    """The Gram of a million rows is off by far more than r eps: no factor of it may be NaN."""
    for seed in range(4):
        Y = gaussian(1_000_000, 2, seed=seed) @ gaussian(2, r, seed=9 + seed)
        Q = np.asarray(orthonormalize(jnp.asarray(Y, jnp.float32)), np.float64)
        assert projection_error(Q) < 1e-5
        assert rank(Q) == 2


def test_order_is_that_of_gram_schmidt():
    Q, exact = np.asarray(orthonormalize(jnp.asarray(Y, jnp.float32))), np.linalg.qr(Y)[0]
    np.testing.assert_allclose(Q * np.sign(np.sum(Q * exact, 0)), exact, atol=1e-5)


def test_a_stack_is_its_matrices():
    stack = jnp.asarray([[HARD["plain"][0], HARD["duplicates"][0]]] * 2, jnp.float32)
    Q = orthonormalize(stack)
    assert Q.shape == (2, 2, 40, 6)
    for i, name in enumerate(("plain", "duplicates")):
        alone = orthonormalize(jnp.asarray(HARD[name][0], jnp.float32))
        np.testing.assert_allclose(Q[1, i], alone, atol=1e-5)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def sharded(request):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((2, 4), ("layers", "rows"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("layers", "rows")))


def test_a_gpu_selects_where_others_branch(monkeypatch, sharded):
    """The same basis, of stacks that need a third pass and of such that do not, on any mesh."""
    names = ("plain", "duplicates", "condition 1e3", "all zero")
    stack = sharded(jnp.asarray([HARD[name][0] for name in names], jnp.float32))
    by_branches = orthonormalize(stack)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, **_: cuda(*x))
    selected = jax.jit(lambda x: _lowrank.orthonormalize(x))(stack)
    for Q, same, name in zip(selected, by_branches, names, strict=True):
        assert projection_error(np.asarray(Q, np.float64)) < 1e-5
        assert rank(Q) == HARD[name][1]
        np.testing.assert_allclose(Q, same, atol=1e-3 if "condition" in name else 1e-5)


product = partial(jnp.matmul, precision="highest")


@jax.jit
def follow(factors, decay, A):
    return _lowrank.follow(factors, decay, lambda X: product(A, X), lambda X: product(X.T, A))


def start(m: int, n: int, r: int) -> Factors:
    V = jnp.asarray(gaussian(n, r, seed=5) / np.sqrt(n), jnp.float32)
    return Factors(jnp.zeros((m, r)), jnp.zeros(r), V)


def whole(factors: Factors) -> np.ndarray:
    U, s, V = (np.asarray(x, np.float64) for x in factors)
    return U * s @ V.T


def test_follow_projects_the_target_on_its_image_of_v():
    m, n, r, decay = 12, 9, 3, 0.8
    U = np.linalg.qr(gaussian(m, r, seed=1))[0]
    V = gaussian(n, r, seed=2)
    V /= np.linalg.norm(V, axis=0)
    s, A = np.array([3.0, 2.0, 0.5]), gaussian(m, n, seed=3)
    factors = Factors(*(jnp.asarray(x, jnp.float32) for x in (U, s, V)))
    new, inside = follow(factors, decay, jnp.asarray(A, jnp.float32))
    target = decay * U * s @ V.T + A
    Q = np.linalg.qr(target @ V)[0]
    np.testing.assert_allclose(whole(new), Q @ Q.T @ target, atol=1e-5)
    np.testing.assert_allclose(new.U @ inside, Q @ Q.T @ A, atol=1e-5)
    np.testing.assert_allclose(new.U.T @ new.U, np.eye(r), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(new.V, axis=0), np.ones(r), rtol=1e-5)
    assert np.all(np.asarray(new.s) >= 0)


def test_a_target_at_rest_is_reached_vector_by_vector():
    A = with_singular_values(20, np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25]))[:, :6]
    u, s, vt = np.linalg.svd(A)
    factors = start(20, 6, 3)
    for _ in range(40):
        factors, _ = follow(factors, 0.0, jnp.asarray(A, jnp.float32))
    np.testing.assert_allclose(factors.s, s[:3], rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(factors.U * u[:, :3], 0)), np.ones(3), rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(factors.V * vt[:3].T, 0)), np.ones(3), rtol=1e-5)


def turned(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A nearby orthonormal basis. QR chooses signs of its own, which would reverse a direction."""
    Q, R = np.linalg.qr(x + by)
    return Q * np.sign(np.diag(R))


def test_one_step_on_a_drifting_stream_is_within_two_percent_of_the_svd():
    """The energy that each step truncates, over what the best rank-r matrix leaves of its target.

    The stream: a mean with singular values that fall as i^-1, turning slowly, and noise as large.
    """
    m, n, r, decay, steps = 48, 64, 8, 0.9, 40
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, m)))[0] for size in (m, n))
    s = 1 / np.arange(1, m + 1)
    factors, ours, best = start(m, n, r), [], []
    for _ in range(steps):
        u, v = (turned(x, 0.02 * rng.normal(size=x.shape) / np.sqrt(m)) for x in (u, v))
        noise = rng.normal(size=(m, n)) * np.linalg.norm(s) / np.sqrt(m * n)
        A = (1 - decay) * (u * s @ v.T + noise)
        target = decay * whole(factors) + A
        factors, _ = follow(factors, decay, jnp.asarray(A, jnp.float32))
        ours.append(np.sum((target - whole(factors)) ** 2))
        best.append(np.sum(np.linalg.svd(target, compute_uv=False)[r:] ** 2))
    # The first steps find their subspace from a random start.
    assert np.max(np.array(ours[4:]) / np.array(best[4:])) <= 1.02


def test_a_new_direction_is_found_after_many_steps_at_rank_one():
    m, n, decay = 10, 8, 0.9
    u, v = np.linalg.qr(gaussian(m, 2))[0], np.linalg.qr(gaussian(n, 2, seed=1))[0]
    old, new = (np.outer(u[:, i], v[:, i]) for i in range(2))
    factors = start(m, n, 3)
    for _ in range(200):
        factors, _ = follow(factors, decay, jnp.asarray((1 - decay) * old, jnp.float32))
    np.testing.assert_allclose(whole(factors), old, atol=1e-5)
    expected = old
    for _ in range(5):
        expected = decay * expected + (1 - decay) * new
        factors, _ = follow(factors, decay, jnp.asarray((1 - decay) * new, jnp.float32))
    np.testing.assert_allclose(whole(factors), expected, atol=1e-4)


def test_nothing_to_follow():
    factors = start(5, 4, 2)
    for _ in range(3):
        factors, inside = follow(factors, 0.9, jnp.zeros((5, 4)))
    assert not np.any(whole(factors)) and not np.any(inside)
    assert np.all(np.linalg.norm(factors.V, axis=0) > 0.5)  # still looking
