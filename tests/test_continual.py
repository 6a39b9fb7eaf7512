"""Tangent-space training, corrections and penalties against NumPy's float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_moma import Factored, continual
from optax_moma.continual import correct, correct_linear, ewc, linearize, stages
from optax_moma.merging import MergeError, average, merge, opcm, perturb_and_merge, running_mean

RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def network(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


BASE = {"up": draw(5, 7), "bias": draw(7), "down": draw(7, 3)}
X = draw(9, 5)


def near(params, size=1.0):
    return {name: (x + size * draw(*x.shape)).astype(x.dtype) for name, x in params.items()}


def taylor(params):
    """The expansion of ``network``, written out by hand in float64."""
    w0, w = ({n: np.asarray(a, np.float64) for n, a in p.items()} for p in (BASE, params))
    d = {name: w[name] - w0[name] for name in w}
    h = np.tanh(X @ w0["up"] + w0["bias"])
    dh = (1 - h**2) * (X @ d["up"] + d["bias"])
    return h @ w0["down"] + dh @ w0["down"] + h @ d["down"]


def test_linearized_model_is_the_taylor_expansion():
    params = near(BASE)
    found = jax.jit(linearize(network, BASE))(params, X)
    want = taylor(params)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert np.abs(found - network(params, X)).max() > 1  # far from the model itself


def test_linearized_gradient_is_that_of_a_linear_model():
    y, params = draw(9, 3), near(BASE)
    f = linearize(network, BASE)
    grads = jax.grad(lambda p: jnp.sum((f(p, X) - y) ** 2) / 2)(params)
    jacobian = jax.jacobian(lambda p: network(p, X))(BASE)
    for name, J in jacobian.items():
        want = np.tensordot(taylor(params) - y, np.asarray(J, np.float64), 2)
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_outputs_of_a_merge_are_the_merge_of_outputs():
    f = jax.jit(linearize(network, BASE))
    experts = [near(BASE), near(BASE)]
    found = f(merge(average(), experts), X)
    np.testing.assert_allclose(found, (f(experts[0], X) + f(experts[1], X)) / 2, rtol=1e-4)


def test_leaves_and_outputs_that_are_not_floating_point():
    base = {"w": jnp.array([1.0, 2.0]), "order": jnp.array([1, 0]), "key": jax.random.key(0)}

    def apply(params, x, *, shift):
        y = params["w"][params["order"]] ** 2 * x + shift
        return {"y": y, "largest": jnp.argmax(y), "draw": jax.random.bits(params["key"])}

    f = linearize(apply, base)
    found = jax.jit(f)(base | {"w": jnp.array([3.0, 2.0])}, 10.0, shift=1.0)
    np.testing.assert_allclose(found["y"], [41, 51])  # 10 (w0^2 + 2 w0 (w - w0)) + 1
    assert found["largest"] == 0  # the base's
    assert found["draw"] == jax.random.bits(jax.random.key(0))
    other = f(base | {"order": jnp.array([0, 1])}, 10.0, shift=1.0)
    np.testing.assert_allclose(other["y"], [11, 41])


def test_aux_is_that_of_the_base():
    apply = lambda params, x: (params["w"] ** 2 * x, {"mean": params["w"] * x, "steps": 3})
    y, aux = linearize(apply, {"w": jnp.array(2.0)}, has_aux=True)({"w": jnp.array(3.0)}, 5.0)
    assert (float(y), float(aux["mean"]), aux["steps"]) == (40.0, 10.0, 3)


def test_small_differences_are_not_lost_to_a_narrow_base():
    f = linearize(lambda params: params["w"], {"w": jnp.array(256.0, jnp.bfloat16)})
    change = jax.jvp(lambda w: f({"w": w}), (jnp.array(256.0),), (jnp.array(1.0),))[1]
    assert change == 1
    gap = linearize(lambda p: p["w"] - 256, {"w": jnp.array(256.0, jnp.bfloat16)})
    assert gap({"w": jnp.array(256.0625)}) == 0.0625  # bfloat16 has no such params


def test_training_with_optax_compiles_once_and_fits():
    traced = []

    def apply(params, x):
        traced.append(1)
        return network(params, x)

    y, tx = draw(9, 3), optax.adam(0.1)

    @jax.jit
    def step(model, params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((model(p, X) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = BASE, tx.init(BASE), []
    for _ in range(100):  # a new expansion of the same function each time: still one program
        params, state, loss = step(linearize(apply, BASE), params, state)
        losses.append(float(loss))
    assert len(traced) == 1
    assert losses[-1] < 0.01 * losses[0]


def test_flax_models():
    nnx = pytest.importorskip("flax.nnx")
    graph, base = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    f = linearize(lambda params, x: nnx.merge(graph, params)(x), base)
    params = jax.tree.map(lambda x: x + 1, base)
    x = draw(4, 3)
    np.testing.assert_allclose(f(params, x), nnx.merge(graph, params)(x), rtol=1e-5, atol=1e-5)


def test_params_that_do_not_fit_the_base():
    f = linearize(network, BASE)
    with pytest.raises(ValueError, match="params is not a tree like base"):
        f({"up": BASE["up"]}, X)
    with pytest.raises(ValueError, match=r"'bias' has shape \(7,\) in base and \(8,\) in params"):
        jax.jit(f)(BASE | {"bias": draw(8)}, X)
    with pytest.raises(ValueError, match="base holds values that are not finite at 'bias'"):
        linearize(network, BASE | {"bias": np.full(7, np.nan)})


def features(params, x):
    return x @ params["body"] @ params["head"]


MODEL = {"body": draw(4, 4), "head": draw(4, 2), "steps": np.int32(3)}
TARGET = {"body": draw(4, 4), "head": draw(4, 2), "steps": np.int32(3)}


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_correction_is_gradient_descent_on_the_distance(distance):
    batches = [draw(6, 4) for _ in range(5)]
    done = correct(
        features, MODEL, TARGET, batches, optax.sgd(0.01), distance=distance,
        trainable=lambda name: name == "head",
    )  # fmt: skip
    B, W = np.float64(MODEL["body"]), np.float64(MODEL["head"])
    goal = np.float64(TARGET["body"]) @ np.float64(TARGET["head"])
    for x, found in zip(batches, done.distances, strict=True):
        gap = x @ B @ W - x @ goal
        value = np.mean(np.abs(gap) if distance == "l1" else gap**2)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        slope = (np.sign(gap) if distance == "l1" else 2 * gap) / gap.size
        W = W - 0.01 * (x @ B).T @ slope
    np.testing.assert_allclose(done.params["head"], W, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(done.params["body"], MODEL["body"])
    assert done.params["steps"] == 3


def test_correction_of_all_leaves_reaches_the_target():
    x = draw(32, 4)
    done = correct(features, MODEL, TARGET, [x] * 300, optax.adam(0.05), distance="l2")
    assert done.distances[-1] < 1e-3 * done.distances[0]


def test_correction_of_a_linearized_model():
    f = linearize(network, BASE)
    params, target = near(BASE, 0.3), near(BASE, 0.3)
    done = correct(f, params, target, [X], optax.sgd(0.0), distance="l2")
    want = np.mean((taylor(params) - taylor(target)) ** 2)
    np.testing.assert_allclose(done.distances, [want], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "batches: there is none"),
        ({"distance": "L1"}, "distance must be 'l1' or 'l2'"),
        ({"trainable": lambda name: "tail" in name}, "chooses no leaf .* body, head, steps"),
        ({"target": {"body": TARGET["body"]}}, "target is not a tree like params"),
        ({"target": TARGET | {"head": draw(4, 3)}}, r"'head' has shape \(4, 2\) in params"),
        ({"target": TARGET | {"head": np.full((4, 2), np.inf)}}, "target holds values .* 'head'"),
        ({"params": MODEL | {"head": np.full((4, 2), np.nan)}}, "params holds values .* 'head'"),
        ({"features": lambda p, x: {"a": x}}, "one floating-point array, it returns dict"),
        ({"batches": [np.full((2, 4), np.nan, np.float32)]}, "the distance is nan at step 0"),
        ({"optimizer": optax.sgd(np.inf)}, "the corrected params holds values"),
    ],
)
def test_faulty_corrections(change, message):
    given = {
        "features": features, "params": MODEL, "target": TARGET, "batches": [draw(2, 4)],
        "optimizer": optax.sgd(0.1),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        correct(**(given | change))


def test_one_batch_is_no_list_of_batches():
    with pytest.raises(TypeError, match="single batch"):
        correct(features, MODEL, TARGET, draw(2, 4), optax.sgd(0.1))


@pytest.mark.parametrize("strength", [0.1, 3.0, 1e4])
def test_ridge_minimises_its_objective(strength):
    P0, H, Z = draw(6, 3), draw(4, 5, 6), draw(4, 5, 3)
    # The same problem as ordinary least squares with rows added, which NumPy solves in float64.
    rows = np.concatenate([H.reshape(-1, 6), np.sqrt(strength) * np.eye(6)]).astype(np.float64)
    right = np.concatenate([Z.reshape(-1, 3), np.sqrt(strength) * P0]).astype(np.float64)
    want = np.linalg.lstsq(rows, right, rcond=None)[0]
    found = jax.jit(correct_linear)(P0, H, Z, strength)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    tiny = 1e-12  # the units of H and Z, with the square in the strength, change nothing
    found = correct_linear(P0, tiny * H, tiny * Z, tiny**2 * strength)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_ridge_between_the_merge_and_least_squares():
    P0, H, Z = draw(6, 3), draw(40, 6), draw(40, 3)
    free = np.linalg.lstsq(np.float64(H), np.float64(Z), rcond=None)[0]
    np.testing.assert_allclose(correct_linear(P0, H, Z, 1e-3), free, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(correct_linear(P0, H, Z, 1e9), P0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(correct_linear(P0, H, H @ P0, 1.0), P0, rtol=1e-5, atol=1e-5)
    assert correct_linear(P0.astype(jnp.bfloat16), H, Z, 1.0).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": draw(5, 4)}, r"cannot read hidden .* hidden \(5, 4\)"),
        ({"target": draw(5, 2)}, r"cannot read hidden or give target"),
        ({"target": draw(4, 3)}, "of the same examples"),
        ({"kernel": draw(2, 6, 3)}, r"a kernel \(fan-in, fan-out\)"),
        ({"hidden": draw(0, 6), "target": draw(0, 3)}, "no example"),
        ({"target": np.full((5, 3), np.nan)}, "not finite at 'target'"),
        ({"strength": -1.0}, "strength must be positive"),
        ({"strength": 0.0}, "strength must be positive"),  # H^T H would be invertible
        ({"hidden": np.ones((5, 6), np.float32), "strength": jnp.array(0.0)}, "take more"),
    ],
)
def test_faulty_ridges(change, message):
    given = {"kernel": draw(6, 3), "hidden": draw(5, 6), "target": draw(5, 3), "strength": 1.0}
    with pytest.raises(ValueError, match=message):
        correct_linear(**(given | change))


def test_ewc_is_quadratic_in_the_curvature():
    base = {"w": draw(4, 3), "b": draw(3), "steps": np.int32(1)}
    row, col, v = np.abs(draw(4, 1)) * 1e-9, np.abs(draw(1, 3)) * 1e-9, np.abs(draw(3)) * 1e-18
    curvature = {"w": Factored(row, col), "b": v, "steps": None}
    params = {"w": draw(4, 3), "b": draw(3), "steps": np.int32(7)}
    penalty = ewc(base, curvature, strength=1e18)
    d = {n: np.float64(params[n]) - np.float64(base[n]) for n in ("w", "b")}
    want = 1e18 / 2 * (np.sum(np.float64(row) * col * d["w"] ** 2) + np.sum(v * d["b"] ** 2))
    np.testing.assert_allclose(penalty(params), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda f, p: f(p))(penalty, params), want, rtol=1e-5)
    assert penalty(base) == 0
    grads = jax.grad(lambda b: penalty(params | {"b": b}))(params["b"])
    np.testing.assert_allclose(grads, 1e18 * v * d["b"], rtol=1e-5)


def test_online_ewc_takes_the_sum_of_the_curvatures():
    base = {"w": np.zeros(4, np.float32)}
    method, total = running_mean(), np.zeros(4)
    state = method.init(base)
    for _ in range(3):
        v = np.abs(draw(4))
        total += v
        state = method.update(state, {"w": draw(4)}, {"w": v})
    newest = {"w": draw(4)}
    penalty = ewc(base, state.weight)
    np.testing.assert_allclose(penalty(newest), np.sum(total * newest["w"] ** 2) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("curvature", "message"),
    [
        ({"up": BASE["up"] ** 2}, "the curvature of expert 'base' lacks leaves .* bias, down"),
        (jax.tree.map(lambda x: x[:2] ** 2, BASE), r"bias: shape \(2,\), but the params have"),
        (jax.tree.map(lambda x: -(x**2), BASE), "negative or not finite"),
        (jax.tree.map(lambda x: x**2 * np.nan, BASE), "negative or not finite"),
    ],
)
def test_curvatures_that_are_none_of_the_base(curvature, message):
    with pytest.raises(MergeError, match=message):
        ewc(BASE, curvature)


def test_penalty_of_other_params():
    penalty = ewc(BASE, jax.tree.map(np.square, BASE))
    with pytest.raises(ValueError, match="params is not a tree like base"):
        penalty({"up": BASE["up"]})
    with pytest.raises(ValueError, match="strength must not be negative"):
        ewc(BASE, jax.tree.map(np.square, BASE), -1.0)


def trainer(experts, curvature):
    """Pretends to train: gives what is stored, and keeps where it was told to start from."""
    starts = []

    def train(params, task):
        starts.append(params)
        return experts[task], curvature[task]

    return train, starts


EXPERTS = [near(BASE) for _ in range(3)]
CURVATURE = [jax.tree.map(np.square, near(BASE)) for _ in range(3)]


def test_stages_merge_and_start_from_the_merge():
    train, starts = trainer(EXPERTS, CURVATURE)
    found = list(stages(running_mean(), BASE, range(3), train))
    for start, stage in zip(starts[1:], found, strict=False):
        jax.tree.map(np.testing.assert_array_equal, start, stage.params)
    for t in range(3):
        for name in BASE:
            v, w = (np.float64([tree[name] for tree in x[: t + 1]]) for x in (CURVATURE, EXPERTS))
            want = (v * w).sum(0) / v.sum(0)
            np.testing.assert_allclose(found[t].params[name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [running_mean(), opcm(), perturb_and_merge()])
def test_stages_go_on_from_where_they_were(method):
    train, _ = trainer(EXPERTS, CURVATURE)
    *_, whole = stages(method, BASE, [0, 1, 2], train)
    *_, half = stages(method, BASE, [0, 1], train)
    *_, rest = stages(method, BASE, [2], train, start=half)
    jax.tree.map(np.testing.assert_array_equal, rest, whole)


def test_sequential_fine_tuning_keeps_the_newest():
    train, _ = trainer(EXPERTS, [None] * 3)
    found = list(stages(running_mean(1.0, power=0), BASE, range(3), train))
    for expert, stage in zip(EXPERTS, found, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            stage.params, expert,
        )  # fmt: skip


def test_what_is_corrected_is_trained_on_from_and_not_merged():
    train, starts = trainer(EXPERTS, [None] * 3)
    given = []

    def correction(params, previous, expert, task):
        given.append((previous, expert, task))
        return jax.tree.map(lambda x: x + 100, params)

    method = running_mean(power=0)
    found = list(stages(method, BASE, range(3), train, correction))
    assert starts[1] is found[0].params and given[1][0] is found[0].params
    assert given[2][1] is EXPERTS[2] and given[2][2] == 2
    mean = np.mean([e["bias"] for e in EXPERTS], axis=0)
    np.testing.assert_allclose(method.params(found[2].state)["bias"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2].params["bias"], mean + 100, rtol=1e-5)


def test_faulty_streams():
    train, _ = trainer(EXPERTS, [None, {"up": CURVATURE[0]["up"]}, None])
    with pytest.raises(ValueError, match="tasks: the stream is empty"):
        list(stages(running_mean(), BASE, iter([]), train))
    with pytest.raises(MergeError, match="the method needs one tree per expert"):
        list(stages(running_mean(), BASE, [0], train))
    with pytest.raises(MergeError, match="lacks leaves that the model has: bias, down"):
        list(stages(running_mean(), BASE, [1], train))
    with pytest.raises(ValueError, match="it must return a pair"):
        list(stages(running_mean(), BASE, [0], lambda params, task: params))
    diverged = EXPERTS[0] | {"bias": np.full(7, np.nan, np.float32)}
    with pytest.raises(MergeError, match="bias: 7 values that are not finite"):
        list(stages(opcm(), BASE, [0], lambda params, task: (diverged, None)))


def test_a_state_that_is_not_finite_is_no_start():
    train, _ = trainer(EXPERTS, CURVATURE)
    *_, last = stages(running_mean(), BASE, [0], train)
    delta = last.state.delta | {"bias": np.full(7, np.inf, np.float32)}
    broken = last._replace(state=last.state._replace(delta=delta))
    with pytest.raises(ValueError, match=r"start holds values .* not finite at .*delta/bias"):
        list(stages(running_mean(), BASE, [1], train, start=broken))


def test_the_module_is_public():
    import optax_moma

    assert optax_moma.continual is continual
