"""Sums whose bits do not depend on the order of the terms, and so not on how a leaf is sharded.

Terms are written as integers, digit by digit, in a base that leaves room for an axis to be added up
in 32 bits. Integers add up to the same in any order, on one device and on eight.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

# How many bits below the bound a sum still sees, by the size of its dtype. What it does not see of
# all 2**32 terms that a leaf may have is less than the last bit of the largest in float32.
_BELOW = {4: 56, 8: 85}


def fixed_sum(
    x: jax.Array, bound: jax.Array | float, axes: Sequence[int] | None = None
) -> jax.Array:
    """Returns sum(x) over some axes, or all: of the same bits in whatever order it is taken.

    The exact sum, rounded a few times at the end; not finite where the bound is not.

    Args:
      x: The terms.
      bound: What no term's magnitude exceeds, by a factor of 2**20 at most if all terms are small:
        a number, or an array in the shape of the sum.
      axes: The axes that are summed over.
    """
    summed = range(x.ndim) if axes is None else (axis % x.ndim for axis in axes)
    bound = jax.lax.stop_gradient(jnp.asarray(bound, x.dtype))
    return _fixed_sum(x, bound, tuple(sorted(summed)))


def fixed_mean(
    x: jax.Array, bound: jax.Array | float, axes: Sequence[int] | None = None
) -> jax.Array:
    """Returns mean(x), as ``fixed_sum``."""
    total = fixed_sum(x, bound, axes)
    return total * jnp.asarray(total.size / max(x.size, 1), x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _fixed_sum(x: jax.Array, bound: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    if not axes or not x.size:
        return jnp.sum(x, axis=axes)
    _, exponent = jnp.frexp(bound)
    bits = min(16, 30 - max(x.shape[axis] for axis in axes).bit_length())

    # Digits from the highest on: x = 2**exponent * sum_i digits[i] * 2**(-bits * (i + 1)).
    each = exponent if exponent.ndim == 0 else jnp.expand_dims(exponent, axes)
    rest, digits = _times_power(x, -each), []
    for _ in range(-(-_BELOW[x.dtype.itemsize] // bits)):
        rest = rest * 2**bits
        digits.append(jnp.round(rest).astype(jnp.int32))
        rest = rest - jnp.round(rest)
    places = 0  # how many digits there are in front of these
    for axis in reversed(axes):
        zeros = (jnp.int32(0),) * len(digits)
        add = lambda a, b: tuple(p + q for p, q in zip(a, b, strict=True))  # noqa: E731
        sums = jax.lax.reduce(tuple(digits), zeros, add, (axis,))
        more = -(-(x.shape[axis].bit_length() + 1) // bits)
        digits, places = _carried(sums, bits, more), places + more
    total = jnp.zeros_like(digits[0], x.dtype)
    for digit in reversed(digits):
        total = total * 2.0**-bits + digit.astype(x.dtype)
    total = _times_power(total, exponent + bits * (places - 1))
    return jnp.where(jnp.isfinite(bound), total, bound)


@_fixed_sum.defjvp
def _(axes: tuple[int, ...], primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]):
    return _fixed_sum(*primals, axes), jnp.sum(tangents[0], axis=axes)


def _carried(digits: Sequence[jax.Array], bits: int, more: int) -> list[jax.Array]:
    """Returns digits of at most half the base each, with more of them in front."""
    carried, carry = [], jnp.zeros_like(digits[0])
    for digit in (*reversed(digits), *(jnp.zeros_like(digits[0]) for _ in range(more))):
        whole = digit + carry
        carry = (whole + 2 ** (bits - 1)) >> bits
        carried.append(whole - (carry << bits))
    return carried[::-1]


def _times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns x * 2**exponent, in two steps, as the power alone may be too large or too small."""
    half = exponent // 2
    for part in (half, exponent - half):
        x = x * jnp.ldexp(jnp.ones((), x.dtype), part)
    return x
