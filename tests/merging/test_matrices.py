"""Matrix methods on stacks of layers, attention kernels and convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_moma._moments import Factored
from optax_moma.checkpoints import Recipe
from optax_moma.checkpoints._recipe import build_method
from optax_moma.merging import (
    ace,
    average,
    chain,
    doge,
    drop,
    iso_c,
    iso_cts,
    knots,
    mean,
    merge,
    regmean,
    tsv_m,
    umtam,
    wudi,
    wudi_adam,
)

K, LAYERS, M, N = 2, 3, 6, 4
METHODS = {
    "tsv_m": lambda axes: tsv_m(axes=axes),
    "iso_c": lambda axes: iso_c(axes=axes),
    "iso_cts": lambda axes: iso_cts(common=0.5, axes=axes),
    "knots": lambda axes: chain(knots(mean(), axes=axes)),
    "wudi": lambda axes: wudi(0.1, axes=axes),
    "wudi_adam": lambda axes: wudi_adam(1e-2, 5, axes=axes),
}


def problem(shape, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: {"w": rng.normal(size=shape).astype(np.float32)}
    return draw(), [draw() for _ in range(K)]


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (7, 6)])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_wudi_is_its_minimum_whichever_side_is_long(shape, ridge):
    base, experts = problem(shape)
    d = [(e["w"] - base["w"]).astype(np.float64) for e in experts]
    A = [x @ x.T / np.sum(x**2) for x in d]
    c = ridge * np.trace(sum(A)) / shape[0]
    right = sum(A_t @ d_t for A_t, d_t in zip(A, d, strict=True)) + c * sum(d)
    want = base["w"] + np.linalg.solve(sum(A) + c * np.eye(shape[0]), right)
    merged = merge(wudi(ridge), experts, base=base)["w"]
    np.testing.assert_allclose(merged, want, rtol=1e-4, atol=1e-4)
    # Adam's first step goes along the sign of the same objective's gradient.
    step = merge(wudi_adam(1e-3, 1), experts, base=base)["w"] - base["w"] - sum(d)
    gradient = sum(A_t @ (sum(d) - d_t) for A_t, d_t in zip(A, d, strict=True))
    np.testing.assert_allclose(step, -1e-3 * np.sign(gradient), rtol=0.05, atol=1e-5)


def mapped(change, base, experts):
    return jax.tree.map(change, base), [jax.tree.map(change, e) for e in experts]


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_is_merged_as_its_matrices_are(name):
    base, experts = problem((LAYERS, M, N))
    merged = merge(METHODS[name]("bmn"), experts, base=base)["w"]
    for i in range(LAYERS):
        one, ones = mapped(lambda x, i=i: x[i], base, experts)
        want = merge(METHODS[name]("mn"), ones, base=one)["w"]
        np.testing.assert_allclose(merged[i], want, rtol=2e-6, atol=2e-6)
    # Seen as one leaf of three axes it is no matrix.
    flat = merge(METHODS[name]("mn"), experts, base=base)["w"]
    np.testing.assert_array_equal(flat, merge(average(), experts, base=base)["w"])
    assert np.abs(merged - flat).max() > 1e-2 or name == "knots"


@pytest.mark.parametrize(
    ("axes", "shape", "change"),
    [
        ("mnn", (6, 2, 2), lambda x: x.reshape(6, 4)),
        ("mmn", (3, 2, 4), lambda x: x.reshape(6, 4)),
        ("mmmn", (3, 1, 2, 4), lambda x: x.reshape(6, 4)),
        ("nm", (4, 6), lambda x: x.T),
        ("mnb", (6, 4, 1), lambda x: x[..., 0]),
        ("bmnn", (1, 6, 2, 2), lambda x: x.reshape(6, 4)),
        ("mn bmn", (1, 6, 4), lambda x: x[0]),
        ("bmn mn", (6, 4), lambda x: x),
    ],
)
def test_axes_name_the_matrix(axes, shape, change):
    base, experts = problem(shape)
    merged = merge(wudi(0.1, axes=axes), experts, base=base)["w"]
    assert merged.shape == shape
    flat, flats = mapped(change, base, experts)
    want = merge(wudi(0.1), flats, base=flat)["w"]
    np.testing.assert_allclose(change(merged), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_the_published_merge_of_a_stack(factored):
    base, experts = problem((LAYERS, M, N))
    rng = np.random.default_rng(2)
    shapes = [(LAYERS, M, 1), (LAYERS, 1, N)] if factored else [(LAYERS, M, N)]
    parts = [[rng.lognormal(size=s).astype(np.float32) for s in shapes] for _ in range(K)]
    curvature = [{"w": Factored(*p) if factored else p[0]} for p in parts]
    merged = merge(umtam(0.4, axes="bmn"), experts, base=base, curvature=curvature)["w"]
    for i in range(LAYERS):
        one, ones = mapped(lambda x, i=i: x[i], base, experts)
        own = [{"w": Factored(*(x[i] for x in p)) if factored else p[0][i]} for p in parts]
        want = merge(umtam(0.4), ones, base=one, curvature=own)["w"]
        np.testing.assert_allclose(merged[i], want, rtol=2e-6, atol=2e-6)
    # What is no matrix stays at the base, as published.
    flat = merge(umtam(0.4), experts, base=base, curvature=curvature)["w"]
    np.testing.assert_array_equal(flat, base["w"])


def test_biases_of_stacked_layers_are_averaged():
    base, experts = problem((LAYERS, N))
    merged = merge(tsv_m(axes="bmn"), experts, base=base)
    np.testing.assert_array_equal(merged["w"], merge(average(), experts, base=base)["w"])
    # Without the axes they look like a matrix.
    assert np.abs(merge(tsv_m(), experts, base=base)["w"] - merged["w"]).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "stack"),
    [((LAYERS, M, N), 3), ((2, 3, 2, 4), 2), ((6, 2, 2), 0), ((3, 2, 4), 0), ((1, 2, 3, 4), 0)],
)
def test_grams_say_where_the_matrices_are(shape, stack):
    _, experts = problem(shape)
    rng = np.random.default_rng(1)
    z = rng.normal(size=(K, max(stack, 1), 20, M)).astype(np.float32)
    grams = [{"w": np.einsum("bxi,bxj->bij", x, x)} for x in z]
    given = grams if stack else [{"w": g["w"][0]} for g in grams]
    merged = merge(regmean(ridge=0.0), experts, curvature=given)["w"]
    assert merged.shape == shape
    parts = [e["w"].reshape(max(stack, 1), M, -1).astype(np.float64) for e in experts]
    for i, got in enumerate(merged.reshape(parts[0].shape)):
        a, b = 0.0, 0.0
        for x, g in zip(parts, grams, strict=True):
            g = g["w"][i].astype(np.float64)
            g = 0.95 * g + 0.05 * np.diag(np.diag(g))
            a, b = a + g, b + g @ x[i]
        want = np.linalg.solve(a, b)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6 * np.abs(want).max())


def test_grams_of_another_kernel_are_named():
    _, experts = problem((LAYERS, M, N))
    right = {"w": np.stack([np.eye(M, dtype=np.float32)] * LAYERS)}
    for wrong in (np.eye(M), np.stack([np.eye(M)] * 2), np.ones((LAYERS, M, N)), np.ones(3)):
        text = r"expert 1, w: shape \(.*\), but a kernel of shape \(3, 6, 4\) has .*or of its first"
        with pytest.raises(ValueError, match=text):
            merge(regmean(), experts, curvature=[right, {"w": wrong.astype(np.float32)}])
    # Each fits the kernel, but not the other.
    other = {"w": np.eye(LAYERS * M, dtype=np.float32)}
    with pytest.raises(ValueError, match=r"w: Grams of shapes \(3, 6, 6\), \(18, 18\); give all"):
        merge(regmean(), experts, curvature=[right, other])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("axes", ["mn", "nm"])
def test_on_a_mesh_of_four_devices(kind, axes):
    """With shardings in types, decompositions ask for matrices that are whole."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(getattr(AxisType, kind),) * 2)
    base, experts = problem((M, N))
    put, puts = mapped(lambda x: jax.device_put(x, NamedSharding(mesh, P("a", "b"))), base, experts)
    # Ridges that make the systems well conditioned: devices add up in another order.
    ridged = (wudi(1.0, axes=axes), ace(1.0, axes=axes))
    for method in (tsv_m(axes=axes), *ridged, doge(steps=2, axes=axes)):
        merged = merge(method, puts, base=put)["w"]
        # On an automatic mesh the compiler chooses.
        assert kind == "Auto" or merged.sharding.is_equivalent_to(put["w"].sharding, 2)
        want = merge(method, experts, base=base)["w"]
        np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)


def test_every_matrix_of_a_stack_draws_for_itself():
    same = {"w": np.broadcast_to(np.arange(24.0, dtype=np.float32).reshape(6, 4), (3, 6, 4))}
    method = chain(knots(drop(0.5), mean(), axes="bmn"))
    base = {"w": np.zeros((3, 6, 4), np.float32)}
    one = merge(method, [same, same], base=base, key=jax.random.key(0))["w"]
    assert np.abs(one[0] - one[1]).max() > 1 and np.abs(one[1] - one[2]).max() > 1
    again = jax.jit(lambda: merge(method, [same, same], base=base, key=jax.random.key(0))["w"])()
    np.testing.assert_allclose(again, one, atol=1e-4)


def test_a_stack_in_low_precision_under_jit_and_grad():
    base, experts = problem((LAYERS, M, N))
    low, lows = mapped(lambda x: jnp.asarray(x, jnp.bfloat16), base, experts)
    merged = merge(iso_c(axes="bmn"), lows, base=low)["w"]
    assert merged.dtype == jnp.bfloat16
    wide, wides = mapped(lambda x: x.astype(jnp.float32), low, lows)
    exact = merge(iso_c(axes="bmn"), wides, base=wide)["w"]
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))

    def score(factor):
        return jnp.sum(merge(tsv_m(factor, axes="bmn"), experts, base=base)["w"])

    slope = score(1.0) - score(0.0)
    np.testing.assert_allclose(jax.jit(jax.grad(score))(0.3), slope, rtol=1e-4)
    empty = {"w": np.zeros((0, M, N), np.float32)}
    assert merge(iso_c(axes="bmn"), [empty, empty], base=empty)["w"].shape == (0, M, N)


@pytest.mark.parametrize(
    ("axes", "error", "text"),
    [
        ("bm", ValueError, "m for fan-in, n for fan-out"),
        ("mnx", ValueError, "got 'mnx'"),
        ("", ValueError, "name one layout"),
        ("mnn mmn", ValueError, "different numbers of axes, got 'mnn mmn'; merge leaves"),
        (1, TypeError, "axes must be a string"),
    ],
)
def test_wrong_axes_are_named(axes, error, text):
    for method in (tsv_m, iso_c, iso_cts, wudi, wudi_adam, ace, doge):
        with pytest.raises(error, match=text):
            method(axes=axes)
    with pytest.raises(error, match=text):
        knots(mean(), axes=axes)


def test_a_recipe_names_axes_rule_by_rule():
    recipe = Recipe.of(
        {
            "experts": {"a": "a", "b": "b"},
            "base": "c",
            "method": "tsv_m",
            "rules": [{"match": "layers/**", "values": {"axes": "bmn"}}],
        }
    )
    assert recipe.rules[0].values == {"axes": "bmn"}
    base, experts = problem((LAYERS, M, N))
    one = merge(build_method("tsv_m", {"axes": "bmn"}), experts, base=base)["w"]
    np.testing.assert_array_equal(one, merge(tsv_m(axes="bmn"), experts, base=base)["w"])
    with pytest.raises(ValueError, match="m for fan-in"):
        Recipe.of({"experts": {"a": "a"}, "base": "c", "method": {"name": "tsv_m", "axes": "qk"}})
