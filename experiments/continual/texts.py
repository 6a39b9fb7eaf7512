"""Text tasks in sequence: MiniLM, of which the encoder is shared and merged, with a head per task.

A task's head is trained with the encoder when the task comes, and stays as it is from then on. The
tasks, the encoder and the heads are those of experiments/glue, cut to LENGTH tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_moma as om
from experiments.glue.experts import Study, open_study, segments
from experiments.glue.tasks import OUTPUTS, Sizes, Task, scores
from experiments.noise.forks import schedule
from optax_moma.continual import correct, linearize
from optax_moma.demo.encoder import embed
from optax_moma.demo.training import apply_head, objective

from .methods import METHODS, MIXING, Method
from .streams import orders
from .worlds import WARMUP, corrector, optimizer

Params = Any
TASKS = ("trec", "sst2", "sick", "ag_news")
SIZES = Sizes(train=512, dev=200, test=400)
LENGTH = 32
BATCH = 16
RATE = 2e-4
"""From the middle of experiments/glue's grid; it is not tuned here."""


def _few(name: str, **changes: Any) -> Method:
    return METHODS[name]._replace(**changes)


FEW: Mapping[str, Method] = {
    "CMM": _few("CMM", numbers=MIXING[::2]),
    "CMM, not linear": _few("CMM, not linear", numbers=MIXING[::2]),
    "running average": _few("running average", numbers=MIXING[::2]),
    "independent average": METHODS["independent average"],
    "moma": METHODS["moma"],
    "OPCM": METHODS["OPCM"],
    "Perturb-and-Merge": METHODS["Perturb-and-Merge"],
    "sequential": METHODS["sequential"],
    "EWC, optimizer's v": _few("EWC, optimizer's v", numbers=(1e2, 1e5)),
    "CMM, not linear + to previous": _few("CMM, not linear + to previous", numbers=(1e-5, 1e-4)),
}
"""Two of the numbers where a number means training anew."""


def open_texts() -> "Texts":
    """Reads the encoder and the tasks.

    Raises:
      DataError: the examples are absent.
      FetchError: the encoder is absent and cannot be downloaded.
    """
    return Texts(open_study(TASKS, SIZES, Path()))


class Texts:
    """A `World` of texts."""

    name = "text"
    rates = (RATE,)
    methods = FEW
    bounds = ("one expert per task",)

    def __init__(self, study: Study):
        """Keeps heads, and experts trained from the base: those serve several methods."""
        self.base, self._tasks = study.base, study.tasks
        self.orders = orders(tuple(study.tasks))
        self._graph = nnx.graphdef(study.encoder)
        self._heads: dict[str, Params] = {}
        self._experts: dict[tuple[Any, ...], tuple[Params, Any, Params]] = {}
        self._embed = jax.jit(lambda encode, params, tokens: encode(params, tokens))
        self._plain = encoder_of(self._graph)
        self._linear = linearize(self._plain, self.base)

    def _encode(self, linear: bool) -> Any:
        return self._linear if linear else jax.tree_util.Partial(self._plain)

    def train(
        self, start: Params, task: str, method: Method, rate: float, penalty: Any, seed: int
    ) -> tuple[Params, Any]:
        """See `World`; a task's examples come in the same order for every seed."""
        key = (task, method.linear, method.optimizer, rate)
        first = start is self.base
        if not first or key not in self._experts:
            found = self._fit(start, self._tasks[task], method, rate, penalty)
            if not first:
                self._heads[task] = found[2]
                return found[:2]
            # A penalty of the first task is zero: there is nothing to hold on to yet.
            self._experts[key] = found
        params, curvature, self._heads[task] = self._experts[key]
        return params, curvature

    def _fit(
        self, start: Params, task: Task, method: Method, rate: float, penalty: Any
    ) -> tuple[Params, Any, Params]:
        tokens, targets = task.splits["train"]
        steps = len(targets) // BATCH
        key = jax.random.key(list(self._tasks).index(task.name))
        width = self.base["norm"]["scale"].size
        kernel = 0.02 * jax.random.normal(key, (width, OUTPUTS))
        params = {"encoder": start, "head": {"kernel": kernel, "bias": jnp.zeros(OUTPUTS)}}
        numbers = np.float32(rate), np.int32(task.kind.classes)
        begin, step = trainer(method.optimizer, steps)
        encode = self._encode(method.linear)
        state = begin(params)
        rows = np.random.default_rng(0).permutation(len(targets))[: steps * BATCH]
        for i in rows.reshape(steps, BATCH):
            batch = tokens[i, :LENGTH], targets[i]
            params, state = step(encode, params, state, penalty, numbers, batch)
        return params["encoder"], om.curvature_from(state, params)["encoder"], params["head"]

    def fisher(self, params: Params, task: str) -> Any:
        """Not for texts: the examples would be taken one by one."""
        raise NotImplementedError("the Fisher information from examples is left to the images")

    def corrected(
        self, method: Method, number: float, params: Params, previous: Params, tuned: Params,
        task: str,
    ) -> Params:  # fmt: skip
        """See `World`; trains the encoder's last projection, in one pass."""
        tokens = self._tasks[task].splits["train"].tokens[:, :LENGTH]
        batches = np.split(tokens, len(tokens) // BATCH)
        target = previous if method.correction == "previous" else tuned
        last = f"layers/{len(self.base['layers']) - 1}/down/kernel"
        return correct(
            self._encode(method.linear), params, target, batches, corrector(number),
            trainable=lambda name: name == last,
        ).params  # fmt: skip

    def accuracy(self, params: Params, task: str, linear: bool, split: str) -> float:
        """See `World`; with the task's own head."""
        tokens, targets = self._tasks[task].splits[split]
        parts = np.split(tokens[:, :LENGTH], range(BATCH, len(tokens), BATCH))
        found = [self._embed(self._encode(linear), params, part) for part in parts]
        outputs = np.asarray(apply_head(self._heads[task], np.concatenate(found)))
        return next(iter(scores(self._tasks[task].kind, outputs, targets).values()))

    def references(self, order: Sequence[str], seed: int) -> Iterator[tuple[str, str, float]]:
        """See `World`; an encoder per task."""
        for task in order:
            params, _ = self.train(self.base, task, METHODS["sequential"], RATE, None, seed)
            yield self.bounds[0], task, self.accuracy(params, task, False, "test")


@cache
def encoder_of(graph: Any) -> Callable[..., jax.Array]:
    """Embeddings (batch, width) as a function of the encoder's params and tokens."""
    return lambda params, tokens: embed(nnx.merge(graph, params), tokens, segments(tokens))


@cache
def trainer(optimizer_name: str, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The optimizer's init, and the compiled step: the encoder, linear or not, is an argument."""

    def tx(rate: Any) -> optax.GradientTransformation:
        return optimizer(optimizer_name, schedule("cosine", rate, steps, WARMUP))

    @jax.jit
    def step(
        encode: Any, params: Params, state: Any, penalty: Any, numbers: Any, batch: Any
    ) -> Any:
        rate, classes = numbers
        tokens, targets = batch

        def loss(params: Params) -> jax.Array:
            outputs = apply_head(params["head"], encode(params["encoder"], tokens))
            held = 0 if penalty is None else penalty(params["encoder"])
            return objective(outputs, targets, classes) + held

        updates, state = tx(rate).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(tx(0.0).init), step
