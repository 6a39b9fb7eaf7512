"""What the metric costs: the time of one training step of each layer, and its parameters.

    python experiments/moe_cost/run.py        # prints the table and writes results.csv

Each layer stands in for the FFN of a transformer, with E routed experts; a step is the loss of
random targets, its gradient and an Adam update. Layers take turns, so that other work on the
machine meets them alike; the shortest time of each counts.
"""

import argparse
import csv
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from optax_moma.moe import MergedMLP, SparseMLP

LAYERS = {
    "soft merging": {"method": "soft"},
    "domain": {"method": "domain"},
    "ties": {"method": "ties"},
    "domain, metric of rank 1": {"method": "domain", "rank": 1},
    "domain, metric of rank 4": {"method": "domain", "rank": 4},
    "domain, metric of rank 8": {"method": "domain", "rank": 8},
    "sparse, top 2": None,
}


def layer(merge: dict | None, width: int, hidden: int, experts: int, segment: int) -> nnx.Module:
    """One of the layers above."""
    sizes, rngs = (width, hidden, experts), nnx.Rngs(0)
    if merge is None:
        return SparseMLP(*sizes, k=2, rngs=rngs)
    return MergedMLP(*sizes, segment=segment, rngs=rngs, **merge)


def parameters(module: nnx.Module) -> int:
    """How many numbers are learned."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def train_step(module: nnx.Module, x: jax.Array, y: jax.Array):
    """A compiled step, and what it steps from."""
    graph, params = nnx.split(module)
    tx = optax.adam(1e-3)

    def loss(params: nnx.State) -> jax.Array:
        out, routing = nnx.merge(graph, params)(x)
        return jnp.mean((out - y) ** 2) + 1e-2 * routing.loss

    @jax.jit
    def step(params: nnx.State, state: optax.OptState) -> tuple[nnx.State, optax.OptState]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, tx.init(params))


def main() -> None:
    """Prints the table and writes it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.csv"))
    args = parser.parse_args()
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (2, args.batch, args.length, args.width))

    steps, counts = {}, {}
    for name, merge in LAYERS.items():
        module = layer(merge, args.width, args.hidden, args.experts, args.segment)
        counts[name] = parameters(module)
        step, start = train_step(module, x, y)
        steps[name] = step, jax.block_until_ready(step(*start))
    times = dict.fromkeys(steps, float("inf"))
    for _ in range(args.rounds):
        for name, (step, carry) in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(*carry))
            times[name] = min(times[name], time.perf_counter() - begin)

    table = Table("layer", "parameters", "step, ms", "of soft merging")
    lines = []
    for name, seconds in times.items():
        ratio = seconds / times["soft merging"]
        lines.append((name, counts[name], f"{1e3 * seconds:.1f}", f"{ratio:.2f}"))
        table.add_row(name, f"{counts[name]:,}", *lines[-1][2:])
    console = Console()
    console.print(table)
    console.print(
        f"{args.width} x {args.hidden}, {args.experts} experts, {args.batch} x {args.length} tokens"
        f" in segments of {args.segment}, on {jax.devices()[0].device_kind}"
    )
    with args.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("layer", "parameters", "milliseconds", "relative"))
        writer.writerows(lines)


if __name__ == "__main__":
    main()
