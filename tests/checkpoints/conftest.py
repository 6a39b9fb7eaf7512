"""Checkpoints that the tests of this folder share: a base, two experts, their training states."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om

ocp = pytest.importorskip("orbax.checkpoint").v1

EXPERTS = ("code", "math")


def params_like(seed: int, base: Any = None) -> dict[str, Any]:
    """A small model with all that trees may hold: lists, empty dicts, integers, half precision."""
    rng = np.random.default_rng(seed)
    scale = 1.0 if base is None else 0.05
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    drawn = {
        "embedding": draw(24, 16),
        "layers_0": {"kernel": draw(16, 16), "bias": draw(16)},
        "layers_1": {"kernel": draw(16, 16), "bias": draw(16)},
        "layers_2": {"kernel": draw(16, 16), "bias": draw(16)},
        "norm": {"scale": draw(16).astype(jnp.bfloat16)},
        "blocks": [{"w": draw(4, 8)}, {"w": draw(4, 8)}],
        "gain": draw(),
        "empty": {},
    }
    if base is not None:
        drawn = jax.tree.map(
            lambda b, d: (b + d).astype(b.dtype), {k: base[k] for k in drawn}, drawn
        )
    return {**drawn, "buckets": jnp.arange(5)}


def trained_state(params: Any, seed: int, tx: optax.GradientTransformation) -> Any:
    """An optimizer's state after three steps on random gradients."""
    floats = {k: v for k, v in params.items() if k != "buckets"}
    state = tx.init(floats)
    rng = np.random.default_rng(seed)
    update = jax.jit(tx.update)
    for _ in range(3):
        grads = jax.tree.map(
            lambda x: jnp.asarray(1e-3 * rng.normal(size=x.shape), x.dtype), floats
        )
        _, state = update(grads, state, floats)
    return state


class World(NamedTuple):
    """A folder of checkpoints and what is in them."""

    folder: Path
    base: Any
    experts: dict[str, Any]
    states: dict[str, Any]

    def recipe(self, method: Any = "average", **more: Any) -> dict[str, Any]:
        return {
            "base": {"path": str(self.folder / "base")},
            "experts": {name: {"path": str(self.folder / name)} for name in EXPERTS},
            "method": method,
            **more,
        }

    def curvature(self) -> dict[str, Any]:
        result = {}
        for name, state in self.states.items():
            floats = {k: v for k, v in self.experts[name].items() if k != "buckets"}
            result[name] = {**om.curvature_from(state, floats), "buckets": None}
        return result


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), om.moma(1e-3, rank=2, min_dim_size_to_factor=16)
    )
    base = params_like(0)
    experts = {name: params_like(i + 1, base) for i, name in enumerate(EXPERTS)}
    states = {name: trained_state(experts[name], i, tx) for i, name in enumerate(EXPERTS)}
    ocp.save(folder / "base", base)
    for name in EXPERTS:
        tree = {"params": experts[name], "opt_state": states[name], "step": jnp.array(3)}
        ocp.save(folder / name, tree)
    return World(folder, base, experts, states)


@pytest.fixture(scope="session")
def equal_bits():
    def compare(actual: Any, desired: Any) -> None:
        assert jax.tree.structure(actual) == jax.tree.structure(desired)
        for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
            a, d = np.asarray(a), np.asarray(d)
            assert (a.dtype, a.shape, a.tobytes()) == (d.dtype, d.shape, d.tobytes())

    return compare
