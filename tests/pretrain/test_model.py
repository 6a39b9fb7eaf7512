"""The decoder: what it sees, how many parameters it has, and that its forms agree."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.pretrain import model

CONFIG = model.Config(vocabulary=50, width=16, layers=3, heads=2, length=8)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 8), 0, 50)


def test_sees_the_past_only(tokens):
    init, apply = model.functional(CONFIG)
    params = init(jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)  # so that attention matters
    changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % 50)
    difference = jnp.max(jnp.abs(apply(params, tokens) - apply(params, changed)), axis=(0, 2))
    assert np.all(difference[:5] == 0)
    assert np.all(difference[5:] > 1e-3)


def test_starts_without_an_opinion(tokens):
    init, apply = model.functional(CONFIG)
    logs = jax.nn.log_softmax(apply(init(jax.random.key(0)), tokens))
    np.testing.assert_allclose(np.mean(logs), -math.log(50), rtol=0.01)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_are_the_same_model(tokens, remat):
    init, apply = model.functional(CONFIG)
    params = init(jax.random.key(0))
    stacked = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *params["blocks"].values())}
    scanned = model.Config(**(CONFIG.__dict__ | {"scan": True, "remat": remat}))
    init_scanned, apply_scanned = model.functional(scanned)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(
        jnp.shape, jax.eval_shape(init_scanned, jax.random.key(0))
    )
    loss = lambda f: lambda p: jnp.sum(jnp.sin(f(p, tokens)))
    grads, grads_scanned = jax.grad(loss(apply))(params), jax.grad(loss(apply_scanned))(stacked)
    np.testing.assert_allclose(apply(params, tokens), apply_scanned(stacked, tokens), atol=1e-5)
    for i in range(CONFIG.layers):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x, y[i], atol=1e-4),
            grads["blocks"][i],
            grads_scanned["blocks"],
        )


def test_layers_of_a_scan_start_apart():
    init, _ = model.functional(model.Config(**(CONFIG.__dict__ | {"scan": True})))
    kernels = init(jax.random.key(0))["blocks"]["up"]["kernel"]
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01


def test_gpt2_has_as_many_parameters_as_gpt2():
    init, _ = model.functional(model.gpt2(vocabulary=50257))
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 124_439_808


def test_bfloat16_computes_in_half_and_keeps_float32_parameters(tokens):
    init, apply = model.functional(model.Config(**(CONFIG.__dict__ | {"dtype": "bfloat16"})))
    params = init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact = model.functional(CONFIG)[1](params, tokens)
    half = apply(params, tokens)
    assert half.dtype == jnp.float32
    assert 0 < float(jnp.abs(half - exact).max()) < 0.02


@pytest.mark.parametrize("scan", [False, True])
def test_specs_name_the_mesh_axes(scan):
    config = model.Config(**(CONFIG.__dict__ | {"scan": scan}))
    shapes = jax.eval_shape(model.functional(config)[0], jax.random.key(0))
    specs = model.partition_specs(config)
    is_spec = lambda x: isinstance(x, P)
    assert jax.tree.structure(shapes) == jax.tree.structure(specs, is_leaf=is_spec)
    block = specs["blocks"] if scan else specs["blocks"][2]
    layer = (None,) if scan else ()
    assert block["up"]["kernel"] == P(*layer, "fsdp", "tensor")
    assert block["down"]["kernel"] == P(*layer, "tensor", "fsdp")
    assert block["down"]["bias"] == P(*layer, "fsdp")
    assert specs["tokens"]["embedding"] == P("tensor", "fsdp")
