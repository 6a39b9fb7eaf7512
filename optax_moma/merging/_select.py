"""Which entries to keep: exact thresholds found by counting, never by sorting.

Scores are non-negative float32 numbers, whose bit patterns, read as integers, have the same order
as the numbers. The k-th largest score is then the largest integer that at least k patterns reach,
and its bits are found from the top by counting. The count k may be traced.

A threshold over many leaves is found from histograms of the upper and then of the lower half of
the pattern. Histograms add up, so the leaves can be visited one at a time, in any order.
"""

from dataclasses import field, replace

import jax
import jax.numpy as jnp

from optax_moma.merging._contract import merge_step
from optax_moma.merging._leaf import gathered, per_expert

_DIGIT = 1 << 16


def ordered_bits(score: jax.Array) -> jax.Array:
    """Returns integers in the order of the scores' magnitudes, shape (k, *shape)."""
    score = jnp.abs(jax.lax.stop_gradient(score).astype(jnp.float32))
    return jax.lax.bitcast_convert_type(score, jnp.uint32)


def kept_count(density: jax.Array | float, n: jax.Array | int) -> jax.Array:
    """Returns max(1, floor(density * n)), never more than n."""
    return jnp.clip(share(density, n), 1, jnp.asarray(n, jnp.uint32))


def share(density: jax.Array | float, n: jax.Array | int) -> jax.Array:
    """Returns floor(density * n), n < 2**32; exactly for a density of at most six decimals.

    Inside a compiled function a density is a float32: a decimal is recognised by being the float32
    of a number of millionths, p. Then p * n / 10**6 is taken in integers, in digits of a thousand
    that 32 bits hold. Any other density is known to one part in 16 million only, and so the share.
    """
    density, n = jnp.asarray(density, jnp.float32), jnp.asarray(n, jnp.uint32)
    p = jnp.round(density * 1e6).astype(jnp.uint32)
    millions, thousands, ones = n // 1_000_000, n // 1000 % 1000, n % 1000
    exact = p * millions + (p * thousands + p * ones // 1000) // 1000
    near = jnp.floor(density * n.astype(jnp.float32)).astype(jnp.uint32)
    # Compilers divide with an error in the last bit.
    decimal = jnp.abs(p.astype(jnp.float32) / 1e6 - density) <= density * 2.0**-23
    return jnp.where(decimal, exact, near)


def kth_largest(score: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the bits of the rank-th largest magnitude of each row, (k, *shape) -> (k,).

    They are zero for the last rank. Two bits are settled per pass: one fused reduction with three
    counts reads the data half as often as one bit per pass, and was measured faster than one or
    three bits on a CPU.
    """
    score = jax.lax.stop_gradient(score)
    return jnp.stack([_kth_largest(score[t], rank) for t in range(score.shape[0])])


def _kth_largest(score: jax.Array, rank: jax.Array) -> jax.Array:
    def settle_two_bits(i: jax.Array, threshold: jax.Array) -> jax.Array:
        # The bits are taken anew in every pass: that costs no time, and memory for them would. The
        # barrier hides from the compiler that they are the same each time.
        row, i = jax.lax.optimization_barrier((score, i))
        bits = ordered_bits(row)
        # The last pass of the 31 bits looks again at the bit before the last, which is harmless.
        shift = jnp.maximum(29 - 2 * i, 0).astype(jnp.uint32)
        candidates = [threshold | (jnp.uint32(digit) << shift) for digit in (1, 2, 3)]
        counts = jax.lax.reduce(
            tuple((bits >= candidate).astype(jnp.uint32) for candidate in candidates),
            (jnp.uint32(0),) * 3,
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
            tuple(range(bits.ndim)),
        )
        for candidate, count in zip(candidates, counts, strict=True):
            threshold = jnp.where(count >= rank, candidate, threshold)
        return threshold

    # Zero is below all; looking for what keeps everything would be a waste.
    passes = jnp.where(rank < score.size, 16, 0)
    return jax.lax.fori_loop(0, passes, settle_two_bits, jnp.uint32(0))


def keep(bits: jax.Array, threshold: jax.Array, density: jax.Array | float) -> jax.Array:
    """Returns the mask (k, *shape) of the entries that reach their row's threshold.

    All entries that tie with the threshold are kept. Zero scores are kept at density 1 only, and
    nothing is kept at density 0.
    """
    density = jnp.asarray(density)
    return (bits >= per_expert(threshold, bits)) & ((bits > 0) | (density >= 1)) & (density > 0)


@merge_step
class GlobalThreshold:
    """The state of a search for each expert's threshold over all leaves.

    Attributes:
      bits: What is known of the thresholds, uint32 of shape (k,); None before the first pass.
      rank: How many entries with these leading bits are still to be kept, uint32 of shape (k,).
      known: How many leading bits are known: 0, 16 or 32.
    """

    bits: jax.Array | None = None
    rank: jax.Array | None = None
    known: int = field(default=0, metadata={"static": True})

    @property
    def passes(self) -> int:
        """How many more passes over the leaves the search needs."""
        return (32 - self.known) // 16

    def count(self, bits: jax.Array) -> jax.Array:
        """Returns a histogram (k, 65536) of the next 16 bits of the entries still in question."""
        bits = gathered(bits)
        bits = bits.reshape(bits.shape[0], -1)
        digit = bits >> 16
        if self.bits is not None:
            # An index past the end is dropped: these entries are already decided.
            digit = jnp.where(digit == self.bits[:, None] >> 16, bits & (_DIGIT - 1), _DIGIT)
        rows = jnp.arange(bits.shape[0])[:, None]
        histogram = jnp.zeros((bits.shape[0], _DIGIT), jnp.uint32)
        return histogram.at[rows, digit].add(jnp.uint32(1), mode="drop")

    def refine(self, counts: jax.Array, density: jax.Array | float) -> "GlobalThreshold":
        """Returns the search with 16 more bits known, from the histogram of all leaves."""
        rank = self.rank
        if rank is None:
            rank = kept_count(density, jnp.sum(counts, axis=1, dtype=jnp.uint32))
        reaching = jnp.cumsum(counts[:, ::-1], axis=1, dtype=jnp.uint32)[:, ::-1]
        digit = jnp.sum(reaching >= rank[:, None], axis=1, dtype=jnp.uint32) - 1
        at = digit[:, None]
        above = jnp.take_along_axis(reaching, at, 1) - jnp.take_along_axis(counts, at, 1)
        bits = digit << 16 if self.bits is None else self.bits | digit
        return replace(self, bits=bits, rank=rank - above[:, 0], known=self.known + 16)
