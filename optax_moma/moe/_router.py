"""Which experts a sequence, a segment or a token uses: gates, and the loss that evens them out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .._checks import check_integer
from .._matrix import divisor


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
      gates: The experts' shares, (*units, E); each unit's add up to 1.
      loss: How unevenly the experts are used, see :class:`Router`. Add it to the training loss, at
        a weight of about 1e-2.
    """

    gates: jax.Array
    loss: jax.Array


class Router(nnx.Module):
    r"""Noisy top-k gating: shares of the experts for each unit, from the unit's mean state.

    .. math::
        gates = softmax(top_k(x G + \epsilon\, softplus(x N) + ...)), \quad
        loss = CV^2(importance) + CV^2(load)

    The noise, of deviation softplus(x N) + 0.01, is drawn in training only. Importance is each
    expert's sum of gates, load the expected number of units that use it (a count where there is no
    noise, or where all experts are used); CV^2 is variance over squared mean.

    Args:
      features: Width m of the states.
      experts: E.
      k: How many experts a unit uses; all by default.
      rngs: Flax's random streams.

    Raises:
      ValueError: k is not between 1 and E.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import Router
      >>> routing = Router(8, experts=4, k=2, rngs=nnx.Rngs(0))(jnp.ones((3, 8)))
      >>> routing.gates.shape, [int(n) for n in (routing.gates > 0).sum(-1)]
      ((3, 4), [2, 2, 2])

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017, appendix A.
    """

    def __init__(self, features: int, experts: int, k: int | None = None, *, rngs: nnx.Rngs):
        """Small random gates, and noise of deviation softplus(0)."""
        self.k = experts if k is None else check_integer("k", k, lowest=1)
        if self.k > experts:
            raise ValueError(f"k must be at most the number of experts, {experts}, got {k}.")
        shape = (features, experts)
        self.gate = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))
        self.noise = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> Routing:
        """The routing of units of mean state ``x`` (*units, m); a key means training."""
        x = x.astype(jnp.float32)
        logits = clean = x @ self.gate[...]
        experts = clean.shape[-1]
        deviation = jax.nn.softplus(x @ self.noise[...]) + 0.01
        if key is not None:
            logits = clean + deviation * jax.random.normal(key, clean.shape)
        ranked, places = jax.lax.top_k(logits, min(self.k + 1, experts))
        # By place, not by value: of equal logits no more than k are chosen.
        chosen = jnp.any(jax.nn.one_hot(places[..., : self.k], experts, dtype=bool), axis=-2)
        gates = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf))
        if key is None or self.k == experts:
            load = chosen.astype(jnp.float32)
        else:
            # An expert is used if it beats the k-th of the others.
            bar = jnp.where(chosen, ranked[..., self.k, None], ranked[..., self.k - 1, None])
            load = jax.scipy.stats.norm.cdf((clean - bar) / deviation)
        return Routing(gates, _unevenness(gates) + _unevenness(load))


def _unevenness(use: jax.Array) -> jax.Array:
    """CV^2 over the experts of what they are used for, (*units, E); 0 without choice or units."""
    if use.shape[-1] == 1 or not use.size:
        return jnp.zeros(())
    total = jnp.sum(use.reshape(-1, use.shape[-1]), axis=0)
    return jnp.var(total, ddof=1) / jnp.mean(total) ** 2


def routed(
    router: Router,
    x: jax.Array,
    segment: int | None,
    first: str,
    mask: jax.Array | None,
    key: jax.Array | None,
) -> tuple[jax.Array, Routing]:
    """Routes sequences (*batch, length, m) as wholes, or cut into segments, by the one before."""
    length = x.shape[-2]
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask has shape {mask.shape}, but the tokens {x.shape[:-1]}.")
    if segment is None:
        return x, router(_mean(x, mask), key)
    if length % segment:
        raise ValueError(
            f"a length of {length} does not divide into segments of {segment}: pad the sequences,"
            " or choose a segment that divides their length."
        )
    units = x.reshape(*x.shape[:-2], -1, segment, x.shape[-1])
    means = _mean(units, None if mask is None else mask.reshape(units.shape[:-1]))
    before, start = means[..., :-1, :], means[..., :1, :]
    if first == "own":
        routing = router(jnp.concatenate([start, before], axis=-2), key)
        opening = jax.lax.stop_gradient(routing.gates[..., :1, :])
        gates = jnp.concatenate([opening, routing.gates[..., 1:, :]], axis=-2)
        return units, routing._replace(gates=gates)
    routing = router(before, key)
    experts = routing.gates.shape[-1]
    even = jnp.full((*start.shape[:-1], experts), 1 / experts)
    gates = jnp.concatenate([even, routing.gates], axis=-2)
    return units, routing._replace(gates=gates)


def _mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean state of each unit's real tokens, in float32."""
    x = x.astype(jnp.float32)
    if mask is None:
        return jnp.mean(x, axis=-2)
    real = mask.astype(jnp.float32)
    return jnp.einsum("...t,...tm->...m", real, x) / divisor(jnp.sum(real, axis=-1))[..., None]


def checked_segment(segment: int | None, first: str) -> int | None:
    """``segment`` as an integer, both arguments in their range."""
    if first not in ("even", "own"):
        raise ValueError(f"first must be 'even' or 'own', got {first!r}.")
    return None if segment is None else check_integer("segment", segment, lowest=1)
