"""The commands on checkpoints: what they print, and their exit codes."""

import json

import numpy as np
import pytest

ocp = pytest.importorskip("orbax.checkpoint").v1
typer_testing = pytest.importorskip("typer.testing")

from optax_moma import checkpoints  # noqa: E402
from optax_moma.cli import app  # noqa: E402


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    base = {"layers_0": {"kernel": rng.normal(size=(8, 6)).astype(np.float32)}}
    for name in ("base", "a", "b"):
        noise = 0.1 * rng.normal(size=(8, 6)) * (name != "base")
        kernel = (base["layers_0"]["kernel"] + noise).astype(np.float32)
        adam = {"count": np.array(3), "mu": {"layers_0": {"kernel": kernel}}}
        adam["nu"] = {"layers_0": {"kernel": kernel**2}}
        tree = {"params": {"layers_0": {"kernel": kernel}}, "opt_state": [adam]}
        ocp.save(tmp_path / name, tree if name != "base" else tree["params"])
    recipe = {"base": "base", "experts": {"a": "a", "b": "b"}, "method": "moma"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_inspect(folder):
    done = run("inspect", folder / "base", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"layers_0/kernel": [[8, 6], "float32"]}
    assert "layers_0/kernel" in run("inspect", folder / "base").stdout
    assert run("inspect", folder / "nothing").exit_code == 2


def test_plan(folder):
    done = run("plan", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["coverage"] == {"a": [1, 1], "b": [1, 1]}
    assert "1 leaves" in run("plan", folder / "recipe.yaml").stdout
    (folder / "bad.yaml").write_text("method: average\nexperts: {a: nowhere, b: nowhere2}")
    done = run("plan", folder / "bad.yaml", "--json")
    assert done.exit_code == 2 and len(json.loads(done.stdout)["problems"]) == 2
    (folder / "typo.yaml").write_text("metod: average\nexperts: {a: a}")
    done = run("plan", folder / "typo.yaml")
    assert done.exit_code == 2 and "did you mean 'method'" in done.stderr


def test_merge_and_verify(folder):
    done = run("merge", folder / "recipe.yaml", folder / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["leaves"] == 1
    checkpoints.merge(folder / "recipe.yaml", folder / "python")
    one, other = (checkpoints.load(folder / n)["layers_0"]["kernel"] for n in ("out", "python"))
    assert np.array_equal(one, other)

    assert run("merge", folder / "recipe.yaml", folder / "out").exit_code == 2
    done = run("merge", folder / "recipe.yaml", folder / "out", "--force")
    assert done.exit_code == 0 and "GB/s" in done.stdout

    assert run("verify", folder / "out").exit_code == 0
    (folder / "out/extra").write_text("")
    done = run("verify", folder / "out", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"] == ["the file extra is not in the manifest"]
    assert "extra" in run("verify", folder / "out").stderr
    assert run("verify", folder / "base").exit_code == 2


def test_compare(folder):
    done = run("compare", folder / "base", folder / "a", folder / "b", "--json")
    (leaf,) = json.loads(done.stdout)
    assert done.exit_code == 0 and len(leaf["drift"]) == 2 and 0 < leaf["overlap"] <= 1
    assert "layers_0/kernel" in run("compare", folder / "base", folder / "a").stdout


def test_export_curvature(folder):
    file = folder / "a.safetensors"
    done = run("export-curvature", folder / "a", file)
    assert done.exit_code == 0 and file.exists()
    assert run("export-curvature", folder / "a", file).exit_code == 2
    assert run("export-curvature", folder / "base", folder / "b.safetensors").exit_code == 2
