"""How close the momentum stays to its best rank-r part, on gradients recorded from the demo.

    python experiments/truncation/run.py            # needs the demo's two files; writes results.csv

At every step the target is b1 U s V^T + (1 - b1) G', with G' the preconditioned gradient. One or
more warm-started subspace iterations keep a rank-r part of it; an exact SVD keeps the best one. The
table shows the energy of what is lost, as a multiple of what the SVD loses.
"""

import csv
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from optax_moma import _moments as moments
from optax_moma._lowrank import Factors, orthonormalize
from optax_moma._tree import named_leaves
from optax_moma.demo import recorded_gradients

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
RESULTS = Path(__file__).with_name("results.csv")
B1, B2, EPS = 0.9, 0.999, 1e-8


def preconditioned(stream: list[jax.Array]) -> list[jax.Array]:
    """The gradients of one matrix as the momentum sees them."""
    m, n = stream[0].shape
    R, C, weight, out = jnp.zeros(m), jnp.zeros(n), jnp.zeros(()), []
    for G in stream:
        R = moments.ema(R, moments.row_sums(jnp.square(G)), B2)
        C = moments.ema(C, moments.col_sums(jnp.square(G)), B2)
        weight = moments.ema(weight, jnp.ones(()), B2)
        p, q = moments.inverse_root(R, C, weight, EPS)
        out.append(p[:, None] * G * q)
    return out


def losses(stream: list[jax.Array], rank: int, iterations: int) -> list[tuple[float, float]]:
    """Energy lost by the subspace step and by the SVD, at every step."""
    m, n = stream[0].shape
    start = jax.random.normal(jax.random.key(0), (n, rank)) / jnp.sqrt(n)
    factors = Factors(jnp.zeros((m, rank)), jnp.zeros(rank), start)

    @jax.jit
    def step(factors: Factors, G: jax.Array) -> tuple[Factors, jax.Array, jax.Array]:
        target = B1 * (factors.U * factors.s) @ factors.V.T + (1 - B1) * G
        X = factors.V
        for _ in range(iterations):
            Q = orthonormalize(target @ X)
            X = target.T @ Q
        s, kept = jnp.linalg.norm(X, axis=0), Q @ X.T
        new = Factors(Q, s, X / s)
        spectrum = jnp.linalg.svd(target, compute_uv=False)
        best = jnp.sum(jnp.square(spectrum[rank:]))
        return new, jnp.sum(jnp.square(target - kept)), best

    result = []
    for G in stream:
        factors, lost, best = step(factors, G)
        result.append((float(lost), float(best)))
    return result


@app.command(help=__doc__)
def main(
    steps: int = 12,
    rank: int = 32,
    every: Annotated[int, typer.Option(help="take every so-manieth matrix")] = 4,
    output: Path = RESULTS,
) -> None:
    """Prints the table and writes it as CSV."""
    start = time.monotonic()
    trees = [named_leaves(tree) for tree in recorded_gradients(steps)]
    names = trees[0][0]
    # The word embeddings are left out: their exact SVD takes minutes.
    chosen = [
        i
        for i, leaf in enumerate(trees[0][1])
        if leaf.ndim == 2 and rank < min(leaf.shape) and max(leaf.shape) < 5000
    ][::every]
    streams = {names[i]: preconditioned([leaves[i] for _, leaves in trees]) for i in chosen}

    lines = []
    for iterations in (1, 2, 3, 4):
        for name, stream in streams.items():
            for t, (lost, best) in enumerate(losses(stream, rank, iterations)):
                lines.append((iterations, name, t + 1, lost, best))
    table = Table(
        "iterations", "all steps", "from step 3", "worst matrix", title="Energy lost / best rank-r"
    )
    for iterations in (1, 2, 3, 4):
        rows = [line for line in lines if line[0] == iterations]
        late = [line for line in rows if line[2] >= 3]
        worst = max(
            sum(r[3] for r in late if r[1] == name) / sum(r[4] for r in late if r[1] == name)
            for name in streams
            if sum(r[4] for r in late if r[1] == name) > 0
        )
        ratios = [sum(r[3] for r in part) / sum(r[4] for r in part) for part in (rows, late)]
        table.add_row(str(iterations), *(f"{x:.4f}" for x in (*ratios, worst)))
    console = Console()
    console.print(table)
    console.print(f"{len(streams)} matrices, rank {rank}, {time.monotonic() - start:.0f} s")
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("iterations", "matrix", "step", "lost", "best"))
        writer.writerows((*a, f"{b:.6e}", f"{c:.6e}") for *a, b, c in lines)


if __name__ == "__main__":
    app()
