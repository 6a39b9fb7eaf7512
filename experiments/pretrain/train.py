"""One pretraining run: any corpus, any optimizer, any number of devices and processes.

    python -m experiments.pretrain.train --out runs/first
    python -m experiments.pretrain.train --out runs/gpt2 --corpus fineweb:sample-10BT \\
        --preset gpt2 --dtype bfloat16 --scan --remat --batch 512 --accumulate 8 \\
        --steps 20000 --lr 1e-3 --validate_every 500 --save_every 500 --mesh=-1,1,1
    ... --coordinator host:1234 --processes 2 --process 0      # on the second host --process 1

A run's folder holds ``losses.csv``, ``validation.csv``, the last two ``checkpoints/`` and, when it
is done, ``result.json``. A run that was stopped or killed goes on from its last checkpoint when
the command is given again, and its losses are those of an unbroken run, bit for bit, on as many
devices.
"""

import argparse
import csv
import dataclasses
import json
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

import optax_moma as om
from experiments.records import machine

from . import model, optimizers
from .data import Batches, find_tokenizer, open_corpus, validation
from .program import Program, State, program_for


@dataclasses.dataclass(frozen=True)
class Config:
    """A run, as its command line: every field is an option.

    Attributes:
      out: folder of the run.
      corpus: see ``data.open_corpus``; by default the folder ``lm`` of OPTAX_MOMA_DATA.
      tokenizer: file of a byte-level BPE; where there is none, one is trained and saved there. By
        default beside the run's folder, one for each corpus and vocabulary.
      preset: ``small``, or ``gpt2`` for the sizes of GPT-2 124M, which the next five then override.
      vocabulary: tokens; 0 for the model's own, as in the next four.
      width: size of the residual stream.
      layers: blocks.
      heads: attention heads.
      length: tokens of a sequence.
      dtype: float32 or bfloat16, what activations are computed in.
      scan: one compiled block for all layers.
      remat: activations are computed again in the backward pass, for less memory.
      optimizer: see ``optimizers.make``.
      lr: peak learning rate.
      steps: optimizer steps.
      batch: sequences of a step, over all devices.
      accumulate: parts of a batch, one after the other, for less memory.
      lanes: streams that fill a batch; a divisor of ``batch``, a multiple of the processes.
      seed: of parameters and order of the data.
      mesh: devices along data, fsdp and tensor; one of them may be -1, for the rest.
      validate: sequences per source for validation.
      validate_every: steps between validations; 0 for only the last.
      save_every: steps between checkpoints; 0 for one at the end or when the run is stopped.
      log_every: steps between progress lines.
      coordinator: host:port of process 0; ``auto`` where the cluster tells.
      processes: number of processes.
      process: this one's index.
    """

    out: str = "runs/default"
    corpus: str = ""
    tokenizer: str = ""
    preset: str = "small"
    vocabulary: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0
    length: int = 0
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False
    optimizer: str = "moma:rank=32"
    lr: float = 4e-3
    steps: int = 400
    batch: int = 8
    accumulate: int = 1
    lanes: int = 8
    seed: int = 0
    mesh: str = "-1,1,1"
    validate: int = 64
    validate_every: int = 0
    save_every: int = 0
    log_every: int = 20
    coordinator: str = ""
    processes: int = 1
    process: int = 0

    def sizes(self) -> model.Config:
        """The model's sizes."""
        names = ("vocabulary", "width", "layers", "heads", "length")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        given |= {"dtype": self.dtype, "scan": self.scan, "remat": self.remat}
        if self.preset not in ("small", "gpt2"):
            raise ValueError(f"--preset is small or gpt2, not {self.preset!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype is float32 or bfloat16, not {self.dtype!r}.")
        return model.gpt2(**given) if self.preset == "gpt2" else model.Config(**given)

    def tokenizer_file(self) -> Path:
        """Where the tokenizer is."""
        corpus = re.sub(r"\W+", "-", self.corpus).strip("-")
        name = "-".join(filter(None, (f"bpe{self.sizes().vocabulary}", corpus)))
        return Path(self.tokenizer or Path(self.out).absolute().parent / f"{name}.json")

    def decides_losses(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint has to have in common with the one before."""
        free = (
            "out", "remat", "accumulate", "mesh", "validate", "validate_every", "save_every",
            "log_every", "coordinator", "processes", "process",
        )  # fmt: skip
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in free}

    def arguments(self) -> list[str]:
        """The options that repeat the run."""
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return [f"--{k}" if v is True else f"--{k}={v}" for k, v in given.items()]

    def command(self) -> str:
        """The command line that repeats the run."""
        return shlex.join(["python", "-m", "experiments.pretrain.train", *self.arguments()])


def parse(arguments: list[str] | None = None) -> Config:
    """A Config from command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = dict(re.findall(r"^ {6}(\w+): (.*(?:\n {8}.*)*)", str(Config.__doc__), re.MULTILINE))
    for field in dataclasses.fields(Config):
        about: dict[str, Any] = {"help": " ".join(texts[field.name].split())}
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action="store_true", **about)
        else:
            about["help"] += f" [{field.default}]" if field.default != "" else ""
            about |= {"type": type(field.default), "default": field.default, "metavar": ""}
            parser.add_argument(f"--{field.name}", **about)
    return Config(**vars(parser.parse_args(arguments)))


class Table:
    """A CSV file that grows by rows, and forgets those after a checkpoint that is gone back to."""

    def __init__(self, path: Path, header: tuple[str, ...], last_step: int):
        """Keeps what the file has of steps up to ``last_step``; only process 0 writes."""
        self._file = None
        if jax.process_index() == 0:
            kept: list[list[str]] = []
            if path.exists():
                with path.open(newline="") as file:
                    # A line that a kill cut short belongs to a step that is run again.
                    rows = [row for row in csv.reader(file) if len(row) == len(header)][1:]
                kept = [row for row in rows if int(row[0]) <= last_step]
            self._file = path.open("w", newline="")
            self.add([header, *kept])

    def add(self, rows: list[Any]) -> None:
        """Appends rows."""
        if self._file is not None:
            csv.writer(self._file, lineterminator="\n").writerows(rows)
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def without_empty(tree: Any) -> Any:
    """Without arrays of no elements (GaLore has some), which Orbax cannot save."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def save(
    checkpoints: ocp.training.Checkpointer,
    step: int,
    state: State,
    batches: Batches,
    config: Config,
    seconds: float,
) -> None:
    """Starts to save the whole run as it is after ``step`` steps and so many seconds."""
    about = {"position": batches.position(), "seconds": seconds, "run": config.decides_losses()}
    checkpoints.save_async(step, without_empty(state._asdict()), custom_metadata=about, force=True)


def load(
    checkpoints: ocp.training.Checkpointer, program: Program, batches: Batches, config: Config
) -> tuple[State, float]:
    """The latest checkpoint's state, laid on the mesh, and its seconds; moves to its position.

    Raises:
      ValueError: it is of another run.
    """
    about: Any = checkpoints.metadata().custom_metadata
    before, now = about.get("run", {}), config.decides_losses()
    changed = [
        f"--{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if v != before.get(k)
    ]
    if changed:
        raise ValueError(
            f"{config.out} holds another run: {'; '.join(changed)}."
            " Give what it was, or another --out."
        )
    wanted = program.abstract._asdict()
    loaded = checkpoints.load(None, without_empty(wanted))
    batches.go_to(about["position"])
    empty = lambda like, x: jnp.zeros(like.shape, like.dtype) if x is None else x  # noqa: E731
    return State(**jax.tree.map(empty, wanted, loaded)), about["seconds"]


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Whether SIGTERM has come, asked once a step; several processes agree on the step."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def say(*parts: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(*parts, flush=True)


def evaluate(
    program: Program, params: Any, sources: dict[str, np.ndarray], rows: int
) -> dict[str, float]:
    """Mean validation loss of every source, and of all sequences as ``all``."""
    tokens = np.concatenate(list(sources.values()))
    padded = np.pad(tokens, ((0, -len(tokens) % rows), (0, 0)), mode="edge")
    values = []
    for start in range(0, len(padded), rows):
        part = padded[start : start + rows]
        batch = jax.make_array_from_callback(part.shape, program.batch, part.__getitem__)
        values.append(program.losses(params, batch))
    losses = np.concatenate(jax.device_get(values))[: len(tokens)]
    ends = np.cumsum([len(x) for x in sources.values()])
    parts = np.split(losses, ends[:-1])
    found = {name: float(x.mean()) for name, x in zip(sources, parts, strict=True)}
    return found | {"all": float(losses.mean())}


def run(config: Config) -> dict[str, Any] | None:
    """Trains, from the last checkpoint if there is one; the result, or None when stopped."""
    started = time.monotonic()
    if "://" in config.out:
        raise ValueError(
            f"--out={config.out} has to be a folder, which all hosts share: mount the bucket."
        )
    out, sizes = Path(config.out).absolute(), config.sizes()
    program = program_for(
        sizes, config.optimizer, config.lr, config.steps, config.mesh, config.accumulate
    )
    shape = program.mesh.shape
    shares = shape["data"] * shape["fsdp"] * config.accumulate
    if config.batch % shares:
        raise ValueError(
            f"--batch={config.batch} has no equal shares for --mesh={config.mesh}"
            f" --accumulate={config.accumulate}: it has to be a multiple of {shares}."
        )
    out.mkdir(parents=True, exist_ok=True)
    corpus, file = open_corpus(config.corpus, sizes.length), config.tokenizer_file()
    if jax.process_index() == 0:
        find_tokenizer(corpus, sizes.vocabulary, file)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    tokenizer = find_tokenizer(corpus, sizes.vocabulary, file)
    sources = validation(corpus, tokenizer, sizes.length, config.validate)
    state_bytes, adamw_bytes = (
        om.state_size(t, program.abstract.params).total_bytes
        for t in (program.tx, optimizers.make("adamw", config.lr))
    )
    tokens_per_second = lambda n, s: n * config.batch * sizes.length / max(s, 1e-9)  # noqa: E731
    params = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    say(
        f"{params / 1e6:.1f} M parameters on {program.mesh.size} of {jax.device_count()} devices,"
        f" tokens of {file}"
    )
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(program.mesh))
        batches = Batches(
            corpus, tokenizer, program.batch, config.batch, sizes.length, config.lanes, config.seed
        )
        stack.callback(batches.close)
        checkpoints = stack.enter_context(
            ocp.training.Checkpointer(
                str(out / "checkpoints"),
                preservation_policy=ocp.training.preservation_policies.LatestN(2),
                cleanup_tmp_directories=True,
            )
        )
        stop = stack.enter_context(stop_signal())
        if checkpoints.latest is None:
            first, state, before = 0, program.init(jax.random.key(config.seed)), 0.0
        else:
            first = checkpoints.latest.step
            state, before = load(checkpoints, program, batches, config)
            say(f"from the checkpoint at step {first}")
        header = ("step", "loss", "gradient_norm")
        losses = stack.enter_context(closing(Table(out / "losses.csv", header, first)))
        header = ("step", "source", "loss")
        validations = stack.enter_context(closing(Table(out / "validation.csv", header, first)))

        waiting: list[tuple[int, jax.Array, jax.Array]] = []
        seconds, mark, found, stopped, finite = 0.0, time.monotonic(), {}, False, True
        step = compiled = first
        while step < config.steps and finite and not stopped:
            state, *values = program.step(state, next(batches))
            step += 1
            waiting.append((step, *values))
            stopped, last = stop(step), step == config.steps
            due = [
                every and step % every == 0 for every in (config.validate_every, config.save_every)
            ]
            if not (
                step - first == 1 or step % config.log_every == 0 or any(due) or last or stopped
            ):
                continue
            # The devices are left to run ahead between these steps.
            rows = [(n, float(loss), float(norm)) for n, loss, norm in jax.device_get(waiting)]
            waiting.clear()
            losses.add(rows)
            finite = all(math.isfinite(loss) for _, loss, _ in rows)
            if step - first == 1:  # the first step compiles
                compiled = step
            else:
                seconds += time.monotonic() - mark
            rate = tokens_per_second(step - compiled, seconds)
            say(
                f"step {step}/{config.steps}  loss {rows[-1][1]:.4f}  {rate:,.0f} tokens/s  "
                f"state {state_bytes / 2**20:.2f} MiB, {state_bytes / adamw_bytes:.1%} of AdamW's"
            )
            if not finite:
                say(f"{config.optimizer} diverged at lr {config.lr:g}")
            if due[0] or last:
                found = evaluate(program, state.params, sources, config.batch)
                validations.add([(step, name, value) for name, value in found.items()])
                say(f"step {step}/{config.steps}  validation {found['all']:.4f}")
            if finite and (due[1] or stopped or last):
                elapsed = before + time.monotonic() - started
                save(checkpoints, step, state, batches, config, elapsed)
            mark = time.monotonic()
        checkpoints.wait()
        if first == config.steps:
            found = evaluate(program, state.params, sources, config.batch)
    if stopped and step < config.steps:
        say(f"stopped at step {step}; the same command goes on from there")
        return None
    result = dataclasses.asdict(config) | {
        "command": config.command(),
        "params": params,
        "loss": final_loss(out / "losses.csv"),
        "validation": found.get("all", math.nan),
        "sources": found,
        "state_bytes": state_bytes,
        "adamw_bytes": adamw_bytes,
        "tokens_per_second": round(tokens_per_second(step - compiled, seconds)),
        "seconds": round(before + time.monotonic() - started, 1),
        "machine": machine(),
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def final_loss(path: Path, steps: int = 20) -> float:
    """Mean training loss of the last steps."""
    with path.open(newline="") as file:
        rows = [float(row["loss"]) for row in csv.DictReader(file)]
    return float(np.mean(rows[-steps:]))


def main() -> None:
    """Runs what the command line says."""
    config = parse()
    if config.coordinator == "auto":
        jax.distributed.initialize()
    elif config.coordinator:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    if run(config) is None:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
