"""Curvature and saliency, against second moments computed in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import optax_moma as om

B2 = 0.95
PARAMS = {"bias": jnp.ones(8), "layer": {"kernel": jnp.ones((12, 8))}}


def draws(count: int = 4) -> list[dict]:
    """Gradients small enough that nothing clips them."""
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(0.02 * rng.normal(size=p.shape), jnp.float32)
    return [jax.tree.map(draw, PARAMS) for _ in range(count)]


GRADS = draws()


def average(squares: list, decays: list[float], start: float = 0.0) -> np.ndarray:
    total = start + 0 * squares[0]
    for x, decay in zip(squares, decays, strict=True):
        total = decay * total + (1 - decay) * x
    return total


def squared(grads: list[dict]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    kernels, biases = ([g["layer"]["kernel"] for g in grads], [g["bias"] for g in grads])
    return tuple([np.asarray(g, np.float64) ** 2 for g in leaf] for leaf in (kernels, biases))


def dense_moments(grads: list[dict]) -> dict:
    weight = 1 - B2 ** len(grads)
    kernel, bias = (average(x, [B2] * len(x)) / weight for x in squared(grads))
    return {"bias": bias, "layer": {"kernel": kernel}}


def factored_moments(grads: list[dict], start: float = 0.0) -> dict:
    """Row and column sums; umtam's start at epsilon."""
    kernels, weight = squared(grads)[0], 1 - B2 ** len(grads)
    R = average([x.sum(1) for x in kernels], [B2] * len(grads), start)
    C = average([x.sum(0) for x in kernels], [B2] * len(grads), start)
    return dense_moments(grads) | {"layer": {"kernel": np.outer(R, C) / R.sum() / weight}}


def adafactor_moments(grads: list[dict]) -> dict:
    """Optax's: decay 1 - t^-0.8, means instead of sums, 1e-30 on the squares."""
    decays = [1 - t**-0.8 for t in range(1, len(grads) + 1)]
    kernels, biases = squared(grads)
    row, col = (average([x.mean(axis) for x in kernels], decays) for axis in (1, 0))
    kernel = np.outer(row / row.mean(), col)
    return {"bias": average(biases, decays), "layer": {"kernel": kernel}}


OPTIMIZERS = {
    "moma": (lambda: om.moma(1e-3, 2, b2=B2, min_dim_size_to_factor=8), factored_moments),
    "umtam": (lambda: om.umtam(1e-3, 2, b2=B2), lambda grads: factored_moments(grads, 1e-8)),
    "adam": (lambda: optax.adam(1e-3, b2=B2), dense_moments),
    "adamw": (lambda: optax.adamw(1e-3, b2=B2), dense_moments),
    "rmsprop": (lambda: optax.rmsprop(1e-3, decay=B2, bias_correction=True), dense_moments),
    "adafactor": (
        lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8, decay_rate=0.8),
        adafactor_moments,
    ),
}


def train(tx, grads=GRADS, params: Any = PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        state = update(g, state, params)[1]
    return state


@pytest.fixture(params=OPTIMIZERS, scope="module")
def optimizer(request):
    make, moments = OPTIMIZERS[request.param]
    return make(), moments


@pytest.fixture(scope="module")
def state(optimizer):
    """After all gradients, bare. What only packs the state needs no training of its own."""
    return train(optimizer[0])


def whole(v) -> np.ndarray:
    return np.asarray(v.row * v.col if isinstance(v, om.Factored) else v, np.float64)


def assert_curvature(found, expected, rtol=1e-5):
    is_leaf = lambda x: isinstance(x, om.Factored)
    found, treedef = jax.tree.flatten(found, is_leaf=is_leaf)
    expected, expected_def = jax.tree.flatten(expected)
    assert treedef == expected_def
    for v, want in zip(found, expected, strict=True):
        assert {x.dtype for x in jax.tree.leaves(v)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(whole(v), want, rtol=rtol, atol=rtol * np.max(want))


def read(state, params: Any = PARAMS, **kwargs):
    return om.curvature_from(state, params, b2=B2, **kwargs)


def test_bare(optimizer, state):
    curvature = read(state)
    assert_curvature(curvature, optimizer[1](GRADS))
    factored = optimizer[1] is not dense_moments
    assert isinstance(curvature["layer"]["kernel"], om.Factored) == factored


def test_shapes_are_enough_and_it_can_be_jitted(optimizer, state):
    shapes = jax.eval_shape(lambda: PARAMS)
    assert_curvature(jax.jit(lambda state: read(state, shapes))(state), optimizer[1](GRADS))


def test_in_a_chain(optimizer, state):
    """A chain's state is a tuple of its parts' states."""
    tx = optax.chain(optax.clip_by_global_norm(1e9), optimizer[0], optax.scale(0.5))
    assert jax.tree.structure(tx.init(PARAMS)[1]) == jax.tree.structure(state)
    assert_curvature(read((optax.EmptyState(), state, optax.EmptyState())), optimizer[1](GRADS))


def test_in_apply_if_finite(optimizer, state):
    packed = optax.apply_if_finite(optimizer[0], 2).init(PARAMS)._replace(inner_state=state)
    assert_curvature(read(packed), optimizer[1](GRADS))


def test_in_multi_steps(optimizer):
    """The gradient of a step is the mean over its mini-batches."""
    found = read(train(optax.MultiSteps(optimizer[0], 2).gradient_transformation()))
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[i : i + 2]) for i in (0, 2)]
    assert_curvature(found, optimizer[1](mean), rtol=1e-4)


def test_in_partition(optimizer):
    """Each leaf has its own optimizer."""
    labels = {"bias": "adam", "layer": {"kernel": "tested"}}
    tx = optax.partition({"adam": optax.adam(1e-3, b2=B2), "tested": optimizer[0]}, labels)
    expected = dense_moments(GRADS) | {"layer": optimizer[1](GRADS)["layer"]}
    assert_curvature(read(train(tx)), expected)


def test_in_masked(optimizer):
    mask = {"bias": False, "layer": {"kernel": True}}
    trained = train(optax.masked(optimizer[0], mask))
    expected = optimizer[1](GRADS) | {"bias": np.full(8, 0.25)}
    assert_curvature(read(trained, missing=0.25), expected)
    with pytest.raises(ValueError, match=r"1 of 2 leaves: 'bias'.*missing"):
        read(trained)


INJECTED = {
    "moma": (
        om.moma,
        {"rank": 2, "min_dim_size_to_factor": 8, "orthogonal_block_size": 128},
        factored_moments,
    ),
    "umtam": (om.umtam, {"rank": 2}, lambda grads: factored_moments(grads, 1e-8)),
    "adamw": (optax.adamw, {}, dense_moments),
}


@pytest.mark.parametrize("name", INJECTED)
def test_in_inject_hyperparams(name):
    factory, static, moments = INJECTED[name]
    tx = optax.inject_hyperparams(factory, static_args=tuple(static))(1e-3, b2=B2, **static)
    assert_curvature(read(train(tx)), moments(GRADS))


def test_in_an_nnx_optimizer(optimizer):
    nnx = pytest.importorskip("flax.nnx")

    class Layer(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((12, 8)))

    class Net(nnx.Module):
        def __init__(self):
            self.bias, self.layer = nnx.Param(jnp.ones(8)), Layer()

    model = Net()
    trained = nnx.Optimizer(model, optimizer[0], wrt=nnx.Param)
    step = nnx.jit(lambda model, trained, grads: trained.update(model, grads))
    for g in GRADS:
        grads = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(grads, g)
        step(model, trained, grads)
    found = om.curvature_from(trained, nnx.state(model, nnx.Param), b2=B2)
    found, expected = (jax.tree.leaves(x, is_leaf=lambda x: isinstance(x, om.Factored))
                       for x in (found, optimizer[1](GRADS)))  # fmt: skip
    assert_curvature(found, expected)


def test_of_a_bare_array(optimizer):
    kernel = lambda tree: tree["layer"]["kernel"]
    trained = train(optimizer[0], [kernel(g) for g in GRADS], kernel(PARAMS))
    assert_curvature(read(trained, kernel(PARAMS)), kernel(optimizer[1](GRADS)))


def raw(node: Any) -> Any:
    """A state as a checkpoint gives it back without the code of its optimizer."""
    if hasattr(node, "_asdict"):
        return {key: raw(value) for key, value in node._asdict().items()}
    if isinstance(node, dict):
        return {key: raw(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [raw(value) for value in node]
    return np.asarray(node)


def test_of_raw_dictionaries_and_lists(optimizer, state):
    assert_curvature(read(raw(state)), optimizer[1](GRADS))


def test_moma_records_the_weight_of_its_own_average():
    make, moments = OPTIMIZERS["moma"]
    assert_curvature(om.curvature_from(train(make()), PARAMS), moments(GRADS))  # the wrong b2


def test_float64_is_kept():
    with jax.enable_x64(True):
        grads = [jax.tree.map(lambda x: np.asarray(x, np.float64), g) for g in GRADS]
        params = jax.tree.map(lambda p: np.ones(p.shape), PARAMS)
        found = read(train(optax.adam(1e-3, b2=B2), grads, params), params)
        assert found["bias"].dtype == np.float64
        np.testing.assert_allclose(found["bias"], dense_moments(grads)["bias"], rtol=1e-9)


@pytest.mark.parametrize("name", ["moma", "adafactor", "adam"])
def test_states_of_low_precision_come_back_in_float32(name):
    low = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    tx = OPTIMIZERS[name][0]()
    found = read(train(tx, [low(g) for g in GRADS], low(PARAMS)), low(PARAMS))
    assert_curvature(found, OPTIMIZERS[name][1](GRADS), rtol=0.05)


@pytest.mark.parametrize("numbers", [Axes(1, 0), Axes(0, 1)], ids=["swapped", "plain"])
def test_dimension_numbers_of_a_square_matrix(numbers):
    """The sums fit both ways round: only the numbers tell rows from columns."""
    g = np.asarray(np.random.default_rng(1).normal(size=(8, 8)), np.float32)
    tx = om.moma(1e-3, 2, b2=B2, min_dim_size_to_factor=8, weight_dimension_numbers=numbers)
    found = om.curvature_from(train(tx, [g], g), g, weight_dimension_numbers=numbers)
    v = g.astype(np.float64) ** 2
    expected = np.outer(v.sum(1), v.sum(0)) / v.sum()
    np.testing.assert_allclose(whole(found), expected, rtol=1e-5)


def test_of_leaves_with_more_axes():
    rng = np.random.default_rng(2)
    shapes = {"stack": (3, 8, 16), "heads": (16, 4, 2), "named": (8, 3, 16)}
    grads = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    numbers = {"stack": Axes(1, 2), "heads": Axes(0, (1, 2)), "named": Axes(0, 2)}
    v = {k: g.astype(np.float64) ** 2 for k, g in grads.items()}

    def rank_one(v, rows, cols):
        return (
            v.sum(cols, keepdims=True)
            * v.sum(rows, keepdims=True)
            / v.sum((*rows, *cols), keepdims=True)
        )

    expected = {
        "stack": rank_one(v["stack"], (1,), (2,)),
        "heads": rank_one(v["heads"], (0,), (1, 2)),
        "named": rank_one(v["named"], (0,), (2,)),
    }
    named = om.moma(1e-3, 2, min_dim_size_to_factor=8, weight_dimension_numbers=numbers)
    state = train(named, [grads], grads)
    found = om.curvature_from(state, grads, weight_dimension_numbers=numbers)
    assert_curvature(found, expected)
    with pytest.raises(ValueError, match=r"'named'.*weight_dimension_numbers"):
        om.curvature_from(state, grads)
    del grads["named"], expected["named"]
    by_default = train(om.moma(1e-3, 2, min_dim_size_to_factor=8), [grads], grads)
    assert_curvature(om.curvature_from(by_default, grads), expected)


@pytest.mark.parametrize(
    "tx",
    [
        optax.nadam(1e-3, b2=B2),
        optax.radam(1e-3, b2=B2),
        optax.amsgrad(1e-3, b2=B2),
        optax.lamb(1e-3, b2=B2),
        optax.rmsprop(1e-3, decay=B2, centered=True, bias_correction=True),
        optax.contrib.ademamix(1e-3, b2=B2),
        optax.contrib.schedule_free_adamw(1e-3, b2=B2),
    ],
    ids=["nadam", "radam", "amsgrad", "lamb", "centred rmsprop", "ademamix", "schedule-free"],
)
def test_optimizers_with_the_second_moment_of_adam(tx):
    assert_curvature(read(train(tx)), dense_moments(GRADS))


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (optax.adabelief(1e-3, b2=B2), "ScaleByBeliefState"),
        (optax.novograd(1e-3, b2=B2), "ScaleByNovogradState"),
        (optax.contrib.galore(1e-3, rank=2), "GaLoreState"),
        (optax.rmsprop(1e-3, decay=B2), "ScaleByRmsState"),
    ],
    ids=["adabelief", "novograd", "galore", "rmsprop without count"],
)
def test_other_moments_under_its_names_are_refused(tx, name):
    with pytest.raises(ValueError, match=rf"no curvature found in opt_state.*{name}"):
        read(train(tx))


def test_before_the_first_step_it_is_next_to_nothing(optimizer):
    """No 0 / 0; umtam's sums start at epsilon."""
    for v in jax.tree.leaves(
        read(optimizer[0].init(PARAMS)), is_leaf=lambda x: isinstance(x, om.Factored)
    ):
        np.testing.assert_allclose(whole(v), np.zeros(whole(v).shape), atol=1e-8)


# Errors


def test_no_curvature_in_the_state():
    state = optax.chain(optax.sgd(1e-3, momentum=0.9)).init(PARAMS)
    with pytest.raises(ValueError, match=r"no curvature found in opt_state.*TraceState"):
        om.curvature_from(state, PARAMS)


def test_parameters_of_another_model(optimizer, state):
    other = {"bias": jnp.ones(9), "layer": {"kernel": jnp.ones((12, 8))}}
    with pytest.raises(ValueError, match=r"'bias'.*opt_state"):
        read(state, other)
    other = {"bias": jnp.ones(8), "layer": {"kernel": jnp.ones((7, 8))}}
    with pytest.raises(ValueError, match=r"'layer/kernel'.*opt_state"):
        read(state, other)


def test_every_uncovered_leaf_is_listed(state):
    other = PARAMS | {"head": {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"2 of 4 leaves: 'head/bias', 'head/kernel'"):
        read(state, other)


# Saliency


def saliency_inputs():
    rng = np.random.default_rng(3)
    w, w0 = ({"a": rng.normal(size=(3, 4)), "b": rng.normal(size=4)} for _ in range(2))
    row, col = rng.lognormal(size=(3, 1)), rng.lognormal(size=(1, 4))
    return w, w0, row, col, rng.lognormal(size=4)


def in_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("power", [0, 0.5, 1.0, 2])
def test_saliency_is_the_squared_change_times_a_power_of_the_curvature(power):
    w, w0, row, col, b = saliency_inputs()
    expected = {
        "a": (w["a"] - w0["a"]) ** 2 * (row * col) ** power,
        "b": (w["b"] - w0["b"]) ** 2 * b**power,
    }
    for v in (om.Factored(row, col), row * col):
        curvature = in_float32({"a": v, "b": b})
        found = om.saliency(in_float32(w), in_float32(w0), curvature, power=power)
        for name, want in expected.items():
            np.testing.assert_allclose(found[name], want, rtol=1e-5)


def test_default_power_is_one_and_the_result_float32():
    w = {"a": jnp.full(3, 3.0, jnp.bfloat16)}
    found = om.saliency(w, {"a": jnp.ones(3, jnp.bfloat16)}, {"a": jnp.array([0.0, 1.0, 2.0])})
    assert found["a"].dtype == jnp.float32
    np.testing.assert_array_equal(found["a"], [0, 4, 8])


def test_saliency_of_trees_that_do_not_fit():
    w, w0, row, col, b = saliency_inputs()
    v = {"a": om.Factored(row, col), "b": b}
    with pytest.raises(ValueError, match="base is not a tree like params"):
        om.saliency(w, {"a": w0["a"]}, v)
    with pytest.raises(ValueError, match="curvature is not a tree like params"):
        om.saliency(w, w0, {"a": v["a"]})
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\) in params.*\(5,\) in curvature"):
        om.saliency(w, w0, v | {"b": np.ones(5)})
    with pytest.raises(ValueError, match=r"'a' has shape.*\(2, 4\) in base"):
        om.saliency(w, w0 | {"a": np.ones((2, 4))}, v)
