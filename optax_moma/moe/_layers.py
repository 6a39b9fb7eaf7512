"""Experts as one merged kernel, and the layers made of them; the formulas head the package."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from .._checks import check_integer
from ..merging._leaf import sum_experts
from ._metric import KroneckerMetric
from ._router import Router, Routing, checked_segment, routed

Method = Literal["soft", "domain", "ties", "dare"]


class Dense(NamedTuple):
    """A linear map as an ordinary layer holds it: ``x @ kernel + bias``.

    Attributes:
      kernel: (m, n), fan-in first as in Flax.
      bias: (n,), or None.
    """

    kernel: jax.Array
    bias: jax.Array | None = None


class ExpertWeights(nnx.Module):
    r"""One linear map of E experts, merged anew for each routing unit.

    The formulas stand at the head of this package. Biases are merged like kernels, without a
    metric. The task vectors pass the metric and the mask before they meet the gates: once per call,
    whatever the batch. A unit's gates must add up to 1, as a router's do. A metric on soft merging
    starts from the experts' mean, as base.

    Args:
      fan_in: m.
      fan_out: n.
      experts: E, routed ones; the base comes on top.
      method: ``"soft"`` (SMEAR: no base), ``"domain"`` (task arithmetic), ``"ties"`` (entries whose
        sign is that of the experts' sum; no trimming, as published), ``"dare"`` (in training,
        entries are dropped at random and the rest scaled up).
      scale: alpha; soft merging has none. With 1 and gates that add up to 1 the base cancels out of
        a merge without masks and metric: domain is then soft merging.
      rank: Terms of a :class:`KroneckerMetric`, or None for the Euclidean merge.
      drop: Share of entries that ``"dare"`` drops.
      own_base: False: the base is an argument of each call, for layers that share one.
      use_bias: Whether there are biases.
      spread: Deviation of the experts around one dense kernel at the start, relative to its root
        mean square. The experts' mean is that kernel, so that a layer starts as the dense one. With
        0 all task vectors are null, and neither metric nor router gets a gradient.
      rngs: Flax's random streams.

    Raises:
      ValueError: The method is unknown, a number out of range, or a size does not factor.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import ExpertWeights
      >>> weights = ExpertWeights(4, 6, experts=3, method="domain", rank=2, rngs=nnx.Rngs(0))
      >>> x, gates = jnp.ones((2, 5, 4)), jnp.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
      >>> weights(x, gates).shape
      (2, 5, 6)

    Source: Nguyen et al., arXiv 2502.18821.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        experts: int,
        *,
        method: Method = "domain",
        scale: float = 1.0,
        rank: int | None = None,
        drop: float = 0.1,
        own_base: bool = True,
        use_bias: bool = True,
        spread: float = 0.1,
        rngs: nnx.Rngs,
    ):
        """Experts around one dense kernel, drawn as ``nnx.Linear`` draws its own."""
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}.")
        if method == "soft" and scale != 1:
            raise ValueError(f"soft merging is a mean and has no scale, got {scale}.")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must lie in [0, 1), got {drop}.")
        self.method, self.scale, self.drop, self.own_base = method, scale, drop, own_base
        count = check_integer("experts", experts, lowest=1)
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (fan_in, fan_out))
        has_base = own_base and method != "soft"
        self.kernels = nnx.Param(_around(kernel, count, spread, rngs.params()))
        self.base = nnx.data(nnx.Param(kernel) if has_base else None)
        self.biases = nnx.data(nnx.Param(jnp.zeros((count, fan_out))) if use_bias else None)
        with_bias = has_base and use_bias
        self.base_bias = nnx.data(nnx.Param(jnp.zeros(fan_out)) if with_bias else None)
        self.metric = nnx.data(
            None if rank is None else KroneckerMetric(count, fan_in, fan_out, rank, rngs=rngs)
        )

    def __call__(
        self,
        x: jax.Array,
        gates: jax.Array,
        *,
        base: Dense | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """States (*units, tokens, m) times each unit's kernel, (*units, tokens, n)."""
        kernel, bias = self.merged(gates, base=base, key=key)
        y = jnp.einsum("...tm,...mn->...tn", x, kernel.astype(x.dtype))
        return y if bias is None else y + bias[..., None, :].astype(x.dtype)

    def merged(
        self, gates: jax.Array, *, base: Dense | None = None, key: jax.Array | None = None
    ) -> Dense:
        """The kernels (*units, m, n) and biases (*units, n) of gates (*units, E)."""
        if base is not None and (self.method == "soft" or self.base is not None):
            raise ValueError("base was given to soft merging, or to a layer that has its own.")
        experts = self._experts()
        if self.method != "soft" or self.metric is not None:
            start = self._start(base)
            # The gates add up to 1: a base within the experts is a base added to each unit's
            # kernel, and does not have to be.
            move = lambda w, step: w + self.scale * step  # noqa: E731
            experts = jax.tree.map(move, start, self.steps(start, key))
        return jax.tree.map(lambda w: _mix(gates, w), experts)

    def steps(self, start: Dense, key: jax.Array | None = None) -> Dense:
        """The experts' task vectors, (E, m, n) and (E, n), after metric and mask."""
        delta = jax.tree.map(lambda w, w0: w - w0, self._experts(), start)
        mapped = delta
        if self.metric is not None:
            mapped = delta._replace(kernel=self.metric(delta.kernel))
        if self.method == "ties":
            return jax.tree.map(lambda step, t: step * _agreeing(t), mapped, delta)
        if self.method == "dare" and key is not None:
            kernel_key, bias_key = jax.random.split(key)
            keys = Dense(kernel_key, None if delta.bias is None else bias_key)
            return jax.tree.map(
                lambda step, key: step * _dropping(key, step, self.drop), mapped, keys
            )
        return mapped

    def _experts(self) -> Dense:
        return Dense(self.kernels[...], None if self.biases is None else self.biases[...])

    def _start(self, base: Dense | None) -> Dense:
        """The base that task vectors are taken from."""
        if self.method == "soft":
            return jax.tree.map(lambda w: sum_experts(w) / len(w), self._experts())
        if self.base is not None:
            return Dense(self.base[...], None if self.base_bias is None else self.base_bias[...])
        if base is None:
            raise ValueError("this layer has no base of its own: give it base=Dense(kernel, bias).")
        shapes = [
            jax.tree.map(jnp.shape, x)
            for x in (base, jax.tree.map(lambda w: w[0], self._experts()))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the base has shapes {tuple(shapes[0])} and the experts {tuple(shapes[1])}: layers"
                " that share a base must be of one shape, all with a bias or all without."
            )
        return base

    def propagated(self, base: Dense) -> Dense:
        r"""The base for the next layer: :math:`W_0 + \alpha / E \sum_e mask_e M_e(t_e)`.

        The dynamic variant (EP-CAMEx), with one base for all layers. Its published description
        leaves open whether the metric belongs into this step; here it does.
        """
        count = self.kernels.shape[0]
        return self.merged(jnp.full(count, 1 / count), base=base)

    def fold(self, base: Dense | None = None) -> None:
        """Put metric and mask into the experts, in place; see the function :func:`fold`."""
        start = self._start(base)
        folded = jax.tree.map(lambda w, step: w + step, start, self.steps(start))
        self.kernels[...] = folded.kernel
        if self.biases is not None:
            self.biases[...] = folded.bias
        self.metric = nnx.data(None)
        self.method = "soft" if self.method == "soft" else "domain"


def _around(kernel: jax.Array, experts: int, spread: float, key: jax.Array) -> jax.Array:
    """Experts (E, m, n) whose mean is the kernel."""
    noise = jax.random.normal(key, (experts, *kernel.shape), kernel.dtype)
    size = spread * jnp.sqrt(jnp.mean(jnp.square(kernel)))
    return kernel + size * (noise - sum_experts(noise) / experts)


def _mix(gates: jax.Array, x: jax.Array) -> jax.Array:
    """(*units, E) and (E, *shape) -> (*units, *shape)."""
    return jnp.tensordot(gates, x, axes=1, precision=jax.lax.Precision.HIGHEST)


def _agreeing(delta: jax.Array) -> jax.Array:
    """Which entries of each expert have the sign of the experts' sum."""
    return (jnp.sign(delta) == jnp.sign(sum_experts(delta))).astype(delta.dtype)


def _dropping(key: jax.Array, x: jax.Array, drop: float) -> jax.Array:
    return jax.random.bernoulli(key, 1 - drop, x.shape).astype(x.dtype) / (1 - drop)


class MergedLinear(nnx.Module):
    """A linear layer of merged experts with its own router, in place of ``nnx.Linear``.

    See :class:`MergedMLP` for what is routed and how, and :class:`ExpertWeights` for the merge.

    Args:
      features: m.
      out_features: n.
      experts: E.
      k: How many experts a unit merges; all by default.
      segment: Tokens of a routing unit; None: a unit is a whole sequence.
      first: How the first segment is routed.
      rngs: Flax's random streams.
      **merge: Arguments of :class:`ExpertWeights`.

    Raises:
      ValueError: An argument is out of its range; later: a length that segments do not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import MergedLinear
      >>> layer = MergedLinear(4, 6, experts=3, method="soft", rngs=nnx.Rngs(0))
      >>> y, routing = layer(jnp.ones((2, 5, 4)))
      >>> y.shape, routing.gates.shape
      ((2, 5, 6), (2, 3))

    Source: Nguyen et al., arXiv 2502.18821.
    """

    def __init__(
        self,
        features: int,
        out_features: int,
        experts: int,
        *,
        k: int | None = None,
        segment: int | None = None,
        first: Literal["even", "own"] = "even",
        rngs: nnx.Rngs,
        **merge: Any,
    ):
        """A router and the experts."""
        self.segment, self.first = checked_segment(segment, first), first
        self.router = Router(features, experts, k, rngs=rngs)
        self.weights = ExpertWeights(features, out_features, experts, rngs=rngs, **merge)

    def __call__(
        self,
        x: jax.Array,
        *,
        base: Dense | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """States (*batch, length, m) -> (*batch, length, n), and the routing; see MergedMLP."""
        noise_key, key = (None, None) if key is None else jax.random.split(key)
        units, routing = routed(self.router, x, self.segment, self.first, mask, noise_key)
        y = self.weights(units, routing.gates, base=base, key=key)
        return y.reshape(*x.shape[:-1], y.shape[-1]), routing


class MergedMLP(nnx.Module):
    """A two-layer network of merged experts with one router, in place of a transformer's FFN.

    Each routing unit, a sequence or a segment of ``segment`` tokens, gets one merged network. With
    segments a unit is routed by the mean state of the one before it, so that no token sees a later
    segment. The first segment has none before it: all experts share it evenly (``"even"``), or, as
    published, its own mean routes it, without gradient (``"own"``), by which its tokens see a
    little of those that follow them *within* the segment.

    Args:
      features: Width m of the states.
      hidden: Width in between.
      experts: E.
      k: How many experts a unit merges; all by default.
      segment: Tokens of a routing unit; None: a unit is a whole sequence (not causal).
      first: How the first segment is routed.
      activation: Between the two layers.
      rngs: Flax's random streams.
      **merge: Arguments of :class:`ExpertWeights`: ``method``, ``scale``, ``rank``, ``drop``,
        ``own_base``, ``use_bias``, ``spread``.

    Raises:
      ValueError: An argument is out of its range; later: a length that segments do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import MergedMLP
      >>> mlp = MergedMLP(4, 6, experts=3, segment=5, method="ties", rank=2, rngs=nnx.Rngs(0))
      >>> y, routing = mlp(jnp.ones((2, 10, 4)), key=jax.random.key(0))  # a key: training
      >>> y.shape, routing.gates.shape
      ((2, 10, 4), (2, 2, 3))

    Source: Nguyen et al., arXiv 2502.18821; segments: Zhong et al., "Lory", 2024.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        experts: int,
        *,
        k: int | None = None,
        segment: int | None = None,
        first: Literal["even", "own"] = "even",
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        rngs: nnx.Rngs,
        **merge: Any,
    ):
        """A router, and the experts of two layers."""
        self.segment, self.first, self.activation = (
            checked_segment(segment, first),
            first,
            activation,
        )
        self.router = Router(features, experts, k, rngs=rngs)
        self.up = ExpertWeights(features, hidden, experts, rngs=rngs, **merge)
        self.down = ExpertWeights(hidden, features, experts, rngs=rngs, **merge)

    def __call__(
        self,
        x: jax.Array,
        *,
        base: tuple[Dense, Dense] | None = None,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing]:
        """States (*batch, length, m) -> the same shape, and the routing.

        ``base`` are the two layers' bases where they have none of their own; ``mask`` (*batch,
        length) is true where a token is real, for the means; a ``key`` means training: noise on the
        gates, and dropping.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        units, routing = routed(self.router, x, self.segment, self.first, mask, keys[0])
        bases = (None, None) if base is None else base
        h = self.activation(self.up(units, routing.gates, base=bases[0], key=keys[1]))
        y = self.down(h, routing.gates, base=bases[1], key=keys[2])
        return y.reshape(x.shape), routing

    def propagated(self, base: tuple[Dense, Dense]) -> tuple[Dense, Dense]:
        """The bases for the next layer; see :meth:`ExpertWeights.propagated`."""
        return self.up.propagated(base[0]), self.down.propagated(base[1])


class SparseMLP(nnx.Module):
    r"""The reference: a mixture of experts that routes tokens and mixes outputs.

    :math:`y = \sum_{e \in top\,k} s_e E_e(x)`; no token is dropped, and only chosen experts are
    computed (``jax.lax.ragged_dot``).

    Args:
      features: Width m of the states.
      hidden: Width in between.
      experts: E.
      k: Experts of a token.
      activation: Between the two layers.
      use_bias: Whether there are biases.
      spread: See :class:`ExpertWeights`.
      rngs: Flax's random streams.

    Raises:
      ValueError: k is not between 1 and E.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import SparseMLP
      >>> y, routing = SparseMLP(4, 6, experts=3, k=2, rngs=nnx.Rngs(0))(jnp.ones((2, 5, 4)))
      >>> y.shape, routing.gates.shape
      ((2, 5, 4), (2, 5, 3))

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        experts: int,
        *,
        k: int = 2,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        use_bias: bool = True,
        spread: float = 0.1,
        rngs: nnx.Rngs,
    ):
        """A router, and the experts of two layers."""
        self.activation = activation
        self.router = Router(features, experts, k, rngs=rngs)
        self.up, self.down = (
            ExpertWeights(
                *sizes, experts, method="soft", use_bias=use_bias, spread=spread, rngs=rngs
            )
            for sizes in ((features, hidden), (hidden, features))
        )

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """States (*batch, length, m) -> the same shape, and the tokens' routing."""
        routing, k = self.router(x, key), self.router.k
        tokens = x.reshape(-1, x.shape[-1])
        gates, chosen = jax.lax.top_k(routing.gates.reshape(len(tokens), -1), k)
        order = jnp.argsort(chosen.ravel())
        expert, source = chosen.ravel()[order], order // k
        sizes = jnp.bincount(expert, length=routing.gates.shape[-1])

        def linear(weights: ExpertWeights, x: jax.Array) -> jax.Array:
            y = jax.lax.ragged_dot(x, weights.kernels[...].astype(x.dtype), sizes)
            return y if weights.biases is None else y + weights.biases[...].astype(x.dtype)[expert]

        y = linear(self.down, self.activation(linear(self.up, tokens[source])))
        y = y * gates.ravel()[order, None].astype(x.dtype)
        return jnp.zeros_like(tokens).at[source].add(y).reshape(x.shape), routing


def upcycle(
    weights: ExpertWeights,
    dense: Dense,
    experts: Sequence[Dense] | None = None,
    *,
    spread: float = 0.1,
    key: jax.Array | None = None,
) -> None:
    """Fill the experts of a layer, in place, from a dense layer, or from several trained ones.

    The base becomes the dense layer; the experts become the given ones, or lie around it with a
    mean equal to it, so that with even gates the layer computes what the dense one did.

    Args:
      weights: The layer; of a :class:`MergedMLP` its ``up`` or ``down``.
      dense: The pretrained layer.
      experts: E layers fine-tuned from it.
      spread: Deviation of the experts around the dense kernel, relative to its root mean square.
        With 0 all task vectors are null, and only the gates tell the experts apart.
      key: Random key for the spread.

    Returns:
      None; the layer is changed.

    Raises:
      ValueError: Shapes that differ, not E experts, or neither experts nor a key.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import Dense, ExpertWeights, upcycle
      >>> dense = Dense(jnp.arange(24.0).reshape(4, 6), jnp.ones(6))
      >>> weights = ExpertWeights(4, 6, experts=3, rank=2, rngs=nnx.Rngs(0))
      >>> upcycle(weights, dense, key=jax.random.key(0))
      >>> merged = weights.merged(jnp.full(3, 1 / 3))
      >>> bool(jnp.allclose(merged.kernel, dense.kernel, atol=1e-4))
      True

    Source: Komatsuzaki et al., "Sparse Upcycling", 2023.
    """
    count, *wanted = weights.kernels.shape
    if experts is None and key is None:
        raise ValueError("upcycle needs either trained experts, or a key to spread them with.")
    if experts is not None and len(experts) != count:
        raise ValueError(f"the layer has {count} experts, got {len(experts)}.")
    for name, layer in (
        ("dense", dense),
        *((f"experts[{i}]", e) for i, e in enumerate(experts or ())),
    ):
        bias = None if layer.bias is None else layer.bias.shape
        if layer.kernel.shape != (*wanted,) or bias != (
            None if weights.biases is None else (wanted[1],)
        ):
            raise ValueError(
                f"{name} has a kernel of shape {layer.kernel.shape} and a bias of shape {bias}; the"
                f" layer's kernels are {tuple(wanted)}, and it has"
                f" {'no biases' if weights.biases is None else 'biases'}."
            )
    if experts is None:
        assert key is not None
        kernels = _around(dense.kernel, count, spread, key)
        experts = [Dense(kernel, dense.bias) for kernel in kernels]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *experts)
    pairs = (
        (weights.kernels, stacked.kernel),
        (weights.biases, stacked.bias),
        (weights.base, dense.kernel),
        (weights.base_bias, dense.bias),
    )
    for param, value in pairs:
        if param is not None and value is not None:
            param[...] = value.astype(param.dtype)


def fold(model: nnx.Module) -> nnx.Module:
    """A copy of a model for serving: metrics and masks are put into the experts' weights.

    ``W_e <- W0 + mask_e M_e(W_e - W0)``, after which every layer merges as ``"domain"`` (or
    ``"soft"``) does: the same outputs, without the metric's cost and parameters. Task vectors of
    ``"dare"`` are whole, as they are outside training.

    Args:
      model: Any Flax NNX module. Layers without a base of their own are folded one by one, each
        with its base: ``mlp.up.fold(base)``.

    Returns:
      The folded copy.

    Raises:
      ValueError: A layer has no base of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_moma.moe import MergedMLP, fold
      >>> mlp = MergedMLP(4, 6, experts=3, rank=2, rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 5, 4))
      >>> fold(mlp).up.metric is None, bool(jnp.allclose(fold(mlp)(x)[0], mlp(x)[0], atol=1e-6))
      (True, True)

    Source: Nguyen et al., arXiv 2502.18821, where it is called reparameterisation.
    """
    model = nnx.clone(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ExpertWeights):
            module.fold()
    return model
