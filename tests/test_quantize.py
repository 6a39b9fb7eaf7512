"""Blockwise int8: the bound on the error, and shapes that no block divides."""

import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma._quantize import BLOCK, dequantize, quantize


def per_entry(scale, n: int) -> np.ndarray:
    return np.repeat(np.asarray(scale, np.float64), BLOCK, axis=-1)[..., :n]


@pytest.mark.parametrize("shape", [(1,), (128,), (3, 130), (2, 3, 300), (4, 1)])
def test_error_is_at_most_half_a_scale(shape):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-6, 6, size=shape)).astype(np.float32)
    blocks = quantize(jnp.asarray(x))
    assert blocks.values.dtype == jnp.int8 and blocks.values.shape == shape
    assert blocks.scale.dtype == jnp.float32
    assert blocks.scale.shape == (*shape[:-1], -(-shape[-1] // BLOCK))
    error = np.abs(np.asarray(dequantize(blocks, jnp.float32), np.float64) - x)
    half = per_entry(blocks.scale, shape[-1]) / 2
    # A tie falls to either side of the half by the rounding of x / scale, at most 127 ulp.
    assert np.all(error <= half * (1 + 127 * 2.0**-23))
    assert np.max(error / half) > 0.5 or x.size < 100  # the bound is not an idle one


def test_scale_is_the_largest_magnitude_over_127():
    x = np.zeros((2, 200), np.float32)
    x[0, 3], x[0, 150], x[1, 0] = -254.0, 12.7, 1.0
    blocks = quantize(jnp.asarray(x))
    np.testing.assert_allclose(blocks.scale, [[2.0, 0.1], [1 / 127, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(dequantize(blocks, jnp.float32), x, rtol=1e-6)


def test_values_of_the_grid_come_back():
    x = jnp.arange(-127.0, 128.0)[None, :128] * 0.5
    np.testing.assert_array_equal(dequantize(quantize(x), jnp.float32), x)


def test_zeros():
    blocks = quantize(jnp.zeros((2, 5)))
    np.testing.assert_array_equal(dequantize(blocks, jnp.float32), np.zeros((2, 5)))


def test_dtype_of_the_result():
    assert dequantize(quantize(jnp.ones(3)), jnp.bfloat16).dtype == jnp.bfloat16
