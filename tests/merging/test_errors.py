"""Every wrong input is named: what, where, whose, and what to do."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma._moments import Factored
from optax_moma.merging import (
    MergeError,
    average,
    chain,
    dare,
    drop,
    elect,
    fisher,
    karcher,
    mean,
    merge,
    moma,
    ota,
    regmean,
    scale,
    task_arithmetic,
    ties,
    total,
    trim,
    umtam,
    weigh,
)


def params(**changes):
    tree = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "steps": jnp.arange(2)}
    for name, value in changes.items():
        part = tree["dense"] if name in ("kernel", "bias", "extra") else tree
        if value is None:
            del part[name]
        else:
            part[name] = value
    return tree


def message(method, experts, **kwargs):
    with pytest.raises(ValueError) as error:
        merge(method, experts, **kwargs)
    return str(error.value)


GOOD = {"math": params(), "code": params()}
CURVATURE = {"math": params(), "code": params()}


def bad(**changes):
    return {"math": params(), "code": params(**changes)}


@pytest.mark.parametrize(
    ("experts", "parts"),
    [
        (bad(bias=None), ["expert 'code' lacks", "dense/bias", "add or rename"]),
        (bad(extra=jnp.ones(1)), ["expert 'code' has", "dense/extra", "take them out"]),
        (bad(bias=jnp.ones(3)), ["expert 'code', dense/bias", "(3,)", "(2,)", "one architecture"]),
        (bad(bias=jnp.arange(2)), ["expert 'code', dense/bias", "int32", "float32", "cast"]),
        (bad(bias=jnp.ones(2) * 1j), ["expert 'code', dense/bias", "complex", "two leaves"]),
        (
            bad(bias=jnp.array([jnp.nan, 1])),
            ["expert 'code', dense/bias", "1 values", "not finite"],
        ),
        (bad(kernel=jnp.full((3, 2), jnp.inf)), ["expert 'code', dense/kernel", "6 values"]),
        (
            bad(steps=jnp.array([0, 5])),
            ["expert 'code', steps", "1 values", "int32", "the same", "take it out"],
        ),
        (bad(steps="adam"), ["expert 'code', steps", "str is not an array", "take it out"]),
    ],
)
def test_a_wrong_expert_is_named(experts, parts):
    text = message(task_arithmetic(), experts, base=params())
    for part in parts:
        assert part in text, text
    # In a list the expert goes by its index.
    assert "expert 1" in message(task_arithmetic(), list(experts.values()), base=params())


def test_all_problems_are_listed_at_once():
    experts = {
        "a": params(bias=None),
        "b": params(kernel=jnp.full((3, 2), jnp.nan), bias=jnp.ones(5)),
        "c": params(),
    }
    text = message(ota(), experts, weights={"a": 1, "b": -2, "d": 1})
    for part in [
        "base: the method works on task vectors; pass base=",
        "curvature: the method needs one tree per expert; pass curvature=",
        "expert 'b' has leaves that expert 'a' lacks: dense/bias",
        "weights: there is no expert 'd'",
        "weights: none for the experts ['c']",
        "expert 'b', dense/kernel: 6 values that are not finite",
    ]:
        assert part in text, text
    assert text.startswith("Cannot merge, 7 problems:") and text.count("\n- ") == 7, text


def test_the_problems_are_an_attribute_of_the_error():
    with pytest.raises(MergeError) as caught:
        merge(ota(), {"a": params(bias=None), "b": params()}, weights={"a": 1, "b": -2})
    error = caught.value
    assert isinstance(error, ValueError) and len(error.problems) == 4
    assert str(error) == "Cannot merge, 4 problems:\n- " + "\n- ".join(error.problems)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.problems == error.problems


def test_what_the_contract_asks_for():
    assert "base:" in message(ties(), GOOD)
    assert "curvature:" in message(fisher(), GOOD)
    assert "curvature_from" in message(moma(), GOOD, base=params())
    assert "key: the method is random; pass key=jax.random.key(seed)" in message(
        dare(), GOOD, base=params()
    )
    assert "key: got 0" in message(dare(), GOOD, base=params(), key=0)
    assert "experts: the method needs at least 1, got 0" in message(average(), [])
    assert "add mean() or total()" in message(chain(trim(0.5)), GOOD, base=params())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"bias": None}, ["the curvature of expert 'code' lacks", "dense/bias"]),
        ({"extra": jnp.ones(2)}, ["the curvature of expert 'code' has", "dense/extra"]),
        ({"bias": jnp.ones(3)}, ["the curvature of expert 'code', dense/bias", "(3,)", "(2,)"]),
        ({"bias": -jnp.ones(2)}, ["the curvature of expert 'code', dense/bias", "2", "negative"]),
        ({"bias": jnp.full(2, jnp.nan)}, ["dense/bias", "2 values", "not finite"]),
        ({"bias": jnp.arange(2)}, ["dense/bias", "not a floating-point array or Factored"]),
        (
            {"kernel": Factored(jnp.ones((3, 1)), jnp.ones((1, 3)))},
            ["dense/kernel", "(3, 1) x (1, 3)", "(3, 2)"],
        ),
        ({"kernel": Factored(jnp.ones(3), jnp.ones(2))}, ["dense/kernel", "(3,) x (2,)"]),
        (
            {"kernel": Factored(-jnp.ones((3, 1)), jnp.ones((1, 2)))},
            ["dense/kernel", "3 values", "negative"],
        ),
    ],
)
def test_a_wrong_curvature_is_named(changes, parts):
    text = message(fisher(), GOOD, curvature=bad(**changes))
    for part in parts:
        assert part in text, text
    if "lacks" not in text and "extra" not in text:
        # A method that does not need it does not look at its values.
        return
    assert "curvature" in message(average(), GOOD, curvature=bad(**changes))


def test_curvature_is_asked_for_floating_point_leaves_only():
    curvature = bad(steps=None)
    merged = merge(moma(), GOOD, base=params(), curvature=curvature)
    np.testing.assert_array_equal(merged["steps"], [0, 1])
    nothing = {"math": params(), "code": params(steps=jnp.array(0.0))}
    merge(moma(), GOOD, base=params(), curvature=nothing)


@pytest.mark.parametrize("argument", ["curvature", "weights"])
def test_names_and_order(argument):
    values = {"curvature": CURVATURE, "weights": {"math": 1.0, "code": 2.0}}[argument]

    def text(experts, value):
        return message(moma(), experts, base=params(), **{"curvature": CURVATURE, argument: value})

    near = {"math": values["math"], "cod": values["code"]}
    assert f"{argument}: there is no expert 'cod'; did you mean 'code'?" in text(GOOD, near)
    assert f"{argument}: none for the experts ['code']" in text(GOOD, {"math": values["math"]})
    three = [values["math"]] * 3
    assert f"{argument}: 3 of them for 2 experts" in text(GOOD, three)
    # "math" before "code" is not the order of names in which dicts are merged.
    assert "not in alphabetical order" in text(GOOD, three[:2])
    assert "a dict by name, but experts is a list" in text(list(GOOD.values()), values)


def test_values_of_weights():
    assert "weights: nan for expert 'code'" in message(
        average(), GOOD, weights={"math": 1.0, "code": float("nan")}
    )
    assert "weights: -1.0 for expert 'code'" in message(
        average(), GOOD, weights={"math": 1.0, "code": -1.0}
    )
    assert "weights: all are zero" in message(average(), GOOD, weights={"math": 0, "code": 0})
    # A negative weight subtracts a task.
    base = {"w": jnp.zeros(1)}
    merged = merge(task_arithmetic(1.0), [{"w": jnp.ones(1)}] * 2, base=base, weights=[1, -1])
    assert float(merged["w"][0]) == 0.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: merge(average, GOOD), "passed without calling it"),  # pyright: ignore
        (lambda: merge("ties", GOOD), "got 'ties'"),  # pyright: ignore
        (lambda: merge(average(), jnp.ones(3)), "experts must be a list of trees"),
        (lambda: merge(average(), {0: params()}), "names are strings"),
        (lambda: merge(average(), GOOD, weights=2.0), "weights must be a list"),
        (lambda: merge(average(), GOOD, weights="ab"), "weights must be a list"),
        (lambda: merge(average(), GOOD, weights={"math": "x", "code": 1}), "must be numbers"),
        (lambda: merge(fisher(), GOOD, curvature=3), "curvature must be a list"),
        (lambda: chain(trim), "passed without calling it"),
        (lambda: ties("dense"), "density must be a number"),
        (lambda: ties(density=True), "density must be a number"),
        (lambda: scale(None), "scale must be a number"),
        (lambda: ties(np.array([0.1, 0.2])), "density must be a number"),  # pyright: ignore
        (lambda: karcher(2.7), "iterations must be an integer, got 2.7"),  # pyright: ignore
    ],
)
def test_wrong_types(call, text):
    with pytest.raises(TypeError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: trim(1.5), "density must be from 0 to 1, got 1.5"),
        (lambda: drop(-0.1), "density must be from 0 to 1, got -0.1"),
        (lambda: umtam(float("nan")), "density must be from 0 to 1, got nan"),
        (lambda: weigh(-1), "power must be at least 0, got -1"),
        (lambda: ota(0.5, power=-0.5), "power must be at least 0"),
        (lambda: ties(scale=float("inf")), "scale must be finite"),
        (lambda: trim(0.5, by="size"), "'magnitude' or 'saliency'"),  # pyright: ignore
        (lambda: trim(0.5, scope="model"), "'leaf' or 'global'"),  # pyright: ignore
        (lambda: karcher(-1), "iterations must be at least 0"),
        (lambda: chain(mean(), weigh(1.0)), "put it before mean"),
        (lambda: chain(total(), drop(0.5), elect()), "put it before mean"),
    ],
)
def test_wrong_numbers_and_orders(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_traced_numbers_are_not_checked():
    @jax.jit
    def f(density):
        return merge(ties(density), GOOD, base=params())["dense"]["bias"]

    assert f(1.5).shape == (2,)


def test_a_merge_that_is_not_finite_is_told():
    big = {"layer": {"w": jnp.full(3, 6e4, jnp.float16)}, "n": jnp.arange(2)}
    base = jax.tree.map(jnp.zeros_like, big) | {"n": big["n"]}
    with pytest.raises(MergeError, match="layer/w: 3 values of float16") as error:
        merge(task_arithmetic(1.0), [big, big], base=base)
    assert "lower its scale" in str(error.value)
    # Nobody knows the values of what is traced.
    traced = jax.jit(lambda big: merge(task_arithmetic(1.0), [big, big], base=base))(big)
    assert jnp.isinf(traced["layer"]["w"]).all()


def test_floats_of_eight_bits():
    eight = {"w": jnp.array([1.0, 3.0], jnp.float8_e4m3fn)}
    other = {"w": jnp.array([2.0, 4.0], jnp.float8_e4m3fn)}
    base = {"w": jnp.zeros(2, jnp.bfloat16)}
    for given in (None, base):
        merged = merge(average(), [eight, other], base=given)["w"]
        assert merged.dtype == (jnp.float8_e4m3fn if given is None else jnp.bfloat16)
        assert merged.astype(jnp.float32).tolist() == [1.5, 3.5]


def test_second_moments_are_no_grams():
    rng = np.random.default_rng(0)
    expert, x = {"w": rng.normal(size=(4, 4))}, rng.normal(size=(9, 4))
    moments = {"w": rng.random((4, 4))}
    with pytest.raises(ValueError, match="12 entries of a Gram that is not symmetric"):
        merge(regmean(), [expert, expert], curvature=[moments, {"w": x.T @ x}])
