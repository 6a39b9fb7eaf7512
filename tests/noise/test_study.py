"""The whole study in small: forks, merges, CSV files, and the page made of them."""

import csv
import re

import numpy as np
import pytest

from experiments.noise import report, run
from experiments.noise.forks import Setting
from experiments.noise.stages import Plan, grid

typer_testing = pytest.importorskip("typer.testing")


@pytest.fixture
def plan():
    rates = (1e-3, 1e-2, 1e-1)
    series = {f"sgd, batch {b}": grid("sgd", b, rates, momentum=0.5) for b in (4, 16)}
    series["adamw, constant rate"] = grid("adamw", 4, (1e-3, np.inf), schedule="constant")
    return Plan(series, Setting("sgd", 8, "constant", 0.03, 0.5, 0.0), 8, 12, (0, 1), 3)


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_study_report_and_going_on(problem, plan, tmp_path, monkeypatch):
    results = tmp_path / "results"
    monkeypatch.setitem(run.PLANS, "fashion", lambda: plan)
    monkeypatch.setattr(run, "open_problem", lambda name: problem)

    def invoke(*arguments):
        done = typer_testing.CliRunner().invoke(run.app, arguments)
        assert done.exit_code == 0, (done.output, done.exception)

    invoke("study", "fashion", "--results", str(results))
    forks = rows_of(results / "forks.csv")
    assert len(forks) == 8 * 2
    for row in forks[:-2]:
        gain = float(row["score_merged"]) - (float(row["score_a"]) + float(row["score_b"])) / 2
        assert float(row["gain"]) == pytest.approx(gain, abs=1e-5)
        assert float(row["barrier"]) >= -1e-6 and float(row["exact"]) > 0
    # An infinite learning rate: said, and left out of what follows.
    assert all(np.isnan(float(row["gain"])) for row in forks[-2:])
    estimates = rows_of(results / "estimates.csv")
    assert {int(row["step"]) for row in estimates} == {4, 8, 12}

    before = (results / "forks.csv").read_bytes()
    invoke("study", "fashion", "--results", str(results))
    assert (results / "forks.csv").read_bytes() == before

    page = tmp_path / "RESULTS.md"
    invoke("report", "--results", str(results), "--page", str(page))
    blocks = dict(
        re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end \1 -->", page.read_text(), re.DOTALL)
    )
    assert list(blocks) == [name for name in report.BLOCKS if name != "recipe"]
    for figure in re.findall(r"\(results/(\w+\.png)\)", page.read_text()):
        assert (results / figure).read_bytes().startswith(b"\x89PNG")
    own = [r for r in forks if r["series"] == "sgd, batch 16" and float(r["learning_rate"]) == 0.1]
    merged = 100 * np.mean([float(r["score_merged"]) for r in own])
    assert f"{merged:.1f}" in blocks["shapes"]


def test_language_has_its_own_bytes(tmp_path, monkeypatch):
    import jax

    from experiments.noise import problems
    from experiments.pretrain.model import Config

    text = "\n\x1e\n".join(f"text {n} " * 60 for n in range(40))
    (tmp_path / "a.txt").write_text(text)
    corpus = problems.text.folder(tmp_path, 1000)
    problem = problems.language_problem(
        corpus, Config(vocabulary=256, width=16, layers=1, heads=1, length=problems.LENGTH)
    )
    tokens = problem.train["tokens"]
    assert tokens.shape[1] == problems.LENGTH + 1 and bytes(np.asarray(tokens[0])[:5]) == b"text "
    found = problem.score(problem.init(jax.random.key(0)), problem.test)
    assert float(found["loss"]) == pytest.approx(np.log(256), abs=0.1)


# The measures


def point(series, x, gain):
    gains = np.array([gain, gain])
    nothing = np.zeros(2)
    noise = dict.fromkeys(report.MEASURES, x)
    return report.Point(series, "sgd", "cosine", noise, gains, gains, nothing, nothing, nothing)


def test_a_collapse_explains_everything_and_a_shift_does_not():
    u = lambda x: 1 - (np.log10(x) - 1) ** 2
    gain = lambda p: float(np.mean(p.gains))
    places = 10 ** np.linspace(0, 2, 9)
    one = [point(s, x, u(x)) for s in "abc" for x in places]
    assert report.explained(one, "proxy", gain) == pytest.approx(1)
    apart = [point(s, x, u(x) + 9 * (s == "a")) for s in "abc" for x in places]
    assert report.explained(apart, "proxy", gain) < 0


def test_names_of_shapes():
    def rows(gains):
        base = {"problem": "fashion", "series": "s", "momentum": "0", "weight_decay": "0",
                "optimizer": "sgd", "schedule": "cosine", "batch": "4", "score_a": "0.5",
                "score_b": "0.5", "loss_gain": "0", "barrier": "0"}  # fmt: skip
        names = ("proxy", "logged", "moments", "exact", "adaptive", "learning_rate")
        return [
            base | dict.fromkeys(names, str(x)) | {"gain": str(g + e), "score_merged": "0.5"}
            for x, g in zip((1, 10, 100), gains, strict=True)
            for e in (-0.001, 0.001)
        ]  # fmt: skip

    for gains, shape in (
        ((0, 0.1, 0), "inverted U"), ((0, 0.1, 0.1), "rises"), ((0.1, 0.1, 0), "falls"),
        ((0, 0, 0), "flat"),
    ):  # fmt: skip
        assert f"| {shape} |" in report.shapes(rows(gains), None)
