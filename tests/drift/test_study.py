"""The study of drift in small, against NumPy, and its page."""

import csv

import jax
import numpy as np
import pytest

for extra in ("flax", "matplotlib", "sklearn", "typer"):
    pytest.importorskip(extra)

from typer.testing import CliRunner  # noqa: E402

from experiments.drift import run  # noqa: E402


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "STEPS", (3, 6))
    monkeypatch.setattr(run, "WIDTH", 16)
    monkeypatch.setattr(run, "SCALES", (0.5, 1.0))
    names = ("average", "moma", "TSV-M")
    monkeypatch.setattr(run, "METHODS", {name: run.METHODS[name] for name in names})
    return tmp_path


def command(*arguments):
    done = CliRunner().invoke(run.app, arguments)
    assert done.exit_code == 0, (done.output, done.exception)


def accuracy(params, x, y):
    layers = [{k: np.float64(v) for k, v in layer.items()} for layer in params.values()]
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return np.mean(np.argmax(x @ layers[-1]["kernel"] + layers[-1]["bias"], -1) == y)


def test_tasks_are_what_they_are_called():
    image = np.arange(64.0).reshape(1, 8, 8) / 64
    seen = {name: task(image)[0] for name, task in run.TASKS.items()}
    np.testing.assert_array_equal(seen["upside down"], image[0, ::-1, ::-1])
    np.testing.assert_array_equal(seen["turned"][::-1, ::-1], seen["turned back"])
    np.testing.assert_array_equal(seen["mirrored"], image[0, :, ::-1])
    np.testing.assert_array_equal(seen["shifted"][:, 2:], image[0, :, :-2])
    assert len({x.tobytes() for x in seen.values()}) == len(run.TASKS) == 8
    data = run.load(0)
    assert data.train[0].shape == (8, 1000, 64) and data.test[0].shape[1] == len(data.test[1])


def test_study_and_page(small):
    results = ("--results", str(small))
    command("study", "--seeds", "1", *results)
    rows = list(csv.DictReader((small / "drift.csv").read_text().splitlines()))
    assert [(r["steps"], r["method"]) for r in rows] == [
        (steps, name) for steps in ("3", "6") for name in run.METHODS
    ]
    assert float(rows[0]["drift"]) < float(rows[-1]["drift"])

    # The average of the experts, made and scored anew.
    data = run.load(0)
    x, y = data.train
    mixed = x[:, :200].reshape(-1, 64), np.tile(y[:200], 8)
    base, _ = run.fit(run.start(0), *mixed, run.BASE_STEPS, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1000), 8)
    experts = [run.fit(base, own, y, 3, key)[0] for own, key in zip(x, keys, strict=True)]
    mean = jax.tree.map(lambda *leaves: np.mean(np.float64(leaves), axis=0), *experts)
    tests, labels = data.test
    own = [accuracy(e, tests[t], labels) for t, e in enumerate(experts)]
    share = np.mean([accuracy(mean, tests[t], labels) / own[t] for t in range(8)])
    np.testing.assert_allclose(float(rows[0]["default"]), share, atol=2e-3)
    np.testing.assert_allclose(float(rows[0]["experts"]), np.mean(own), atol=1e-3)

    before = (small / "drift.csv").read_text()
    command("study", "--seeds", "1", *results)
    assert (small / "drift.csv").read_text() == before
    page = small / "RESULTS.md"
    command("report", *results, "--page", str(page))
    line = next(x for x in page.read_text().splitlines() if x.startswith("| moma |"))
    assert f"{100 * float(rows[1]['default']):.1f}" in line
    assert (small / "drift.png").read_bytes().startswith(b"\x89PNG")
