"""The recipe finds a known optimum, goes on where it stopped, and says what a file lacks."""

import re

import numpy as np
import pytest

from experiments.noise import run, sweep
from experiments.records import Records

typer_testing = pytest.importorskip("typer.testing")

SETUP = '''
"""Merged models are best at noise {best}; branches lie on both sides of their average."""
import numpy as np

def train(noise, pair, branch):
    return {{"w": np.float32([np.log2(noise), (-1) ** branch * (1 + pair)])}}

def evaluate(params):
    depth = (params["w"][0] - np.log2({best})) ** 2 + params["w"][1] ** 2
    return {{"score": -depth, "test": -2 * depth}}
'''


@pytest.mark.parametrize(("best", "found"), [(1.0, 1.0), (2.0, 2.0), (64.0, 64.0), (0.1, 0.0625)])
def test_finds_the_best_noise(best, found, tmp_path):
    """Between two points of the grid, and beyond its end."""
    path = tmp_path / "mine.py"
    path.write_text(SETUP.format(best=best))
    setup = sweep.load(path)
    records = Records(tmp_path / "a.csv", sweep.KEY)
    assert sweep.sweep(setup, records, (0.25, 1.0, 4.0, 16.0), pairs=2) == found
    count = len(records.rows)
    again = Records(tmp_path / "a.csv", sweep.KEY)
    assert sweep.sweep(setup, again, (0.25, 1.0, 4.0, 16.0), pairs=2) == found
    assert len(again.rows) == count
    points = sweep.summary(again, "mine")
    at = next(p for p in points if p.noise == 4.0)
    gap = (2 - np.log2(best)) ** 2
    np.testing.assert_allclose(at.merged, [-gap] * 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(at.single, [-gap - 1, -gap - 4], rtol=1e-4)


def test_advice_says_how_sure_it_is():
    still = lambda noise, merged: sweep.Point(noise, np.zeros(3), np.array(merged))
    today, better = still(1.0, [0.5, 0.6, 0.7]), still(4.0, [0.6, 0.7, 0.81])
    assert "multiply the learning rate by 4 or divide the batch" in sweep.advice([today, better])
    assert "two standard errors" not in sweep.advice([today, better])
    vague = still(4.0, [0.9, 0.3, 0.7])
    assert "within two standard errors" in sweep.advice([today, vague])
    assert sweep.advice([today]) == "Merges are best at 1 times today's noise."


def words(output):
    """What is said, without frames and line ends."""
    return " ".join(re.findall(r"\w+", output))


def test_the_command(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SETUP.format(best=4.0))
    runner = typer_testing.CliRunner()
    arguments = ["sweep", str(path), "--pairs", "2", "--results", str(tmp_path)]
    done = runner.invoke(run.app, arguments)
    assert done.exit_code == 0, done.output
    assert "Merges are best at 4 times today s noise" in words(done.output)
    path.write_text("def train(): ...")
    done = runner.invoke(run.app, arguments)
    assert done.exit_code == 2 and "no function evaluate" in words(done.output)
    done = runner.invoke(run.app, ["sweep", str(tmp_path / "none.py")])
    assert done.exit_code == 2 and "no Python file" in words(done.output)


def test_the_example_runs():
    from pathlib import Path

    pytest.importorskip("sklearn")
    setup = sweep.load(Path(sweep.__file__).parent / "setups" / "digits.py")
    params = [setup.train(4.0, 0, branch) for branch in (0, 1)]
    assert not np.array_equal(*(p["layer0"]["kernel"] for p in params))
    assert setup.evaluate(params[0])["score"] > 0.9
