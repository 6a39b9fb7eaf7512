"""A small version of every experiment runs."""

import csv
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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
    out = tmp_path / "results.csv"
    arguments = ["--rounds", "1", "--shape", "128", "256", "--size", "256", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    module.main()
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
