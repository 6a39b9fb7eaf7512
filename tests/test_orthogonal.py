"""The orthogonal factor, against the iteration in float64, and the optimizer that applies it."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_moma as om
from optax_moma._matrix import contract
from optax_moma._orthogonal import orthogonal_factor


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_singular_values(X) -> np.ndarray:
    """The iteration on each singular value, in float64, from the Schatten norm of order 8, or the
    length of a row of ones if that is more."""
    U, s, Vt = np.linalg.svd(np.asarray(X, np.float64), full_matrices=False)
    least = np.sqrt(max(X.shape[-2:]))
    s = s / np.maximum(np.sum(s**8, -1, keepdims=True) ** (1 / 8), least)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[..., None, :]) @ Vt


def by_blocks(X, count: int) -> np.ndarray:
    """The same of each of ``count`` blocks of the shorter side."""
    axis = -2 if X.shape[-2] <= X.shape[-1] else -1
    size = -(-X.shape[axis] // count)
    cuts = range(size, X.shape[axis], size)
    return np.concatenate([by_singular_values(b) for b in np.split(X, list(cuts), axis)], axis)


def exact(X, block_size: int) -> np.ndarray:
    """The function in float64."""
    with jax.enable_x64(True):
        return np.asarray(orthogonal_factor(jnp.asarray(X, jnp.float64), block_size))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (2, 3, 5, 8), (1, 4), (4, 1)])
def test_every_singular_value_goes_its_way(shape):
    X = gaussian(*shape)
    np.testing.assert_allclose(exact(X, 10), by_singular_values(X), atol=1e-10)
    found = jax.jit(orthogonal_factor, static_argnums=1)(jnp.asarray(X), 10)
    np.testing.assert_allclose(found, exact(X, 10), atol=2e-5)


@pytest.mark.parametrize("size", [1e1, 1e6, 1e15])
def test_the_scale_does_not_matter(size):
    X = jnp.asarray(10 * gaussian(6, 9))
    np.testing.assert_allclose(orthogonal_factor(size * X, 10), orthogonal_factor(X, 10), atol=1e-5)


def test_what_is_far_below_one_fades():
    """Alpha is at least sqrt(n): the smaller the entries, the smaller the result, by the slope."""
    X = gaussian(6, 9)
    faint = np.asarray(orthogonal_factor(jnp.asarray(1e-6 * X), 10))
    np.testing.assert_allclose(faint, 3.4445**3 / 3 * 1e-6 * X, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "block_size", "count"),
    [
        ((6, 9), 3, 2),
        ((9, 6), 3, 2),
        ((9, 6), 5, 2),  # 3 + 3, not 5 + 1
        ((7, 9), 3, 4),  # a power of two: 2 + 2 + 2 + 1, filled up
        ((2, 3, 8, 5), 3, 2),
        ((4, 9), 1, 4),
    ],
)
def test_blocks_go_their_own_ways(shape, block_size, count):
    X = gaussian(*shape)
    np.testing.assert_allclose(exact(X, block_size), by_blocks(X, count), atol=1e-10)


def test_values_above_a_fiftieth_come_to_about_one():
    U, V = (np.linalg.qr(gaussian(20, 20, seed=i))[0] for i in range(2))
    s = 100 * np.geomspace(1, 0.005, 20)
    values = np.diag(U.T @ orthogonal_factor(jnp.asarray(U * s @ V.T), 20) @ V)
    large = s > 0.02 * np.sum(s**8) ** (1 / 8)
    assert 10 < large.sum() < 20  # else nothing is tested
    assert np.all(values[large] > 0.68) and np.all(values < 1.21)


def test_a_direction_that_is_rounding_error_stays_small():
    """In float32 a Gram knows no values below some 3e-4 of the largest, nor their signs."""
    U, V = (np.linalg.qr(gaussian(64, 64, seed=i))[0] for i in range(2))
    s = 100 * np.geomspace(1, 1e-7, 64)
    F = orthogonal_factor(jnp.asarray(U * s @ V.T, jnp.float32), 64)
    assert np.linalg.svd(F, compute_uv=False).max() < 1.21
    assert np.linalg.norm(U[:, s < 3e-3].T @ F, axis=1).max() < 0.05


@pytest.mark.parametrize(
    ("values", "bound"),
    [
        (np.geomspace(1, 0.1, 64), 0.02),
        (np.geomspace(1, 1e-4, 64), 0.05),
        (np.array([1] + 63 * [1e-3]), 0.2),
    ],
    ids=["alike", "unlike", "one"],
)
def test_products_with_bfloat16_factors_do(values, bound, monkeypatch):
    """What TPUs multiply with by default, emulated: both products with X are so rounded."""
    U, V = (np.linalg.qr(gaussian(size, 64, seed=size))[0] for size in (64, 256))
    X = np.asarray(U * 100 * values @ V.T, np.float32)
    exactly = np.asarray(orthogonal_factor(jnp.asarray(X), 64))

    def rounded(subscripts, a, b, precision=jax.lax.Precision.HIGHEST):
        if precision is None:
            a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
        return contract(subscripts, a, b, precision)

    monkeypatch.setattr("optax_moma._orthogonal.contract", rounded)
    roughly = np.asarray(orthogonal_factor(jnp.asarray(X), 64))
    assert 1e-4 < np.linalg.norm(roughly - exactly) < bound * np.linalg.norm(exactly)
    assert np.linalg.svd(roughly, compute_uv=False).max() < 1.25


def test_nothing_stays_nothing():
    assert not np.any(orthogonal_factor(jnp.zeros((3, 4)), 2))
    X = gaussian(4, 6)
    X[1], X[2:, 3] = 0, 0
    found = np.asarray(orthogonal_factor(jnp.asarray(X), 2))
    assert not found[1].any() and not found[2:, 3].any()
    assert found[0].any() and found[2].any()


GRADIENTS = [{"w": gaussian(3, 8, 11, seed=i), "b": gaussian(5, seed=i)} for i in range(6)]
SETTINGS = {"rank": 2, "min_dim_size_to_factor": 8}
FREE = SETTINGS | {"orthogonal_block_size": None, "clip_rms": np.inf, "clip_spectral": np.inf}


def run(tx, gradients=GRADIENTS):
    update, state, steps = jax.jit(tx.update), tx.init(gradients[0]), []
    for g in gradients:
        step, state = update(g, state, gradients[0])
        steps.append(step)
    return steps, state


@pytest.mark.parametrize(("block_size", "count", "residual"), [(128, 1, 1.0), (4, 2, 0.25)])
def test_updates_are_the_orthogonal_factors_of_those_without(block_size, count, residual):
    """At an RMS of about one; what is remembered is the same."""
    plain, plain_state = run(om.scale_by_moma(**FREE, residual=residual))
    tx = om.scale_by_moma(**SETTINGS, residual=residual, orthogonal_block_size=block_size)
    steps, state = run(tx)
    for step, other in zip(steps, plain, strict=True):
        expected = 11**0.5 * by_blocks(np.asarray(other["w"]), count)
        assert 0.7 < np.sqrt(np.mean(expected**2)) < 1.2
        np.testing.assert_allclose(step["w"], expected, atol=1e-4)
    momenta = ("U", "s", "V", "R", "C", "mu", "nu")
    kept, others = ([getattr(x, name) for name in momenta] for x in (state, plain_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, others)


@pytest.mark.parametrize("clip_rms", [0.0625, 3.0, np.inf])
def test_clip_rms_is_the_size_of_an_update_up_to_one(clip_rms):
    """A sixteenth, as a power of two, scales what is rounded without another rounding."""
    (one, *_), _ = run(om.scale_by_moma(**SETTINGS))
    (step, *_), _ = run(om.scale_by_moma(**SETTINGS, clip_rms=clip_rms))
    np.testing.assert_allclose(step["w"], min(1, clip_rms) * one["w"], rtol=1e-6)


def test_rows_that_no_gradient_reached_do_not_count():
    """An embedding is updated as if it were its used rows alone; each matrix of a stack by its."""
    used = gaussian(3, 12, 10)
    tx = om.scale_by_moma(3, min_dim_size_to_factor=2)
    alone, _ = run(tx, list(used))
    among, _ = run(tx, list(np.pad(used, [(0, 0), (4, 20), (0, 0)])))
    for a, b in zip(among, alone, strict=True):
        np.testing.assert_allclose(a[4:16], b, atol=1e-4)
        assert not np.any(a[:4]) and not np.any(a[16:])
    stack = gaussian(3, 2, 24, 10)
    stack[:, 1, 12:] = 0
    steps, _ = run(tx, list(stack))
    for step in steps:
        sizes = [np.sqrt(np.mean(x**2)) for x in (step[0], step[1, :12])]
        assert 0.7 < min(sizes) and max(sizes) < 1.2


def test_updates_fade_when_gradients_cease():
    """As the momentum does, but for the time that the orthogonal factor makes up for it."""
    nothing = jax.tree.map(np.zeros_like, GRADIENTS[0])
    steps, _ = run(om.scale_by_moma(**SETTINGS), GRADIENTS + 100 * [nothing])
    sizes = [float(np.sqrt(np.mean(np.square(step["w"])))) for step in steps]
    assert sizes[5] > 0.5
    assert all(later < 0.91 * earlier for earlier, later in pairwise(sizes[60:]))
    assert sizes[-1] < 1e-2


def test_saliency_is_the_path_integral_of_the_emitted_updates():
    steps, state = run(om.scale_by_moma(**SETTINGS))
    path = sum(np.float64(g["w"]) * u["w"] for g, u in zip(GRADIENTS, steps, strict=True))
    np.testing.assert_allclose(state.saliency_row["w"], path.sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.saliency_col["w"], path.sum(-2), rtol=1e-4, atol=1e-5)


def test_the_alias_hands_it_on():
    chained = optax.chain(om.scale_by_moma(orthogonal_block_size=4, **SETTINGS), optax.scale(-0.1))
    (expected, *_), _ = run(chained)
    (step, *_), _ = run(om.moma(0.1, orthogonal_block_size=4, **SETTINGS))
    np.testing.assert_allclose(step["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("block_size", [4, 8, 16, 5])
def test_on_a_mesh(kind, block_size):
    """Blocks within a device, on several, and with one that is filled up."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    rows = 16 if block_size != 5 else 18
    gradients = [{"w": gaussian(3, rows, 24, seed=i)} for i in range(3)]
    tx = om.scale_by_moma(4, min_dim_size_to_factor=8, orthogonal_block_size=block_size)
    alone, _ = run(tx, gradients)
    mesh = jax.make_mesh((2, 4), ("rows", "cols"), axis_types=(kind,) * 2)
    layout = NamedSharding(mesh, PartitionSpec(None, "rows", "cols"))
    with jax.set_mesh(mesh):
        spread, _ = run(tx, jax.device_put(gradients, layout))
    for a, b in zip(spread, alone, strict=True):
        assert a["w"].sharding.is_equivalent_to(layout, 3)
        np.testing.assert_allclose(a["w"], b["w"], atol=1e-4)
