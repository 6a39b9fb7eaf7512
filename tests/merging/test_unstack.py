"""A merge compiled on slices is that compiled on stacks."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma import merging
from optax_moma._moments import Factored
from optax_moma.merging._leaf import LeafInputs
from optax_moma.merging._merge import merge_leaf
from optax_moma.merging._unstack import unstacked

METHODS = {
    "task_arithmetic": merging.task_arithmetic(),
    "ties": merging.ties(0.4),
    "dare": merging.dare(),
    "sce": merging.sce(0.3),
    "curvature_ties": merging.curvature_ties(0.5),
    "umtam": merging.umtam(),
}
SHAPES = [((), 2), ((1, 3), 1), ((3, 1), 2), ((2, 2), 2), ((16, 40), 3)]


def leaf(shape, k, dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda: np.asarray(rng.standard_normal(shape), dtype)
    curvature = (
        [Factored(np.abs(draw()[..., :1]), np.abs(draw()[..., :1, :])) for _ in range(k)]
        if len(shape) > 1
        else [np.abs(draw()) for _ in range(k)]
    )
    return LeafInputs(
        experts=tuple(draw() for _ in range(k)),
        base=draw(),
        curvature=tuple(curvature),
        weights=np.arange(1.0, k + 1),
        key=jax.random.key(0),
        path_id=np.uint32(1),
        expert_ids=np.arange(k, dtype=np.uint32),
    )


@pytest.mark.parametrize("name", METHODS)
def test_same_as_on_stacks(name, monkeypatch):
    """Shapes in which axes of length k and of length one are easily mistaken for each other."""
    method = METHODS[name]
    for shape, k in SHAPES:
        if k < method.contract.min_experts:
            continue
        inputs = leaf(shape, k)
        fast = merge_leaf(method, inputs)
        on_stacks = mock.Mock(side_effect=lambda function, k: function)
        with monkeypatch.context() as patch:
            patch.setattr("optax_moma.merging._merge.unstacked", on_stacks)
            # A function of its own: that of merge_leaf has been traced already.
            slow = jax.jit(lambda *given: merge_leaf.__wrapped__(*given))(method, inputs)
        on_stacks.assert_called_once()
        assert fast.dtype == slow.dtype and fast.shape == shape
        np.testing.assert_allclose(fast, slow, rtol=2e-6, atol=1e-7)


def test_stacks_are_not_made():
    """Slices are only put together for what needs them together."""

    def names(function):
        x = jnp.ones((4, 5))
        return [e.primitive.name for e in jax.make_jaxpr(function)(x, x).jaxpr.eqns]

    apart = names(unstacked(lambda a, b: jnp.sum(jnp.abs(jnp.stack([a, b]) - a), axis=(1, 2)), 2))
    assert apart.count("abs") == apart.count("reduce_sum") == 2
    together = names(unstacked(lambda a, b: jnp.cumsum(jnp.stack([a, b]), axis=0), 2))
    assert together.count("cumsum") == 1
    products = names(unstacked(lambda a, b: jnp.stack([a, b]) @ b.T, 2))
    assert products.count("dot_general") == 1


def test_gradients_pass():
    def loss(x, k):
        function = lambda a, b: jnp.sum(jnp.stack([a * x, b]) ** 2, axis=0)
        return jnp.sum(unstacked(function, k)(jnp.ones(3), 2 * jnp.ones(3)))

    assert jax.grad(loss)(3.0, 2) == pytest.approx(18.0)
