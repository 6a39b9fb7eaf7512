"""What a streamed merge costs, beside a plain copy: time, processor seconds, memory.

    python experiments/streaming/run.py run                      # 1 GB float32 models
    python experiments/streaming/run.py run --dtype bfloat16     # 1 GB bfloat16 models
    python experiments/streaming/run.py plan                     # the plan of 6.7 B models

A plain copy reads the parameters of k experts with Orbax and writes one of them with the same
options; nothing less can be called a merge. Every measurement is a process of its own, so that its
peak memory is its own and its compilations are paid for; interpreter start and imports are not
counted. Each round takes all of them in turn, starting one further on than the round before, and
the ratios of a round are what the median is taken of.
"""

import csv
import json
import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
import typer
from orbax.checkpoint import v1 as ocp
from rich.console import Console
from rich.table import Table

import optax_moma as om
from optax_moma import checkpoints

# The bar for the time, as a multiple of the copy's: methods that only weigh, and those that trim;
# none for one that multiplies matrices.
METHODS: dict[str, tuple[Any, float | None]] = {
    "average": ("average", 1.3),
    "fisher": ("fisher", 1.3),
    "ota": ("ota", 2.0),
    "ties": ("ties", 2.0),
    "curvature_ties": ("curvature_ties", 2.0),
    "moma": ("moma", None),
}
WITHOUT_BASE = ("average", "fisher")
MERGED, COPY, COPY_AND_BASE = "merged", "copy", "copy, base too"
COMPILATION = "/jax/core/compile/backend_compile_duration"
"""JAX's name for the time of a compilation; a process pays for its own."""

RESULTS = Path(__file__).with_name("results.csv")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


def transformer(layers: int, width: int, vocabulary: int) -> dict[str, Any]:
    """Shapes of the parameters of a decoder, 12 * layers * width**2 and an embedding."""
    block = {
        "attention": {"qkv": {"kernel": (width, 3 * width), "bias": (3 * width,)}},
        "attention_out": {"kernel": (width, width), "bias": (width,)},
        "up": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "down": {"kernel": (4 * width, width), "bias": (width,)},
        "norms": {"first": (width,), "second": (width,)},
    }
    model: dict[str, Any] = {f"layers_{i}": block for i in range(layers)}
    return {"embedding": (vocabulary, width), "norm": (width,), **model}


def write_models(folder: Path, shapes: Any, dtype: str, k: int) -> None:
    """A base and k experts with the state of ``moma``, of random numbers; and the recipes."""
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731

    def draw(shape: tuple[int, ...], near: np.ndarray | None = None) -> np.ndarray:
        noise = 0.02 * rng.standard_normal(shape, np.float32)
        return (noise if near is None else near + 0.05 * noise).astype(jnp.dtype(dtype))

    base = jax.tree.map(draw, shapes, is_leaf=is_shape)
    ocp.save(str(folder / "base"), {"params": base})
    for expert in range(k):
        params = jax.tree.map(lambda b: draw(b.shape, b), base)
        state = om.scale_by_moma(rank=8).init(params)
        moments = (jax.tree.map(lambda x: rng.random(x.shape, np.float32), m) for m in state[6:8])
        R, C = moments
        nu = jax.tree.map(lambda x: rng.random(x.shape, np.float32), state.nu)
        state = state._replace(R=R, C=C, nu=nu, count=jnp.int32(1000), nu_weight=jnp.float32(0.6))
        ocp.save(str(folder / f"expert{expert}"), {"params": params, "opt_state": state})
    for name, (method, _) in METHODS.items():
        recipe = {"experts": {f"e{i}": str(folder / f"expert{i}") for i in range(k)}}
        recipe |= {} if name in WITHOUT_BASE else {"base": str(folder / "base")}
        (folder / f"{name}.yaml").write_text(json.dumps({**recipe, "method": method}))


def copy(folder: Path, models: list[str]) -> None:
    """Reads the parameters of models into the host's memory, and writes the last."""
    params = None
    for name in models:
        wanted = dict(ocp.metadata(str(folder / name)).metadata)
        for key, tree in wanted.items():
            place = lambda x: np.empty(x.shape, x.dtype) if key == "params" else ...  # noqa: B023, E731
            wanted[key] = jax.tree.map(place, tree)
        params = ocp.load(str(folder / name), wanted)["params"]
    ocp.save(str(folder / MERGED), params)


def large_transformer(layers: int, width: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """Shapes of a decoder with gated units; 6.7 B numbers with 32, 4096, 11008, 32000."""
    block = {
        "attention": {name: {"kernel": (width, width)} for name in ("q", "k", "v", "out")},
        "mlp": {
            "gate": {"kernel": (width, hidden)},
            "up": {"kernel": (width, hidden)},
            "down": {"kernel": (hidden, width)},
        },
        "norms": {"first": (width,), "second": (width,)},
    }
    model: dict[str, Any] = {f"layers_{i}": block for i in range(layers)}
    embedding, head = (vocabulary, width), {"kernel": (width, vocabulary)}
    return {"embedding": embedding, "norm": (width,), "head": head, **model}


def write_metadata(path: Path, tree: Any) -> None:
    """An Orbax checkpoint of arrays of zeros of any size, of which none is stored.

    It is saved with arrays of a one each, and their shapes are then written over.
    """
    ocp.save(str(path), jax.tree.map(lambda x: np.ones((1,) * len(x.shape), x.dtype), tree))
    folder = f"{path}/state/"
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": folder}})
    store, pending = store.result(), []

    def enlarged(node: Any, shape: list[int]) -> Any:
        if isinstance(node, list):
            return [enlarged(x, shape) for x in node]
        if not isinstance(node, dict):
            return node
        return {
            key: shape if key in ("shape", "chunk_shape") else enlarged(x, shape)
            for key, x in node.items()
        }

    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if leaf.shape:
            name = ".".join(jax.tree_util.keystr((key,), simple=True) for key in keys)
            about = json.loads(store.read(f"{name}/zarr.json").result().value)
            text = json.dumps(enlarged(about, list(leaf.shape)))
            pending.append(store.write(f"{name}/zarr.json", text.encode()))
            pending.append(store.delete_range(ts.KvStore.KeyRange(f"{name}/c/", f"{name}/c0")))
    for write in pending:
        write.result()


@app.command()
def plan(
    method: Annotated[str, typer.Option(help="what is planned")] = "moma",
    layers: int = 32,
    width: int = 4096,
    hidden: int = 11008,
    vocabulary: int = 32000,
    experts: int = 3,
) -> None:
    """How long the plan of large models takes, of which nothing but the metadata exists."""
    shapes = large_transformer(layers, width, hidden, vocabulary)
    abstract = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    params = jax.tree.map(abstract, shapes, is_leaf=lambda x: isinstance(x, tuple))
    state = jax.eval_shape(om.scale_by_moma(rank=32).init, params)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_metadata(folder / "base", {"params": params})
        write_metadata(folder / "expert0", {"params": params, "opt_state": state._asdict()})
        for i in range(1, experts):
            shutil.copytree(folder / "expert0", folder / f"expert{i}")
        recipe = {"experts": {f"e{i}": str(folder / f"expert{i}") for i in range(experts)}}
        recipe |= {"base": str(folder / "base"), "method": method}
        (folder / f"{method}.yaml").write_text(json.dumps(recipe))
        found = own_process("predict", method, folder, 128 << 20, "")
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    arrays = len(jax.tree.leaves((params, state)))
    print(
        f"{size / 1e9:.2f} B bfloat16 parameters, k = {experts}, {arrays} arrays an expert: "
        f"planned in {found['seconds']:.1f} s, {len(found['problems'])} problems, predicted peak "
        f"{found['peak'] / 1e9:.1f} GB; {machine()}"
    )


@app.command(hidden=True)
def measure(what: str, folder: Path, chunk_bytes: int) -> None:
    """Does one thing and prints what it took, as JSON; ``run`` starts this in its own process."""
    experts = sorted(path.name for path in folder.glob("expert*"))
    recipe = folder / f"{what}.yaml"
    compiling: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiling.append(seconds) if event == COMPILATION else None
    )
    start, cpu = time.perf_counter(), processor_seconds()
    if what == COPY:
        copy(folder, experts)
    elif what == COPY_AND_BASE:
        copy(folder, ["base", *experts])
    else:
        checkpoints.merge(recipe, folder / MERGED, chunk_bytes=chunk_bytes)
    seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu
    found = {"seconds": seconds, "cpu": cpu, "compile": sum(compiling), "peak": peak_bytes()}
    print(json.dumps(found))


@app.command(hidden=True)
def predict(what: str, folder: Path, chunk_bytes: int) -> None:
    """Plans, and prints how long that took and the peak memory that the plan predicts."""
    start = time.perf_counter()
    found = checkpoints.plan(folder / f"{what}.yaml", chunk_bytes=chunk_bytes)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": found.peak_bytes, "problems": found.problems}))


def processor_seconds() -> float:
    """What all threads of this process have used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most memory this process had: not getrusage's, which starts with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text())
    return 1024 * int(found[1]) if found else 0


def own_process(
    command: str, what: str, folder: Path, chunk_bytes: int, launcher: str
) -> dict[str, Any]:
    """What a command of this file prints when it is run by itself."""
    python = [*shlex.split(launcher), sys.executable, __file__]
    arguments = [*python, command, what, str(folder), str(chunk_bytes)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder / MERGED, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """What the times were measured on."""
    device = jax.devices()[0]
    return f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}"


@app.command()
def run(
    dtype: Annotated[str, typer.Option(help="of the parameters")] = "float32",
    layers: Annotated[int | None, typer.Option(help="default: 16, or 36 in bfloat16")] = None,
    width: int = 1024,
    vocabulary: int = 50257,
    experts: int = 3,
    rounds: int = 5,
    chunk_mib: int = 128,
    method: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    doubled: Annotated[bool, typer.Option(help="also with half as many layers")] = True,
    folder: Annotated[Path | None, typer.Option(help="where there is room: 5 GB")] = None,
    launcher: Annotated[str, typer.Option(help="such as 'taskset -c 0,1'")] = "",
    output: Path = RESULTS,
) -> None:
    """Time, processor seconds and memory of each method, beside a plain copy."""
    layers = layers or (16 if dtype == "float32" else 36)
    names = list(method or METHODS)
    chunk_bytes = chunk_mib << 20
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        rows = []
        for count in (layers // 2, layers) if doubled else (layers,):
            models = place / f"{count}"
            models.mkdir()
            write_models(models, transformer(count, width, vocabulary), dtype, experts)
            rows += measured(models, names, rounds if count == layers else 1, chunk_bytes, launcher)
            for row in rows:
                row.setdefault("layers", count)
            shutil.rmtree(models)
    size = vocabulary * width + width + layers * (12 * width**2 + 11 * width)
    label = f"{size / 1e6:.0f} M {dtype}, k = {experts}"
    show(rows, layers, label)
    rows = [{"model": label, **row, "machine": machine()} for row in rows]
    kept = []
    if output.exists():
        with output.open() as file:
            kept = [row for row in csv.DictReader(file) if row["model"] != label]
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def measured(
    folder: Path, names: list[str], rounds: int, chunk_bytes: int, launcher: str
) -> list[dict[str, Any]]:
    """One row per method: medians over the rounds."""
    everything = [COPY, COPY_AND_BASE, *names]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in everything}
    for i in range(rounds):
        turn = i % len(everything)
        for name in everything[turn:] + everything[:turn]:
            found[name].append(own_process("measure", name, folder, chunk_bytes, launcher))
    rows = []
    for name in everything:
        row: dict[str, Any] = {"method": name}
        for unit in ("seconds", "cpu"):
            values = [run[unit] for run in found[name]]
            row[unit] = f"{statistics.median(values):.3f}"
            for suffix, copied in (("", COPY), ("_with_base", COPY_AND_BASE)):
                ratios = [a / b[unit] for a, b in zip(values, found[copied], strict=True)]
                row[f"{unit}_ratio{suffix}"] = f"{statistics.median(ratios):.3f}"
        compiling = statistics.median(run["compile"] for run in found[name])
        row["compile_seconds"] = f"{compiling:.2f}"
        row["peak_mb"] = f"{max(run['peak'] for run in found[name]) / 1e6:.0f}"
        plan = (
            own_process("predict", name, folder, chunk_bytes, launcher) if name in names else None
        )
        row["predicted_mb"] = f"{plan['peak'] / 1e6:.0f}" if plan else ""
        row["plan_seconds"] = f"{plan['seconds']:.2f}" if plan else ""
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], layers: int, label: str) -> None:
    """Prints the rows as tables."""
    console = Console()
    half = {row["method"]: row for row in rows if row["layers"] != layers}
    table = Table(title=f"{label}: a merge, and a copy of the experts (of the base too)")
    columns = ("", "s", "of these compiling", "x copy", "bar", "CPU s", "x copy", "peak MB",
               "predicted", "half")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in (row for row in rows if row["layers"] == layers):
        name = row["method"]
        table.add_row(
            name,
            f"{float(row['seconds']):.2f}",
            row["compile_seconds"],
            f"{float(row['seconds_ratio']):.2f} ({float(row['seconds_ratio_with_base']):.2f})",
            f"{METHODS[name][1] or ''}" if name in METHODS else "",
            f"{float(row['cpu']):.2f}",
            f"{float(row['cpu_ratio']):.2f} ({float(row['cpu_ratio_with_base']):.2f})",
            row["peak_mb"],
            row["predicted_mb"],
            half[name]["peak_mb"] if name in half else "",
        )
    console.print(table)
    console.print(f"half: peak MB with half as many layers; {machine()}, jax {jax.__version__}")


if __name__ == "__main__":
    app()
