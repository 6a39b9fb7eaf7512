"""`nnx.Optimizer` and Linen's boxed parameters: kernels that carry sharding annotations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")

X = jnp.asarray(np.random.default_rng(2).normal(size=(16, 16)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(3).normal(size=(16, 8)), jnp.float32)
SPECS = {"hidden": ("fsdp", "tensor"), "out": ("tensor", "fsdp")}


def optimizer() -> optax.GradientTransformationExtraArgs:
    return om.moma(1e-2, rank=4, min_dim_size_to_factor=8)


class MLP(nnx.Module):
    def __init__(self, rngs, annotated):
        def linear(name, m, n):
            init = nnx.initializers.lecun_normal()
            init = nnx.with_partitioning(init, SPECS[name]) if annotated else init
            return nnx.Linear(m, n, kernel_init=init, rngs=rngs)

        self.hidden = linear("hidden", 16, 32)
        self.out = linear("out", 32, 8)

    def loss(self):
        return jnp.mean((self.out(jnp.tanh(self.hidden(X))) - Y) ** 2)


@nnx.jit
def step(model, optimizer, grads):
    optimizer.update(model, grads)


def trained(mesh: Mesh | None):
    """Three steps on gradients at hand, of all directions: of none is mere rounding applied."""
    model = MLP(nnx.Rngs(0), annotated=mesh is not None)
    optimizer_ = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(50 * p * (i + 1)), nnx.state(model, nnx.Param))
        step(model, optimizer_, grads)
    return model, optimizer_


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_nnx_optimizer_with_annotated_kernels(axis_type):
    """Here optax.adafactor fails: its factors inherit the kernel's two-axis annotation."""
    plain, _ = trained(None)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        model, optimizer_ = trained(mesh)
    for name, spec in SPECS.items():
        kernel = getattr(model, name).kernel
        wanted = NamedSharding(mesh, P(*spec))
        assert kernel.get_value().sharding.is_equivalent_to(wanted, 2)
        expected = np.asarray(getattr(plain, name).kernel.get_value())
        np.testing.assert_allclose(kernel.get_value(), expected, rtol=1e-5, atol=1e-6)
    assert int(optax.tree.get(optimizer_.opt_state, "count").get_value()) == 3


def test_curvature_from_an_nnx_optimizer():
    """The live optimizer's state gives the curvature of the same tree without NNX."""
    model, optimizer_ = trained(None)
    tx = optimizer()
    params = nnx.to_pure_dict(nnx.state(MLP(nnx.Rngs(0), annotated=False), nnx.Param))
    state = tx.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(50 * p * (i + 1)), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    bare = om.curvature_from(state, params)
    live = om.curvature_from(optimizer_.opt_state, nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(live), jax.tree.leaves(bare), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_partition_over_an_nnx_state():
    """Kernels by ours, biases by another; sizes and specs are read off the same tree."""
    params = nnx.state(MLP(nnx.Rngs(0), annotated=False), nnx.Param)
    by_kind = lambda kernel, other: jax.tree.map(lambda p: kernel if p.ndim == 2 else other, params)
    tx = optax.partition({"ours": optimizer(), "sgd": optax.sgd(1.0)}, by_kind("ours", "sgd"))
    grads = jax.tree.map(jnp.cos, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = jax.jit(optimizer().update)(grads, optimizer().init(params), params)
    for g, found, ours in zip(*map(jax.tree.leaves, (grads, updates, expected)), strict=True):
        np.testing.assert_allclose(found, ours if g.ndim == 2 else -g, rtol=1e-5, atol=1e-6)
    weight = sum(x.nbytes for x in jax.tree.leaves(state))
    assert om.state_size(tx, params).total_bytes == weight
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    for inner in (tx, optax.MultiSteps(optimizer(), 2), optax.adam(1e-3)):
        specs = om.state_partition_specs(
            inner, params, by_kind(P("fsdp", None), P()), spread_over=mesh
        )
        is_spec = lambda x: isinstance(x, P)
        assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(inner.init(params))


def test_linen_params_in_their_boxes():
    """`nn.with_partitioning` boxes a kernel; the boxed tree trains as the unboxed one does."""

    class Boxed(linen.Module):
        @linen.compact
        def __call__(self, x):
            init = linen.with_partitioning(linen.initializers.lecun_normal(), ("fsdp", None))
            return linen.Dense(32, kernel_init=init)(x)

    boxed = Boxed().init(jax.random.key(0), X)["params"]
    plain = linen.meta.unbox(boxed)
    tx = optimizer()
    states = [tx.init(boxed), tx.init(plain)]
    trees = [boxed, plain]
    for _ in range(3):
        for i, tree in enumerate(trees):
            grads = jax.tree.map(jnp.cos, tree)
            updates, states[i] = jax.jit(tx.update)(grads, states[i], tree)
            trees[i] = optax.apply_updates(tree, updates)
    assert jax.tree.structure(trees[0]) == jax.tree.structure(boxed)
    for a, b in zip(jax.tree.leaves(trees[0]), jax.tree.leaves(trees[1]), strict=True):
        np.testing.assert_array_equal(a, b)
