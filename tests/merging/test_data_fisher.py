"""The diagonal Fisher from data against closed forms in NumPy with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.merging import diagonal_fisher, fisher, merge


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def softmax(z):
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def linear(params, x):
    return x @ params["w"] + params["b"]


W, X = {"w": normal(4, 3), "b": normal(3)}, normal(7, 4)
Y = np.array([0, 2, 1, 1, 0, 2, 2])
P = softmax(X @ W["w"] + W["b"])
X2 = X.astype(np.float64) ** 2


def check(found, wanted, rtol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def test_logistic_regression():
    batches = [X[:3], X[3:]]
    found = diagonal_fisher(linear, W, batches)
    check(found["w"], np.einsum("ni,nc->ic", X2, P * (1 - P)) / 7)
    check(found["b"], (P * (1 - P)).mean(0))

    pairs = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    error = (np.eye(3)[Y] - P) ** 2
    found = diagonal_fisher(linear, W, pairs, labels="empirical")
    check(found["w"], np.einsum("ni,nc->ic", X2, error) / 7)
    check(found["b"], error.mean(0))


def test_sampled_labels():
    key = jax.random.key(0)
    one = diagonal_fisher(linear, W, [X], labels="sampled", key=key)
    # The same draws whatever the batches; the square of one of the three possible gradients each.
    two = diagonal_fisher(linear, W, [X[:2], X[2:]], labels="sampled", key=key)
    check(two["w"], np.asarray(one["w"], np.float64), rtol=1e-6)
    single = diagonal_fisher(linear, W, [X[:1]], labels="sampled", key=key)["b"]
    possible = (np.eye(3) - P[0]) ** 2
    assert np.min(np.abs(possible - np.asarray(single)).max(1)) < 1e-6
    # Many draws for one example: their mean is the expectation, within four standard errors.
    many = np.repeat(X[:1], 4000, 0)
    found = diagonal_fisher(linear, W, [many], labels="sampled", key=key)["b"]
    error = np.sqrt(((possible - P[0] * (1 - P[0])) ** 2 * P[0][:, None]).sum(0) / 4000)
    assert np.all(np.abs(found - P[0] * (1 - P[0])) < 4 * error)


def test_regression():
    def apply(params, x):
        return (x @ params["w"])[:, 0]

    w, y = {"w": normal(4, 1)}, normal(7)
    options = {"likelihood": "normal"}
    check(diagonal_fisher(apply, w, [X], **options)["w"][:, 0], X2.mean(0))
    error = (y - (X @ w["w"])[:, 0].astype(np.float64)) ** 2
    found = diagonal_fisher(apply, w, [(X, y)], labels="empirical", **options)["w"]
    check(found[:, 0], (X2 * error[:, None]).mean(0))
    many = [np.repeat(X[:1], 4000, 0)]
    drawn = diagonal_fisher(apply, w, many, labels="sampled", key=jax.random.key(1), **options)
    # E[(y - mean)**2] is 1, with a standard error of sqrt(2 / 4000).
    check(drawn["w"][:, 0], X2[0], rtol=4 * np.sqrt(2 / 4000))


def test_a_network_of_two_layers_at_several_positions():
    params = {"up": normal(4, 6), "down": normal(6, 3)}
    x = normal(5, 2, 4)

    def apply(params, x):
        return jnp.tanh(x @ params["up"]) @ params["down"]

    found = diagonal_fisher(apply, params, [x[:4], x[4:]])
    up, down = (params[n].astype(np.float64) for n in ("up", "down"))
    wanted = {"up": np.zeros((4, 6)), "down": np.zeros((6, 3))}
    for z in x.reshape(-1, 4).astype(np.float64):
        h = np.tanh(z @ up)
        p = softmax(h @ down)
        for c in range(3):
            error = np.eye(3)[c] - p
            wanted["down"] += p[c] * np.outer(h, error) ** 2
            wanted["up"] += p[c] * np.outer(z, (down @ error) * (1 - h**2)) ** 2
    for name in wanted:
        check(found[name], wanted[name] / 5)

    # Labels below zero are left out; positions are one example: squared after the sum.
    labels = np.array([[0, -100], [1, 2], [2, -1], [0, 0], [-100, -100]])
    found = diagonal_fisher(apply, params, [(x, labels)], labels="empirical")["down"]
    wanted = np.zeros((6, 3))
    for example, ys in zip(x.astype(np.float64), labels, strict=True):
        score = np.zeros((6, 3))
        for z, y in zip(example, ys, strict=True):
            h = np.tanh(z @ up)
            score += (y >= 0) * np.outer(h, np.eye(3)[max(y, 0)] - softmax(h @ down))
        wanted += score**2 / 5
    check(found, wanted)

    # Padding that has a constant for an output counts for nothing.
    def padded(params, x):
        return apply(params, x) * jnp.array([1, 0])[:, None]

    one = diagonal_fisher(lambda p, x: apply(p, x[:, :1]), params, [x])
    check(diagonal_fisher(padded, params, [x])["up"], np.asarray(one["up"]), rtol=1e-6)


def test_leaves_and_dtypes():
    params = {**W, "w": W["w"].astype(jnp.bfloat16), "steps": np.array(3), "unused": normal(2)}
    found = diagonal_fisher(linear, params, [X])
    assert found["steps"] is None
    assert found["w"].dtype == jnp.float32
    assert not found["unused"].any()
    exact = diagonal_fisher(linear, {**W, "w": np.float32(params["w"])}, [X])["w"]
    check(found["w"], np.asarray(exact), rtol=2e-2)
    merged = merge(fisher(), [params, params], curvature=[found, found])
    np.testing.assert_array_equal(merged["unused"], params["unused"])


def test_a_module_of_nnx():
    nnx = pytest.importorskip("flax.nnx")
    graphdef, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    found = diagonal_fisher(lambda p, x: nnx.merge(graphdef, p)(x), params, [X])
    p = softmax(X @ np.asarray(params["kernel"].get_value()))
    wanted = np.einsum("ni,nc->ic", X2, p * (1 - p)) / 7
    check(found["kernel"].get_value(), wanted)
    merged = merge(fisher(), [params, params], curvature=[found, found])
    check(merged["kernel"].get_value(), np.asarray(params["kernel"].get_value()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batches": []}, "batches: there is no example"),
        ({"batches": [X[:0]]}, "batches: there is no example"),
        ({"batches": [{"x": X, "n": np.ones(3)}]}, "first axis of all inputs must count examples"),
        ({"batches": [{"x": X, "n": 3}]}, "first axis of all inputs must count examples"),
        ({"labels": "true"}, "labels must be one of"),
        ({"likelihood": "gauss"}, "likelihood must be one of"),
        ({"labels": "sampled"}, "pass key="),
        ({"key": jax.random.key(0)}, "leave it out"),
        ({"apply": lambda p, x: linear(p, x).sum(0)}, r"logits \(1, ..., classes\), it returns"),
        ({"apply": lambda p, x: linear(p, x).sum()}, r"it returns an array of shape \(\)"),
        ({"apply": lambda p, x: (linear(p, x), 0)}, "it returns tuple"),
        ({"labels": "empirical"}, "needs pairs"),
        ({"labels": "empirical", "batches": [(X, Y[:3])]}, r"\(7, 3\) need labels of shape \(7,\)"),
        ({"labels": "empirical", "batches": [(X, Y + 1)]}, "integers below 3, .* up to 3"),
        ({"labels": "empirical", "batches": [(X, Y * 1.0)]}, "integers below 3"),
        ({"params": {"w": np.arange(3)}}, "params: no leaf is floating point"),
    ],
)
def test_bad_input(change, text):
    arguments = {"apply": linear, "params": W, "batches": [X], **change}
    with pytest.raises(ValueError, match=text):
        diagonal_fisher(**arguments)


def test_a_single_batch_is_none():
    with pytest.raises(TypeError, match="Is it a single batch"):
        diagonal_fisher(linear, W, X)
