"""The study: what it plans, that it never repeats a run, and what its report says."""

import dataclasses
import fcntl
import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.pretrain import report, study, train

BASE = train.Config(vocabulary=1024, width=128, layers=4, length=256, batch=8)
STAGES = (
    study.Stage("tune", BASE, ("adamw", "moma:rank=8"), (0,)),
    study.Stage("seeds", BASE, ("adamw", "moma:rank=8"), (0, 1, 2)),
)
BEST = {"adamw": 2e-3, "moma:rank=8": 1.6e-2, "muon": 4e-3}


def pretend(config):
    """A run's result in no time: a parabola in log2 of the rate; seeds differ by a hundredth."""
    away = math.log2(config.lr / BEST[config.optimizer])
    loss = 4 + 0.1 * away**2 + 0.01 * config.seed - 0.5 * (config.optimizer != "adamw")
    diverged = config.lr > 3e-3 and config.optimizer == "adamw"
    return dataclasses.asdict(config) | {
        "loss": loss, "validation": math.nan if diverged else loss, "params": 10**6,
        "state_bytes": 8 * 10**6 if config.optimizer == "adamw" else 8 * 10**5,
        "adamw_bytes": 8 * 10**6, "tokens_per_second": 1000, "seconds": 36.0, "machine": "none",
        "jax": "0", "sources": {"a": loss, "all": loss},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A finished study of two pretended optimizers, and the runs it took."""
    asked = []

    def runner(config):
        asked.append(config)
        return pretend(config)

    assert study.work(STAGES, tmp_path / "results.csv", tmp_path / "runs", runner)
    return tmp_path / "results.csv", asked


def test_tunes_past_the_grid_then_takes_seeds(results):
    _, asked = results
    rates = {
        name: sorted(c.lr for c in asked if c.optimizer == name and c.seed == 0) for name in BEST
    }
    assert rates["adamw"] == list(study.RATES)  # its best is inside, and one diverged
    assert rates["moma:rank=8"] == [*study.RATES, 8e-3, 1.6e-2]
    further = [(c.optimizer, c.lr, c.seed) for c in asked if c.seed]
    assert further == [(n, BEST[n], s) for n in ("adamw", "moma:rank=8") for s in (1, 2)]
    assert len(set(map(study.identity, asked))) == len(asked)


def test_does_not_follow_a_rate_for_ever():
    found = {rate: -rate for rate in study.RATES}
    while further := study.next_rates(found):
        found |= {rate: -rate for rate in further}
    assert max(found) == study.RATES[-1] * study.REACH


def test_a_single_rate_is_not_tuned():
    stages = (study.Stage("part", BASE, ("adamw",), (0, 1), (2e-3,)),)
    first = study.plan(stages, [])
    assert [(job.config.lr, job.config.seed) for job in first] == [(2e-3, 0)]
    rows = [{name: str(value) for name, value in pretend(first[0].config).items()}]
    asked = [(job.config.lr, job.config.seed) for job in study.plan(stages, rows)]
    assert asked == [(2e-3, 0), (2e-3, 1)]


def test_a_finished_run_is_never_repeated(results, tmp_path):
    path, asked = results
    text, count = path.read_text(), len(asked)
    assert study.work(STAGES, path, tmp_path / "runs", pytest.fail)
    assert path.read_text() == text
    # A new optimizer is all that is left to do.
    more = (*STAGES, study.Stage("more", BASE, ("muon",), (0,)))
    assert study.work(more, path, tmp_path / "runs", pretend)
    assert len(study.read(path)) == count + 4


def test_stops_when_a_run_is_stopped(tmp_path):
    assert not study.work(STAGES, tmp_path / "results.csv", tmp_path / "runs", lambda _: None)
    assert study.read(tmp_path / "results.csv") == []


def test_runs_side_by_side_are_the_same_runs(results, tmp_path):
    """As many at a time as there are workers; the plan waits for what a rate depends on."""
    alone, _ = results
    at_once, most, lock = 0, 0, threading.Lock()

    def runner(config):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return pretend(config)

    assert study.work(STAGES, tmp_path / "many.csv", tmp_path / "runs", runner, workers=3)
    assert most == 3
    rows = lambda path: {study.identity(row): row for row in study.read(path)}
    assert rows(tmp_path / "many.csv") == rows(alone)


def test_a_run_that_fails_does_not_keep_the_others(tmp_path):
    def runner(config):
        if config.optimizer == "adamw":
            raise study.RunFailed(f"{config.lr} failed")
        return pretend(config)

    path = tmp_path / "results.csv"
    with pytest.raises(study.RunFailed, match=r"(?s)0.001 failed.*0.004 failed"):
        study.work(STAGES, path, tmp_path / "runs", runner, workers=2)
    assert {row["optimizer"] for row in study.read(path)} == {"moma:rank=8"}
    assert len(study.read(path)) == 7


def test_processes_are_stopped_and_report_failures(new_run, tmp_path):
    config = dataclasses.replace(new_run("run"), steps=10**6, log_every=1)
    processes, found = study.Processes(quiet=True), []
    thread = threading.Thread(target=lambda: found.append(processes(config)))
    thread.start()
    log = Path(config.out) / "log.txt"
    while thread.is_alive() and not (log.exists() and "step 2/" in log.read_text()):
        time.sleep(0.05)
    processes.stop()
    thread.join()
    assert found == [None] and "the same command goes on from there" in log.read_text()
    assert processes(config) is None  # nothing new is started
    wrong = dataclasses.replace(config, out=str(tmp_path / "wrong"), optimizer="sgd")
    with pytest.raises(study.RunFailed, match=r"status 1; see .*log\.txt"):
        study.Processes(quiet=True)(wrong)
    assert "the optimizers are" in (tmp_path / "wrong" / "log.txt").read_text()


def test_a_run_of_a_preset_is_found_again_by_its_sizes():
    config = study.Config(preset="gpt2", steps=3)
    row = {name: str(getattr(config, name)) for name in ("optimizer", "lr", "seed", "batch")}
    row |= {"steps": "3", "vocabulary": "50304", "width": "768", "layers": "12", "length": "1024"}
    assert study.identity(row) == study.identity(config)


def test_two_studies_do_not_run_at_a_time(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="already running"):
            study.work(STAGES, tmp_path / "results.csv", tmp_path, pretend)


def test_every_planned_optimizer_can_be_made():
    from experiments.pretrain import optimizers

    for job in study.plan(study.STAGES + study.LARGE, []):
        optimizers.make(job.config.optimizer, job.config.lr)


def test_code_changes_with_code_and_not_with_comments(tmp_path, monkeypatch):
    file = tmp_path / "_moma.py"
    monkeypatch.setattr(study.om, "__file__", str(tmp_path / "__init__.py"))
    digests = []
    for text in ('"""A."""\nx = 1\n', '"""B."""\nx = 1  # one\n', '"""A."""\nx = 2\n'):
        file.write_text(text)
        digests.append(study.code("moma:rank=8"))
    assert digests[0] == digests[1] != digests[2]
    assert study.code("moma_variant:rank=8") != digests[2]  # which has code of its own
    assert study.code("muon").startswith("optax ")


def test_report(results, tmp_path, monkeypatch, capsys):
    path, _ = results
    page = tmp_path / "RESULTS.md"
    page.write_text("# Prose\n\n<!-- study -->\nold\n<!-- end study -->\n\nmore\n")
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(path), "--page", str(page)])
    report.main()
    assert "width 128, 4 layers, 400 steps of 8 x 256 tokens" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Prose") and text.endswith("more\n") and "old" not in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == len(report.HEADER)}
    # Mean of 4, 4.01 and 4.02, less a half for moma; standard error 0.01 over the root of 3.
    assert table["adamw"][:5] == ["100.0", "0.002", "3", "4.0100 ± 0.0058", "+0.00"]
    assert table["moma:rank=8"][:4] == ["10.0", "0.016", "3", "3.5100 ± 0.0058"]
    assert float(table["moma:rank=8"][4]) == pytest.approx(-100 * 0.5 / 4.01, abs=0.01)
    # Excess over the grid 1, 2, 4e-3: .1, 0 and, diverged, log(1024) - 4.
    area = 0.05 + (math.log(1024) - 4) / 2
    assert float(table["adamw"][5]) == pytest.approx(area / 2, abs=1e-4)
    # moma's lowest lies past the grid: 1.6, 0.9, 0.4.
    assert float(table["moma:rank=8"][5]) == pytest.approx((0.8 + 0.9 + 0.2) / 2, abs=1e-4)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"width128_batch8_{kind}.png"
        for kind in ("state", "rates")  # one rank makes no curve
    }


def test_ranks_are_drawn_from_three_on_beside_the_best_of_others(tmp_path):
    result = lambda loss: report.Tuned(0.1, 2e-3, {(1e-3, 0): 9.0, (2e-3, 0): loss}, None)
    group = {f"moma:rank={r}": result(4.5 - r / 100) for r in (4, 8)}
    group |= {"adamw": result(4.6), "adamw:b1=0.5": result(4.4), "adamw:b2=0.9": result(4.5)}
    group |= {"adafactor:b1=0.9": result(4.6), "adafactor": result(4.5)}
    assert report.references(group) == ["adamw", "adamw:b1=0.5", "adafactor"]
    size = (128, 4, 256, 8, 400)
    assert not any("rank" in link for link in report.figures(size, group, tmp_path))
    group["moma:rank=16"] = result(4.3)
    assert any("rank" in link for link in report.figures(size, group, tmp_path))


def test_a_part_stands_beside_the_whole():
    """With the whole's loss at the same rate and seeds, whether or not that is its best rate; the
    whole is what has not the last argument.
    """
    ran = lambda rate, runs: report.Tuned(0.1, rate, runs, None)
    group = {
        "moma:rank=8": ran(4e-3, {(4e-3, 0): 4.25, (8e-3, 0): 4.5, (4e-3, 1): 4.0, (4e-3, 2): 9.0}),
        "moma_variant:rank=8,residual=0.0": ran(4e-3, {(4e-3, 0): 4.75, (4e-3, 1): 5.0}),
        "moma:rank=8,b1=0.0": ran(8e-3, {(8e-3, 0): 4.25}),
        "moma:rank=8,b1=0.0,b2=0.5": ran(8e-3, {(8e-3, 0): 4.375}),
        "moma_variant:rank=8,refresh=4": ran(4e-3, {(4e-3, 0): 4.0, (4e-3, 3): 4.0}),
        "adamw": ran(4e-3, {(4e-3, 0): 5.0}),
    }
    assert report.part_lines(group) == [
        ("moma_variant:rank=8,refresh=4", "10.0", "0.004", "2", "4.0000 ± 0.0000", "", ""),
        ("moma:rank=8,b1=0.0", "10.0", "0.008", "1", "4.2500", "4.5000", "-0.2500"),
        ("moma:rank=8,b1=0.0,b2=0.5", "10.0", "0.008", "1", "4.3750", "4.2500", "+0.1250"),
        ("moma_variant:rank=8,residual=0.0", "10.0", "0.004", "2", "4.8750 ± 0.1250",
         "4.1250 ± 0.1250", "+0.7500 ± 0.2500"),
        ("adamw", "10.0", "0.004", "1", "5.0000", "5.0000", "+0.0000"),
    ]  # fmt: skip


def test_betas_are_compared_over_the_pairs_that_all_have(tmp_path):
    ran = lambda *losses: report.Tuned(
        0.1, 1e-3, {(r, 0): loss for r, loss in zip(study.RATES, losses, strict=True)}, None
    )
    group = {
        "adamw": ran(5.0, 5.0, 5.0),
        "adamw:b1=0.5": ran(4.5, 5.0, 5.5),
        "adamw:b2=0.95": ran(5.25, 5.5, 6.0),
        "moma:rank=8": ran(4.0, 4.0, 4.0),
        "moma:rank=8,b1=0.5": ran(4.25, 4.25, 4.5),
        "moma:rank=8,b2=0.95": ran(4.5, 4.5, 4.5),
        "moma:rank=8,b1=0.95": ran(9.0, 9.0, 9.0),  # no such run of AdamW
        "moma_variant:rank=8,residual=0.0": ran(9.0, 9.0, 9.0),
        "moma:rank=4,b1=0.5": ran(9.0, 9.0, 9.0),  # too few pairs
    }
    found = report.betas(group)
    assert {name: len(pairs) for name, pairs in found.items()} == {"adamw": 3, "moma:rank=8": 4}
    assert report.betas_lines(found) == [
        ("adamw", "0.5, 0.999", "4.5000", "0.9, 0.95", "5.2500", "+0.4167", "+0.6944"),
        ("moma:rank=8", "0.9, 0.999", "4.0000", "0.9, 0.95", "4.5000", "+0.2500", "+0.2778"),
    ]
    assert "width128_batch8_betas" in report.betas_figure((128, 4, 256, 8, 400), found, tmp_path)


def test_a_real_run_enters_the_study(new_run, tmp_path, capsys):
    base = dataclasses.replace(new_run("unused"), steps=8)
    stages = (study.Stage("small", base, (base.optimizer,), (0,), (5e-3,)),)
    path = tmp_path / "results.csv"
    assert study.work(stages, path, tmp_path / "runs", study.Processes(quiet=False))
    (row,) = study.read(path)
    assert np.isfinite(float(row["validation"]))
    assert row["vocabulary"] == "320" and int(row["state_bytes"]) < int(row["adamw_bytes"])
    assert [source.split("=")[0] for source in row["sources"].split()] == ["essays", "letters"]
    study.show(stages, path, every=True)
    assert "1/1 done" in capsys.readouterr().out
