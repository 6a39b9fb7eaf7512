"""Small trees, and the optimizers at a rank that such trees can bear."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om

FREE = {"orthogonal_block_size": None, "clip_spectral": np.inf}
"""Nothing of the momentum is cut off."""

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "moma": lambda rank=4, clipped=True: om.moma(
        1e-2, rank=rank, min_dim_size_to_factor=8, **({} if clipped else FREE)
    ),
    "umtam": lambda rank=4, clipped=True: om.umtam(1e-2, rank=rank),
}


@pytest.fixture(params=OPTIMIZERS, scope="session")
def make(request: pytest.FixtureRequest) -> Callable[..., optax.GradientTransformationExtraArgs]:
    return OPTIMIZERS[request.param]


@pytest.fixture(scope="session")
def params() -> dict:
    """A matrix, a vector, a scalar: little to compile."""
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=(8,)), jnp.float32),
        "temperature": jnp.float32(0.5),
    }


@pytest.fixture(scope="session")
def grads(params: dict) -> list[dict]:
    """Four steps of gradients, unlike in size from leaf to leaf."""
    rng = np.random.default_rng(1)
    draw = lambda p, size: jnp.asarray(size * rng.normal(size=p.shape), p.dtype)
    return [
        {name: draw(p, 10.0**-i) for i, (name, p) in enumerate(params.items())} for _ in range(4)
    ]


def run(tx: optax.GradientTransformationExtraArgs, params: dict, grads: list[dict]):
    """Apply a list of gradients, one jitted step each: the parameters and state that come out."""

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


@pytest.fixture(name="run", scope="session")
def run_fixture() -> Callable:
    return run


@pytest.fixture(scope="session")
def bare(make: Callable, params: dict, grads: list[dict]) -> tuple[dict, optax.OptState]:
    """What the optimizer gives by itself, inside no wrapper, for all four gradients."""
    return run(make(), params, grads)
