"""Grams of the inputs of kernels against the same sums in NumPy with float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.merging import input_grams, merge, regmean


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def gram(*inputs, weight=None):
    """The mean of z z^T over all rows z, the last axis of each array."""
    rows = np.concatenate([np.asarray(z, np.float64).reshape(-1, z.shape[-1]) for z in inputs])
    weight = np.ones(len(rows)) if weight is None else np.asarray(weight, np.float64).ravel()
    return rows.T @ (weight[:, None] * rows) / weight.sum()


def check(found, wanted, rtol=1e-5):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def mlp(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"]


MLP = {"up": {"kernel": normal(4, 6), "bias": normal(6)}, "down": {"kernel": normal(6, 3)}}


@pytest.mark.parametrize(
    "apply", [mlp, jax.jit(mlp), jax.checkpoint(mlp), lambda p, x: jax.vmap(partial(mlp, p))(x)]
)
def test_a_network_of_two_layers(apply):
    batches = [normal(5, 4), normal(2, 4, seed=1), normal(5, 4, seed=2)]
    grams = input_grams(apply, MLP, (jnp.asarray(x) for x in batches))
    hidden = [np.tanh(x @ MLP["up"]["kernel"] + MLP["up"]["bias"]) for x in batches]
    check(grams["up"]["kernel"], gram(*batches))
    check(grams["down"]["kernel"], gram(*hidden))
    assert grams["up"]["bias"] is None


def test_regmean_takes_what_is_collected():
    experts = [jax.tree.map(lambda x, s=s: x + 0.1 * normal(*x.shape, seed=s), MLP) for s in (1, 2)]
    data = [[normal(9, 4, seed=s)] for s in (3, 4)]
    grams = [input_grams(mlp, e, d) for e, d in zip(experts, data, strict=True)]
    merged = merge(regmean(ratio=1.0, ridge=0.0), experts, curvature=grams)
    g = [gram(*d) for d in data]
    w = [e["up"]["kernel"].astype(np.float64) for e in experts]
    wanted = np.linalg.solve(g[0] + g[1], g[0] @ w[0] + g[1] @ w[1])
    np.testing.assert_allclose(merged["up"]["kernel"], wanted, rtol=1e-4, atol=1e-5)
    # Without a Gram, the mean.
    mean = (experts[0]["up"]["bias"] + experts[1]["up"]["bias"]) / 2
    np.testing.assert_allclose(merged["up"]["bias"], mean, rtol=1e-6)


@jax.custom_vjp
def scaled_product(x, w):
    return x @ w


scaled_product.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))

W, X = normal(6, 4), normal(5, 7, 6)


@pytest.mark.parametrize(
    "apply",
    [
        lambda w, x: jnp.einsum("mn,btm->nbt", w, x),  # the kernel on the left
        lambda w, x: jnp.einsum("btm,mn->btn", x.astype(jnp.float16), w.astype(jnp.float16)),
        lambda w, x: x @ w.T.T,
        lambda w, x: x @ w.reshape(6, 2, 2)[:, None].reshape(6, 4),
        lambda w, x: jnp.einsum("btm,mhk->bthk", x, w.reshape(6, 2, 2)),
        # Contracted over two axes, in the other order.
        lambda w, x: jnp.einsum("btji,ijn->btn", x.reshape(5, 7, 2, 3), swapped(w)),
        lambda w, x: scaled_product(x, w),
        lambda w, x: jax.lax.map(lambda x: x @ w, x),
        lambda w, x: (x @ w, x @ w),  # used twice: the same rows twice
    ],
)
def test_ways_to_the_product(apply):
    # Entries that float16 holds, so that the cast changes nothing.
    x = X.astype(np.float16).astype(np.float32)
    check(input_grams(lambda p, x: apply(p["w"], x), {"w": W}, [x])["w"], gram(x))


def swapped(w):
    """(6, 4) as (3, 2, 4) whose first axis is the inner one of the six."""
    return w.reshape(2, 3, 4).transpose(1, 0, 2)


def test_what_has_no_gram():
    params = {
        "looked_up": W,
        "transposed": normal(4, 6),
        "a": normal(6, 6),
        "b": normal(6, 4),
        "looped": normal(6, 6),
        "part": normal(12, 4),
        "cut": normal(12, 4),
        "outer": normal(6, 4),
        "kernel": W,
        "steps": np.zeros((), np.int32),
    }

    def apply(p, x):
        rows = p["looked_up"][jnp.array([0, 1])]
        y = x @ p["transposed"].T + x @ (p["a"] @ p["b"]) + x @ p["kernel"] + x @ p["part"][:6]
        z = jax.lax.while_loop(lambda z: z[0, 0, 0] < 0, lambda z: z @ p["looped"], x)
        cut = x.reshape(5, 7, 2, 3).sum(2) @ p["cut"].reshape(4, 3, 4)[0]
        outer = jax.lax.dot_general(x, p["outer"], (((), ()), ((), ())))
        return rows, y, z, cut, outer, p["steps"] + 1

    grams = input_grams(apply, params, [X])
    assert [name for name, g in grams.items() if g is not None] == ["kernel"]
    check(grams["kernel"], gram(X))


def test_layers_in_a_scan_and_steps_in_time():
    params = {"layers": normal(3, 6, 6), "cell": normal(6, 6), "in": normal(6, 6)}

    def apply(p, x):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(x @ w), None

        def cell(h, x):
            return jnp.tanh(h @ p["cell"] + x @ p["in"]), h

        deep, _ = jax.lax.scan(layer, x, p["layers"])
        return jax.lax.scan(cell, jnp.zeros((5, 6)), deep.swapaxes(0, 1), reverse=True)

    grams = input_grams(apply, params, [X, X[:, :4]])
    inputs = [[X], [X[:, :4]]]
    states = []
    for found in inputs:
        for w in params["layers"]:
            found.append(np.tanh(found[-1] @ w))
        h = np.zeros((5, 6))
        for t in reversed(range(found[-1].shape[1])):
            states.append(h)
            h = np.tanh(h @ params["cell"] + found[-1][:, t] @ params["in"])
    assert grams["layers"].shape == (3, 6, 6)
    for layer in range(3):
        check(grams["layers"][layer], gram(inputs[0][layer], inputs[1][layer]))
    check(grams["cell"], gram(*states))
    check(grams["in"], gram(inputs[0][-1], inputs[1][-1]))


def test_stacks_of_matrices():
    w, x = normal(3, 6, 4), normal(3, 5, 6)
    einsum = partial(jnp.einsum, "emn,ebm->ben")
    for apply in (einsum, jax.vmap(lambda w, x: x @ w)):
        found = input_grams(lambda p, x, f=apply: f(p["w"], x), {"w": w}, [x])["w"]
        assert found.shape == (3, 6, 6)
        for i in range(3):
            check(found[i], gram(x[i]))

    def both(p, x):
        return jax.vmap(jnp.matmul)(x, p["w"]), x[0] @ p["w"].reshape(3, -1)

    with pytest.raises(ValueError, match=r"w is contracted .* as a stack of matrices in one place"):
        input_grams(both, {"w": normal(3, 3, 3)}, [normal(3, 3, 3)])


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, "SAME", 1), (2, "VALID", 2)])
def test_convolutions(stride, padding, dilation):
    w, x = normal(3, 2, 4, 5), normal(2, 8, 7, 4)

    def apply(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["w"],
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    found = input_grams(apply, {"w": w}, [x])["w"]
    out = np.asarray(apply({"w": w}, x))
    pad = [(0, 0), (1, 1), (0, 1), (0, 0)] if padding == "SAME" else [(0, 0)] * 4
    padded = np.pad(x, pad)
    rows = np.array(
        [
            padded[
                n,
                stride * i : stride * i + 2 * dilation + 1 : dilation,
                stride * j : stride * j + dilation + 1 : dilation,
            ].ravel()
            for n in range(2)
            for i in range(out.shape[1])
            for j in range(out.shape[2])
        ]
    )
    # These rows are what the kernel multiplies, in the order of the kernel's own axes.
    np.testing.assert_allclose(rows @ w.reshape(-1, 5), out.reshape(-1, 5), atol=1e-5)
    check(found, gram(rows))


def test_a_depthwise_convolution_has_no_gram():
    w, x = normal(3, 1, 4), normal(2, 8, 4)

    def apply(p, x):
        numbers = ("NHC", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=4
        )
        return y @ p["v"]

    grams = input_grams(apply, {"w": w, "v": normal(4, 2)}, [x])
    assert grams["w"] is None and grams["v"].shape == (4, 4)


def test_mask():
    params = {"embed": normal(9, 6), "kernel": W, "pooled": normal(4, 3), "flat": normal(6, 2)}
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]])

    def apply(p, tokens):
        x = p["embed"][tokens]
        y = (x @ p["kernel"]).sum(1)
        return y @ p["pooled"], x.reshape(-1, 6) @ p["flat"]

    grams = input_grams(apply, params, [tokens], mask=lambda tokens: tokens != 0)
    x = params["embed"][tokens]
    check(grams["kernel"], gram(x, weight=tokens != 0))
    check(grams["flat"], gram(x, weight=tokens != 0))
    check(grams["pooled"], gram((x @ W).sum(1), weight=[1, 1, 0]))

    def first(params, tokens):
        return params["embed"][tokens] @ params["kernel"]

    one = input_grams(first, params, [tokens], mask=lambda tokens: jnp.array([0.5, 2.0, 0.0]))
    check(one["kernel"], gram(x, weight=np.repeat([0.5, 2.0, 0.0], 4)))
    with pytest.raises(ValueError, match=r"mask: its shape is \(4,\), but kernel .*\(3, 4\)"):
        input_grams(first, params, [tokens], mask=lambda tokens: jnp.ones(4))
    with pytest.raises(ValueError, match="mask: it leaves no row for kernel"):
        input_grams(first, params, [tokens], mask=lambda tokens: tokens > 99)


def test_bad_input():
    x = jnp.asarray(normal(5, 4))
    with pytest.raises(ValueError, match="batches: there is none"):
        input_grams(mlp, MLP, [])
    for batch in (x, {"x": x}, None):
        with pytest.raises(TypeError, match="Is it a single batch"):
            input_grams(mlp, MLP, batch)
    with pytest.raises(ValueError, match=r"apply: it contracts none.*down/kernel, up/bias"):
        input_grams(lambda p, x: mlp(MLP, x), MLP, [x])


def test_linen_attention():
    nn = pytest.importorskip("flax.linen")
    model, x = nn.MultiHeadDotProductAttention(2), normal(3, 5, 8)
    params = model.init(jax.random.key(0), x)["params"]
    grams = input_grams(lambda p, x: model.apply({"params": p}, x), params, [x])
    attention_inputs_of_out = heads(params, x)
    for name in ("query", "key", "value"):
        check(grams[name]["kernel"], gram(x))
    check(grams["out"]["kernel"], gram(attention_inputs_of_out))
    assert all(grams[name]["bias"] is None for name in grams)


def heads(params, x):
    """What the output projection of an attention layer reads, in float64."""
    x = x.astype(np.float64)
    q, k, v = (
        np.einsum("btd,dhk->bhtk", x, params[n]["kernel"]) for n in ("query", "key", "value")
    )
    score = np.exp(np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1]))
    mixed = np.einsum("bhts,bhsk->bthk", score / score.sum(-1, keepdims=True), v)
    return mixed.reshape(*x.shape[:2], -1)


def test_nnx_modules():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.conv = nnx.Conv(8, 4, (3,), rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs, dtype=jnp.bfloat16)

        def __call__(self, x):
            return self.head(jax.nn.gelu(self.conv(self.attention(x))))

    graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    x = normal(3, 5, 8)
    grams = input_grams(lambda p, x: nnx.merge(graphdef, p)(x), params, [x])
    plain = nnx.to_pure_dict(params)
    check(grams["attention"]["query"]["kernel"].get_value(), gram(x))
    mixed = heads(plain["attention"], x)
    check(grams["attention"]["out"]["kernel"].get_value(), gram(mixed))
    assert grams["conv"]["kernel"].get_value().shape == (24, 24)
    assert grams["head"]["kernel"].get_value().shape == (4, 4)
    assert grams["head"]["bias"].get_value() is None
    # Every kernel is merged by its Gram, attention's (8, 2, 4) and (2, 4, 8) and the convolution's.
    other = jax.tree.map(lambda w: w + 0.1 * normal(*w.shape), params)
    others = input_grams(lambda p, x: nnx.merge(graphdef, p)(x), other, [2 * x])
    merged = nnx.to_pure_dict(
        merge(regmean(ratio=1.0, ridge=0.0), [params, other], curvature=[grams, others])
    )
    for path in (("attention", "query"), ("attention", "out"), ("conv",), ("head",)):
        g, w = [], []
        for gram_tree, tree in ((grams, params), (others, other)):
            for name in (*path, "kernel"):
                gram_tree, tree = gram_tree[name], tree[name]
            g.append(np.asarray(gram_tree.get_value(), np.float64))
            w.append(np.asarray(tree.get_value(), np.float64).reshape(len(g[-1]), -1))
        found = merged
        for name in (*path, "kernel"):
            found = found[name]
        wanted = g[0] @ w[0] + g[1] @ w[1]
        np.testing.assert_allclose(
            (g[0] + g[1]) @ found.reshape(w[0].shape), wanted, rtol=1e-3, atol=1e-3 * wanted.max()
        )
