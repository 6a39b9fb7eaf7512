"""Thresholds against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_moma.merging import _select

N = 60


def sorted_threshold(scores, rank):
    return np.sort(scores, axis=1)[:, ::-1][:, rank - 1]


scores = st.lists(
    st.one_of(
        st.floats(0, 2.0**120, width=32, allow_subnormal=False),
        # Few values, so that many entries tie.
        st.sampled_from([0.0, 1.0, 2.0, 1.5e-30]),
    ),
    min_size=N,
    max_size=N,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(row=scores, rank=st.integers(1, N))
def test_bit_search_and_histograms_find_the_kth_largest(row, rank):
    x = np.array([row, row[::-1]], np.float32)
    x[1, :7] = 3.0
    expected = sorted_threshold(x, rank)
    bits = _select.ordered_bits(jnp.asarray(x))
    found = jax.jit(_select.kth_largest)(-jnp.asarray(x), jnp.uint32(rank))
    np.testing.assert_array_equal(np.asarray(found).view(np.float32), expected)

    # The same from histograms of two parts. A density that floors to the rank exactly.
    density = np.float32(rank / N)
    density = np.nextafter(density, np.float32(2)) if np.floor(density * N) < rank else density
    search = _select.GlobalThreshold()
    while search.passes:
        counts = search.count(bits[:, :20]) + search.count(bits[:, 20:])
        search = search.refine(counts, min(density, 1))
    assert search.passes == 0 and search.bits is not None
    np.testing.assert_array_equal(np.asarray(search.bits).view(np.float32), expected)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 6_000_000])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_kept_count(n, density):
    exact = max(1, int(density * n + 1e-6))
    assert int(_select.kept_count(density, n)) == exact


def test_counts_of_many_entries_are_exact():
    """float32 holds no integers above 2**24; decimals are exact all the same, traced or not."""
    rng = np.random.default_rng(0)
    millionths = np.concatenate([rng.integers(0, 10**6 + 1, 2000), 10 ** np.arange(7)])
    n = rng.integers(1, 1 << 32, len(millionths)).astype(np.uint32)
    n[::7] = (1 << 32) - 1
    found = jax.jit(jax.vmap(_select.share))((millionths / 1e6).astype(np.float32), n)
    exact = [p * int(m) // 10**6 for p, m in zip(millionths.tolist(), n, strict=True)]
    np.testing.assert_array_equal(found, np.array(exact, np.uint32))
    assert int(_select.kept_count(0.2, 123_456_789)) == 24_691_357
    third = float(_select.share(1 / 3, 3_000_000_000))
    assert abs(third / 1e9 - 1) < 2**-23


def test_threshold_of_many_entries_is_exact():
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(2, 300_000))).astype(np.float32)
    bits = _select.ordered_bits(jnp.asarray(x))
    rank = _select.kept_count(0.2, x.shape[1])
    threshold = _select.kth_largest(jnp.asarray(x), rank)
    assert (_select.keep(bits, threshold, 0.2).sum(axis=1) == 60_000).all()
    np.testing.assert_array_equal(
        np.asarray(threshold).view(np.float32), sorted_threshold(x, 60_000)
    )
