"""Small trees, and the optimizers at a rank that such trees can bear."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "moma": lambda rank=4: om.moma(1e-2, rank=rank, min_dim_size_to_factor=8),
    "umtam": lambda rank=4: om.umtam(1e-2, rank=rank),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return OPTIMIZERS[request.param]


@pytest.fixture
def params() -> dict:
    """A matrix, a stack of matrices, a vector, a scalar."""
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32),
        "stack": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
        "temperature": jnp.float32(0.5),
    }


@pytest.fixture
def grads(params: dict) -> list[dict]:
    """Four steps of gradients, unlike in size from leaf to leaf."""
    rng = np.random.default_rng(1)
    draw = lambda p, size: jnp.asarray(size * rng.normal(size=p.shape), p.dtype)
    return [
        {name: draw(p, 10.0**-i) for i, (name, p) in enumerate(params.items())} for _ in range(4)
    ]


@pytest.fixture
def run() -> Callable:
    """Apply a list of gradients: the parameters and the state that come out, jitted per step."""

    def run(tx: optax.GradientTransformationExtraArgs, params: dict, grads: list[dict]):
        @jax.jit
        def step(params, state, g):
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for g in grads:
            params, state = step(params, state, g)
        return params, state

    return run
