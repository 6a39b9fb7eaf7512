"""Training: resumption bit for bit, the same losses on any mesh, one compilation, honest tables."""

import csv
import dataclasses
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.pretrain import train
from experiments.pretrain.data import Batches

ROOT = Path(__file__).parents[2]
MODULE = "experiments.pretrain.train"


def losses(config) -> list[tuple[str, str, str]]:
    """The rows of a run's losses, as they stand in the file."""
    with (Path(config.out) / "losses.csv").open() as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def values(config) -> np.ndarray:
    return np.array([float(loss) for _, loss, _ in losses(config)])


class Killed(Exception):
    """Stands for the end of the process."""


def kill_before_step(monkeypatch, step: int) -> None:
    """The run ends without warning when it asks for the batch of this step."""
    taken, take = [], Batches.__next__

    def next_or_die(self):
        taken.append(1)
        if len(taken) == step:
            raise Killed
        return take(self)

    monkeypatch.setattr(Batches, "__next__", next_or_die)


MOMA = "moma:rank=4,min_dim_size_to_factor=32"


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """A run of 50 steps on one device, and the same on eight; what the second returned."""
    one, eight = (
        dataclasses.replace(
            small, out=str(tmp_path_factory.mktemp(name)), steps=50, validate_every=20, mesh=mesh
        )
        for name, mesh in (("one", "1,1,1"), ("eight", "2,2,2"))
    )
    train.run(one)
    return one, eight, train.run(eight)


@pytest.fixture(scope="module", params=[MOMA, "galore:rank=4"], ids=["moma", "galore"])
def unbroken(request, small, tmp_path_factory):
    """A run of 14 steps, and what it returned."""
    out = tmp_path_factory.mktemp("unbroken")
    tokenizer = str(Path(small.out).parent / "bpe320.json")
    config = dataclasses.replace(
        small, out=str(out), tokenizer=tokenizer, steps=14, save_every=3, optimizer=request.param
    )
    return config, train.run(config)


def test_a_run(pair):
    _, config, result = pair
    assert result == json.loads((Path(config.out) / "result.json").read_text())
    assert [int(step) for step, _, _ in losses(config)] == list(range(1, 51))
    assert values(config)[-5:].mean() < 0.7 * values(config)[0]
    assert result["loss"] == pytest.approx(values(config)[-20:].mean())
    with (Path(config.out) / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows[::3]] == ["20", "40", "50"]
    found = {row["source"]: float(row["loss"]) for row in rows[-3:]}
    assert found.keys() == {"essays", "letters", "all"}
    assert found["all"] == result["validation"] < float(rows[2]["loss"])
    assert result["state_bytes"] < 0.4 * result["adamw_bytes"]
    command = shlex.split(result["command"])
    assert train.parse(command[3:]) == config


def test_eight_devices_are_one(pair):
    """Over 50 steps; float32 sums in another order are the only difference."""
    one, eight, _ = pair
    np.testing.assert_allclose(values(eight), values(one), rtol=1e-4)


def test_compiles_once(pair):
    for config in pair[:2]:
        program = train.program_for(
            config.sizes(), config.optimizer, config.lr, config.steps, config.mesh, 1
        )
        assert program.step._cache_size() == program.losses._cache_size() == 1


def test_parts_of_a_batch_are_the_batch(pair):
    """On four devices in two parts, and on one device in one."""
    config, found = pair[0], []
    tokens = np.random.default_rng(0).integers(0, 320, (3, config.batch, config.length + 1))
    for mesh, parts in (("1,1,1", 1), ("2,2,1", 2)):
        program = train.program_for(
            config.sizes(), config.optimizer, config.lr, config.steps, mesh, parts
        )
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(0))
            for batch in tokens.astype(np.int32):
                state, *values = program.step(state, batch)
                found.append([float(x) for x in values])
    np.testing.assert_allclose(found[3:], found[:3], rtol=2e-5)


@pytest.mark.parametrize("killed", [5, 12])
def test_goes_on_after_a_kill(killed, unbroken, tmp_path, monkeypatch):
    whole, expected = unbroken
    broken = dataclasses.replace(whole, out=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_step(patch, killed)
        train.run(broken)
    # Rows that were written after the checkpoint, one of them cut short, are written again.
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("12,0.5,0.5\n13,0.")
    found = train.run(broken)
    assert losses(broken) == losses(whole)
    assert found["validation"] == expected["validation"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"12", "14"}
    assert found["seconds"] > 0


def test_stops_at_sigterm(unbroken, tmp_path, monkeypatch):
    """In this process, between two steps; the next run goes on from there."""
    whole, _ = unbroken
    config, taken, take = dataclasses.replace(whole, out=str(tmp_path)), [], Batches.__next__

    def next_and_signal(self):
        taken.append(1)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", next_and_signal)
        assert train.run(config) is None
    assert len(losses(config)) == 5
    assert not (tmp_path / "result.json").exists()
    assert train.run(config) is not None
    assert losses(config) == losses(whole)


def test_does_not_go_on_with_another_run(unbroken):
    config, _ = unbroken
    with pytest.raises(ValueError, match=r"--lr was 0.005, is 0.1; --steps was 14, is 20\. Give"):
        train.run(dataclasses.replace(config, lr=0.1, steps=20, log_every=1))


def test_corpora_have_tokenizers_of_their_own():
    files = [
        train.Config(out="runs/first", corpus=corpus).tokenizer_file().name
        for corpus in ("", "fineweb:sample-10BT", "/texts/*.parquet")
    ]
    assert files == [
        "bpe4096.json",
        "bpe4096-fineweb-sample-10BT.json",
        "bpe4096-texts-parquet.json",
    ]
    assert train.Config(tokenizer="mine.json").tokenizer_file() == Path("mine.json")


def test_help_says_what_every_option_is(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--lr peak learning rate. [0.004]" in said
    assert "trained and saved there. By default beside the run's folder" in said


def test_a_finished_run_only_validates(unbroken):
    config, first = unbroken
    rows = losses(config)
    assert train.run(config)["validation"] == first["validation"]
    assert losses(config) == rows


def test_says_that_it_diverged(new_run, capsys):
    config = new_run("run", lr=1e30, steps=30, optimizer="adamw")
    result = train.run(config)
    assert np.isnan(result["loss"]) and np.isnan(result["validation"])
    assert "diverged" in capsys.readouterr().out
    assert not list((Path(config.out) / "checkpoints").iterdir())


def test_bfloat16_scanned_and_rematerialised(new_run):
    config = new_run("run", steps=24, scan=True, remat=True, layers=2, dtype="bfloat16")
    train.run(config)
    assert values(config)[0] == pytest.approx(np.log(320), rel=0.02)
    assert values(config)[-3:].mean() < 0.8 * values(config)[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "2,2"}, "three sizes"),
        ({"lanes": 3}, "3 equal lanes"),
        ({"preset": "huge"}, "small or gpt2"),
        ({"mesh": "3,-1,1"}, "does not lay out 8 devices"),
        ({"mesh": "0,-1,1"}, "does not lay out 8 devices"),
        ({"mesh": "2,2,2", "accumulate": 3}, "a multiple of 12"),
        ({"dtype": "bf16"}, "float32 or bfloat16"),
        ({"heads": 3}, "3 heads do not divide a width of 64"),
        ({"out": "gs://bucket/run"}, "mount the bucket"),
    ],
)
def test_says_what_is_wrong(changes, said, new_run):
    with pytest.raises(ValueError, match=said):
        train.run(dataclasses.replace(new_run("run"), **changes))


# What follows starts processes, as a user does.


def start(config, devices: int = 1) -> subprocess.Popen:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    command = [sys.executable, "-m", MODULE, *config.arguments()]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


def rows_in(path: Path) -> int:
    return path.read_text().count("\n") - 1 if path.exists() else 0


def finish(process: subprocess.Popen, status: int = 0) -> None:
    assert process.wait(timeout=600) == status


@pytest.mark.slow
def test_sigkill_at_five_random_steps(new_run):
    settings = {"steps": 120, "save_every": 5, "log_every": 1, "mesh": "-1,1,1"}
    unbroken, broken = new_run("unbroken", **settings), new_run("broken", **settings)
    finish(start(unbroken))
    path = Path(broken.out) / "losses.csv"
    for step in sorted(np.random.default_rng(0).choice(np.arange(2, 115), 5, replace=False)):
        process = start(broken)
        while rows_in(path) <= step:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (Path(broken.out) / "result.json").exists()
    finish(start(broken))
    assert losses(broken) == losses(unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8,1,1", "2,2,2"])
def test_two_processes_are_one(mesh, new_run):
    """Two processes of four devices; stopped by SIGTERM at one of them on the way."""
    settings = {"steps": 50, "save_every": 25, "log_every": 1, "mesh": mesh}
    one, two = new_run("one", **settings), new_run("two", **settings)
    finish(start(one, devices=8))
    path = Path(two.out) / "losses.csv"
    for signalled in (True, False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        pair = [
            start(dataclasses.replace(two, coordinator=address, processes=2, process=i), devices=4)
            for i in range(2)
        ]
        if signalled:
            while rows_in(path) <= 10:
                assert all(process.poll() is None for process in pair)
                time.sleep(0.01)
            pair[1].terminate()
        for process in pair:
            finish(process, 128 + signal.SIGTERM if signalled else 0)
    assert [step for step, _, _ in losses(two)] == [str(i) for i in range(1, 51)]
    np.testing.assert_allclose(values(two), values(one), rtol=1e-4)
