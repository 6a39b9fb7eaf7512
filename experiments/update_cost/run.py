"""What one update costs, beside AdamW's: bytes of state, live buffers, time.

    python experiments/update_cost/run.py            # all three tables; writes results.csv

Bytes and buffers come from shapes and from the compiled program, so they are the same everywhere.
Times are ratios measured side by side: every optimizer takes one step in turn, and the ratio of
each round's times is what the median is taken of.
"""

import csv
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table

import optax_moma as om

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RESULTS = Path(__file__).with_name("results.csv")
Shapes = dict[str, tuple[int, ...]]

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "adafactor + momentum": lambda: optax.adafactor(1e-3, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-3),
    "galore r=32": lambda: optax.contrib.galore(1e-3, rank=32),
    "moma r=8": lambda: om.moma(1e-3, rank=8, weight_decay=1e-4),
    "moma r=32": lambda: om.moma(1e-3, rank=32, weight_decay=1e-4),
    "moma r=32, clipped": lambda: om.moma(
        1e-3, rank=32, weight_decay=1e-4, orthogonal_block_size=None
    ),
    "moma r=128": lambda: om.moma(1e-3, rank=128, weight_decay=1e-4),
    "moma r=32 bfloat16": lambda: om.moma(1e-3, mu_dtype="bfloat16"),
    "umtam r=32": lambda: om.umtam(1e-3, rank=32),
}
TIMED = ("adamw", "adafactor", "moma r=8", "moma r=32", "moma r=32, clipped", "moma r=128")


def matrix(m: int, n: int) -> Shapes:
    """A single matrix."""
    return {"kernel": (m, n)}


def bert_base() -> Shapes:
    """BERT-base: 109.5 M parameters."""
    shapes: Shapes = {"words": (30522, 768), "positions": (512, 768), "types": (2, 768)}
    shapes |= {"norm/scale": (768,), "norm/bias": (768,), "pooler": (768, 768), "pooler_b": (768,)}
    for layer in range(12):
        shapes |= {f"{layer}/{name}": (768, 768) for name in ("query", "key", "value", "out")}
        shapes |= {f"{layer}/up": (768, 3072), f"{layer}/down": (3072, 768)}
        vectors = ("query_b", "key_b", "value_b", "out_b", "down_b", "s1", "b1", "s2", "b2")
        shapes |= {f"{layer}/{name}": (768,) for name in vectors} | {f"{layer}/up_b": (3072,)}
    return shapes


def gpt2() -> Shapes:
    """GPT-2 small with a tied head: 124.4 M parameters."""
    shapes: Shapes = {"tokens": (50257, 768), "positions": (1024, 768), "s": (768,), "b": (768,)}
    for layer in range(12):
        shapes |= {f"{layer}/qkv": (768, 2304), f"{layer}/out": (768, 768)}
        shapes |= {f"{layer}/up": (768, 3072), f"{layer}/down": (3072, 768)}
        shapes |= {f"{layer}/qkv_b": (2304,), f"{layer}/up_b": (3072,)}
        shapes |= {
            f"{layer}/{name}": (768,) for name in ("out_b", "down_b", "s1", "b1", "s2", "b2")
        }
    return shapes


MODELS: dict[str, Shapes] = {
    "768 x 768": matrix(768, 768),
    "768 x 3072": matrix(768, 3072),
    "4096 x 4096": matrix(4096, 4096),
    "4096 x 11008": matrix(4096, 11008),
    "BERT-base": bert_base(),
    "GPT-2": gpt2(),
}


def abstract(shapes: Shapes) -> Any:
    """float32 parameters of these shapes, without values."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def state_bytes() -> dict[tuple[str, str], int]:
    """Bytes of state of every optimizer on every model."""
    return {
        (name, model): om.state_size(make(), abstract(shapes)).total_bytes
        for name, make in OPTIMIZERS.items()
        for model, shapes in MODELS.items()
    }


def live_buffers(size: int) -> dict[str, tuple[float, float, float]]:
    """Arguments, results and temporaries of a compiled update, in size x size arrays."""
    params = abstract(matrix(size, size))
    unit = 4 * size * size
    result = {}
    for name in ("adamw", "moma r=32"):
        tx = OPTIMIZERS[name]()
        state = jax.eval_shape(tx.init, params)
        memory = jax.jit(tx.update).lower(params, state, params).compile().memory_analysis()
        sizes = (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
        )
        result[name] = tuple(x / unit for x in sizes)
    return result


def interleaved(
    shape: tuple[int, int], rounds: int, donate: bool
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of one jitted update, and the median ratio to AdamW's of each round."""
    keys = jax.random.split(jax.random.key(0))
    params, grads = ({"kernel": jax.random.normal(key, shape)} for key in keys)
    steps, states = {}, {}
    for name in TIMED:
        tx = OPTIMIZERS[name]()
        steps[name] = jax.jit(tx.update, donate_argnums=(1,) if donate else ())
        states[name] = tx.init(params)
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for i in range(rounds + 3):
        for name in TIMED:
            start = time.perf_counter()
            out = steps[name](grads, states[name], params)
            _, states[name] = jax.block_until_ready(out)
            if i >= 3:  # the first rounds compile and warm up
                times[name].append(time.perf_counter() - start)
    reference = np.array(times["adamw"])
    return {
        name: (1e3 * float(np.median(t)), float(np.median(np.array(t) / reference)))
        for name, t in times.items()
    }


def machine() -> str:
    """What the times were measured on."""
    device = jax.devices()[0]
    return f"{device.platform} {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}"


@app.command(help=__doc__)
def main(
    rounds: int = 20,
    shape: tuple[int, int] = (768, 3072),
    size: Annotated[int, typer.Option(help="side of the matrix for buffers")] = 4096,
    output: Path = RESULTS,
) -> None:
    """Prints the three tables and writes them as one CSV file."""
    console, lines = Console(), []

    sizes = state_bytes()
    table = Table("optimizer", *MODELS, title="State, % of AdamW's bytes, float32")
    for name in OPTIMIZERS:
        shares = [100 * sizes[name, model] / sizes["adamw", model] for model in MODELS]
        table.add_row(name, *(f"{share:.1f}" for share in shares))
        lines += [
            ("state_bytes", name, model, sizes[name, model], share)
            for model, share in zip(MODELS, shares, strict=True)
        ]
    console.print(table)

    label = f"{size} x {size}"
    table = Table("update", "in", "out", "temporary", "sum", title=f"Live arrays of {label}")
    for name, parts in live_buffers(size).items():
        table.add_row(name, *(f"{x:.2f}" for x in (*parts, sum(parts))))
        lines.append(("live_buffers", name, label, f"{sum(parts):.3f}", f"{parts[-1]:.3f}"))
    console.print(table)

    label = f"{shape[0]} x {shape[1]}"
    for donate in (True, False):
        kind = "state donated" if donate else "nothing donated"
        table = Table("update", "ms", "x AdamW", title=f"Time of one update, {label}, {kind}")
        for name, (ms, ratio) in interleaved(shape, rounds, donate).items():
            table.add_row(name, f"{ms:.2f}", f"{ratio:.2f}")
            lines.append((f"time, {kind}", name, label, f"{ms:.3f}", f"{ratio:.3f}"))
        console.print(table)
    console.print(f"medians of {rounds} interleaved rounds on {machine()}, jax {jax.__version__}")

    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("what", "optimizer", "shape", "value", "relative", "machine"))
        writer.writerows((*line, machine()) for line in lines)


if __name__ == "__main__":
    app()
