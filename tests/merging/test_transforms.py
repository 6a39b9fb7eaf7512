"""jit, grad, vmap, compilation, flax trees, several devices."""

from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.merging import (
    MergeError,
    average,
    chain,
    curvature_ties,
    dare,
    elect,
    fisher,
    mean,
    merge,
    merge_step,
    scale,
    task_arithmetic,
    ties,
    trim,
    weigh,
)
from optax_moma.merging._merge import merge_leaf


def problem(seed=0, k=3):
    rng = np.random.default_rng(seed)

    def tree(low=None):
        return {
            "kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
            "steps": jnp.arange(2),
        }

    experts = [tree() for _ in range(k)]
    curvature = [jax.tree.map(lambda x: jnp.asarray(x**2 + 0.1, jnp.float32), e) for e in experts]
    return tree(), experts, curvature


METHODS = [
    ties(0.3, 0.7),
    dare(0.4, 0.5),
    curvature_ties(0.3, 0.5, 0.9),
    chain(trim(0.3, scope="global"), elect(), mean()),
]


@pytest.mark.parametrize("method", METHODS)
def test_jit_of_the_whole_merge_equals_eager(method):
    base, experts, curvature = problem()
    key, weights = jax.random.key(1), [1.0, 2.0, 0.5]
    eager = merge(method, experts, base=base, curvature=curvature, weights=weights, key=key)
    jitted = jax.jit(merge)(
        method, experts, base=base, curvature=curvature, weights=weights, key=key
    )
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gradient_with_respect_to_scale_is_the_merged_task_vector():
    base, experts, curvature = problem(1)
    whole = merge(curvature_ties(0.4, scale=1.0), experts, base=base, curvature=curvature)
    step = jax.tree.map(jnp.subtract, whole, base)

    def score(factor):
        merged = merge(curvature_ties(0.4, scale=factor), experts, base=base, curvature=curvature)
        return sum(jnp.sum(jnp.sin(merged[n])) for n in ("kernel", "bias"))

    expected = sum(jnp.sum(jnp.cos(base[n] + 0.3 * step[n]) * step[n]) for n in ("kernel", "bias"))
    for grad in (jax.grad(score), jax.jit(jax.grad(score))):
        np.testing.assert_allclose(grad(0.3), expected, rtol=1e-5)


def test_gradients_with_respect_to_a_method_and_weights():
    base, experts, curvature = problem(2)
    experts = [jax.tree.map(lambda x: x.astype(jnp.float32), e) for e in experts]
    base = jax.tree.map(lambda x: x.astype(jnp.float32), base)

    def score(method, weights):
        merged = merge(method, experts, base=base, curvature=curvature, weights=weights)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(merged))

    method, weights = chain(weigh(0.5), mean(), scale(0.7)), jnp.array([1.0, 2.0, 0.5])
    grads = jax.grad(score, argnums=(0, 1))(method, weights)
    eps = 1e-2
    power, factor = grads[0].steps[0].power, grads[0].steps[2].factor
    for i, got in enumerate(grads[1]):
        h = eps * (jnp.arange(3) == i)
        slope = (score(method, weights + h) - score(method, weights - h)) / (2 * eps)
        np.testing.assert_allclose(got, slope, rtol=2e-3)

    def moved(p, s):
        return score(chain(weigh(0.5 + p), mean(), scale(0.7 + s)), weights)

    slope_p, slope_s = ((moved(eps, 0) - moved(-eps, 0)), (moved(0, eps) - moved(0, -eps)))
    np.testing.assert_allclose(power, slope_p / (2 * eps), rtol=2e-3)
    np.testing.assert_allclose(factor, slope_s / (2 * eps), rtol=2e-3)


def test_vmap_over_scales():
    base, experts, _ = problem(3)
    many = jax.vmap(lambda s: merge(task_arithmetic(s), experts, base=base)["bias"])
    scales = jnp.array([0.0, 0.5, 1.0])
    for row, s in zip(many(scales), scales, strict=True):
        one = merge(task_arithmetic(float(s)), experts, base=base)["bias"]
        np.testing.assert_allclose(row, one, rtol=1e-6, atol=1e-6)


def test_nothing_is_compiled_again_when_only_numbers_change():
    base, experts, curvature = problem(4)
    traces = []

    @jax.jit
    def whole(method, experts, base, curvature, key):
        traces.append(method)
        return merge(method, experts, base=base, curvature=curvature, key=key)

    for density, factor in [(0.2, 1.0), (0.5, 0.3), (1.0, 0.0)]:
        whole(curvature_ties(density, 0.5, factor), experts, base, curvature, None)
    assert len(traces) == 1

    merge(curvature_ties(0.2), experts, base=base, curvature=curvature)
    compiled = merge_leaf._cache_size()
    for density, power, factor in [(0.3, 0.5, 1.0), (0.7, 1.0, 0.1)]:
        merge(
            curvature_ties(density, power, factor),
            experts,
            base=base,
            curvature=curvature,
            weights=[1.0, density, factor],
        )
    assert merge_leaf._cache_size() == compiled


def test_jit_never_takes_one_step_for_another():
    """JAX finds programs by the hash of a PyTreeDef, of which few bits count, and by equality."""

    def class_of(i):
        @merge_step
        class Alike:
            number: float
            contract = average().contract

            def __call__(self, leaf):
                return leaf._replace(delta=leaf.delta + i)

        return Alike

    steps = [class_of(i)(2.0) for i in range(20)]
    for one, other in combinations(map(jax.tree.structure, steps), 2):
        assert one != other and not one == other
    program = jax.jit(lambda step: step.number + classes.index(type(step)))
    classes = [type(step) for step in steps]
    assert [program(step) for step in steps] == [2.0 + i for i in range(20)]


def test_no_class_is_registered_in_a_way_that_jit_confuses():
    root = Path(__file__).parents[2]
    sources = [p for folder in ("optax_moma", "experiments") for p in (root / folder).rglob("*.py")]
    assert len(sources) > 50
    said = [p.name for p in sources if "register_dataclass" in p.read_text()]
    assert said == ["_contract.py"]  # where it says why not


def test_concrete_inputs_are_checked_inside_a_trace():
    base, experts, _ = problem(5)
    bad = [*experts[:2], {**experts[2], "bias": jnp.full(5, jnp.nan)}]
    with pytest.raises(ValueError, match="expert 2, bias: 5 values that are not finite"):
        jax.jit(lambda s: merge(task_arithmetic(s), bad, base=base))(0.3)
    # What is traced has no values yet.
    traced = jax.jit(lambda e: merge(ties(), e, base=base))(bad)
    assert traced["kernel"].shape == (6, 5)


def test_flax_nnx_state_and_plain_dicts_are_the_same_params():
    nnx = pytest.importorskip("flax.nnx")
    base, *experts = (nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(i))) for i in range(3))
    key = jax.random.key(0)
    merged = merge(dare(0.5), experts, base=base, key=key)
    assert jax.tree.structure(merged) == jax.tree.structure(base)

    def plain(state):
        return {name: state[name][...] for name in ("kernel", "bias")}

    same = merge(dare(0.5), [plain(e) for e in experts], base=plain(base), key=key)
    for name in same:
        np.testing.assert_array_equal(merged[name][...], same[name])


def test_methods_by_path_are_those_of_the_parts():
    """Each part as if there were no others: its threshold, its random numbers, its curvature."""
    base, experts, curvature = problem()
    wrap = lambda tree: {"embed": {"w": tree["kernel"] * 2}, "layers": [tree, {"b": tree["bias"]}]}
    base, experts, curvature = wrap(base), [wrap(e) for e in experts], [wrap(v) for v in curvature]
    curvature = [v | {"embed": {"w": None}} for v in curvature]  # nothing is asked of it
    key, weights = jax.random.key(1), [1.0, 2.0, 0.5]
    at = chain(trim(0.3, by="saliency", scope="global"), weigh(), mean())
    found = merge(
        [("embed/*", dare(0.4, 0.5)), ("layers/{0..0}/**", at), ("**", average())],
        experts, base=base, curvature=curvature, weights=weights, key=key,
    )  # fmt: skip
    alone = lambda get, method, **given: merge(
        method, [get(e) for e in experts], base=get(base), weights=weights, **given
    )
    embed = alone(lambda tree: {"embed": tree["embed"]}, dare(0.4, 0.5), key=key)
    first = lambda tree: {"layers": [tree["layers"][0]]}
    layer = alone(first, at, curvature=[first(v) for v in curvature])
    last = alone(lambda tree: tree["layers"][1], average())
    want = {"embed": embed["embed"], "layers": [layer["layers"][0], last]}
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    traced = jax.jit(lambda experts: merge([("**", average())], experts))(experts)
    jax.tree.map(np.testing.assert_array_equal, traced, merge(average(), experts))


def test_globs_that_leave_something_out_are_told():
    base, experts, _ = problem()
    with pytest.raises(ValueError, match=r"'kernle' matches none of 3 leaves; .* kernel; no glob"):
        merge([("kernle", average()), ("{bias,steps}", average())], experts, base=base)
    with pytest.raises(ValueError, match="'kernel' matches falls under an earlier glob"):
        merge([("**", average()), ("kernel", average())], experts, base=base)
    with pytest.raises(TypeError, match="Was the factory passed without calling it"):
        merge([("**", average)], experts, base=base)
    with pytest.raises(MergeError, match=r"2 problems:\n- key: .*\n- curvature"):
        merge([("kernel", dare()), ("**", fisher())], experts, base=base)
