"""What a method asks of its inputs, and the protocol of the steps it is chained from."""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import numpy as np

from optax_moma.merging._leaf import TaskVectors


class Contract(NamedTuple):
    """What a step, or a chain of steps, asks of the inputs of a merge.

    Attributes:
      base: Whether a base is required.
      curvature: Whether every expert needs a curvature.
      axes: Which leaves' curvature is read, as the ``axes`` of ``tsv_m`` say it, or None: of all.
      gram: Whether the curvature of a matrix is the Gram (fan-in, fan-in) of its inputs, instead of
        an estimate for each entry; leaves may then go without.
      key: Whether a random key is required.
      nonnegative_weights: Whether weights below zero make no sense.
      min_experts: The fewest experts it can merge.
      max_experts: The most experts it can merge, or None.
      combines: Whether it turns k task vectors into one.
      whole: Whether the last bits depend on how a leaf is spread over devices, as those of products
        and decompositions of matrices do: then a sharded leaf is merged on one device.
      passes: How many passes over all leaves it needs before the merge itself.
    """

    base: bool = False
    curvature: bool = False
    axes: str | None = None
    gram: bool = False
    key: bool = False
    nonnegative_weights: bool = False
    min_experts: int = 1
    max_experts: int | None = None
    combines: bool = False
    whole: bool = False
    passes: int = 0

    def union(self, other: "Contract") -> "Contract":
        """Returns what is asked by two steps together."""
        limits = [m for m in (self.max_experts, other.max_experts) if m is not None]
        read = {contract.axes for contract in (self, other) if contract.curvature}
        return Contract(
            base=self.base or other.base,
            curvature=self.curvature or other.curvature,
            axes=read.pop() if len(read) == 1 else None,
            gram=self.gram or other.gram,
            key=self.key or other.key,
            nonnegative_weights=self.nonnegative_weights or other.nonnegative_weights,
            min_experts=max(self.min_experts, other.min_experts),
            max_experts=min(limits, default=None),
            combines=self.combines or other.combines,
            whole=self.whole or other.whole,
            passes=self.passes + other.passes,
        )


class Step(Protocol):
    """A step of a merge: a pytree that maps the record of a leaf to a record of that leaf.

    A step of your own is a class under ``merge_step``: its numbers are fields, its switches static
    fields. It sees one leaf at a time and is traced, so it must not depend on values in Python.
    """

    @property
    def contract(self) -> Contract:
        """What the step asks of the inputs."""
        ...

    def __call__(self, leaf: TaskVectors) -> TaskVectors:
        """Maps the record of one leaf."""
        ...


class SummaryStep(Step, Protocol):
    """A step that must see all leaves before it can map one; ``contract.passes`` says how often."""

    def count(self, leaf: TaskVectors) -> Any:
        """Returns what one leaf adds to the summary: arrays of the same shapes for all."""
        ...

    def refine(self, counts: Any) -> "SummaryStep":
        """Returns the step that has learned from the sum over all leaves: one pass fewer to go."""
        ...


T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def merge_step(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree, as steps of merges are.

    Use this, not ``jax.tree_util.register_dataclass``: to JAX (0.10 at least) the classes that it
    registers are equal in a PyTreeDef when their fields are, and ``jax.jit`` then returns, now and
    then, what it has compiled for another class.

    Args:
      cls: A class with annotated fields. They are children in the pytree, numbers or other steps,
        but for those of ``dataclasses.field(metadata={"static": True})``, which are hashable and
        recompile.

    Returns:
      The class.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_moma.merging import Contract, chain, mean, merge, merge_step
      >>> @merge_step
      ... class Clip:
      ...     limit: float
      ...     contract = Contract(base=True)
      ...     def __call__(self, leaf):
      ...         return leaf._replace(delta=jnp.clip(leaf.delta, -self.limit, self.limit))
      >>> experts, base = [{"w": jnp.array([3., -1.])}], {"w": jnp.zeros(2)}
      >>> merge(chain(Clip(2.0), mean()), experts, base=base)["w"]
      Array([ 2., -1.], dtype=float32)
    """
    made: Any = dataclass(frozen=True)(cls)
    static = [f.name for f in fields(made) if f.metadata.get("static", False)]
    data = [f.name for f in fields(made) if f.name not in static]

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(x, name) for name in data], tuple(getattr(x, name) for name in static)

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, switches = flatten(x)
        keys = map(jax.tree_util.GetAttrKey, data)
        return list(zip(keys, children, strict=True)), switches

    def unflatten(switches: tuple[Any, ...], children: Any) -> Any:
        values = zip([*data, *static], [*children, *switches], strict=True)
        return made(**dict(values))

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def check_number(
    name: str, value: Any, low: float = float("-inf"), high: float = float("inf")
) -> None:
    """Raises if a number given in Python is out of range; arrays and tracers are let pass."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not hasattr(value, "__float__") or np.ndim(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not low <= float(value) <= high or abs(float(value)) == float("inf"):
        span = f"from {low:g} to {high:g}" if high < float("inf") else f"at least {low:g}"
        raise ValueError(
            f"{name} must be {span if low > float('-inf') else 'finite'}, got {value}."
        )
