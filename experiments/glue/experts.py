"""Experts: one encoder fine-tuned per task, optimizer and seed, trained once and kept.

An expert is an Orbax checkpoint in the cache: the encoder, its head, and what the optimizer knows
of the curvature (never its momentum). Batches hold texts of similar length and are as long as
their longest, in steps of 16 tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

import optax_moma as om
from experiments.records import machine
from optax_moma.demo.encoder import Encoder, Params, embed, load_pretrained
from optax_moma.demo.files import default_cache
from optax_moma.demo.training import apply_head, objective, save

from .tasks import KINDS, OUTPUTS, Examples, Sizes, Split, Task, load_tasks, scores

BUCKET = 16
EVALUATION_BATCH = 64
SEPARATOR = 102
"""The token after each text."""
SNAPSHOTS = 4
"""How often, in equal parts of training, the factored curvature is kept."""


class Recipe(NamedTuple):
    """All that decides what an expert learns."""

    task: str
    optimizer: str
    seed: int = 0
    learning_rate: float = 2e-4
    epochs: int = 2
    batch: int = 32
    warmup: float = 0.1
    train: int = 1500
    b2: float = 0.999
    rank: int = 32

    @property
    def name(self) -> str:
        """The folder of the expert."""
        return f"{self.task}-{self.optimizer}-seed{self.seed}-lr{self.learning_rate:g}"


class Study(NamedTuple):
    """What every stage works on.

    Attributes:
      encoder: the base.
      tasks: by name.
      folder: where experts and intermediate results are kept.
      results: where the CSV files go.
    """

    encoder: Encoder
    tasks: Mapping[str, Task]
    folder: Path
    results: Path

    @property
    def base(self) -> Params:
        """The params of the base."""
        return nnx.to_pure_dict(nnx.state(self.encoder))


def open_study(names: Sequence[str], sizes: Sizes, results: Path) -> Study:
    """Reads the encoder and the tasks; compiled programs are kept beside the experts.

    Raises:
      tasks.DataError: the examples are absent.
      optax_moma.demo.files.FetchError: the encoder is absent and cannot be downloaded.
    """
    folder = default_cache() / "glue"
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    encoder, tokenizer = load_pretrained(default_cache())
    tasks = load_tasks(names, tokenizer, sizes)
    return Study(encoder, {task.name: task for task in tasks}, folder, results)


# --------------------------------------------------------------------------------------- the model


def segments(tokens: jax.Array) -> jax.Array:
    """Token types of BERT: 0 up to the first separator, 1 after it."""
    ends = tokens == SEPARATOR
    return (jnp.cumsum(ends, axis=-1) - ends > 0).astype(jnp.int32)


def outputs(graph: Any, params: Params, tokens: jax.Array) -> jax.Array:
    """(batch, length) -> (batch, OUTPUTS)."""
    embeddings = embed(nnx.merge(graph, params["encoder"]), tokens, segments(tokens))
    return apply_head(params["head"], embeddings)


def initial_params(encoder: Encoder, recipe: Recipe) -> Params:
    """A copy of the base and a fresh head, the same for all optimizers."""
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(encoder)))
    key = jax.random.fold_in(jax.random.key(recipe.seed), list(KINDS).index(recipe.task))
    kernel = 0.02 * jax.random.normal(key, (params["norm"]["scale"].size, OUTPUTS))
    return {"encoder": params, "head": {"kernel": kernel, "bias": jnp.zeros(OUTPUTS)}}


# ------------------------------------------------------------------------------------- optimizers


def schedule(peak: jax.Array, warmup: jax.Array, steps: jax.Array) -> optax.Schedule:
    """Linear warm-up and cosine decay, of traced numbers: one program for all rates and lengths."""

    def rate(count: jax.Array) -> jax.Array:
        rising = (count + 1) / jnp.maximum(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (count - warmup) / jnp.maximum(steps - warmup, 1)))
        return peak * jnp.where(count < warmup, rising, falling)

    return rate


NO_RATE = optax.constant_schedule(0.0)
"""For the shapes of a state, which no rate changes."""


MOMA = {"moma": None, "orthogonal": 128}
"""By name, the block size of its orthogonal updates."""


def optimizer(recipe: Recipe, rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """No weight decay: it would add the same drift to every expert."""
    if recipe.optimizer in MOMA:
        tx = om.moma(
            rate,
            rank=recipe.rank,
            b2=recipe.b2,
            orthogonal_block_size=MOMA[recipe.optimizer],
        )
    elif recipe.optimizer == "adamw":
        tx = optax.adamw(rate, b2=recipe.b2, weight_decay=0.0)
    elif recipe.optimizer == "umtam":
        tx = om.umtam(rate, rank=recipe.rank, b2=recipe.b2)
    else:
        names = ", ".join(MOMA)
        raise ValueError(f"optimizer must be {names}, adamw or umtam, got {recipe.optimizer!r}.")
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def curvature_of(opt_state: Any, params: Params, recipe: Recipe) -> Any:
    """What the optimizer knows of the encoder's curvature."""
    return om.curvature_from(opt_state, params, b2=recipe.b2)["encoder"]


def saliency_of(opt_state: Any, recipe: Recipe) -> Any:
    """What the optimizer itself recorded of importance along the way, as a tree without gaps.

    moma: row and column sums of the decrease of the loss, and the decrease of each entry of leaves
    that are no matrices. umtam: the paper's dense S of matrices. AdamW: nothing.
    """
    if recipe.optimizer in MOMA:
        names = ("saliency_row", "saliency_col", "saliency")
    elif recipe.optimizer == "umtam":
        names = ("saliency",)
    else:
        return {}
    found = {name: optax.tree.get(opt_state, name)["encoder"] for name in names}
    return {
        name: {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for name, tree in found.items()
    }


class Statistics(NamedTuple):
    """What an optimizer measured.

    Attributes:
      curvature: a tree like the encoder, of arrays or ``Factored``.
      saliency: see `saliency_of`.
      history: moma's curvature after each quarter of training but the last; else empty.
    """

    curvature: Any
    saliency: Any
    history: list[Any]


class Expert(NamedTuple):
    """A trained encoder and head, and what its optimizer measured."""

    encoder: Params
    head: Params
    statistics: Statistics


# --------------------------------------------------------------------------------------- training


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Each text's length, rounded up to a multiple of `BUCKET`."""
    used = np.maximum(np.count_nonzero(tokens, axis=1), 1)
    return np.minimum(-(-used // BUCKET) * BUCKET, tokens.shape[1])


def batches(examples: Examples, recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (tokens, targets) of each step: whole batches of similar length, in random order."""
    rng = np.random.default_rng((recipe.seed, list(KINDS).index(recipe.task)))
    for _ in range(recipe.epochs):
        order = rng.permutation(len(examples.targets))
        order = order[: len(order) // recipe.batch * recipe.batch]
        # Sorted within stretches of sixteen batches: similar lengths, other company every epoch.
        stretches = np.split(order, range(16 * recipe.batch, len(order), 16 * recipe.batch))
        rows = [
            part[np.argsort(lengths(examples.tokens[part]), kind="stable")] for part in stretches
        ]
        parts = np.concatenate(rows).reshape(-1, recipe.batch)
        for part in rng.permutation(parts):
            longest = lengths(examples.tokens[part]).max()
            yield examples.tokens[part, :longest], examples.targets[part]


def training_examples(task: Task, recipe: Recipe) -> Examples:
    """The examples an expert sees; real targets are standardised."""
    tokens, targets = (x[: recipe.train] for x in task.splits["train"])
    if task.kind.classes == 1:
        targets = (targets - targets.mean()) / targets.std()
    return Examples(tokens, targets)


@cache
def _update(graph: Any, recipe: Recipe) -> Callable[..., Any]:
    """The compiled step of an optimizer; task, seed, rate and length of training are arguments."""

    def loss(
        params: Params, tokens: jax.Array, targets: jax.Array, classes: jax.Array
    ) -> jax.Array:
        return objective(outputs(graph, params, tokens), targets, classes)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Params, opt_state: Any, numbers: Any, *batch: jax.Array) -> Any:
        tx = optimizer(recipe, schedule(*numbers))
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return update


def train(study: Study, recipe: Recipe) -> tuple[Expert, dict[str, Any]]:
    """Trains one expert; returns it and how it went."""
    start = time.monotonic()
    task = study.tasks[recipe.task]
    examples = training_examples(task, recipe)
    if len(examples.targets) < recipe.batch:
        raise ValueError(
            f"{recipe.task} has {len(examples.targets)} examples to train on, less than one batch"
            f" of {recipe.batch}: lower Recipe.batch."
        )
    steps = recipe.epochs * (len(examples.targets) // recipe.batch)
    warmup = round(recipe.warmup * steps)
    numbers = tuple(jnp.float32(x) for x in (recipe.learning_rate, warmup, steps))
    # What the program does not depend on is made equal, so that it is compiled once.
    same = recipe._replace(task="", seed=0, learning_rate=0.0, epochs=0, train=0)
    update = _update(nnx.graphdef(study.encoder), same)
    params = initial_params(study.encoder, recipe)
    opt_state = jax.jit(optimizer(recipe, NO_RATE).init)(params)
    history, losses = [], []
    marks = [round(steps * i / SNAPSHOTS) for i in range(1, SNAPSHOTS)]
    for i, (tokens, targets) in enumerate(batches(examples, recipe), start=1):
        params, opt_state, value = update(
            params, opt_state, numbers, tokens, targets, np.int32(task.kind.classes)
        )
        losses.append(value)
        if recipe.optimizer in MOMA and i in marks:
            history.append(jax.tree.map(jnp.copy, curvature_of(opt_state, params, recipe)))
    statistics = Statistics(
        curvature_of(opt_state, params, recipe), saliency_of(opt_state, recipe), history
    )
    quarter = [float(x) for x in losses[-max(1, steps // 4) :]]
    about = {
        "steps": steps,
        "loss": float(np.mean(quarter)),
        "seconds": time.monotonic() - start,
        "machine": machine(),
    }
    return Expert(params["encoder"], params["head"], statistics), about


def template(study: Study, recipe: Recipe) -> Any:
    """The shapes of an expert, for loading."""

    def make() -> Expert:
        params = initial_params(study.encoder, recipe)
        opt_state = optimizer(recipe, NO_RATE).init(params)
        curvature = curvature_of(opt_state, params, recipe)
        history = [curvature] * (SNAPSHOTS - 1) if recipe.optimizer in MOMA else []
        statistics = Statistics(curvature, saliency_of(opt_state, recipe), history)
        return Expert(params["encoder"], params["head"], statistics)

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(make)
    )


def expert(study: Study, recipe: Recipe) -> Expert:
    """The expert of a recipe: loaded, or trained and kept."""
    path = study.folder / "experts" / recipe.name
    if about_expert(study, recipe) is None:
        trained, about = train(study, recipe)
        save(path, trained, {"recipe": recipe._asdict(), "about": about})
    return ocp.load(str(path.absolute()), template(study, recipe))


def about_expert(study: Study, recipe: Recipe) -> dict[str, Any] | None:
    """How the training of a kept expert went; None if there is none of exactly this recipe."""
    path = str((study.folder / "experts" / recipe.name).absolute())
    if not ocp.is_orbax_checkpoint(path):
        return None
    found = ocp.metadata(path).custom_metadata
    return found["about"] if found and found["recipe"] == recipe._asdict() else None


def size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------- evaluation


@cache
def _embedder(graph: Any) -> Callable[[Params, jax.Array], jax.Array]:
    return jax.jit(lambda params, tokens: embed(nnx.merge(graph, params), tokens, segments(tokens)))


class Evaluator:
    """Scores an encoder on tasks, each with its own expert's head; compiled once per length."""

    def __init__(self, study: Study):
        """Evaluates on a study's tasks."""
        self._tasks = study.tasks
        self._embed = _embedder(nnx.graphdef(study.encoder))

    def embeddings(self, encoder: Params, tokens: np.ndarray) -> np.ndarray:
        """(n, LENGTH) -> (n, width), in batches of similar length."""
        order = np.argsort(lengths(tokens), kind="stable")
        parts = []
        for start in range(0, len(order), EVALUATION_BATCH):
            rows = tokens[order[start : start + EVALUATION_BATCH]]
            rows = rows[:, : lengths(rows).max()]
            missing = EVALUATION_BATCH - len(rows)
            parts.append(self._embed(encoder, np.pad(rows, ((0, missing), (0, 0)))))
        out = np.empty((len(order), parts[0].shape[1]), np.float32)
        out[order] = np.concatenate([np.asarray(part) for part in parts])[: len(order)]
        return out

    def __call__(
        self, encoder: Params, heads: Mapping[str, Params], split: Split
    ) -> dict[str, dict[str, float]]:
        """By task of ``heads``, all its metrics on a split."""
        found = {}
        # All tasks together, so that few batches are filled up with padding.
        parts = [self._tasks[name].splits[split] for name in heads]
        every = self.embeddings(encoder, np.concatenate([part.tokens for part in parts]))
        ends = np.cumsum([len(part.targets) for part in parts])[:-1]
        for (name, head), part, own in zip(
            heads.items(), parts, np.split(every, ends), strict=True
        ):
            out = np.asarray(apply_head(head, own))
            found[name] = scores(self._tasks[name].kind, out, part.targets)
        return found

    def primary(
        self, encoder: Params, heads: Mapping[str, Params], split: Split
    ) -> dict[str, float]:
        """By task of ``heads``, its first metric on a split."""
        return {name: next(iter(own.values())) for name, own in self(encoder, heads, split).items()}
