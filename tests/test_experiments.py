"""A small version of every experiment runs."""

import csv
import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_moma as om

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def script(name):
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_update_cost(tmp_path, monkeypatch):
    module = script("update_cost")
    small = {name: module.MODELS[name] for name in ("768 x 768", "GPT-2")}
    monkeypatch.setattr(module, "MODELS", small)
    monkeypatch.setattr(module, "TIMED", ("adamw", "moma r=32"))
    out = tmp_path / "results.csv"
    arguments = ["--rounds", "1", "--shape", "128", "256", "--size", "256", "--output", str(out)]
    module.app(arguments, standalone_mode=False)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    state = {
        (r["optimizer"], r["shape"]): float(r["relative"]) for r in rows if "state" in r["what"]
    }
    assert state["adamw", "GPT-2"] == 100
    assert state["moma r=32", "GPT-2"] < 3.5
    assert {r["what"] for r in rows if r["what"].startswith("time")} == {
        "time, state donated",
        "time, nothing donated",
    }


def test_gpt2_cost(tmp_path, monkeypatch):
    """Every measurement on small shapes, one after the other into one file."""
    pytest.importorskip("flax")
    from experiments.pretrain.model import Config
    from experiments.update_cost import gpt2 as module

    monkeypatch.setattr(module, "SHAPES", {(128, 256): 3, (256, 128): 1})
    monkeypatch.setattr(module, "MEASURED", ("moma r=32",))
    monkeypatch.setattr(module, "STEPS", {"adamw": "adamw", "moma r=32": "moma:rank=4"})
    monkeypatch.setitem(module.OPTIMIZERS, "moma r=32", module.OPTIMIZERS["moma r=8"])
    monkeypatch.setattr(module, "gpt2", lambda: {"a": (512, 256), "b": (256,)})
    small = Config(vocabulary=256, width=128, layers=2, length=16, scan=True)
    monkeypatch.setattr(module.model, "gpt2", lambda **_: small)
    out = tmp_path / "gpt2.csv"

    def measured(*arguments):
        module.app([*arguments, "--output", str(out)], standalone_mode=False)
        rows = list(csv.DictReader(out.read_text().splitlines()))
        return {(r["what"], r["case"], r["optimizer"]): r for r in rows}

    measured("memory")
    measured("published")
    rows = measured("step", "--rounds", "2", "--length", "16")
    value = lambda case, column: float(rows["published", case, "umtam r=32"][column])
    total = 3 * value("128 x 256", "value") + value("256 x 128", "value")
    assert value("all 4 matrices", "value") == pytest.approx(total, rel=1e-3)
    both = "update and apply, both donated"
    assert rows["memory", both, "adamw"]["of_reference"] == "1"
    assert float(rows["memory", both, "moma r=32"]["value"]) > 0
    step = rows["step", "32 tokens, float32", "moma r=32"]
    rounds, _, low, _, high = step["detail"].split()
    assert rounds == "2" and 0 < float(low) <= float(step["of_reference"]) <= float(high)


def test_truncation():
    """More iterations lose less, and never less than the SVD."""
    pytest.importorskip("flax")
    module = script("truncation")
    keys = jax.random.split(jax.random.key(0), 4)
    stream = module.preconditioned([jax.random.normal(key, (48, 40)) for key in keys])
    found = {n: module.losses(stream, rank=4, iterations=n) for n in (1, 3)}
    assert all(lost >= 0.9999 * best for pairs in found.values() for lost, best in pairs)
    once, thrice = (jnp.asarray(found[n])[:, 0].sum() for n in (1, 3))
    assert thrice < once


def test_mergekit_comparison(tmp_path, monkeypatch):
    """Ours from both formats, with the comparison's own recipes; and what it would start."""
    for extra in ("orbax.checkpoint", "safetensors", "typer"):
        pytest.importorskip(extra)
    from optax_moma import checkpoints

    module = script("mergekit_comparison")
    small = ["--layers", "2", "--width", "28", "--hidden", "40", "--vocabulary", "50"]
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", lambda dir: nullcontext(tmp_path))
    output = tmp_path / "results.csv"
    arguments = ["run.py", *small, "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        module.app()
    assert stopped.value.code == 0
    rows = {row["what"]: row for row in csv.DictReader(output.read_text().splitlines())}
    assert rows.keys() == {"ours, safetensors", "ours, Orbax"}
    assert all(float(row["cpu_s"]) > 0 and float(row["wall_s"]) > 0 for row in rows.values())
    # Both formats, the same bits: those of the merge in memory.
    names = ("base", *module.EXPERTS)
    base, *experts = (checkpoints.load(tmp_path / f"{name}.safetensors") for name in names)
    want = om.merge(om.merging.mergekit.ties(module.DENSITY), experts, base=base)
    one, two = (checkpoints.load(tmp_path / name) for name in ("ours.safetensors", "ours"))
    assert len(jax.tree.leaves(want)) == 26
    for x, y, z in zip(*map(jax.tree.leaves, (want, one, two)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    theirs = module.commands(tmp_path, Path("env/bin/python"))["mergekit"]
    assert theirs[0] == str(Path("env/bin/mergekit-pytorch"))
    recipe = json.loads(Path(theirs[1]).read_text())
    assert recipe["merge_method"] == "ties" and len(recipe["models"]) == 3


def test_streaming(tmp_path):
    """Beside two copies, in processes of their own, and what the plan predicts."""
    pytest.importorskip("orbax.checkpoint")
    module = script("streaming")
    module.write_models(tmp_path, module.transformer(1, 32, 64), "float32", k=2)
    rows = module.measured(tmp_path, ["average"], rounds=1, chunk_bytes=1 << 20, launcher="")
    assert [row["method"] for row in rows] == [module.COPY, module.COPY_AND_BASE, "average"]
    assert rows[0]["seconds_ratio"] == "1.000" and float(rows[2]["cpu"]) > 0
    assert 0 < float(rows[2]["compile_seconds"]) < float(rows[2]["seconds"])
    assert float(rows[2]["predicted_mb"]) > 0 and not (tmp_path / module.MERGED).exists()


def test_plan_of_metadata_alone(tmp_path):
    """A large checkpoint of which nothing is stored is planned as if it were all there."""
    pytest.importorskip("orbax.checkpoint")
    from optax_moma import checkpoints

    module = script("streaming")
    shapes = module.large_transformer(2, 4096, 11008, 32000)
    abstract = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = jax.tree.map(abstract, shapes, is_leaf=lambda x: isinstance(x, tuple))
    state = jax.eval_shape(om.scale_by_moma(rank=8).init, params)
    module.write_metadata(tmp_path / "base", params)
    module.write_metadata(tmp_path / "a", {"params": params, "opt_state": state._asdict()})
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 1e6
    recipe = {"base": str(tmp_path / "base"), "experts": {"a": str(tmp_path / "a")}}
    found = checkpoints.plan({**recipe, "method": "ties"})
    size = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 2 * 32000 * 4096
    assert found.problems == [] and found.parameters == size
    assert found.read_bytes == 2 * 2 * size and found.write_bytes == 2 * size


def test_a_line_replaces_the_one_of_its_key(tmp_path):
    from experiments import records

    path = tmp_path / "results.csv"
    for case, value in (("a", 1), ("b", 2), ("a", 3)):
        records.replace(path, ("case",), {"case": case, "value": value})
    assert path.read_text() == "case,value\na,3\nb,2\n"


def test_recorded_command_names_no_folder(monkeypatch):
    """Results may be written anywhere; the command is the one that fills the repository's."""
    from experiments import records

    arguments = ["text", "sst2", "--results", "elsewhere/results", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert records.command().startswith("python ")
    assert records.command().endswith(" text sst2 --rounds 2")
