"""The grid of runs: optimizer x learning rate x seed x width, smallest first.

    python -m experiments.pretrain.study             # goes on with what is missing, until stopped
    python -m experiments.pretrain.study --list      # every run planned so far, done or not
    python -m experiments.pretrain.study --status    # how much is done, and how long the rest takes
    python -m experiments.pretrain.study --quick     # the same in two minutes, to see that it works
    python -m experiments.pretrain.study --large     # GPT-2 124M, for which one wants a GPU

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
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import optax

import optax_moma as om

from . import optimizers, variants
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

MOMA, LEAN, CLIPPED = "moma:rank=16", "moma:rank=4", "moma_clipped:rank=16"
FINALISTS = (
    MOMA, "moma:rank=8", LEAN, "adamw", "adafactor", "adamw:b1=0.5,b2=0.95", CLIPPED, "muon",
    "moma_clipped:rank=8", "moma_clipped:rank=16,b1=0.98",
)  # fmt: skip
WHOLE = tuple(f"moma:rank={r},residual=1.0" for r in (16, 8, 4))
"""With all of the gradient outside the subspace, as `moma` once was."""
PEERS = ("galore:rank=16", "galore:rank=8", "moma_clipped:rank=4")
BLOCKS = tuple(f"{MOMA},orthogonal_block_size={size}" for size in (32, 64, 256))
FIRST = (MOMA, LEAN, "adamw", "adafactor", "muon", CLIPPED, "moma_clipped:rank=4", "galore:rank=16")
BETAS = (
    *(f"{name}{betas}" for betas in ("b2=0.95", "b1=0.5,b2=0.95", "b1=0.5", "b1=0.95")
      for name in ("adamw:", f"{MOMA},")),
    "adafactor:b1=0.5", "adafactor:b1=0.9",
)  # fmt: skip
"""The same for both, beside 0.9 and 0.999; Adafactor has a schedule for the other."""
VARIANTS = {
    name: f"moma_variant:rank=16,{name}"
    for name in (
        "residual=0.0", "residual=0.25", "residual=1.0", "nesterov=True", "precondition='after'",
        "refresh=4", "refresh=16", "power_iterations=2", "residual=1.0,error_dtype=float32",
        "residual=1.0,error_dtype=bfloat16", "residual=1.0,error_dtype=int8",
    )
}  # fmt: skip
PARTS = (f"{MOMA},b1=0.0", f"{MOMA},mu_dtype=bfloat16", *VARIANTS.values())
DOUBTFUL = (
    *(VARIANTS[name] for name in (
        "residual=1.0,error_dtype=float32", "power_iterations=2", "refresh=16", "residual=0.25",
        "residual=1.0",
    )),
    f"{MOMA},mu_dtype=bfloat16", f"{MOMA},b1=0.0",
)  # fmt: skip
"""Parts whose worth one seed at width 128 leaves open."""
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
    Stage("tune", W256, FINALISTS[:7], (0,)),
    Stage("seeds", W256, FINALISTS[:7], (0, 1, 2)),
    Stage("tune", W128, FIRST, (0,)),
    Stage("seeds", W256, ("muon",), (0, 1, 2)),
    Stage("seeds", W128, FIRST[:5], (0, 1, 2)),
    Stage("parts", W128, PARTS, (0,), (4e-3,)),
    Stage("ranks", W128, RANKS, (0,)),
    Stage("as published", W128, ("umtam:rank=16",), (0, 1, 2)),
    Stage(
        "batch",
        dataclasses.replace(W128, batch=32, steps=100),
        (MOMA, "adamw"),
        (0,),
    ),
    Stage("seeds", W256, WHOLE, (0, 1, 2)),
    Stage("parts", W256, DOUBTFUL, (0, 1, 2), (2e-3,)),
    Stage("betas", W128, BETAS, (0,)),
    Stage("blocks", W256, BLOCKS, (0,), (4e-3,)),
    Stage("tune", W512, ("adamw", MOMA, "adafactor", CLIPPED, "muon"), (0,)),
    Stage("seeds", W256, FINALISTS[8:], (0, 1, 2)),
    Stage("peers", W256, PEERS, (0, 1, 2)),
    Stage("peers", W256, ("galore:rank=16,update_proj_gap=20",), (0,), (4e-3,)),
)
GPT2 = Config(preset="gpt2", dtype="bfloat16", scan=True, batch=8, steps=300)
LARGE_RATES = (5e-4, 1e-3, 2e-3)
LARGE = (
    Stage(
        "blocks",
        GPT2,
        tuple(f"moma:rank=32,orthogonal_block_size={size}" for size in (64, 256)),
        (0,),
        (1e-3,),
    ),
    Stage(
        "gpt2",
        GPT2,
        ("moma:rank=32", "adamw:b2=0.95", "adafactor", "muon", "moma_clipped:rank=32"),
        (0,),
        LARGE_RATES,
    ),
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
    values = row if isinstance(row, dict) else row.__dict__ | row.sizes().__dict__
    return tuple(
        str(values[name]) if name == "optimizer" else f"{float(values[name]):.6g}"
        for name in IDENTITY
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
    name, _ = optimizers.parse(optimizer)
    if not name.startswith(("moma", "umtam")):
        return f"optax {optax.__version__}"
    files = sorted(Path(om.__file__).parent.glob("_*.py"))
    if name == "moma_variant":
        files.append(Path(variants.__file__))
    digest = hashlib.blake2b(digest_size=4)
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


class Processes:
    """Runs, each in a process of its own, which can all be stopped.

    Attributes:
      quiet: what a run says goes to ``log.txt`` in its folder.
    """

    def __init__(self, quiet: bool):
        """No run yet."""
        self.quiet = quiet
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()

    def __call__(self, config: Config) -> dict[str, Any] | None:
        """Runs; None when it was stopped."""
        if self._stopped.is_set():
            return None
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.pretrain.train", *config.arguments()]
        with (out / "log.txt").open("a") if self.quiet else nullcontext() as log:
            # A session of its own: Ctrl-C is for `stop` to pass on.
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._running.add(child)
        if self._stopped.is_set():
            child.terminate()
        status = child.wait()
        self._running.discard(child)
        if status in (128 + signal.SIGTERM, -signal.SIGTERM):
            return None
        if status:
            seen = f"; see {out / 'log.txt'}" if self.quiet else ""
            raise RunFailed(f"{config.command()} failed with status {status}{seen}.")
        return json.loads((out / "result.json").read_text())

    def stop(self, *_: Any) -> None:
        """Stops every run, after it has saved where it is; a handler of signals."""
        self._stopped.set()
        for child in tuple(self._running):
            child.terminate()


class RunFailed(RuntimeError):
    """A run ended with an error."""


def work(
    stages: tuple[Stage, ...],
    results: Path,
    runs: Path,
    runner: Callable[[Config], dict[str, Any] | None],
    workers: int = 1,
) -> bool:
    """Runs what is missing, so many runs at a time; whether all is done.

    A run that fails does not keep the others from running; RunFailed is raised in the end.
    """
    runs.mkdir(parents=True, exist_ok=True)
    started: set[tuple[str, ...]] = set()
    running: dict[Future, Job] = {}
    stopped, failures = False, []
    with (runs / "lock").open("w") as lock, ThreadPoolExecutor(workers) as pool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"A study is already running in {runs}.") from None
        while True:
            rows = read(results)
            known = started | {identity(row) for row in rows}
            free = [job for job in plan(stages, rows) if identity(job.config) not in known]
            for job in free[: 0 if stopped else workers - len(running)]:
                started.add(identity(job.config))
                name = "_".join(identity(job.config)).replace(":", "-").replace(",", "-")
                config = dataclasses.replace(job.config, out=str(runs / name))
                print(f"\n[{len(rows)} done] {job.stage}: {config.command()}", flush=True)
                running[pool.submit(runner, config)] = Job(job.stage, config)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    result = future.result()
                except RunFailed as error:
                    failures.append(str(error))
                    print(error, flush=True)
                    continue
                if result is None:
                    stopped = True
                else:
                    append(results, finished(job, result))
    if failures:
        raise RunFailed("\n".join(failures))
    return not stopped


def finished(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """A run's row; its checkpoints are of no more use."""
    out = Path(job.config.out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    sources = {name: loss for name, loss in result["sources"].items() if name != "all"}
    return (
        result
        | job.config.sizes().__dict__
        | {
            "stage": job.stage,
            "code": code(job.config.optimizer),
            "sources": " ".join(f"{name}={loss:.4f}" for name, loss in sources.items()),
            "command": dataclasses.replace(job.config, out=f"runs/{out.name}").command(),
        }
    )


def expected_seconds(config: Config, rows: list[Row]) -> float:
    """Time of a run: that of a like one, scaled by parameters x tokens; a guess if none."""
    tokens = config.steps * config.batch * config.sizes().length

    def work_of(width: int, layers: int, tokens: float) -> float:
        return tokens * width * (12 * width * layers + config.sizes().vocabulary)

    own = work_of(config.sizes().width, config.sizes().layers, tokens)
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
        total = counts.setdefault((config.sizes().width, job.stage), [0, 0, 0.0])
        total[0] += row is not None
        total[1] += 1
        total[2] += 0 if row else expected_seconds(config, rows)
        if every:
            stale = row is not None and row["code"] != code(config.optimizer)
            state = f"{float(row['validation']):.4f}" if row else "-"
            print(
                f"{state:>8} {job.stage:12} width {config.sizes().width:<4} lr {config.lr:<8g} "
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
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--runs", type=Path, default=RUNS)
    args = parser.parse_args()
    stages = QUICK if args.quick else LARGE if args.large else STAGES
    runs = args.runs / "quick" if args.quick else args.runs
    results = args.results or (runs / "results.csv" if args.quick else RESULTS)
    if args.list or args.status:
        show(stages, results, args.list)
        return
    started = time.monotonic()
    processes = Processes(quiet=args.workers > 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, processes.stop)
    done = work(stages, results, runs.absolute(), processes, args.workers)
    state = "all runs are done" if done else "stopped; the same command goes on"
    print(f"{state} ({(time.monotonic() - started) / 60:.1f} min)")


if __name__ == "__main__":
    main()
