"""The commands on checkpoints: what they print, and their exit codes."""

import json

import numpy as np
import pytest

ocp = pytest.importorskip("orbax.checkpoint").v1
typer_testing = pytest.importorskip("typer.testing")

from optax_moma import checkpoints  # noqa: E402
from optax_moma.checkpoints._recipe import METHODS  # noqa: E402
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
        adam = {"count": np.array(20), "mu": {"layers_0": {"kernel": kernel}}}
        adam["nu"] = {"layers_0": {"kernel": kernel**2}}
        tree = {"params": {"layers_0": {"kernel": kernel}}, "opt_state": [adam]}
        ocp.save(tmp_path / name, tree if name != "base" else tree["params"])
    recipe = {"base": "base", "experts": {"a": "a", "b": "b"}, "method": "moma"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_inspect(folder):
    done = run("inspect", folder / "a", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["leaves"]["params/layers_0/kernel"] == [[8, 6], "float32"]
    assert (found["params"], found["covered"], found["wanted"]) == ("params", 1, 1)
    assert (found["curvature"], found["gradients"]) == ("adam (opt_state/0)", 20)
    text = run("inspect", folder / "a").stdout
    assert "adam (opt_state/0): 1 of 1 leaf, 20 gradients" in text
    assert row(text, "params") == ["params", "1", "48", "192 bytes", "float32"]
    assert row(text, "layers_0/kernel") == ["layers_0/kernel", "1", "8 x 6", "float32"]
    assert "opt_state/0/nu" not in text
    assert "opt_state/0/nu/layers_0/kernel" in run("inspect", folder / "a", "--all").stdout
    assert "none" in run("inspect", folder / "base").stdout
    assert run("inspect", folder / "nothing").exit_code == 2


def row(text, start):
    """The cells of the first line that starts with a text."""
    line = next(line for line in text.splitlines() if line.startswith(start + " "))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_inspect_puts_layers_on_one_line(tmp_path):
    tree = {f"l_{i}": {"w": np.ones((2, 3 + i % 2), np.float32)} for i in range(6)}
    ocp.save(tmp_path / "deep", {"params": tree, "other": {"params": np.ones(2)}})
    text = run("inspect", tmp_path / "deep").stdout
    assert row(text, "l_{0,2,4}/w") == ["l_{0,2,4}/w", "3", "2 x 3", "float32"]
    assert row(text, "l_{1,3,5}/w") == ["l_{1,3,5}/w", "3", "2 x 4", "float32"]
    assert row(text, "all") == ["all", "7", "44", "184 bytes", "float32, float64"]
    done = run("inspect", tmp_path / "deep", "--params", "other.params")
    assert done.exit_code == 0 and "params     other/params" in done.stdout
    done = run("inspect", tmp_path / "deep", "--params", "othr", "--json")
    assert done.exit_code == 2 and "did you mean 'other'" in json.loads(done.stdout)["error"]


def test_steps(tmp_path):
    v0 = pytest.importorskip("orbax.checkpoint")
    with v0.CheckpointManager(tmp_path / "run") as manager:
        for step in (5, 10):
            tree = {"w": np.full(3, step, np.float32)}
            manager.save(step, args=v0.args.StandardSave(tree))
    done = run("inspect", tmp_path / "run")
    assert done.exit_code == 2 and "the steps 5, 10; name one" in done.stderr
    found = json.loads(run("inspect", tmp_path / "run", "--step", "latest", "--json").stdout)
    assert found["step"] == 10
    assert ", step 5\n" in run("inspect", tmp_path / "run", "--step", "5").stdout
    assert "a number or latest" in run("inspect", tmp_path / "run", "--step", "last").stderr

    assert checkpoints.load(tmp_path / "run", step=5)["w"].tolist() == [5, 5, 5]
    assert checkpoints.load(tmp_path / "run", step="latest")["w"].tolist() == [10, 10, 10]
    # A run of steps with a base that has none.
    ocp.save(tmp_path / "base", {"w": np.full(3, 4, np.float32)})
    done = run("compare", tmp_path / "base", tmp_path / "run")
    assert done.exit_code == 2 and "name one with step:" in done.stderr
    for step, drift in (("5", 0.25), ("latest", 1.5)):
        done = run("compare", tmp_path / "base", tmp_path / "run", "--step", step, "--json")
        assert json.loads(done.stdout)[0]["drift"] == [drift]


def test_items(tmp_path):
    for name, start in (("base", 1), ("a", 2)):
        trees = {item: {"w": np.full(3, start * n, np.float32)} for n, item in ((1, "x"), (3, "y"))}
        ocp.save_checkpointables(tmp_path / name, trees)
    done = run("compare", tmp_path / "base", tmp_path / "a")
    assert done.exit_code == 2 and "name one with item:" in done.stderr
    done = run("compare", tmp_path / "base", tmp_path / "a", "--item", "y", "--json")
    assert json.loads(done.stdout)[0]["drift"] == [1.0]
    assert checkpoints.load(tmp_path / "a", item="y")["w"].tolist() == [6, 6, 6]


def test_plan(folder):
    done = run("plan", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["coverage"] == {"a": [1, 1], "b": [1, 1]}
    assert found["rules"] == [
        {"match": "(no rule)", "action": "moma: 1 matrix", "names": ["layers_0/kernel"]}
    ]
    assert [model["gradients"] for model in found["models"]] == [None, 20, 20]
    text = run("plan", folder / "recipe.yaml", "--leaves").stdout
    assert "1 leaf of 48 numbers: reads" in text and "The merge can start." in text
    assert row(text, "(no rule)") == ["(no rule)", "1", "moma: 1 matrix"]
    assert row(text, "a")[-2:] == ["adam 1/1", "20"]
    assert "\n  layers_0/kernel\n" in text

    (folder / "bad.yaml").write_text("method: average\nexperts: {a: nowhere, b: nowhere2}")
    done = run("plan", folder / "bad.yaml", "--json")
    assert done.exit_code == 2 and len(json.loads(done.stdout)["problems"]) == 2
    assert "2 problems: the merge cannot start." in run("plan", folder / "bad.yaml").stdout
    (folder / "typo.yaml").write_text("metod: average\nexperts: {a: a}")
    done = run("plan", folder / "typo.yaml")
    assert done.exit_code == 2 and "did you mean 'method'" in done.stderr


def test_plan_warns(folder):
    recipe = json.loads((folder / "recipe.yaml").read_text())
    recipe["experts"]["a"] = {"path": "a", "curvature": {"path": "young"}}
    (folder / "old.yaml").write_text(json.dumps(recipe))
    kernel = np.ones((8, 6), np.float32)
    moments = {"layers_0": {"kernel": kernel}}
    adam = {"count": np.array(3), "mu": moments, "nu": moments}
    ocp.save(folder / "young", {"params": moments, "opt_state": [adam]})
    done = run("plan", folder / "old.yaml")
    assert done.exit_code == 0
    assert "warning: the curvature of expert 'a' is noisy: it was estimated from 3" in done.stdout
    done = run("merge", folder / "old.yaml", folder / "merged")
    assert done.exit_code == 0 and "warning: the curvature of expert 'a'" in done.stdout


def test_merge_and_verify(folder):
    done = run("merge", folder / "recipe.yaml", folder / "out", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["leaves"] == 1
    checkpoints.merge(folder / "recipe.yaml", folder / "python")
    one, other = (checkpoints.load(folder / n)["layers_0"]["kernel"] for n in ("out", "python"))
    assert np.array_equal(one, other)

    done = run("merge", folder / "recipe.yaml", folder / "out")
    assert done.exit_code == 2 and "exists; name another output" in done.stderr
    done = run("merge", folder / "recipe.yaml", folder / "out", "--force")
    assert done.exit_code == 0 and "192 bytes written" in done.stdout and "B/s" in done.stdout

    done = run("verify", folder / "out")
    assert done.exit_code == 0 and "1 leaf, 192 bytes, all as it was written" in done.stdout
    (folder / "out/extra").write_text("")
    done = run("verify", folder / "out", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"] == ["the file extra is not in the manifest"]
    assert "extra" in run("verify", folder / "out").stderr
    assert run("verify", folder / "base").exit_code == 2


def test_problems_as_json_and_as_text(folder):
    (folder / "bad.yaml").write_text("method: average\nexperts: {a: nowhere, b: nowhere2}")
    done = run("merge", folder / "bad.yaml", folder / "out", "--json")
    assert done.exit_code == 2 and not (folder / "out").exists()
    found = json.loads(done.stdout)
    assert found["error"] == "Cannot merge," and len(found["problems"]) == 2
    assert "error: Cannot merge, 2 problems:" in done.stderr
    assert [line.startswith("- expert") for line in done.stderr.splitlines()[1:]] == [True, True]


def test_an_interruption_says_how_to_go_on(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "merge", interrupted)
    done = run("merge", folder / "recipe.yaml", folder / "out")
    assert done.exit_code == 130 and "goes on where it was" in done.stderr


def test_compare(folder):
    done = run("compare", folder / "base", folder / "a", folder / "b", "--json")
    (leaf,) = json.loads(done.stdout)
    assert done.exit_code == 0 and len(leaf["drift"]) == 2 and 0 < leaf["overlap"] <= 1
    assert leaf["trouble"] == pytest.approx(max(leaf["drift"]) * leaf["conflict"])
    text = run("compare", folder / "base", folder / "a", folder / "b").stdout
    cells = row(text, "layers_0/kernel")
    shown = [max(leaf["drift"]), leaf["conflict"], leaf["overlap"], leaf["trouble"]]
    assert cells[1:] == [f"{x:.3g}" for x in shown]
    assert len(row(run("compare", folder / "base", folder / "a").stdout, "layers_0/kernel")) == 2


def test_export_curvature(folder):
    file = folder / "a.safetensors"
    done = run("export-curvature", folder / "a", file)
    assert done.exit_code == 0 and file.exists()
    done = run("export-curvature", folder / "a", file)
    assert done.exit_code == 2 and "force" in done.stderr
    done = run("export-curvature", folder / "a", file, "--force", "--json", "--tree", "opt_state")
    assert json.loads(done.stdout) == {"path": str(file), "bytes": file.stat().st_size}
    assert run("export-curvature", folder / "base", folder / "b.safetensors").exit_code == 2


def test_methods():
    found = json.loads(run("methods", "--json").stdout)
    kinds = {x["name"]: x["kind"] for x in found}
    assert kinds.keys() == METHODS.keys()
    told = {name: kinds[name] for name in ("moma", "average", "peft.ties", "trim", "regmean")}
    assert list(told.values()) == [
        "with base and curvature",
        "without a base",
        "as other libraries do",
        "step, for a list of them",
        "not in a recipe",
    ]
    assert row(run("methods").stdout, "ties")[1] == next(
        x["summary"] for x in found if x["name"] == "ties"
    )
    done = run("methods", "trim")
    assert done.stdout.startswith("method: {name: trim, density: ..., by: magnitude, power: 1.0,")
    assert "Share of entries kept" in done.stdout
    options = json.loads(run("methods", "trim", "--json").stdout)["options"]
    assert (options["density"], options["by"]) == ({"required": True}, {"default": "magnitude"})
    done = run("methods", "breadcrumbs_ties")
    assert done.exit_code == 2 and "did you mean 'mergekit.breadcrumbs_ties'?" in done.stderr


def test_the_keys_of_a_recipe_are_in_the_help():
    told = run("plan", "--help").stdout
    assert [key for key in checkpoints.Recipe.model_fields if f" {key}:" not in told] == []


@pytest.mark.parametrize(
    "command", ["inspect", "methods", "plan", "merge", "compare", "verify", "export-curvature"]
)
def test_help(command):
    done = typer_testing.CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0 and "--json" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "Exit codes" in run("--help").stdout
