"""How far from the base may experts go until their merge breaks, at defaults and at best?

    python -m experiments.drift.run study      # minutes: three seeds
    python -m experiments.drift.run report     # the table and the figure of RESULTS.md

scikit-learn's digits, turned, mirrored, inverted, shifted: eight tasks that share their classes, so
that experts fight for the same outputs. A perceptron sees a little of all, then one copy of it
learns each task by `moma`, for longer and longer. Merges are tuned on dev and scored on test, by
the mean share of the experts' accuracies.
"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import optax_moma as om
from experiments.pages import Block, Row, add_report, number, save, table, tidy, unique
from experiments.records import Records, machine
from optax_moma import merging
from optax_moma.demo.pipeline import along

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)
HERE = Path(__file__).parent
WIDTH, BASE_STEPS, BATCH, RATE = 256, 100, 64, 1e-3
STEPS = (25, 50, 100, 200, 400)
SCALES = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0)
METHODS: Mapping[str, merging.Step] = {
    "average": merging.average(),
    "TIES": merging.ties(),
    "OTA": merging.ota(),
    "TSV-M": merging.tsv_m(),
    "WUDI": merging.wudi(),
    "moma": merging.moma(),
    "moma, ridge 0.01": merging.moma(ridge=0.01),
    "moma, ridge 1": merging.moma(ridge=1.0),
    "moma, no curvature": merging.moma(power=0),
}
TASKS = {
    "plain": lambda x: x,
    "turned": lambda x: np.rot90(x, 1, (1, 2)),
    "upside down": lambda x: np.rot90(x, 2, (1, 2)),
    "turned back": lambda x: np.rot90(x, 3, (1, 2)),
    "mirrored": lambda x: x[:, :, ::-1],
    "transposed": lambda x: np.swapaxes(x, 1, 2),
    "inverted": lambda x: 1 - x,
    "shifted": lambda x: np.roll(x, 2, 2),
}
COLOURS = {
    "average": "C0",
    "TIES": "C5",
    "OTA": "C9",
    "TSV-M": "C2",
    "WUDI": "C4",
    "moma": "C3",
    "moma, ridge 0.01": "salmon",
    "moma, ridge 1": "rosybrown",
    "moma, no curvature": "C1",
}
Params = Any


class Data(NamedTuple):
    """All tasks' images (tasks, n, 64) and their labels, by split."""

    train: tuple[np.ndarray, np.ndarray]
    dev: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(seed: int) -> Data:
    """The digits in an order of the seed's: 1,000 to train, 300 for dev, the rest for test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).reshape(-1, 8, 8), labels[order]
    views = np.stack([task(images).reshape(-1, 64) for task in TASKS.values()]).astype(np.float32)
    cuts = (slice(0, 1000), slice(1000, 1300), slice(1300, None))
    return Data(*((views[:, cut], labels[cut]) for cut in cuts))


def start(seed: int) -> Params:
    """Three layers of `WIDTH` and a head."""
    rng = np.random.default_rng(seed)
    sizes = (64, WIDTH, WIDTH, WIDTH, 10)
    return {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m), jnp.float32),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(pairwise(sizes))
    }


def logits(params: Params, x: jax.Array) -> jax.Array:
    """(..., 64) -> (..., 10)."""
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


@partial(jax.jit, static_argnames="steps")
def fit(params: Params, x: jax.Array, y: jax.Array, steps: int, key: jax.Array) -> Any:
    """Trains on rows drawn from (n, 64) images; returns the params and the curvature."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    tx = om.moma(schedule, rank=16, orthogonal_block_size=None)

    def loss(params: Params, rows: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, x[rows]), y[rows]
        ).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        gradients = jax.grad(loss)(params, jax.random.choice(key, len(y), (BATCH,)))
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    (params, state), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    return params, om.curvature_from(state, params)


@jax.jit
def accuracies(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """(tasks, n, 64) -> (tasks,)."""
    return jnp.mean(jnp.argmax(logits(params, x), -1) == y, -1)


def drift(base: Params, expert: Params) -> float:
    """|expert - base| / |base| of the kernels between the first and the head, their mean."""
    names = [name for name in base if base[name]["kernel"].shape == (WIDTH, WIDTH)]
    return float(
        np.mean(
            [
                jnp.linalg.norm(expert[n]["kernel"] - base[n]["kernel"])
                / jnp.linalg.norm(base[n]["kernel"])
                for n in names
            ]
        )
    )


@app.command()
def study(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    results: Annotated[Path, typer.Option(file_okay=False)] = HERE / "results",
) -> None:
    """Trains experts for `STEPS`, merges them by every method, and writes drift.csv."""
    records = Records(results / "drift.csv", ("seed", "steps", "method"))
    for seed in range(seeds):
        data = load(seed)
        x, y = data.train
        mixed = x[:, :200].reshape(-1, 64), np.tile(y[:200], len(x))
        base, _ = fit(start(seed), *mixed, BASE_STEPS, jax.random.key(seed))
        for steps in STEPS:
            if not all(records.holds(seed=seed, steps=steps, method=m) for m in METHODS):
                keys = jax.random.split(jax.random.key(1000 + seed), len(x))
                made = [fit(base, own, y, steps, key) for own, key in zip(x, keys, strict=True)]
                experts, curvature = map(list, zip(*made, strict=True))
                compare(records, {"seed": seed, "steps": steps}, data, base, experts, curvature)


def compare(
    records: Records, about: Mapping[str, int], data: Data, base: Params, experts: list[Params],
    curvature: list[Any],
) -> None:  # fmt: skip
    """Merges by every method; the scale is tuned on dev, all scores are of test."""
    far = float(np.mean([drift(base, expert) for expert in experts]))
    ceiling = {
        split: np.array([accuracies(e, *getattr(data, split))[t] for t, e in enumerate(experts)])
        for split in ("dev", "test")
    }

    def kept(params: Params, split: str) -> float:
        found = np.asarray(accuracies(params, *getattr(data, split)))
        return float(np.mean(found / ceiling[split]))

    for name, method in METHODS.items():
        if records.holds(**about, method=name):
            continue
        merged = om.merge(method, experts, base=base, curvature=curvature)
        grid = {scale: along(base, merged, scale) for scale in SCALES}
        dev = {scale: kept(params, "dev") for scale, params in grid.items()}
        best = max(dev, key=lambda scale: dev[scale])
        records.add(
            **about,
            method=name,
            drift=far,
            experts=float(np.mean(ceiling["test"])),
            base=kept(base, "test"),
            default=kept(merged, "test"),
            best_scale=best,
            tuned=kept(grid[best], "test"),
            machine=machine(),
        )


def page(rows: list[Row], results: Path) -> str:
    """What is kept against the drift, at the default scale and at the best."""
    steps = sorted(unique(rows, "steps"), key=int)
    methods = unique(rows, "method")

    def values(method: str, step: str, column: str) -> list[float]:
        return [float(r[column]) for r in rows if (r["method"], r["steps"]) == (method, step)]

    far = {s: 100 * np.mean(values(methods[0], s, "drift")) for s in steps}
    figure = Figure(figsize=(10, 4), layout="constrained")
    titles = {"default": "at the default scale", "tuned": "at the best scale"}
    parts = []
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for method in methods:
            mean = [100 * np.mean(values(method, s, column)) for s in steps]
            style = "o-" if method.startswith("moma") else "s--"
            colour, width = COLOURS.get(method), 2.5 if method == "moma" else 1.2
            axis.plot([far[s] for s in steps], mean, style, ms=4, c=colour, lw=width, label=method)
        floor = [100 * np.mean(values(methods[0], s, "base")) for s in steps]
        axis.plot([far[s] for s in steps], floor, ":", c="gray", label="base")
        axis.set_xscale("log")
        axis.set_xticks([far[s] for s in steps], [f"{far[s]:.0f}" for s in steps])
        axis.minorticks_off()
        axis.set_xlabel("drift of the experts from the base (%)")
        axis.set_title(title)
        tidy(axis)
        lines = [[m, *(number(values(m, s, column)) for s in steps)] for m in methods]
        lines.append(["base", *(number(values(methods[0], s, "base")) for s in steps)])
        header = ["share kept (%)", *(f"{s} steps, drift {far[s]:.0f} %" for s in steps)]
        parts.append(f"{title.capitalize()}:\n\n{table(header, lines)}")
    axes[0].set_ylabel("share of the experts' test accuracy kept (%)")
    axes[1].legend(frameon=False, fontsize=8)
    return "\n\n".join([*parts, save(figure, results / "drift.png")])


BLOCKS = {"drift": Block("drift", "Share kept against the drift", page)}
add_report(app, HERE, BLOCKS)


if __name__ == "__main__":
    app()
