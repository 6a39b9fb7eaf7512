"""The training step, laid on a mesh: what a run compiles, and what scale.py compiles for TPUs."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om

from . import model, optimizers

AXES = ("data", "fsdp", "tensor")


class State(NamedTuple):
    """What a step carries on, and a checkpoint holds."""

    params: Any
    opt_state: Any


class Program(NamedTuple):
    """What runs on the devices.

    Attributes:
      mesh: the devices.
      tx: the optimizer.
      abstract: shapes and shardings of a State.
      batch: sharding of the tokens (rows, length + 1) of a step.
      init: key -> State.
      update: (gradient, optimizer's state, params) -> (update, state); the state is donated.
      step: (State, tokens) -> (State, loss, norm of the gradient). The State is donated.
      losses: (params, tokens) -> mean loss of every row.
    """

    mesh: Mesh
    tx: optax.GradientTransformation
    abstract: State
    batch: NamedSharding
    init: Callable[[jax.Array], State]
    update: Callable[..., tuple[Any, Any]]
    step: Callable[..., tuple[State, jax.Array, jax.Array]]
    losses: Callable[..., jax.Array]


def make_mesh(shape: str) -> Mesh:
    """The devices as ``"data,fsdp,tensor"`` says: all with a -1 among them, else the first so many.

    Raises:
      ValueError: there are not three sizes, or the devices cannot be laid out so.
    """
    sizes, devices = [int(n) for n in shape.split(",")], jax.device_count()
    if len(sizes) != len(AXES):
        raise ValueError(f"--mesh takes three sizes (data, fsdp, tensor), not {shape!r}.")
    given = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or given < 1 or given > devices or (-1 in sizes and devices % given):
        raise ValueError(f"--mesh={shape} does not lay out {devices} devices.")
    sizes = [devices // given if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def build(
    sizes: model.Config, tx: optax.GradientTransformation, mesh: Mesh, accumulate: int = 1
) -> Program:
    """Lays a model and its optimizer on a mesh; a step goes through its rows in so many parts."""
    init_params, apply = model.functional(sizes)
    shapes = jax.eval_shape(init_params, jax.random.key(0))
    specs = model.partition_specs(sizes)
    placed = lambda specs: jax.tree.map(  # noqa: E731
        functools.partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, P)
    )
    # Between steps the optimizer's state lies over every device once; a step gathers what it needs.
    shardings = State(
        placed(specs), placed(om.state_partition_specs(tx, shapes, specs, spread_over=mesh))
    )
    at_work = placed(om.state_partition_specs(tx, shapes, specs))
    replicated, batch = NamedSharding(mesh, P()), NamedSharding(mesh, P(model.BATCH_AXES))

    def init(key: jax.Array) -> State:
        params = init_params(key)
        return State(params, tx.init(params))

    def losses(params: Any, tokens: jax.Array) -> jax.Array:
        logits = apply(params, tokens[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(entropy, axis=1)

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        opt_state = jax.lax.with_sharding_constraint(opt_state, at_work)
        updates, opt_state = tx.update(grads, opt_state, params)
        return updates, jax.lax.with_sharding_constraint(opt_state, at_work)

    def gradient(params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        """The mean loss of all rows and its gradient, in the memory of one part's."""
        value_and_grad = jax.value_and_grad(lambda params, part: jnp.mean(losses(params, part)))
        if accumulate == 1:
            return value_and_grad(params, tokens)
        # Every part has rows of every device, so that none has to travel.
        parts = tokens.reshape(-1, accumulate, tokens.shape[-1]).swapaxes(0, 1)
        parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, P(None, *batch.spec)))
        add = lambda total, part: (optax.tree.add(total, value_and_grad(params, part)), None)  # noqa: E731
        total, _ = jax.lax.scan(add, (jnp.zeros(()), optax.tree.zeros_like(params)), parts)
        return optax.tree.scale(1 / accumulate, total)

    def step(state: State, tokens: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        loss, grads = gradient(state.params, tokens)
        updates, opt_state = update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), loss, optax.tree.norm(grads)

    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, jax.random.key(0)),
        shardings,
    )
    return Program(
        mesh,
        tx,
        abstract,
        batch,
        jax.jit(init, out_shardings=shardings),
        jax.jit(update, donate_argnums=1, out_shardings=tuple(shardings)),
        jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, replicated, replicated),
        ),
        jax.jit(losses, in_shardings=(shardings.params, batch), out_shardings=replicated),
    )


@functools.cache
def program_for(
    config: model.Config, optimizer: str, lr: float, steps: int, mesh: str, accumulate: int = 1
) -> Program:
    """A run's program; runs of one process that differ in nothing else compile once."""
    tx = optimizers.make(optimizer, optimizers.schedule(lr, steps))
    return build(config, tx, make_mesh(mesh), accumulate)
