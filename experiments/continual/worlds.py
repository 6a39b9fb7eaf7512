"""What a way through a stream asks of the model and the data; and that for images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import optax_moma as om
from experiments.noise.forks import schedule
from experiments.noise.images import Images
from optax_moma.continual import correct, correct_linear, linearize
from optax_moma.merging import diagonal_fisher

from .methods import METHODS, Method
from .streams import Stream, before_last, hidden, logits

Params = Any
BATCH = 50
EPOCHS = {"classes": 5, "domains": 10}
"""200 steps a task."""
RANK = 32
WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""
FISHER_EXAMPLES = 250


class World(Protocol):
    """A stream of tasks, and how a model learns from them. All params are those that are merged.

    Attributes:
      name: what the results call it.
      base: the params before the first task.
      orders: the tasks' names, in the three orders.
      rates: learning rates that are tried for every method.
      methods: what is compared.
      bounds: names of the references beside them.
    """

    name: str
    base: Params
    orders: Sequence[tuple[str, ...]]
    rates: Sequence[float]
    methods: Mapping[str, Method]
    bounds: Sequence[str]

    def train(
        self, start: Params, task: str, method: Method, rate: float, penalty: Any, seed: int
    ) -> tuple[Params, Any]:
        """Trains on a task; returns params, and the curvature of the optimizer's state."""
        ...

    def fisher(self, params: Params, task: str) -> Any:
        """The Fisher information of a task, from examples."""
        ...

    def corrected(
        self, method: Method, number: float, params: Params, previous: Params, tuned: Params,
        task: str,
    ) -> Params:  # fmt: skip
        """The merge, corrected with examples of the newest task."""
        ...

    def references(self, order: Sequence[str], seed: int) -> Iterator[tuple[str, str, float]]:
        """Name, task and test accuracy of what no way through a stream is."""
        ...

    def accuracy(self, params: Params, task: str, linear: bool, split: str) -> float:
        """On the dev or test examples of a task."""
        ...


def optimizer(name: str, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """No weight decay: it would pull every expert the same way."""
    if name == "moma":
        tx = om.moma(rate, RANK, orthogonal_block_size=None)
    elif name == "adamw":
        tx = optax.adamw(rate, weight_decay=0.0)
    else:
        raise ValueError(f"optimizer must be adamw or moma, got {name!r}.")
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def model(base: Params, head: Params, linear: bool) -> Callable[..., jax.Array]:
    """Logits as a function of the body and images; if linear, expanded around the base."""
    apply = Partial(lambda head, body, x: logits(body, head, x), head)
    return linearize(apply, base) if linear else apply


@cache
def trainer(linear: bool, optimizer_name: str) -> Callable[..., Any]:
    """The compiled training of one task."""

    @jax.jit
    def run(
        start: Params,
        base: Params,
        head: Params,
        rate: Any,
        rows: Any,
        penalty: Any,
        x: Any,
        y: Any,
    ) -> Any:
        apply = model(base, head, linear)
        tx = optimizer(optimizer_name, schedule("cosine", rate, len(rows), WARMUP))

        def loss(params: Params, i: jax.Array) -> jax.Array:
            values = optax.softmax_cross_entropy_with_integer_labels(apply(params, x[i]), y[i])
            return jnp.mean(values) + (0 if penalty is None else penalty(params))

        def step(carry: Any, i: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, i), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), rows)[0]

    return run


@partial(jax.jit, static_argnames="linear")
def _hits(params: Params, base: Params, head: Params, x: Any, y: Any, linear: bool) -> jax.Array:
    return jnp.mean(jnp.argmax(model(base, head, linear)(params, x), -1) == y)


_last_layer: Callable[[str], bool] = lambda name: name == "layer1/kernel"  # noqa: E731


@cache
def corrector(rate: float) -> optax.GradientTransformation:
    """The optimizer of a correction, as the authors have it but for the rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


class Pictures:
    """A `World` of images."""

    rates = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    methods = METHODS
    bounds = ("base", "all at once")

    def __init__(self, stream: Stream, epochs: int):
        """Reads the stream; each task is gone through ``epochs`` times."""
        self.name, self.base, self.orders = stream.name, stream.base, stream.orders
        self._stream, self._head, self._epochs = stream, stream.head, epochs
        self._expanded = linearize(hidden, self.base)
        self._apply = lambda body, x: logits(body, stream.head, x)

    def train(
        self, start: Params, task: str, method: Method, rate: float, penalty: Any, seed: int
    ) -> tuple[Params, Any]:
        """See `World`."""
        images = self._stream.tasks[task]["train"]
        params, state = self._fit(images, start, method, rate, penalty, seed)
        return params, om.curvature_from(state, params)

    def _fit(
        self, images: Images, start: Params, method: Method, rate: float, penalty: Any, seed: int
    ) -> tuple[Params, Any]:
        rng = np.random.default_rng((seed, len(images.y)))
        whole = len(images.y) // BATCH * BATCH
        rows = [rng.permutation(len(images.y))[:whole] for _ in range(self._epochs)]
        rows = np.concatenate(rows).reshape(-1, BATCH).astype(np.int32)
        return trainer(method.linear, method.optimizer)(
            start, self.base, self._head, np.float32(rate), rows, penalty, *images
        )

    def fisher(self, params: Params, task: str) -> Any:
        """See `World`; labels are drawn from the model."""
        x = self._stream.tasks[task]["train"].x[:FISHER_EXAMPLES]
        return diagonal_fisher(self._apply, params, [x], labels="sampled", key=jax.random.key(0))

    def corrected(
        self, method: Method, number: float, params: Params, previous: Params, tuned: Params,
        task: str,
    ) -> Params:  # fmt: skip
        """See `World`; one pass over the newest task's images."""
        x = self._stream.tasks[task]["train"].x
        if method.correction == "ridge":
            layer = params["layer1"]
            read, wanted = before_last(params, x), _preactivation(previous, x) - layer["bias"]
            kernel = correct_linear(layer["kernel"], read, wanted, number)
            return params | {"layer1": layer | {"kernel": kernel}}
        features = self._expanded if method.linear else hidden
        target = previous if method.correction == "previous" else tuned
        batches = np.split(x, len(x) // BATCH)
        return correct(
            features, params, target, batches, corrector(number), trainable=_last_layer
        ).params

    def accuracy(self, params: Params, task: str, linear: bool, split: str) -> float:
        """See `World`; the answer is among all ten classes."""
        return float(_hits(params, self.base, self._head, *self._stream.tasks[task][split], linear))

    def references(self, order: Sequence[str], seed: int) -> Iterator[tuple[str, str, float]]:
        """See `World`; the base, and as many passes over all tasks' images shuffled together.

        Its learning rate is chosen on dev, in every order.
        """
        parts = [self._stream.tasks[task]["train"] for task in order]
        pool = Images(*map(np.concatenate, zip(*parts, strict=True)))
        fitted = [
            self._fit(pool, self.base, METHODS["sequential"], rate, None, seed)[0]
            for rate in self.rates
        ]
        joint = max(fitted, key=lambda p: sum(self.accuracy(p, t, False, "dev") for t in order))
        for name, params in (("base", self.base), ("all at once", joint)):
            for task in order:
                yield name, task, self.accuracy(params, task, False, "test")


def _preactivation(body: Params, x: Any) -> jax.Array:
    return before_last(body, x) @ body["layer1"]["kernel"] + body["layer1"]["bias"]
