"""What a training step needs on TPUs that are not there: compiled for them, never run.

    pip install "jax[tpu]"                              # the compiler, on any x86-64 machine
    python -m experiments.pretrain.scale                # prints the table, writes results/scale.csv
    python -m experiments.pretrain.scale --only gpt2    # the 124 M model alone
    python -m experiments.pretrain.scale --state        # what chips hold, without compiling

Every number comes from the compiled program of one chip: the state it holds, its temporaries, and
the bytes of its collectives, those of a loop times the loop's length. ``step`` is the whole
training step, ``update`` the optimizer alone. Flops: XLA's count, a loop's body taken once.
Compiled for, not measured on: there is no time here.
"""

import argparse
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Both must stand before jax starts: this machine has no TPU to ask.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh
from rich.console import Console
from rich.table import Table

from experiments.records import replace

from . import model, optimizers
from .program import AXES, Program, build

RESULTS = Path(__file__).parent / "results" / "scale.csv"
LARGE = model.Config(
    vocabulary=50304,
    width=4096,
    layers=40,
    heads=32,
    length=2048,
    dtype="bfloat16",
    scan=True,
    remat=True,
)
"""8.3 billion parameters."""
GPT2 = model.gpt2(dtype="bfloat16", scan=True, remat=True)


class Plan(NamedTuple):
    """A model on a slice of TPUs.

    Attributes:
      name: of the model.
      config: its sizes.
      slice: topology, as Google names it.
      mesh: chips along data, fsdp and tensor.
      rows: sequences of a step, over all chips.
    """

    name: str
    config: model.Config
    slice: str
    mesh: tuple[int, int, int]
    rows: int


PLANS = (
    Plan("gpt2", GPT2, "v5e:2x4", (1, 4, 2), 64),
    Plan("8b", LARGE, "v5e:16x16", (1, 32, 8), 256),
    Plan("8b", LARGE, "v6e:16x16", (1, 32, 8), 256),
)
OPTIMIZERS = ("adamw", "moma:rank=32")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KEY = ("model", "slice", "mesh", "optimizer", "what")

ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "f64": 8}
"""Bytes of an element, where they are not four."""


class Instruction(NamedTuple):
    """A line of a compiled program.

    Attributes:
      kind: the operation's name.
      arrays: bytes of each array it makes.
      operands: names of what it reads.
      line: all of it.
    """

    kind: str
    arrays: list[int]
    operands: list[str]
    line: str


def instructions(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The entry computation's name, and by computation its instructions by name."""
    entry, current, found = "", "", defaultdict(dict)
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = head[2]
            entry = current if head[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line):
            name, shapes, kind, rest = match.groups()
            arrays = [
                ITEM.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n], initial=1))
                for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
            ]
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            found[current][name] = Instruction(kind, arrays, operands, line)
    return entry, found


def collectives(text: str) -> list[tuple[str, int, int]]:
    """(kind, bytes, times) of every collective that a compiled program runs.

    Bytes are those of the larger side, what goes in or what comes out: the gathered array of an
    all-gather, the array before a reduce-scatter. The pieces that a collective is cut into, to run
    beside other work, share a channel and count once. A loop runs as often as the constant says
    that its counter is compared with.
    """
    entry, computations = instructions(text)
    found: dict[str, tuple[str, int, int]] = {}

    def walk(name: str, times: int) -> None:
        own = computations[name]
        for key, (kind, arrays, operands, line) in own.items():
            plain = kind.removesuffix("-start")
            called = re.findall(r"\b(?:body|calls|to_apply)=%?([\w.-]+)", line)
            if plain in KINDS:
                inside = sum(sum(own[operand].arrays) for operand in operands)
                # The result of a -start holds its operand as well.
                made = sum(arrays) - (inside if kind != plain else 0)
                scatters = plain == "all-reduce" and name.startswith("all-reduce-scatter")
                channel = re.search(r"channel_id=\d+", line)
                place = channel[0] if channel else f"{name} {key}"
                before = found.get(place, ("", 0, 0))
                found[place] = (
                    "reduce-scatter" if scatters else plain,
                    max(before[1], made, inside),
                    max(before[2], times),
                )
            elif kind == "while":
                condition = re.search(r"condition=%?([\w.-]+)", line)
                lines = [i.line for i in computations[condition[1] if condition else ""].values()]
                bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
                trips = max(map(int, bounds), default=1)
                for body in called:
                    walk(body, times * trips)
            else:
                for computation in called:
                    if computation in computations:
                        walk(computation, times)

    walk(entry, 1)
    return list(found.values())


def per_chip(tree: Any) -> int:
    """Bytes of a tree of sharded shapes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def lay_out(plan: Plan, optimizer: str) -> Program:
    """The plan's program, on chips that exist only by name."""
    topology = topologies.get_topology_desc(plan.slice, platform="tpu")
    # A slice of 16 x 16 chips holds a mesh of 32 x 8 only if one of its sides is cut in two.
    devices = mesh_utils.create_device_mesh(
        plan.mesh, list(topology.devices), allow_split_physical_axes=True
    )
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return build(plan.config, optimizers.make(optimizer, 1e-3), mesh)


def measure(
    plan: Plan, optimizer: str, what: Iterable[str] = ("step", "update")
) -> Iterator[dict[str, Any]]:
    """Compiles the step and the update; one row for each."""
    program = lay_out(plan, optimizer)
    params, opt_state = program.abstract
    tokens = jax.ShapeDtypeStruct(
        (plan.rows, plan.config.length + 1), jnp.int32, sharding=program.batch
    )
    compilable = {
        "step": (program.step, (program.abstract, tokens)),
        "update": (program.update, (params, opt_state, params)),
    }
    for part in what:
        function, arguments = compilable[part]
        started = time.monotonic()
        with jax.set_mesh(program.mesh):
            compiled = function.lower(*arguments).compile()
        seconds = time.monotonic() - started
        by_kind: Counter[str] = Counter()
        largest = 0
        for kind, size, times in collectives(compiled.as_text()):
            by_kind[kind] += size * times
            largest = max(largest, size)
        yield {
            "model": plan.name,
            "params": sum(x.size for x in jax.tree.leaves(params)),
            "slice": plan.slice,
            "mesh": "x".join(map(str, plan.mesh)),
            "tokens": plan.rows * plan.config.length,
            "optimizer": optimizer,
            "what": part,
            "state_bytes": per_chip(opt_state),
            "param_bytes": per_chip(params),
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "flops": compiled.cost_analysis()["flops"],
            **{kind: by_kind[kind] for kind in KINDS},
            "collective_bytes": by_kind.total(),
            "largest_collective": largest,
            "compile_seconds": round(seconds, 1),
        }


def holdings(plan: Plan, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Bytes that one chip holds from step to step, by optimizer: its state, the parameters."""
    mesh = AbstractMesh(plan.mesh, AXES)
    programs = {name: build(plan.config, optimizers.make(name, 1e-3), mesh) for name in names}
    return {
        name: (per_chip(program.abstract.opt_state), per_chip(program.abstract.params))
        for name, program in programs.items()
    }


def print_holdings(names: Sequence[str], only: str | None) -> None:
    """The table of --state: from shapes and shardings alone."""
    title = "Held by one chip from step to step, MiB: from shapes and shardings"
    table = Table("model", "slice", "mesh", "optimizer", "params", "state", "% of AdamW's")
    table.title = title
    for plan in PLANS:
        if only in (None, plan.name):
            held = holdings(plan, dict.fromkeys(("adamw", *names)))
            for name, (state, params) in held.items():
                share = 100 * state / held["adamw"][0]
                mesh = "x".join(map(str, plan.mesh))
                sizes = (f"{params / 2**20:.2f}", f"{state / 2**20:.3f}", f"{share:.2f}")
                table.add_row(plan.name, plan.slice, mesh, name, *sizes)
    Console().print(table)


def main() -> None:
    """Prints the table, and writes it row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[plan.name for plan in PLANS], default=None)
    parser.add_argument("--slice", choices=[plan.slice for plan in PLANS], default=None)
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS)
    parser.add_argument("--state", action="store_true", help="bytes held by a chip; no compiler")
    parser.add_argument("--what", nargs="+", choices=("step", "update"), default=("step", "update"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.state:
        print_holdings(args.optimizers, args.only)
        return
    table = Table(
        "model", "slice", "optimizer", "what", "state", "parameters", "temporary", "collectives",
        "largest", "TFLOP", title="Per chip, MiB; compiled for TPUs, not measured on them",
    )  # fmt: skip
    for plan in PLANS:
        if args.only not in (None, plan.name) or args.slice not in (None, plan.slice):
            continue
        for optimizer in args.optimizers:
            for row in measure(plan, optimizer, args.what):
                replace(args.output, KEY, row)
                sizes = ("state_bytes", "param_bytes", "temporary_bytes", "collective_bytes")
                table.add_row(
                    *(row[name] for name in ("model", "slice", "optimizer", "what")),
                    *(f"{row[n] / 2**20:.1f}" for n in (*sizes, "largest_collective")),
                    f"{row['flops'] / 1e12:.2f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
