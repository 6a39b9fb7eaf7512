"""Processor seconds of TIES: mergekit's command beside ours, on the same tensors.

    python experiments/mergekit_comparison/run.py --mergekit PYTHON    # 0.5 B bfloat16, k = 3

PYTHON is the interpreter of an environment in which mergekit is installed. The models have the
tensors of Qwen2-0.5B with random numbers, as one safetensors file each, and for us as Orbax
checkpoints too. Both merge by the same recipe (density 0.3, weights 1, divided by the weights that
agree) and write bfloat16. Every merge is the command that a user starts, in a process of its own:
interpreter, imports and compilation count. Processor seconds are those of the process and all that
it waited for, user and system.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table
from safetensors.flax import load_file, save_file

RESULTS = Path(__file__).with_name("results.csv")
BASE, EXPERTS = "base", ("one", "two", "three")
DENSITY = 0.3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def qwen2(layers: int, width: int, hidden: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of Qwen2, with a head tied to the embedding."""
    keys = width // 7
    block = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (hidden, width),
        "mlp.up_proj.weight": (hidden, width),
        "mlp.down_proj.weight": (width, hidden),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    shapes |= {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in block.items()}
    return {**shapes, "model.norm.weight": (width,)}


def write_models(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A base and experts near it, as safetensors and as Orbax checkpoints."""

    def draws(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes.items()}

    for seed, name in enumerate((BASE, *EXPERTS)):
        model = draws(0)
        if name != BASE:
            for key, change in draws(seed).items():
                model[key] += 0.1 * change
        rounded = {key: jnp.asarray(x, jnp.bfloat16) for key, x in model.items()}
        save_file(rounded, folder / f"{name}.safetensors")
        ocp.save(folder / name, rounded)


def our_recipe(folder: Path, suffix: str) -> Path:
    """The merge by mergekit's convention, for ``optax-moma``."""
    path = folder / f"ours{suffix}.yaml"
    recipe = {
        "base": f"{BASE}{suffix}",
        "experts": {name: f"{name}{suffix}" for name in EXPERTS},
        "method": {"name": "mergekit.ties", "density": DENSITY},
    }
    path.write_text(json.dumps(recipe))
    return path


def mergekit_recipe(folder: Path) -> Path:
    """The same for ``mergekit-pytorch``."""
    path = folder / "mergekit.yaml"
    parameters = {"weight": 1.0, "density": DENSITY}
    recipe = {
        "merge_method": "ties",
        "base_model": str(folder / f"{BASE}.safetensors"),
        "models": [
            {"model": str(folder / f"{name}.safetensors"), "parameters": parameters}
            for name in EXPERTS
        ],
        "dtype": "bfloat16",
    }
    path.write_text(json.dumps(recipe))
    return path


class Cost(NamedTuple):
    """What a command took, in seconds of processors and of the clock."""

    cpu: float
    wall: float


def cost(command: list[str]) -> Cost:
    """Runs a command.

    Raises:
      RuntimeError: with what it printed, if it fails.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{command} failed:\n{said.read().decode(errors='replace')}")
    return Cost(used.ru_utime + used.ru_stime, wall)


def commands(folder: Path, mergekit: Path | None) -> dict[str, list[str]]:
    """The commands to compare."""
    ours = [sys.executable, "-c", "from optax_moma.cli import app; app()", "merge", "--force"]
    found = {
        "ours, safetensors": [
            *ours,
            str(our_recipe(folder, ".safetensors")),
            str(folder / "ours.safetensors"),
        ],
        "ours, Orbax": [*ours, str(our_recipe(folder, "")), str(folder / "ours")],
    }
    if mergekit is not None:
        theirs = str(mergekit.with_name("mergekit-pytorch"))
        found["mergekit"] = [theirs, str(mergekit_recipe(folder)), str(folder / "theirs")]
    return found


def equal_share(folder: Path) -> float:
    """The share of entries that both merged to the same number."""
    ours = load_file(folder / "ours.safetensors")
    (written,) = (folder / "theirs").glob("*.safetensors")
    theirs = load_file(written)
    if ours.keys() != theirs.keys():
        raise ValueError("The two merges have other tensors.")
    same = sum(int(jnp.sum(x == theirs[name])) for name, x in ours.items())
    return same / sum(x.size for x in ours.values())


@app.command()
def run(
    mergekit: Annotated[Path | None, typer.Option(help="an interpreter that has mergekit")] = None,
    layers: int = 24,
    width: int = 896,
    hidden: int = 4864,
    vocabulary: int = 151936,
    rounds: Annotated[int, typer.Option(help="of ours; mergekit runs once")] = 3,
    folder: Annotated[Path | None, typer.Option(help="where there is room: 12 GB")] = None,
    output: Path = RESULTS,
) -> None:
    """Processor seconds of each command, and how many times ours mergekit takes."""
    shapes = qwen2(layers, width, hidden, vocabulary)
    millions = sum(int(np.prod(s)) for s in shapes.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        write_models(place, shapes)
        found: dict[str, list[Cost]] = {}
        for name, command in commands(place, mergekit).items():
            found[name] = [cost(command) for _ in range(1 if name == "mergekit" else rounds)]
        if mergekit is not None:
            print(f"entries merged to the same number: {100 * equal_share(place):.1f} %")
    device = f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}"
    where = f"{device}, {os.cpu_count()} cores, {platform.machine()}"
    table = Table(title=f"TIES of {millions:.0f} M bfloat16 parameters, k = {len(EXPERTS)}")
    for column in ("", "CPU s", "wall s", "mergekit / ours"):
        table.add_column(column, justify="right" if column else "left")
    rows = []
    for name, costs in found.items():
        middle = Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))
        times = f"{found['mergekit'][0].cpu / middle.cpu:.1f}" if mergekit is not None else ""
        values = (f"{middle.cpu:.1f}", f"{middle.wall:.1f}", times)
        table.add_row(name, *values)
        rows.append((name, f"{millions:.0f}", *values, where))
    Console().print(table)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "millions", "cpu_s", "wall_s", "ratio", "machine"))
        writer.writerows(rows)


if __name__ == "__main__":
    app()
