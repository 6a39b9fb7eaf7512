"""The recommended merge against its formula in NumPy, and what is said of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma._moments import Factored
from optax_moma.merging import (
    chain,
    curvature_ties,
    merge,
    moma,
    running_moma,
    scale,
    trim,
    weigh,
    wudi,
)
from optax_moma.merging._leaf import LeafInputs
from optax_moma.merging._merge import merge_leaf

RNG = np.random.default_rng(0)
SHAPE = (12, 9)


def formula(d, v, w, power=0.5, ridge=0.1):
    """The minimiser, from the normal equations of all outputs at once."""
    n = d[0].shape[1]
    B = []
    for d_t, v_t, w_t in zip(d, v, w, strict=True):
        G = d_t * (v_t / v_t.mean()) ** power
        B.append(w_t * G.T @ G / np.sum(G**2))
    c = ridge * np.trace(sum(B)) / n
    mean = np.average(d, axis=0, weights=w)
    right = sum(d_t @ B_t for d_t, B_t in zip(d, B, strict=True)) + c * mean
    return right @ np.linalg.inv(sum(B) + c * np.eye(n))


def problem(k=3, shape=SHAPE):
    base = RNG.normal(size=shape)
    d = [RNG.normal(size=shape) * 10.0**-t for t in range(k)]
    v = [RNG.lognormal(sigma=2, size=shape) * 1e-12 for _ in range(k)]
    return base, d, v


def merged(method, base, d, v, weights=None):
    float32 = lambda x: {"w": jnp.asarray(x, jnp.float32)}
    curvature = [{"w": x} if isinstance(x, Factored) else float32(x) for x in v]
    experts = [float32(base + x) for x in d]
    whole = merge(method, experts, base=float32(base), curvature=curvature, weights=weights)
    return np.asarray(whole["w"], np.float64) - base


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]])
@pytest.mark.parametrize(("power", "ridge"), [(0.5, 1e-2), (0.0, 0.3), (1.0, 1e-3)])
def test_formula(power, ridge, weights):
    base, d, v = problem()
    found = merged(moma(0.7, power=power, ridge=ridge), base, d, v, weights)
    expected = 0.7 * formula(d, v, weights, power, ridge)
    np.testing.assert_allclose(found, expected, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3)])
def test_either_side_may_be_long(shape):
    """Where fan-out is longer than all experts' fan-in, another Gram is factorised."""
    base, d, v = problem(shape=shape)
    weights = [0.5, 2.0, 0.0]
    found = merged(moma(), base, d, v, weights)
    np.testing.assert_allclose(found, formula(d, v, weights), rtol=3e-4, atol=3e-5)


def test_memory_of_an_output_layer():
    """A vocabulary has no Gram: that of this one alone would have 0.9 GB."""
    shape = jax.ShapeDtypeStruct((8, 15_000), jnp.float32)
    numbers = jax.ShapeDtypeStruct((2,), jnp.float32)
    one = jax.ShapeDtypeStruct((), jnp.uint32)
    inputs = LeafInputs((shape, shape), shape, (shape, shape), numbers, None, one, numbers)
    for method, side in ((moma(), 1), (wudi(), 0)):
        turned = inputs if side else jax.tree.map(_turned, inputs)
        compiled = merge_leaf.lower(method, turned).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 20 * 4 * 8 * 15_000


def _turned(x):
    return jax.ShapeDtypeStruct(x.shape[::-1], x.dtype)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), SHAPE])
def test_without_a_ridge_it_is_what_rounding_needs(shape):
    """B is singular, as outputs were not trained along: without a ridge there is no solution."""
    base, d, _ = problem(shape=shape)
    d = [x * (np.arange(shape[1]) < 2) for x in d]
    found = merged(moma(power=0, ridge=0), base, d, [np.ones(shape)] * 3)
    least = 32 * shape[1] * np.finfo(np.float32).eps
    want = formula(d, [np.ones(shape)] * 3, [1, 1, 1], power=0, ridge=least)
    np.testing.assert_allclose(found, want, atol=0.03 * np.abs(want).max())


def test_factored_curvature_is_its_product():
    base, d, _ = problem()
    draw = lambda *shape: jnp.asarray(RNG.lognormal(size=shape), jnp.float32)
    v = [Factored(draw(SHAPE[0], 1), draw(1, SHAPE[1])) for _ in d]
    dense = [np.asarray(x.row, np.float64) * np.asarray(x.col, np.float64) for x in v]
    np.testing.assert_allclose(
        merged(moma(), base, d, v), formula(d, dense, [1, 1, 1]), rtol=1e-4, atol=1e-5
    )


def test_it_is_the_minimum():
    """Of what the docstring says: any other matrix is worse."""
    _, d, v = problem()
    W = formula(d, v, [1, 1, 1])

    def objective(W):
        total, trace = 0.0, 0.0
        for d_t, v_t in zip(d, v, strict=True):
            G = d_t * (v_t / v_t.mean()) ** 0.5
            B = G.T @ G / np.sum(G**2)
            total += np.trace((W - d_t) @ B @ (W - d_t).T)
            trace += np.trace(B)
        return total + 0.1 * trace / SHAPE[1] * np.sum((W - np.mean(d, 0)) ** 2)

    for _ in range(20):
        assert objective(W + 1e-3 * RNG.normal(size=SHAPE)) > objective(W)


def test_experts_of_other_outputs_do_not_disturb_each_other():
    """Each has its own way where it alone was trained; a mean would have halved both."""
    base = np.zeros((8, 6))
    one, two = np.zeros((2, 8, 6))
    one[:, :3], two[:, 3:] = RNG.normal(size=(2, 8, 3))
    v = [np.ones((8, 6))] * 2
    found = merged(moma(ridge=1e-4), base, [one, two], v)
    np.testing.assert_allclose(found, one + two, rtol=2e-3, atol=2e-3)


def test_who_did_not_change_a_matrix_has_no_say():
    base, d, v = problem(2)
    alone = merged(moma(), base, d[:1], v[:1])
    np.testing.assert_allclose(alone, d[0], rtol=1e-5, atol=1e-5)
    unchanged = merged(moma(), base, [d[0], np.zeros(SHAPE)], v)
    np.testing.assert_allclose(unchanged, alone, rtol=1e-5, atol=1e-6)
    untrained = merged(moma(), base, d, [v[0], np.zeros(SHAPE)])
    np.testing.assert_allclose(untrained, alone, rtol=1e-5, atol=1e-6)
    nobody = merged(moma(), base, d, [np.zeros(SHAPE)] * 2)
    np.testing.assert_allclose(nobody, 0, atol=1e-6)


def test_the_size_of_an_experts_curvature_does_not_matter():
    base, d, v = problem()
    again = merged(moma(), base, d, [v[0] * 1e20, v[1], v[2] * 1e-20])
    np.testing.assert_allclose(again, merged(moma(), base, d, v), rtol=2e-4, atol=1e-5)


def test_tiny_task_vectors():
    """Neither their squares nor those of the curvature underflow."""
    _, d, v = problem()
    found = merged(moma(), np.zeros(SHAPE), [1e-25 * x for x in d], v)
    np.testing.assert_allclose(found, 1e-25 * formula(d, v, [1, 1, 1]), rtol=3e-4, atol=1e-30)


@pytest.mark.parametrize("axes", ["bmn", "mn bmn"])
def test_layers_stacked_for_a_scan_are_merged_one_by_one(axes):
    base, d, v = problem(shape=(2, *SHAPE))
    found = merged(moma(axes=axes), base, d, v)
    for i in range(2):
        expected = formula([x[i] for x in d], [x[i] for x in v], [1, 1, 1])
        np.testing.assert_allclose(found[i], expected, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_leaves_that_are_no_matrices_are_averaged(shape):
    base, d, v = problem(shape=shape)
    np.testing.assert_allclose(
        merged(moma(), base, d, v, [1, 2, 1]), np.average(d, axis=0, weights=[1, 2, 1]), atol=1e-5
    )


def test_in_a_chain():
    """After a mask it sees what the mask has left."""
    base, d, v = problem()
    found = merged(chain(trim(0.5), *moma().steps), base, d, v)
    kept = [np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-x.size // 2], x, 0) for x in d]
    np.testing.assert_allclose(found, formula(kept, v, [1, 1, 1]), rtol=3e-4, atol=3e-5)
    assert not np.allclose(found, merged(moma(), base, d, v), atol=1e-3)
    halved = merged(chain(*moma().steps, scale(0.5)), base, d, v)
    np.testing.assert_allclose(halved, merged(moma(0.5), base, d, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"power": -1.0}, "power must be at least 0"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"axes": "mx"}, "axes must have one letter"),
    ],
)
def test_numbers_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        moma(**arguments)


def test_a_curvature_is_asked_for_unless_its_power_is_zero():
    base, d, _ = problem()
    assert moma().contract.curvature and curvature_ties().contract.curvature
    trees = [{"w": jnp.asarray(base + x, jnp.float32)} for x in d]
    whole = merge(moma(power=0), trees, base={"w": jnp.asarray(base, jnp.float32)})
    expected = base + formula(d, np.ones((3, *SHAPE)), [1, 1, 1])
    np.testing.assert_allclose(whole["w"], expected, rtol=3e-4, atol=3e-5)
    assert moma(power=jnp.float32(0)).contract.curvature


def test_a_curvature_is_asked_for_matrices_only():
    """What is averaged needs none, and one that is given changes nothing."""
    base, d, v = problem()
    tree = lambda x: {"w": jnp.asarray(x, jnp.float32), "b": jnp.asarray(x[0], jnp.float32)}
    trees = [tree(base + x) for x in d]
    whole = merge(moma(), trees, base=tree(base), curvature=[tree(x) for x in v])
    kernels = [{"w": tree(x)["w"]} for x in v]
    for curvature in (kernels, [{**x, "b": None} for x in kernels]):
        for name, x in merge(moma(), trees, base=tree(base), curvature=curvature).items():
            np.testing.assert_array_equal(x, whole[name])
    running = running_moma()
    state = running.init(tree(base))
    for expert, x in zip(trees, kernels, strict=True):
        state = running.update(state, expert, x)
    np.testing.assert_allclose(running.params(state)["b"], whole["b"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"the curvature of expert 1 lacks leaves .* has: w;"):
        merge(moma(), trees, base=tree(base), curvature=[kernels[0], {}, kernels[2]])
    # Another step of the chain may need it of all leaves.
    with pytest.raises(ValueError, match=r"the curvature of expert 0 lacks leaves .* has: b;"):
        merge(chain(weigh(1.0), *moma().steps), trees, base=tree(base), curvature=kernels)
