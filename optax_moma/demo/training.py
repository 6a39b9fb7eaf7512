"""Fine-tuning of one expert per task, and evaluation of any encoder with the experts' heads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

import optax_moma
from optax_moma.demo.encoder import Encoder, Params, embed
from optax_moma.demo.tasks import Split, Task, score

OUTPUTS = 4
"""Outputs of every head, so that one compiled step serves all tasks."""
EVALUATION_BATCH = 64


class Settings(NamedTuple):
    """Everything that decides what an expert learns, and how models are compared."""

    seed: int = 0
    train: int = 2048
    dev: int = 200
    test: int = 500
    length: int = 32
    batch: int = 32
    learning_rate: float = 4e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    rank: int = 32


class Problem(NamedTuple):
    """An encoder to start from, a corpus of token ids (texts, length), and tasks on its rows."""

    encoder: Encoder
    tokens: np.ndarray
    tasks: Sequence[Task]


class Expert(NamedTuple):
    """What training leaves: params ``{"encoder", "head"}`` and the optimizer's state."""

    params: Params
    opt_state: optax.OptState


def initial_params(problem: Problem, task: int, seed: int) -> Params:
    """A copy of the base encoder, and a fresh head for the task at index ``task``."""
    encoder = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(problem.encoder)))
    key = jax.random.fold_in(jax.random.key(seed), task)
    kernel = 0.02 * jax.random.normal(key, (encoder["norm"]["scale"].size, OUTPUTS))
    return {"encoder": encoder, "head": {"kernel": kernel, "bias": jnp.zeros(OUTPUTS)}}


def apply_head(head: Params, embeddings: Any) -> Any:
    """``x W + b``, for JAX and NumPy embeddings (batch, width)."""
    return embeddings @ head["kernel"] + head["bias"]


def loss(
    graph: Any, params: Params, tokens: jax.Array, targets: jax.Array, classes: jax.Array
) -> jax.Array:
    """The `objective` of an encoder and a head."""
    embeddings = embed(nnx.merge(graph, params["encoder"]), tokens)
    return objective(apply_head(params["head"], embeddings), targets, classes)


def objective(outputs: jax.Array, targets: jax.Array, classes: jax.Array) -> jax.Array:
    """Cross entropy over the first ``classes`` outputs; squared error of the first if it is 1.

    ``classes`` is traced, so that one compiled program serves classification and regression.
    """
    regression = classes == 1
    real = jnp.arange(outputs.shape[-1]) < classes
    logits = jnp.where(real, outputs, jnp.finfo(outputs.dtype).min)
    labels = jnp.where(regression, 0, targets).astype(jnp.int32)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(jnp.where(regression, (outputs[:, 0] - targets) ** 2, entropy))


def steps(problem: Problem, settings: Settings) -> int:
    """Steps of one epoch, the same for every task: as many as the smallest task has batches.

    Raises:
      ValueError: a task has less than one batch of examples to train on.
    """
    for task in problem.tasks:
        if len(task.splits["train"].rows) < settings.batch:
            raise ValueError(
                f"Task {task.name!r} has {len(task.splits['train'].rows)} examples to train on, "
                f"less than one batch of {settings.batch}: lower Settings.batch."
            )
    return min(len(task.splits["train"].rows) for task in problem.tasks) // settings.batch


def optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """The demo's optimizer: `optax_moma.moma` in an ordinary chain."""
    warmup = round(settings.warmup * steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax_moma.moma(
            schedule,
            rank=settings.rank,
            weight_decay=settings.weight_decay,
            orthogonal_block_size=None,  # what is fine-tuned was trained by Adam
        ),
    )


def batches(problem: Problem, settings: Settings, task: int) -> Iterator[tuple]:
    """The (tokens, targets, classes) of each step, shuffled; real targets are standardised."""
    rows, targets = problem.tasks[task].splits["train"]
    classes = problem.tasks[task].classes
    if classes == 1:
        targets = (targets - targets.mean()) / targets.std()
    order = np.random.default_rng((settings.seed, task)).permutation(len(rows))
    for start in range(0, steps(problem, settings) * settings.batch, settings.batch):
        batch = order[start : start + settings.batch]
        yield problem.tokens[rows[batch]], targets[batch], np.int32(classes)


class Step(NamedTuple):
    """A training step in two halves and, compiled, as a whole.

    Attributes:
      tx: the optimizer.
      gradient: (params, tokens, targets, classes) -> (loss, gradients).
      apply: (expert, gradients) -> expert.
      update: (expert, tokens, targets, classes) -> (expert, loss), jitted; the expert is donated.
    """

    tx: optax.GradientTransformation
    gradient: Callable[..., tuple[jax.Array, Params]]
    apply: Callable[[Expert, Params], Expert]
    update: Callable[..., tuple[Expert, jax.Array]]


def make_step(problem: Problem, settings: Settings) -> Step:
    """The training step that serves all of a problem's tasks."""
    tx = optimizer(settings, steps(problem, settings))
    gradient = jax.value_and_grad(partial(loss, nnx.graphdef(problem.encoder)))

    def apply(expert: Expert, gradients: Params) -> Expert:
        updates, opt_state = tx.update(gradients, expert.opt_state, expert.params)
        return Expert(cast(Params, optax.apply_updates(expert.params, updates)), opt_state)

    @partial(jax.jit, donate_argnums=0)
    def update(expert: Expert, *batch: jax.Array) -> tuple[Expert, jax.Array]:
        value, gradients = gradient(expert.params, *batch)
        return apply(expert, gradients), value

    return Step(tx, gradient, apply, update)


def save(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Writes a tree as an Orbax checkpoint, whole or not at all; replaces what was there."""
    ocp.save(str(path.absolute()), tree, custom_metadata=about, overwrite=True)


def find_expert(path: Path, problem: Problem, settings: Settings, step: Step) -> Expert | None:
    """Loads an expert that was trained with the same settings, if ``path`` holds one."""
    if not ocp.is_orbax_checkpoint(str(path.absolute())):
        return None
    if ocp.metadata(str(path.absolute())).custom_metadata != settings._asdict():
        return None
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        jax.eval_shape(lambda: new_expert(problem, settings, 0, step)),
    )
    return ocp.load(str(path.absolute()), like)


def new_expert(problem: Problem, settings: Settings, task: int, step: Step) -> Expert:
    """The base with a fresh head, before training."""
    params = initial_params(problem, task, settings.seed)
    return Expert(params, jax.jit(step.tx.init)(params))


def make_embedder(problem: Problem) -> Callable[[Params, np.ndarray], np.ndarray]:
    """The function ``(encoder params, rows) -> embeddings (len(rows), width)``, compiled once."""
    graph = nnx.graphdef(problem.encoder)
    compiled = jax.jit(lambda params, tokens: embed(nnx.merge(graph, params), tokens))

    def embed_rows(params: Params, rows: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), EVALUATION_BATCH):
            tokens = problem.tokens[rows[start : start + EVALUATION_BATCH]]
            missing = EVALUATION_BATCH - len(tokens)
            parts.append(np.asarray(compiled(params, np.pad(tokens, ((0, missing), (0, 0))))))
        return np.concatenate(parts)[: len(rows)]

    return embed_rows


def evaluate(
    embed_rows: Callable[[Params, np.ndarray], np.ndarray],
    encoder: Params,
    heads: Mapping[str, Params],
    tasks: Sequence[Task],
    split: Split,
) -> dict[str, float]:
    """Scores an encoder on tasks, each with its own expert's head.

    Tasks share texts, and each text is embedded once.

    Args:
      embed_rows: from `make_embedder`.
      encoder: params of the encoder, merged or not.
      heads: by task name.
      tasks: the tasks to score.
      split: the split to score on.

    Returns:
      By task name, the `optax_moma.demo.tasks.score`.
    """
    rows = np.unique(np.concatenate([task.splits[split].rows for task in tasks]))
    embeddings = embed_rows(encoder, rows)
    scores = {}
    for task in tasks:
        own, targets = task.splits[split]
        outputs = apply_head(heads[task.name], embeddings[np.searchsorted(rows, own)])
        scores[task.name] = score(task, np.asarray(outputs), targets)
    return scores
