"""Arguments are checked where they come in. Traced values are not: they have no value yet."""

import operator
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._tree import named_leaves

Scalar = float | jax.Array


def check_integer(name: str, value: Any, lowest: int) -> int:
    """``value`` as a Python integer of at least ``lowest``: it fixes shapes."""
    if isinstance(value, Tracer | jax.Array | bool):
        raise TypeError(
            f"{name} must be a Python integer, got {value!r}: it shapes the program."
            f" Under optax.inject_hyperparams name it in static_args=('{name}', ...)."
        )
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
    if number < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {number}.")
    return number


def check_decay(name: str, value: Any) -> None:
    """``value`` lies in [0, 1), and in a type that can tell it from 1."""
    check_width(name, value)
    if _known(name, value) and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}: it is the share that is kept.")


def check_not_negative(name: str, value: Any) -> None:
    """``value`` is at least zero, and a number."""
    if _known(name, value) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")


def check_positive(name: str, value: Any) -> None:
    """``value`` is greater than zero."""
    if _known(name, value) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


def check_width(name: str, value: Any) -> None:
    """``value``, traced or not, is in no type narrower than float32, which would round it away."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} must not be a {jnp.dtype(dtype).name}: in so narrow a type 0.999 may be 1, and"
            " 1e-8 may be 0. Give a Python number or a float32. optax.inject_hyperparams takes the"
            " type of the parameters and gradients: pass it hyperparam_dtype=jnp.float32, or name"
            f" the argument in static_args=('{name}', ...)."
        )


def check_finite(argument: str, tree: Any) -> None:
    """Every number in ``tree`` is finite; leaves that are traced are not looked at."""
    bad = [
        name
        for name, x in zip(*named_leaves(tree), strict=True)
        if not isinstance(x, Tracer) and not jnp.all(jnp.isfinite(x))
    ]
    if bad:
        raise ValueError(
            f"{argument} holds values that are not finite at {listing(bad)}: look for the step that"
            " diverged, and go back to a state before it."
        )


def listing(names: list[str], most: int = 10) -> str:
    """The names as they stand in a message, not more than the first few."""
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _known(name: str, value: Any) -> bool:
    """Whether the value can be looked at: JAX's arrays may be traced, or wait for a device."""
    if isinstance(value, Tracer | jax.Array):
        return False
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    return True
