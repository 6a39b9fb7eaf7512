"""The grid of runs: optimizer x learning rate x seed x width, one run at a time, smallest first.

    python -m experiments.pretrain.study             # goes on with what is missing, until stopped
    python -m experiments.pretrain.study --list      # every run planned so far, done or not
    python -m experiments.pretrain.study --status    # how much is done, and how long the rest takes
    python -m experiments.pretrain.study --quick     # the same in two minutes, to see that it works

Each finished run appends a line to ``results/study.csv``, and is never run again; a run that was
stopped goes on from its checkpoint. Every optimizer gets the same steps, the same data and the same
grid of learning rates, with seed 0. Where the best rate is the lowest or highest of those tried,
the grid grows that way by a factor of two. Further seeds are run at the best rate. Stages of one
rate compare parts of an optimizer: nothing is tuned there.
"""

import argparse
import ast
import csv
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import optax

import optax_moma as om

from . import optimizers
from .train import Config

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study.csv"
RUNS = HERE / "runs"
COLUMNS = (
    "stage", "optimizer", "lr", "seed", "vocabulary", "width", "layers", "length", "batch",
    "steps", "params", "loss", "validation", "state_bytes", "adamw_bytes", "tokens_per_second",
    "seconds", "machine", "jax", "code", "sources", "command",
)  # fmt: skip
IDENTITY = ("optimizer", "lr", "seed", "vocabulary", "width", "layers", "length", "batch", "steps")
"""What makes two runs the same."""

RATES = (1e-3, 2e-3, 4e-3)
REACH = 4
"""How far beyond the grid a best rate is followed."""

MOMA, LEAN = "moma:rank=16", "moma:rank=4"
FIRST = ("adamw", MOMA, "adafactor", LEAN, "muon", "galore:rank=16", "galore:rank=4")
BETAS = (
    "adamw:b2=0.95", "adamw:b1=0.8,b2=0.95", "adamw:b1=0.5,b2=0.95", "adamw:b1=0.0,b2=0.95",
    "moma:rank=16,b2=0.95", "moma:rank=16,b1=0.95", "moma:rank=16,b1=0.98", "moma:rank=16,b1=0.5",
    "adafactor:b1=0.5", "adafactor:b1=0.9",
)  # fmt: skip
"""Four for AdamW as for moma, and all there is for Adafactor."""
PARTS = tuple(
    f"moma:rank=16,{part}"
    for part in (
        "residual=0.0", "residual=0.5", "clip_spectral=1e9", "clip_spectral=0.5",
        "clip_spectral=2.0", "clip_rms=1e9", "power_iterations=2", "mu_dtype=bfloat16",
        "error_dtype=float32", "error_dtype=bfloat16", "error_dtype=int8",
    )
)  # fmt: skip
FINALISTS = ("adamw", MOMA, "adafactor", "moma:rank=8", "adamw:b1=0.5,b2=0.95", "muon")
RANKS = tuple(f"moma:rank={r}" for r in (32, 64, 128))


class Stage(NamedTuple):
    """Some optimizers at one size.

    Attributes:
      name: what the stage is for.
      base: the run that all share.
      optimizers: as ``optimizers.make`` takes them.
      seeds: the first is tuned with, over the grid; the others run at the best rate.
      rates: the grid, which grows while the best rate is its end; with a single rate nothing is
        tuned.
    """

    name: str
    base: Config
    optimizers: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = RATES


W128 = Config(vocabulary=1024, width=128, layers=4, length=256, batch=8, steps=400, save_every=200)
W256 = Config(vocabulary=1024, width=256, layers=4, length=256, batch=8, steps=500, save_every=100)
W512 = Config(vocabulary=1024, width=512, layers=6, length=256, batch=8, steps=600, save_every=50)
STAGES = (
    Stage("tune", W128, FIRST[:4], (0,)),
    Stage("tune", W256, FINALISTS[:4], (0,)),
    Stage("seeds", W256, FINALISTS[:4], (0, 1, 2)),
    Stage("betas", W256, ("moma:rank=16,b1=0.98", "moma:rank=16,b1=0.95"), (0, 1, 2)),
    Stage("peers", W256, ("galore:rank=16", "galore:rank=8", LEAN), (0, 1, 2)),
    Stage("peers", W256, ("galore:rank=16,update_proj_gap=20",), (0,), (4e-3,)),
    Stage("tune", W128, FIRST[4:], (0,)),
    Stage("seeds", W128, FIRST[:4], (0, 1, 2)),
    Stage("tune", W256, FINALISTS[4:], (0,)),
    Stage("seeds", W256, FINALISTS[4:], (0, 1, 2)),
    Stage("parts", W128, PARTS, (0,), (2e-3,)),
    Stage("betas", W128, BETAS, (0,)),
    Stage("ranks", W128, RANKS, (0,)),
    Stage("as published", W128, ("umtam:rank=16",), (0, 1, 2)),
    Stage("batch", dataclasses.replace(W128, batch=32), ("adamw", MOMA), (0,)),
    Stage("tune", W512, ("adamw", MOMA, "adafactor"), (0,)),
)
QUICK = (
    Stage(
        "quick",
        Config(vocabulary=512, width=128, layers=1, length=64, batch=8, steps=40, validate=8),
        ("adamw", "moma:rank=4"),
        (0, 1),
    ),
)

Row = dict[str, str]


class Job(NamedTuple):
    """A run and the stage it belongs to."""

    stage: str
    config: Config


def identity(row: Any) -> tuple[str, ...]:
    """What makes a run the same as another, from its row or its Config."""
    get = row.get if isinstance(row, dict) else lambda name: getattr(row, name)
    return tuple(
        str(get(name)) if name == "optimizer" else f"{float(get(name)):.6g}" for name in IDENTITY
    )


def best_rate(found: dict[float, float]) -> float:
    """The learning rate of the lowest validation loss; a run that diverged has none."""
    return min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)


def next_rates(found: dict[float, float], grid: tuple[float, ...] = RATES) -> list[float]:
    """The rates still to try: the grid's, then past its ends while the best one is an end."""
    missing = [rate for rate in grid if rate not in found]
    if missing or len(grid) == 1:
        return missing
    best = best_rate(found)
    further = {min(found): best / 2, max(found): best * 2}.get(best)
    reachable = further and RATES[0] / REACH <= further <= RATES[-1] * REACH
    return [further] if reachable else []


def plan(stages: Iterable[Stage], rows: Iterable[Row]) -> list[Job]:
    """All runs known so far, in order; those that depend on a best rate follow once it is known."""
    losses = {identity(row): float(row["validation"]) for row in rows}
    jobs: dict[tuple[str, ...], Job] = {}
    for stage in stages:
        for optimizer in stage.optimizers:
            base = dataclasses.replace(stage.base, optimizer=optimizer)
            tuned = {}
            for rate in (RATES[0] * 2.0**i for i in range(-8, 12)):
                config = dataclasses.replace(base, lr=round(rate, 10), seed=stage.seeds[0])
                if identity(config) in losses:
                    tuned[config.lr] = losses[identity(config)]
            missing = next_rates(tuned, stage.rates)
            pairs = [(rate, stage.seeds[0]) for rate in [*tuned, *missing]]
            if not missing:
                pairs += [(best_rate(tuned), seed) for seed in stage.seeds[1:]]
            for rate, seed in pairs:
                config = dataclasses.replace(base, lr=rate, seed=seed)
                jobs.setdefault(identity(config), Job(stage.name, config))
    return list(jobs.values())


def read(path: Path) -> list[Row]:
    """The rows of a results file, the last of each run; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return latest(csv.DictReader(file))


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each run."""
    return list({identity(row): row for row in rows}.values())


def append(path: Path, row: dict[str, Any]) -> None:
    """Adds one line to a results file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: row[name] for name in COLUMNS})


def code(optimizer: str) -> str:
    """A digest of the source that an optimizer runs, without comments and docstrings.

    Results outlive changes of the code; this tells which of them came from the present one.
    """
    if optimizers.parse(optimizer)[0] not in ("moma", "umtam"):
        return f"optax {optax.__version__}"
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(Path(om.__file__).parent.glob("_*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def run_apart(config: Config) -> dict[str, Any] | None:
    """Runs in a process of its own; None when it was stopped. SIGTERM is passed on to it."""
    module = "experiments.pretrain.train"
    child = subprocess.Popen([sys.executable, "-m", module, *config.arguments()])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return None
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (128 + signal.SIGTERM, -signal.SIGTERM):
        return None
    if status:
        raise RuntimeError(f"{config.command()} failed with status {status}.")
    return json.loads((Path(config.out) / "result.json").read_text())


def work(
    stages: tuple[Stage, ...],
    results: Path,
    runs: Path,
    runner: Callable[[Config], dict[str, Any] | None] = run_apart,
) -> bool:
    """Runs what is missing, one run after the other; whether all is done."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"A study is already running in {runs}.") from None
        while True:
            rows = read(results)
            done = {identity(row) for row in rows}
            job = next((j for j in plan(stages, rows) if identity(j.config) not in done), None)
            if job is None:
                return True
            name = "_".join(identity(job.config)).replace(":", "-").replace(",", "-")
            config = dataclasses.replace(job.config, out=str(runs / name))
            print(f"\n[{len(done)} done] {job.stage}: {config.command()}", flush=True)
            result = runner(config)
            if result is None:
                return False
            shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)
            places = dataclasses.replace(config, out=f"runs/{name}")
            result |= {
                "stage": job.stage,
                "code": code(config.optimizer),
                "sources": " ".join(
                    f"{k}={v:.4f}" for k, v in result["sources"].items() if k != "all"
                ),
                "command": places.command(),
            } | config.sizes().__dict__
            append(results, result)


def expected_seconds(config: Config, rows: list[Row]) -> float:
    """Time of a run: that of a like one, scaled by parameters x tokens; a guess if none."""
    tokens = config.steps * config.batch * config.length

    def work_of(width: int, layers: int, tokens: float) -> float:
        return tokens * width * (12 * width * layers + config.sizes().vocabulary)

    own = work_of(config.width, config.layers, tokens)
    rates = [
        float(row["seconds"])
        / work_of(
            int(row["width"]),
            int(row["layers"]),
            float(row["steps"]) * float(row["batch"]) * float(row["length"]),
        )
        for row in rows
        if row["optimizer"].partition(":")[0] == config.optimizer.partition(":")[0]
    ]
    # At 80 GFLOP/s, of two cores, 6 operations a parameter and token.
    return own * (sorted(rates)[len(rates) // 2] if rates else 6 / 80e9)


def show(stages: tuple[Stage, ...], results: Path, every: bool) -> None:
    """Prints each run, or how many of each stage are done."""
    rows = read(results)
    found = {identity(row): row for row in rows}
    jobs = plan(stages, rows)
    counts: dict[tuple[int, str], list[float]] = {}
    for job in jobs:
        config, row = job.config, found.get(identity(job.config))
        total = counts.setdefault((config.width, job.stage), [0, 0, 0.0])
        total[0] += row is not None
        total[1] += 1
        total[2] += 0 if row else expected_seconds(config, rows)
        if every:
            stale = row is not None and row["code"] != code(config.optimizer)
            state = f"{float(row['validation']):.4f}" if row else "-"
            print(
                f"{state:>8} {job.stage:12} width {config.width:<4} lr {config.lr:<8g} "
                f"seed {config.seed} {config.optimizer}{'  (other code)' if stale else ''}"
            )
    for (width, stage), (done, total, seconds) in counts.items():
        print(f"width {width:<4} {stage:12} {done}/{total} done, about {seconds / 3600:.1f} h left")
    print("further seeds, and rates past the grid, join the plan as best rates become known")


def main() -> None:
    """Lists, counts or runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--status", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--runs", type=Path, default=RUNS)
    args = parser.parse_args()
    stages = QUICK if args.quick else STAGES
    runs = args.runs / "quick" if args.quick else args.runs
    results = args.results or (runs / "results.csv" if args.quick else RESULTS)
    if args.list or args.status:
        show(stages, results, args.list)
        return
    started = time.monotonic()
    finished = work(stages, results, runs.absolute())
    state = "all runs are done" if finished else "stopped; the same command goes on"
    print(f"{state} ({(time.monotonic() - started) / 60:.1f} min)")


if __name__ == "__main__":
    main()
