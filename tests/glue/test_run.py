"""Every stage from its command, in small, and the report made of what they wrote."""

import csv
import json
import re
from itertools import product

import pytest


@pytest.fixture
def study(small, monkeypatch, tmp_path):
    """The command line on two small tasks, with two methods and few points."""
    from experiments.glue import fisher, merges, run, stages

    opened = small._replace(results=tmp_path / "results")
    monkeypatch.setattr(run, "open_study", lambda *_: opened)
    methods = {name: merges.METHODS[name] for name in ("RegMean (data)", "moma")}
    monkeypatch.setattr(run, "METHODS", methods)
    monkeypatch.setattr(run, "ABLATIONS", {"moma": methods["moma"]})
    monkeypatch.setattr(fisher, "EXAMPLES", 4)
    monkeypatch.setattr(merges, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(merges, "DENSITIES", (0.5,))
    monkeypatch.setattr(stages, "RATE_TASKS", ("cola",))
    monkeypatch.setattr(stages, "SETS", (("cola", "sts"),))
    monkeypatch.setattr(stages.saliency, "DENSITIES", (0.2, 0.9))
    return run, opened


def test_every_stage_and_the_report(study, tmp_path):
    testing = pytest.importorskip("typer.testing")
    from experiments.glue import saliency

    module, opened = study

    def run(*arguments):
        done = testing.CliRunner().invoke(module.app, arguments)
        assert done.exit_code == 0, (done.output, done.exception)

    mine = ("--optimizer", "moma")
    tasks = ("--task", "cola", "--task", "sts")
    run("train", *mine, *tasks)
    run("fisher", *mine, *tasks)
    run("select", *mine, "--task", "cola", "--score", "magnitude")
    with (opened.results / "select.csv").open() as file:
        assert {(r["task"], r["score"]) for r in csv.DictReader(file)} == {("cola", "magnitude")}
    run("select", *mine, *tasks)
    run("merge", *mine, "--size", "2")
    run("together", *mine)
    run("ablate", *mine)
    run("statistics", *mine, *tasks)
    page = tmp_path / "RESULTS.md"
    run("report", "--results", str(opened.results), "--page", str(page))

    text = page.read_text()
    blocks = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end \1 -->", text, re.DOTALL)
    assert [name for name, _ in blocks] == list(module.BLOCKS)
    for name, block in blocks:
        assert re.search(r"\d\.\d", block), name
        for figure in re.findall(r"\(results/(\w+\.png)\)", block):
            assert (opened.results / figure).read_bytes().startswith(b"\x89PNG")
    # The table says what the CSV file holds.
    lines = lambda file: (opened.results / file).read_text().splitlines()
    rows = list(csv.DictReader(lines("merges.csv")))
    shares = [float(r["share"]) for r in rows if (r["method"], r["tuned"]) == ("moma", "True")]
    line = next(x for x in dict(blocks)["merging"].splitlines() if x.startswith("| moma |"))
    assert line.split("|")[2].strip() == f"{50 * sum(shares):.1f}"
    others = [
        float(r["share"]) for r in rows if (r["method"], r["tuned"]) == ("RegMean (data)", "True")
    ]
    other = next(x for x in dict(blocks)["merging"].splitlines() if x.startswith("| RegMean"))
    lead = 50 * (sum(shares) - sum(others))
    able = 100 * (shares[1] - others[1])  # STS; not CoLA
    assert [x.strip() for x in other.split("|")[4:7]] == [f"{lead:.1f}", f"{able:.1f}", "1"]
    # One model of both tasks, in the same file, with the rate that was best on dev.
    joint = [r for r in rows if r["method"].startswith("one model")]
    assert [(r["tuned"], r["task"]) for r in joint] == list(
        product(("False", "True"), ("cola", "sts"))
    )
    tried = [
        r for r in csv.DictReader(lines("merges_tuning.csv")) if r["method"] == joint[0]["method"]
    ]
    assert {r["setting"] for r in tried} == {json.dumps({"learning_rate": r}) for r in (1e-3, 3e-3)}
    assert joint[-1]["setting"] == max(tried, key=lambda r: float(r["score"]))["setting"]
    costs = list(csv.DictReader(lines("fisher.csv")))
    assert all(int(r["curvature_bytes"]) < int(r["fisher_bytes"]) for r in costs)

    # A curve for every score that moma's state gives; nearly the expert where nearly all is kept.
    rows = list(csv.DictReader(lines("select.csv")))
    scores = set(saliency.SCORES) - {"Adam's v", "dense S of the paper"}
    assert {(r["task"], r["score"], r["scope"], float(r["density"])) for r in rows} == set(
        product(("cola", "sts"), scores, ("tensor", "global"), (0.2, 0.9))
    )
    for row in rows:
        if row["density"] == "0.9" and row["score"] in ("magnitude", "exact Fisher"):
            assert float(row["value"]) >= float(row["expert_value"]) - 0.2
    # What is there is not computed again.
    before = {file.name: file.read_text() for file in opened.results.glob("*.csv")}
    run("select", *mine, *tasks)
    run("merge", *mine, "--size", "2")
    run("together", *mine)
    run("statistics", *mine, *tasks)
    assert before == {file.name: file.read_text() for file in opened.results.glob("*.csv")}

    # Prose outside of the blocks stays, the blocks are made anew.
    page.write_text(text.replace("# Results", "# Results\n\nProse.").replace(line, "| old |"))
    run("report", "--results", str(opened.results), "--page", str(page))
    assert page.read_text() == text.replace("# Results", "# Results\n\nProse.")


@pytest.mark.parametrize(("command", "option"), [("merge", "--method"), ("select", "--score")])
def test_unknown_names_are_told(study, command, option):
    testing = pytest.importorskip("typer.testing")
    module, _ = study
    done = testing.CliRunner().invoke(module.app, [command, option, "tie"])
    assert done.exit_code == 2 and "unknown: ['tie']" in done.output


def test_sets_of_other_tasks_are_told(study):
    testing = pytest.importorskip("typer.testing")
    module, _ = study
    done = testing.CliRunner().invoke(module.app, ["merge", "--task", "cola", "--size", "2"])
    assert done.exit_code == 2 and "no set of [2] experts" in done.output
