"""Optimizer states through Orbax checkpoints and back, bit for bit, from NNX and from Linen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_moma as om

nnx = pytest.importorskip("flax.nnx")
linen = pytest.importorskip("flax.linen")
ocp_v0 = pytest.importorskip("orbax.checkpoint")
ocp_v1 = ocp_v0.v1
from flax.training.train_state import TrainState  # noqa: E402

X = jnp.asarray(np.random.default_rng(2).normal(size=(32, 12)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(3).normal(size=(32, 8)), jnp.float32)


class Trained(NamedTuple):
    """What is saved of a trained model, and what is read from it live."""

    tree: Any
    params: Any
    opt_state: Any
    fresh: Any  # the saved tree's structure, before training
    advance: Callable  # saved tree -> parameters after one more step


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(12, 16, rngs=rngs)
        self.out = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def nnx_trained(tx) -> Trained:
    def build():
        model = MLP(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(X) - Y) ** 2))(model)
        optimizer.update(model, grads)

    def tree(model, optimizer):
        return {
            "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
            "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
        }

    def advance(saved):
        model, optimizer = build()
        for node, values in ((model, saved["params"]), (optimizer, saved["optimizer"])):
            state = nnx.state(node)
            nnx.replace_by_pure_dict(state, values)
            nnx.update(node, state)
        step(model, optimizer)
        return tree(model, optimizer)["params"]

    fresh = tree(*build())
    model, optimizer = build()
    for _ in range(3):
        step(model, optimizer)
    saved = tree(model, optimizer)
    return Trained(saved, nnx.state(model, nnx.Param), optimizer.opt_state, fresh, advance)


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8, name="out")(jnp.tanh(linen.Dense(16, name="hidden")(x)))


def linen_trained(tx) -> Trained:
    model = LinenMLP()
    params = model.init(jax.random.key(0), X)["params"]
    fresh = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    fresh = fresh.replace(step=jnp.int32(0))  # Flax starts with the Python number 0

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - Y) ** 2)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = fresh
    for _ in range(3):
        state = step(state)
    advance = lambda state: step(state).params
    return Trained(state, state.params, state.opt_state, fresh, advance)


def save_v1(path, tree):
    ocp_v1.save(path, tree)


def load_v1(path, like):
    return ocp_v1.load(path, like)


def save_v0(path, tree):
    with ocp_v0.CheckpointManager(path) as manager:
        manager.save(3, args=ocp_v0.args.StandardSave(tree))


def load_v0(path, like):
    with ocp_v0.CheckpointManager(path) as manager:
        args = ocp_v0.args.StandardRestore(like)
        return manager.restore(3, args=args)


@pytest.fixture(params=[nnx_trained, linen_trained], ids=["nnx", "linen"])
def trained(request, make) -> Trained:
    return request.param(make())


@pytest.fixture(params=[(save_v1, load_v1), (save_v0, load_v0)], ids=["v1", "v0"])
def version(request):
    return request.param


def assert_equal_bits(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert np.asarray(a).dtype == np.asarray(d).dtype
        assert np.asarray(a).shape == np.asarray(d).shape
        assert np.asarray(a).tobytes() == np.asarray(d).tobytes()


def test_round_trip_and_on_with_training(trained, version, tmp_path):
    save, load = version
    save(tmp_path / "checkpoint", trained.tree)
    restored = load(tmp_path / "checkpoint", trained.fresh)
    assert_equal_bits(restored, trained.tree)
    assert_equal_bits(trained.advance(restored), trained.advance(trained.tree))


# Version 0 warns about what this test does on purpose: it restores without a template.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring:UserWarning")
def test_curvature_from_a_checkpoint_without_its_optimizer(trained, version, tmp_path):
    """Restored without a template a state is dicts and lists; its curvature is still found."""
    save, load = version
    save(tmp_path / "checkpoint", trained.tree)
    raw = load(tmp_path / "checkpoint", None)
    opt_state = raw["opt_state"] if "opt_state" in raw else raw["optimizer"]["opt_state"]
    containers = {type(x) for x in jax.tree.leaves(raw, is_leaf=lambda x: isinstance(x, tuple))}
    assert tuple not in containers

    curvature = om.curvature_from(opt_state, raw["params"])
    live = om.curvature_from(trained.opt_state, trained.params)
    assert jax.tree.leaves(live)
    assert_equal_bits(jax.tree.leaves(curvature), jax.tree.leaves(live))
