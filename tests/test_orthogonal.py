"""The orthogonal factor, against the iteration in float64, and the optimizer that applies it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_moma as om
from optax_moma._orthogonal import orthogonal_factor


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_singular_values(X) -> np.ndarray:
    """The iteration on each singular value, in float64."""
    U, s, Vt = np.linalg.svd(np.asarray(X, np.float64), full_matrices=False)
    s = s / np.sqrt(np.sum(s**2, -1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[..., None, :]) @ Vt


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (2, 3, 5, 8), (1, 4), (4, 1)])
def test_every_singular_value_goes_its_way(shape):
    X = gaussian(*shape)
    found = np.asarray(jax.jit(orthogonal_factor)(jnp.asarray(X)))
    np.testing.assert_allclose(found, by_singular_values(X), atol=2e-5)
    scaled = np.asarray(orthogonal_factor(jnp.asarray(1e6 * X)))
    np.testing.assert_allclose(scaled, found, atol=1e-5)


def test_values_above_a_hundredth_of_the_norm_come_to_about_one():
    U, V = (np.linalg.qr(gaussian(20, 20, seed=i))[0] for i in range(2))
    s = np.geomspace(1, 0.005, 20)
    s /= np.linalg.norm(s)
    values = np.diag(U.T @ orthogonal_factor(jnp.asarray(U * s @ V.T)) @ V)
    large = s > 0.01
    assert 10 < large.sum() < 20  # else nothing is tested
    assert np.all(values[large] > 0.6) and np.all(values < 1.3)


def test_nothing_stays_nothing():
    assert not np.any(orthogonal_factor(jnp.zeros((3, 4))))


GRADIENTS = [{"w": gaussian(3, 8, 11, seed=i), "b": gaussian(5, seed=i)} for i in range(6)]
SETTINGS = {"rank": 2, "min_dim_size_to_factor": 8}


def run(tx, gradients=GRADIENTS):
    update, state, steps = jax.jit(tx.update), tx.init(gradients[0]), []
    for g in gradients:
        step, state = update(g, state, gradients[0])
        steps.append(step)
    return steps, state


@pytest.mark.parametrize("error_dtype", [None, jnp.float32])
@pytest.mark.parametrize("clip_rms", [1.0, 0.05])
def test_updates_are_the_orthogonal_factors_of_those_without(error_dtype, clip_rms):
    """At an RMS of about 0.2, or what clip_rms allows; what is remembered is the same."""
    settings = SETTINGS | {"error_dtype": error_dtype, "clip_rms": clip_rms}
    plain, plain_state = run(om.scale_by_moma(**settings))
    steps, state = run(om.scale_by_moma(orthogonalize=True, **settings))
    for step, other in zip(steps, plain, strict=True):
        expected = min(0.2, clip_rms) * 11**0.5 * by_singular_values(other["w"])
        np.testing.assert_allclose(step["w"], expected, atol=2e-5)
        np.testing.assert_array_equal(step["b"], other["b"])
    momenta = ("U", "s", "V", "R", "C", "error", "mu", "nu")
    kept, others = ([getattr(x, name) for name in momenta] for x in (state, plain_state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, others)


def test_saliency_is_the_path_integral_of_the_emitted_updates():
    steps, state = run(om.scale_by_moma(orthogonalize=True, **SETTINGS))
    path = sum(np.float64(g["w"]) * u["w"] for g, u in zip(GRADIENTS, steps, strict=True))
    np.testing.assert_allclose(state.saliency_row["w"], path.sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.saliency_col["w"], path.sum(-2), rtol=1e-4, atol=1e-5)


def test_the_alias_hands_it_on():
    chained = optax.chain(om.scale_by_moma(orthogonalize=True, **SETTINGS), optax.scale(-0.1))
    (expected, *_), _ = run(chained)
    (step, *_), _ = run(om.moma(0.1, orthogonalize=True, **SETTINGS))
    np.testing.assert_allclose(step["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh(kind):
    """Rows and columns of the matrices spread over devices, and the stacked axis not."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    gradients = [{"w": gaussian(3, 16, 24, seed=i)} for i in range(3)]
    tx = om.scale_by_moma(4, min_dim_size_to_factor=8, orthogonalize=True)
    alone, _ = run(tx, gradients)
    mesh = jax.make_mesh((2, 4), ("rows", "cols"), axis_types=(kind,) * 2)
    layout = NamedSharding(mesh, PartitionSpec(None, "rows", "cols"))
    with jax.set_mesh(mesh):
        spread, _ = run(tx, jax.device_put(gradients, layout))
    for a, b in zip(spread, alone, strict=True):
        assert a["w"].sharding.is_equivalent_to(layout, 3)
        np.testing.assert_allclose(a["w"], b["w"], atol=2e-5)


def test_a_hidden_layer_learns_with_its_embedding_apart():
    """The composition that the docstring recommends, as a curvature of both parts."""
    params = {"embedding": gaussian(40, 16), "kernel": gaussian(16, 24, seed=1)}
    labels = {"embedding": "rest", "kernel": "hidden"}
    small = {"rank": 4, "min_dim_size_to_factor": 16}
    tx = optax.partition(
        {
            "hidden": om.moma(0.05, orthogonalize=True, **small),
            "rest": om.moma(0.05, clip_spectral=np.inf, **small),
        },
        labels,
    )
    target = gaussian(40, 24, seed=2)
    loss = lambda p: jnp.mean((p["embedding"] @ p["kernel"] - target) ** 2)
    state, first, own = tx.init(params), loss(params), params
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    for _ in range(60):
        updates, state = step(own, state)
        own = optax.apply_updates(own, updates)
    assert loss(own) < 0.2 * first
    assert set(om.curvature_from(state, own)) == {"embedding", "kernel"}
