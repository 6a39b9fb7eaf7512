"""AdaMerging: its gradient against finite differences of the published formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_moma.merging import (
    adamerging,
    chain,
    dare,
    elect,
    entropy,
    mean,
    merge,
    total,
    trim,
    weigh,
)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def tree(seed, size=1.0):
    return {
        "up": {"kernel": size * normal(4, 6, seed=seed), "bias": size * normal(6, seed=seed)},
        "down": size * normal(6, 3, seed=seed),
    }


BASE = tree(0)
EXPERTS = {
    name: jax.tree.map(jnp.add, BASE, tree(seed, 0.5)) for name, seed in (("b", 1), ("a", 2))
}
BATCH = {"a": normal(8, 4, seed=5), "b": normal(8, 4, seed=6)}
LAYERS = ["down", "up/bias", "up/kernel"]


def apply(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]


def loss(params, batch):
    return sum(entropy(apply(params, x)) for x in batch.values())


def numpy_loss(c):
    """The entropy of the merged model in float64; c is an array of (layers, experts a and b)."""
    w = {}
    for i, layer in enumerate(LAYERS):
        base, a, b = (
            np.asarray(t["down"] if layer == "down" else t["up"][layer[3:]], np.float64)
            for t in (BASE, EXPERTS["a"], EXPERTS["b"])
        )
        w[layer] = base + c[i, 0] * (a - base) + c[i, 1] * (b - base)
    value = 0.0
    for x in BATCH.values():
        z = np.tanh(x @ w["up/kernel"] + w["up/bias"]) @ w["down"]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        value -= (p * np.log(p)).sum(-1).mean()
    return value


def numpy_gradient(c, h=1e-6):
    steps = np.eye(c.size).reshape(c.size, *c.shape) * h
    slopes = [(numpy_loss(c + s) - numpy_loss(c - s)) / (2 * h) for s in steps]
    return np.reshape(slopes, c.shape)


def table(coefficients, layers=LAYERS):
    assert sorted(coefficients) == layers
    return np.array([[coefficients[layer][e] for e in "ab"] for layer in layers])


def test_entropy():
    z = normal(2, 5, 7)
    p = np.exp(z.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy(jnp.asarray(z)), -(p * np.log(p)).sum(-1).mean(), rtol=1e-6)
    assert float(entropy(jnp.array([[0.0, 200.0]]))) == 0.0


def test_one_step_of_descent_on_every_layer():
    sgd = optax.sgd(0.1)
    found = adamerging(loss, EXPERTS, [BATCH], base=BASE, optimizer=sgd, init=0.4)
    start = np.full((3, 2), 0.4)
    np.testing.assert_allclose(found.losses, [numpy_loss(start)], rtol=1e-5)
    wanted = start - 0.1 * numpy_gradient(start)
    np.testing.assert_allclose(table(found.coefficients), wanted, rtol=1e-5, atol=1e-6)
    after = loss(found.params, BATCH)
    np.testing.assert_allclose(after, numpy_loss(wanted), rtol=1e-5)


def test_one_number_per_expert_is_task_wise():
    sgd = optax.sgd(0.1)
    found = adamerging(
        loss, EXPERTS, [BATCH, BATCH], base=BASE, optimizer=sgd, group=lambda path: "all"
    )
    c = np.full((1, 2), 0.3)
    for _ in range(2):
        c = c - 0.1 * numpy_gradient(np.repeat(c, 3, 0)).sum(0)
    np.testing.assert_allclose(table(found.coefficients, ["all"]), c, rtol=1e-5, atol=1e-6)
    merged = merge(total(), EXPERTS, base=BASE, weights=found.coefficients["all"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found.params, merged)


def test_the_published_optimizer_and_bounds():
    found = adamerging(loss, EXPERTS, [BATCH] * 3, base=BASE)
    # Adam's first steps have the size of the learning rate.
    c = table(found.coefficients)
    np.testing.assert_allclose(np.abs(c - 0.3), 3e-3, rtol=0.2)
    assert np.all(np.diff(found.losses) < 0)
    fast = optax.adam(0.2)
    clipped = adamerging(loss, EXPERTS, [BATCH] * 20, base=BASE, optimizer=fast)
    free = adamerging(loss, EXPERTS, [BATCH] * 20, base=BASE, optimizer=fast, bounds=None)
    assert table(clipped.coefficients).max() == 1.0
    assert table(free.coefficients).max() > 1.5
    assert free.losses[-1] < clipped.losses[-1] < clipped.losses[0]


def test_other_methods():
    method = chain(trim(0.5), elect(), total())
    found = adamerging(loss, EXPERTS, [BATCH], base=BASE, method=method, group=lambda path: "all")
    merged = merge(method, EXPERTS, base=BASE, weights=found.coefficients["all"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found.params, merged)

    # Weights of a mean by curvature, without a base.
    curvature = {n: jax.tree.map(jnp.square, e) for n, e in EXPERTS.items()}
    method = chain(weigh(0.5), mean())
    found = adamerging(
        loss, EXPERTS, [BATCH] * 5, method=method, curvature=curvature, group=lambda path: "all"
    )
    c = found.coefficients["all"]
    assert found.losses[-1] < found.losses[0] and c["a"] != c["b"]
    merged = merge(method, EXPERTS, curvature=curvature, weights=c)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.params, merged)

    # Draws are those of the merge, whatever the groups.
    key = jax.random.key(0)
    options = {"base": BASE, "key": key}
    frozen = optax.sgd(0.0)
    found = adamerging(
        loss, EXPERTS, [BATCH], method=dare(0.5), optimizer=frozen, init=1.0, **options
    )
    merged = merge(dare(0.5), EXPERTS, **options)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found.params, merged)


def test_leaves_that_are_not_merged_and_lists():
    base = {**BASE, "steps": np.array(3)}
    experts = [{**EXPERTS[name], "steps": np.array(3)} for name in "ab"]
    found = adamerging(loss, experts, [BATCH], base=base)
    assert int(found.params["steps"]) == 3
    assert sorted(found.coefficients) == LAYERS
    assert list(found.coefficients["down"]) == ["0", "1"]
    named = adamerging(loss, EXPERTS, [BATCH], base=BASE)
    values = [list(found.coefficients[layer].values()) for layer in LAYERS]
    np.testing.assert_array_equal(table(named.coefficients), values)


def test_modules_of_nnx():
    nnx = pytest.importorskip("flax.nnx")
    graphdef, base = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    expert = jax.tree.map(lambda x: x + normal(*x.shape), base)

    def loss(params, x):
        return entropy(nnx.merge(graphdef, params)(x))

    found = adamerging(loss, [expert], [BATCH["a"]] * 2, base=base)
    assert sorted(found.coefficients) == ["bias", "kernel"]
    assert found.losses[1] < found.losses[0]
    assert nnx.merge(graphdef, found.params)(BATCH["a"]).shape == (8, 3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batches": []}, "batches: there is none"),
        ({"loss": lambda p, b: apply(p, b["a"])}, r"one floating-point number, .*\(8, 3\)"),
        ({"loss": lambda p, b: (loss(p, b), 1)}, "it returns tuple"),
        ({"loss": lambda p, b: loss(p, b) * jnp.nan}, "loss: it is nan at step 0"),
        ({"method": chain(trim(0.5, scope="global"), total())}, "global threshold"),
        ({"method": chain(weigh(), mean())}, "curvature: the method needs one tree per expert"),
        ({"base": None}, "base: the method works on task vectors"),
        ({"experts": [BASE, {"up": BASE["up"]}]}, "expert 1 lacks leaves that the base has: down"),
    ],
)
def test_bad_input(change, text):
    arguments = {"loss": loss, "experts": EXPERTS, "batches": [BATCH], "base": BASE, **change}
    with pytest.raises(ValueError, match=text):
        adamerging(
            arguments.pop("loss"), arguments.pop("experts"), arguments.pop("batches"), **arguments
        )


def test_wrong_types():
    with pytest.raises(TypeError, match="Is it a single batch"):
        adamerging(loss, EXPERTS, BATCH, base=BASE)
    with pytest.raises(TypeError, match="init must be a number"):
        adamerging(loss, EXPERTS, [BATCH], base=BASE, init="0.3")  # pyright: ignore
