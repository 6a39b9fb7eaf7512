"""What must hold for every method, on random trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_moma.merging import (
    ace,
    average,
    breadcrumbs,
    chain,
    consensus,
    curvature_ties,
    dare,
    della,
    doge,
    elect,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    knots,
    mean,
    merge,
    model_stock,
    moma,
    ota,
    pcb,
    regmean,
    scale,
    sce,
    task_arithmetic,
    ties,
    total,
    trim,
    tsv_m,
    umtam,
    weigh,
    wudi,
)

# Names that sort differently from how they are written. Every shape is compiled once per method.
SHAPES = {"z": (6, 4), "m": ()}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
METHODS = {
    "average": average(),
    "task_arithmetic": task_arithmetic(0.5),
    "ties": ties(0.4),
    "dare": dare(0.5),
    "fisher": fisher(),
    "ota": ota(0.6),
    "curvature_ties": curvature_ties(0.4),
    "umtam": umtam(0.4),
    "global": chain(trim(0.4, by="saliency", scope="global"), elect(), mean()),
    "pcb": pcb(0.4),
    "della": della(0.5),
    "breadcrumbs": breadcrumbs(0.6, 0.1),
    "sce": sce(0.5),
    "consensus": chain(consensus(), total(), scale(0.3)),
}
# Methods that look at a matrix or a leaf as a whole, and so round in another way in another order.
WHOLE = {
    "karcher": karcher(),
    "model_stock": model_stock(),
    "wudi": wudi(),
    "moma": moma(),
    "ace": ace(1e-2),
    "doge": doge(steps=3),
    "tsv_m": tsv_m(),
    "iso_c": iso_c(),
    "iso_cts": iso_cts(common=0.5),
    "knots": chain(knots(mean())),
}
# Methods that give back k equal experts: no sums, and nothing trimmed.
MEANS = {
    "average": average(),
    "ties": ties(1.0),
    "fisher": fisher(),
    "ota": ota(1.0),
    "curvature_ties": curvature_ties(1.0),
    "moma": moma(),
    "global": chain(trim(1.0, scope="global"), mean()),
    "karcher": karcher(),
    "model_stock": model_stock(),
    "knots": chain(knots(mean())),
}
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=15, deadline=None, derandomize=True)


def tree(rng, dtype=jnp.float32, low=None):
    def leaf(shape):
        x = rng.normal(size=shape) if low is None else low + rng.lognormal(size=shape)
        return jnp.asarray(x, dtype)

    return {
        "layer": {name: leaf(shape) for name, shape in SHAPES.items()},
        "empty": {},
        "none": None,
        "steps": jnp.arange(3),
        "frozen": np.array([True, False]),
    }


def problem(seed, k=3, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    base = tree(rng, dtype)
    experts = {f"e{9 - t}": tree(rng, dtype) for t in range(k)}
    curvature = {name: tree(rng, low=0.01) for name in experts}
    return base, experts, curvature


def close(x, y, rtol=2e-6):
    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1, np.abs(b).max()))

    jax.tree.map(check, x, y)


def equal(x, y):
    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    jax.tree.map(check, x, y)


@pytest.mark.parametrize("name", MEANS)
@quick
@given(seed=seeds, dtype=st.sampled_from(DTYPES))
def test_equal_experts_give_that_expert(name, seed, dtype):
    base, experts, curvature = problem(seed, dtype=dtype)
    expert = experts["e9"]
    same = dict.fromkeys(experts, expert)
    merged = merge(MEANS[name], same, base=base, curvature=curvature)
    # An ulp of the dtype: base + (expert - base) is rounded.
    rtol = 1e-5 if name in WHOLE else 2e-6
    close(merged, expert, rtol=max(rtol, 2 * float(jnp.finfo(dtype).eps)))
    assert jax.tree.structure(merged) == jax.tree.structure(base)


@pytest.mark.parametrize("name", [*METHODS, *WHOLE])
@quick
@given(seed=seeds)
def test_the_order_of_experts_does_not_matter(name, seed):
    method = {**METHODS, **WHOLE}[name]
    base, experts, curvature = problem(seed)
    key, weights = jax.random.key(seed), {"e9": 1.0, "e8": 0.5, "e7": 2.0}
    merged = merge(method, experts, base=base, curvature=curvature, weights=weights, key=key)
    shuffled = {n: experts[n] for n in ("e8", "e7", "e9")}
    again = merge(method, shuffled, base=base, curvature=curvature, weights=weights, key=key)
    equal(merged, again)
    if not method.contract.key:
        lists = merge(
            method,
            list(shuffled.values()),
            base=base,
            curvature=[curvature[n] for n in shuffled],
            weights=[weights[n] for n in shuffled],
        )
        close(merged, lists, rtol=1e-4 if name in WHOLE else 2e-6)


@quick
@given(seed=seeds)
def test_draws_do_not_depend_on_the_order_or_number_of_leaves(seed):
    base, experts, _ = problem(seed)
    key = jax.random.key(seed)
    merged = merge(dare(0.5), experts, base=base, key=key)

    def part(tree):
        return {"layer": {"z": tree["layer"]["z"]}}

    alone = merge(dare(0.5), {n: part(e) for n, e in experts.items()}, base=part(base), key=key)
    equal(part(merged), alone)


@quick
@given(seed=seeds, exponent=st.integers(-60, 60))
def test_grams_times_a_number_change_nothing(seed, exponent):
    base, experts, _ = problem(seed)
    rng = np.random.default_rng(seed)
    grams = {}
    for name in experts:
        z = rng.normal(size=(9, SHAPES["z"][0])).astype(np.float32)
        grams[name] = {"layer": {"z": z.T @ z}}
    scaled = jax.tree.map(lambda g: g * np.float32(2.0**exponent), grams)
    merged = merge(regmean(), experts, base=base, curvature=grams)
    close(merge(regmean(), experts, base=base, curvature=scaled), merged)
    same = dict.fromkeys(experts, experts["e9"])
    close(merge(regmean(), same, base=base, curvature=grams), experts["e9"], rtol=1e-5)


@pytest.mark.parametrize("name", ["fisher", "ota", "curvature_ties", "moma", "global"])
@quick
@given(seed=seeds, exponent=st.integers(-60, 20))
def test_curvature_times_a_number_changes_nothing(name, seed, exponent):
    base, experts, curvature = problem(seed)
    # A power of four has an exact root, so even ties between saliencies stay ties.
    scaled = jax.tree.map(lambda v: v * 4.0**exponent if v.dtype == jnp.float32 else v, curvature)
    method = (METHODS | WHOLE)[name]
    merged = merge(method, experts, base=base, curvature=curvature)
    close(merge(method, experts, base=base, curvature=scaled), merged)


@quick
@given(seed=seeds, factor=st.floats(1e-20, 1e20))
def test_each_expert_has_its_own_scale_of_curvature(seed, factor):
    base, experts, curvature = problem(seed)
    merged = merge(chain(weigh(0.5), mean()), experts, base=base, curvature=curvature)
    scaled = dict(curvature)
    scaled["e8"] = jax.tree.map(
        lambda v: v * np.float32(factor) if v.dtype == jnp.float32 else v, curvature["e8"]
    )
    again = merge(chain(weigh(0.5), mean()), experts, base=base, curvature=scaled)
    close(again, merged)


@pytest.mark.parametrize("name", ["ties", "ota", "curvature_ties"])
@quick
@given(seed=seeds)
def test_density_one_without_conflict_is_the_mean(name, seed):
    base, experts, curvature = problem(seed)
    rng = np.random.default_rng(seed)
    sign = jax.tree.map(lambda x: np.sign(rng.normal(size=x.shape)), base["layer"])
    for expert in experts.values():
        expert["layer"] = jax.tree.map(
            lambda b, s: b + s * jnp.asarray(rng.lognormal(size=b.shape), b.dtype),
            base["layer"],
            sign,
        )
    ones = jax.tree.map(jnp.ones_like, curvature["e9"])
    merged = merge(MEANS[name], experts, base=base, curvature=dict.fromkeys(experts, ones))
    close(merged, merge(average(), experts))


@pytest.mark.parametrize(
    "method",
    [
        task_arithmetic(0.0),
        ties(0.4, 0.0),
        dare(0.5, 0.0),
        curvature_ties(0.4, 0.5, 0.0),
        moma(0.0),
        pcb(0.4, 0.0),
        ace(scale=0.0),
        wudi(scale=0.0),
        tsv_m(0.0),
        iso_cts(0.0),
    ],
)
@quick
@given(seed=seeds, dtype=st.sampled_from(DTYPES))
def test_scale_zero_is_the_base(method, seed, dtype):
    base, experts, curvature = problem(seed, dtype=dtype)
    merged = merge(method, experts, base=base, curvature=curvature, key=jax.random.key(0))
    equal(merged, jax.tree.map(jnp.asarray, base))


@pytest.mark.parametrize(
    "method", [ties(0.0), dare(0.0), ota(0.0), curvature_ties(0.0), umtam(0.0), pcb(0.0)]
)
def test_density_zero_is_the_base(method):
    base, experts, curvature = problem(0)
    merged = merge(method, experts, base=base, curvature=curvature, key=jax.random.key(0))
    equal(merged, jax.tree.map(jnp.asarray, base))


@quick
@given(seed=seeds, factor=st.floats(-2, 2))
def test_scale_is_linear(seed, factor):
    base, experts, curvature = problem(seed)
    whole = merge(curvature_ties(0.4), experts, base=base, curvature=curvature)
    part = merge(curvature_ties(0.4, scale=factor), experts, base=base, curvature=curvature)
    line = jax.tree.map(
        lambda b, w: b + factor * (w - b) if w.dtype == jnp.float32 else w, base, whole
    )
    close(part, line, rtol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_merged_in_float32_and_rounded_once(dtype):
    rng = np.random.default_rng(0)
    experts = [{"w": jnp.asarray(rng.normal(size=999), dtype)} for _ in range(7)]
    merged = merge(average(), experts)["w"]
    x = np.stack([np.asarray(e["w"], np.float32) for e in experts])
    exact = x.mean(0, dtype=np.float64)
    assert merged.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(merged, np.float64), exact, rtol=0.51 * float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_mixed_dtypes_take_the_base_or_the_one_that_holds_all():
    one, two = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.ones(3, jnp.float16)}
    assert merge(average(), [one, two])["w"].dtype == jnp.float32
    assert merge(average(), [two, one])["w"].dtype == jnp.float32
    assert merge(average(), [one, one])["w"].dtype == jnp.bfloat16
    assert merge(average(), [one, one], base=two)["w"].dtype == jnp.float16


def test_trees_of_all_kinds():
    two = merge(average(), [jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])])
    np.testing.assert_array_equal(two, [2.0, 2.0])
    assert float(merge(average(), [1.0, 3.0])) == 2.0
    assert merge(average(), [{}, {}]) == {}
    assert merge(average(), [{"a": None}, {"a": None}]) == {"a": None}
    empty = merge(ties(0.5), [{"w": jnp.zeros((0, 3))}] * 2, base={"w": jnp.zeros((0, 3))})
    assert empty["w"].shape == (0, 3)
    key = jax.random.key(7)
    kept = merge(average(), [{"key": key, "n": 3}, {"key": key, "n": 3}])
    assert kept["key"] == key and int(kept["n"]) == 3
    nested = merge(
        average(), {"a": [jnp.ones(2), (jnp.zeros(1),)], "b": [jnp.ones(2), (jnp.ones(1),)]}
    )
    assert isinstance(nested[1], tuple) and float(nested[1][0][0]) == 0.5


def test_float64_leaves_stay_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        base = {"w": rng.normal(size=(8, 5)), "b": rng.normal(size=5).astype(np.float32)}
        experts = [
            jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(x.dtype), base)
            for _ in range(3)
        ]
        curvature = [
            jax.tree.map(lambda x: 1e-9 * rng.lognormal(size=x.shape), base) for _ in range(3)
        ]
        merged = merge(chain(weigh(), mean(), scale(0.5)), experts, base=base, curvature=curvature)
        assert merged["w"].dtype == jnp.float64 and merged["b"].dtype == jnp.float32
        d = np.stack([e["w"] - base["w"] for e in experts])
        v = np.stack([c["w"] / c["w"].mean() for c in curvature])
        expected = base["w"] + 0.5 * (v * d).sum(0) / v.sum(0)
        np.testing.assert_allclose(merged["w"], expected, rtol=1e-13)
        trimmed = merge(ties(0.5), experts, base=base)
        assert trimmed["w"].dtype == jnp.float64
