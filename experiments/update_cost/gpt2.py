"""What GPT-2 124M costs to train with `moma`, beside AdamW and the published algorithm.

    python -m experiments.update_cost.gpt2 memory     # temporaries of the compiled update
    python -m experiments.update_cost.gpt2 published  # one update against `umtam`, by shape
    python -m experiments.update_cost.gpt2 step       # a whole training step against AdamW's
    python -m experiments.update_cost.gpt2 step --rows 8 --dtype bfloat16 --rounds 40   # on a GPU

Rows go to gpt2.csv as they come; a new measurement replaces the old of the same machine. Times are
taken side by side, the optimizers in turn, and say something only on a machine that does nothing
else meanwhile.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table

from experiments.pretrain import model, optimizers
from experiments.pretrain.program import build, make_mesh
from experiments.records import machine, replace
from experiments.update_cost.run import OPTIMIZERS, abstract, gpt2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RESULTS = Path(__file__).with_name("gpt2.csv")
KEY = ("what", "case", "optimizer", "machine")
SHAPES = {(768, 768): 12, (768, 2304): 12, (768, 3072): 12, (3072, 768): 12, (1024, 768): 1}
SHAPES |= {(50257, 768): 1}
"""How often each matrix occurs in GPT-2."""
MEASURED = ("moma r=32", "moma r=32, clipped")
STEPS = {
    "adamw": "adamw",
    "moma r=32": "moma:rank=32",
    "moma r=32, blocks of 64": "moma:rank=32,orthogonal_block_size=64",
    "moma r=32, clipped": "moma_clipped:rank=32",
}
"""The optimizers of a training step, as ``pretrain.optimizers`` takes them; the first is the
reference.
"""


class Row(NamedTuple):
    """One measurement; ``of_reference`` is its ratio to what it is compared with."""

    what: str
    case: str
    optimizer: str
    value: float
    unit: str
    of_reference: float
    detail: str


def memory() -> Iterator[Row]:
    """Temporaries of the update, alone and with ``apply_updates``, in bytes of the parameters."""
    params = abstract(gpt2())
    total = sum(4 * x.size for x in jax.tree.leaves(params))

    def applied(tx: optax.GradientTransformation) -> Callable:
        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return update

    cases = {
        "update, nothing donated": (lambda tx: tx.update, ()),
        "update, state donated": (lambda tx: tx.update, (1,)),
        "update and apply, both donated": (applied, (1, 2)),
    }
    for case, (make, donated) in cases.items():
        reference = None
        for name in ("adamw", *MEASURED):
            tx = OPTIMIZERS[name]()
            state = jax.eval_shape(tx.init, params)
            lowered = jax.jit(make(tx), donate_argnums=donated).lower(params, state, params)
            started = time.process_time()
            compiled = lowered.compile()
            seconds = time.process_time() - started
            share = compiled.memory_analysis().temp_size_in_bytes / total
            reference = share if reference is None else reference
            detail = f"compiled in {seconds:.0f} s of processor time"
            yield Row("memory", case, name, share, "of the params", share / reference, detail)


def updates(tx: optax.GradientTransformation, params: Any, grads: Any) -> Iterator[float]:
    """Wall times of updates; gradients and state are donated, as in a training step."""
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=(0, 1)).lower(grads, state, params).compile()
    while True:
        given = jax.block_until_ready(jax.tree.map(jnp.copy, grads))
        started = time.perf_counter()
        _, state = jax.block_until_ready(update(given, state, params))
        yield time.perf_counter() - started


def published(repetitions: int) -> Iterator[Row]:
    """An update of each of GPT-2's matrices: full SVD against the warm-started subspace.

    The two take turns, after one update each to warm up.
    """
    totals = dict.fromkeys((*MEASURED, "umtam r=32"), 0.0)
    for shape, count in SHAPES.items():
        keys = jax.random.split(jax.random.key(0))
        params, grads = ({"kernel": jax.random.normal(key, shape)} for key in keys)
        often = dict.fromkeys(totals, 10) | {"umtam r=32": 1 if shape[0] > 3072 else 3}
        running = {name: updates(OPTIMIZERS[name](), params, grads) for name in often}
        times: dict[str, list[float]] = {name: [] for name in often}
        for own in running.values():
            next(own)
        for _ in range(repetitions):
            for name, own in running.items():
                times[name] += islice(own, often[name])
        medians = {name: float(np.median(own)) for name, own in times.items()}
        case = " x ".join(map(str, shape))
        for name, median in medians.items():
            totals[name] += count * median
            ratio, detail = median / medians["moma r=32"], f"median of {len(times[name])}"
            yield Row("published", case, name, 1e3 * median, "ms", ratio, detail)
    for name, total in totals.items():
        ratio = total / totals["moma r=32"]
        detail = "each shape's median times its number"
        case = f"all {sum(SHAPES.values())} matrices"
        yield Row("published", case, name, 1e3 * total, "ms", ratio, detail)


def step(rows: int, length: int, dtype: str, rounds: int) -> Iterator[Row]:
    """A training step of GPT-2, the optimizers in turn, after a tenth of the rounds to warm up."""
    config = model.gpt2(length=length, dtype=dtype, scan=True)
    tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.vocabulary)
    mesh = make_mesh("1,1,-1")
    cold = -(-rounds // 10)

    def compiled(spec: str) -> tuple[Callable, Any]:
        with jax.set_mesh(mesh):
            program = build(config, optimizers.make(spec, 1e-3), mesh)
            state = program.init(jax.random.key(0))
            return program.step.lower(program.abstract, tokens).compile(), state

    with ThreadPoolExecutor() as pool:
        steps, states = {}, {}
        for name, (own, state) in zip(STEPS, pool.map(compiled, STEPS.values()), strict=True):
            steps[name], states[name] = own, state
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    for i in range(cold + rounds):
        for name in STEPS:
            started = time.perf_counter()
            states[name], loss, _ = jax.block_until_ready(steps[name](states[name], tokens))
            taken = time.perf_counter() - started
            if i >= cold:
                times[name].append(taken)
            Console(stderr=True).print(
                f"round {i + 1 - cold} {name}: {taken:.4g} s, loss {loss:.3f}"
            )
    reference = np.array(times["adamw"])
    for name, t in times.items():
        ratios = np.array(t) / reference
        detail = f"{rounds} rounds, {ratios.min():.3f} to {ratios.max():.3f}"
        case = f"{rows * length} tokens, {dtype}"
        yield Row("step", case, name, float(np.median(t)), "s", float(np.median(ratios)), detail)


@app.command(help=__doc__)
def main(
    what: Annotated[Literal["memory", "published", "step"], typer.Argument()],
    rounds: Annotated[int, typer.Option(help="timed rounds of a step")] = 3,
    repetitions: Annotated[int, typer.Option(help="turns of published")] = 3,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 2,
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 1024,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="activations")] = "float32",
    output: Path = RESULTS,
) -> None:
    """Measures one thing, prints its table and writes it among the others."""
    measured = {
        "memory": memory,
        "published": lambda: published(repetitions),
        "step": lambda: step(rows, length, dtype, rounds),
    }[what]()
    table = Table("case", "optimizer", "value", "unit", "ratio", "detail", title=what)
    for row in measured:
        values = {"value": f"{row.value:.4g}", "of_reference": f"{row.of_reference:.4g}"}
        about = {"jax": jax.__version__, "machine": machine()}
        replace(output, KEY, row._asdict() | values | about)
        table.add_row(*row[1:3], values["value"], row.unit, values["of_reference"], row.detail)
    Console().print(table)


if __name__ == "__main__":
    app()
