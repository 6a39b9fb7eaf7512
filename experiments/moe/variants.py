"""The feed-forward networks that are compared, and a stack of them for any transformer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from optax_moma.moe import Dense, ExpertWeights, MergedMLP, SparseMLP, upcycle

EXPERTS = 4


class Variant(NamedTuple):
    """One way to build a feed-forward network.

    Attributes:
      kind: one dense network; experts merged; or the two best of a token's experts, mixed.
      method: see `ExpertWeights`.
      metric: how it starts: as the identity, or as the sum of ``rank`` identities of the published
        code; or none.
      scaled: the merge is multiplied by ``rank``, as such a sum does, and has no metric: the same
        start, and the same gradients of base and experts, with nothing more to learn.
      shared: one base for all layers, handed on (the dynamic variant).
    """

    kind: Literal["dense", "merged", "sparse"] = "merged"
    method: str = "domain"
    metric: Literal["identity", "identities"] | None = None
    scaled: bool = False
    shared: bool = False


VARIANTS: Mapping[str, Variant] = {
    "dense": Variant("dense"),
    "soft": Variant(method="soft"),
    "domain": Variant(),
    "domain, metric": Variant(metric="identity"),
    "domain, r identities": Variant(metric="identities"),
    "domain, scale r": Variant(scaled=True),
    "sparse, top 2": Variant("sparse"),
    "ties, metric": Variant(method="ties", metric="identity"),
    "dare, metric": Variant(method="dare", metric="identity"),
    "dynamic, metric": Variant(metric="identity", shared=True),
    "ties": Variant(method="ties"),
    "dare": Variant(method="dare"),
}


class Sizes(NamedTuple):
    """What every layer of a stack is made of.

    Attributes:
      width: of the states.
      hidden: of one network or expert.
      rank: terms of a metric.
      segment: tokens of a routing unit; None: a whole sequence.
      activation: between the two layers.
    """

    width: int
    hidden: int
    rank: int = 4
    segment: int | None = None
    activation: Callable[[jax.Array], jax.Array] = nnx.gelu


class DenseMLP(nnx.Module):
    """The ordinary network."""

    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        """Two layers, as those of `ExpertWeights` start."""
        self.up = nnx.Linear(sizes.width, sizes.hidden, rngs=rngs)
        self.down = nnx.Linear(sizes.hidden, sizes.width, rngs=rngs)
        self.activation = sizes.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) -> the same."""
        return self.down(self.activation(self.up(x)))


class Routed(NamedTuple):
    """What a layer of a stack gives.

    Attributes:
      y: its output.
      base: for the next layer.
      loss: of its router.
      evenness: mean entropy of its gates, 1 where all experts have equal shares.
    """

    y: jax.Array
    base: Any
    loss: jax.Array
    evenness: jax.Array


class Stack(nnx.Module):
    """The feed-forward networks of all layers of one transformer."""

    def __init__(
        self,
        variant: Variant,
        sizes: Sizes,
        layers: int,
        *,
        rngs: nnx.Rngs,
        upcycled: list[tuple[Dense, Dense]] | None = None,
    ):
        """Fresh networks, or such as start from the given dense layers, one pair each."""
        make = partial(_network, variant, sizes, rngs)
        self.layers = nnx.List([make() for _ in range(layers)])
        pairs = upcycled
        if variant.shared and pairs is None:
            like = DenseMLP(sizes, rngs)
            pairs = [(_dense(like.up), _dense(like.down))] * layers
        self.base = nnx.data(
            jax.tree.map(nnx.Param, pairs[0]) if variant.shared and pairs is not None else None
        )
        for layer, pair in zip(self.layers, upcycled or (), strict=False):
            for weights, dense in zip((layer.up, layer.down), pair, strict=True):
                if isinstance(weights, ExpertWeights):
                    upcycle(weights, dense, key=rngs.params())
                else:
                    weights.kernel[...], weights.bias[...] = dense
        if variant.metric == "identities":
            for _, module in nnx.iter_modules(self):
                if isinstance(module, ExpertWeights):
                    make_identities(module)

    def start(self) -> Any:
        """The base of the first layer, if the layers have none of their own."""
        if self.base is None:
            return None
        return jax.tree.map(lambda p: p[...], self.base, is_leaf=lambda p: isinstance(p, nnx.Param))

    def __call__(
        self,
        index: int,
        x: jax.Array,
        base: Any,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Routed:
        """One layer of the stack; a key means training."""
        layer = self.layers[index]
        if isinstance(layer, DenseMLP):
            return Routed(layer(x), None, jnp.zeros(()), jnp.ones(()))
        if isinstance(layer, SparseMLP):
            y, routing = layer(x, key=key)
        else:
            y, routing = layer(x, base=base, mask=mask, key=key)
            base = layer.propagated(base) if base is not None else None
        entropy = -jnp.sum(jax.scipy.special.xlogy(routing.gates, routing.gates), axis=-1)
        return Routed(y, base, routing.loss, jnp.mean(entropy) / jnp.log(EXPERTS))


def _network(variant: Variant, sizes: Sizes, rngs: nnx.Rngs) -> nnx.Module:
    shape = (sizes.width, sizes.hidden, EXPERTS)
    if variant.kind == "dense":
        return DenseMLP(sizes, rngs)
    if variant.kind == "sparse":
        return SparseMLP(*shape, k=2, activation=sizes.activation, rngs=rngs)
    return MergedMLP(
        *shape,
        segment=sizes.segment,
        activation=sizes.activation,
        method=variant.method,
        rank=sizes.rank if variant.metric else None,
        scale=float(sizes.rank) if variant.scaled else 1.0,
        own_base=not variant.shared,
        rngs=rngs,
    )


def _dense(layer: nnx.Linear) -> Dense:
    return Dense(layer.kernel[...], layer.bias[...])


def make_identities(weights: ExpertWeights) -> None:
    """Every term of the metric an identity, in place: it then multiplies by its rank."""
    assert weights.metric is not None
    for factor in (weights.metric.A, weights.metric.B, weights.metric.C, weights.metric.D):
        factor[...] = jnp.broadcast_to(jnp.eye(factor.shape[-1]), factor.shape)


def parameters(module: nnx.Module) -> int:
    """How many numbers are learned."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
