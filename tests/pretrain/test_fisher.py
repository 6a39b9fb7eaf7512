"""Second moments against the Fisher: what is ranked, and that it is what it says."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

import optax_moma as om
from experiments.pretrain import fisher, program, side


def test_what_is_compared_with_what():
    keys = jax.random.split(jax.random.key(0), 4)
    start, params, F, g = ({"a": jax.random.normal(key, (8, 16))} for key in keys)
    tx = optax.scale_by_adam()
    opt_state = tx.update(g, tx.init(params))[1]
    found = {
        estimate: (leaf, rho, entries)
        for estimate, leaf, rho, entries in fisher.compared(
            program.State(params, opt_state), start, jax.tree.map(jnp.square, F)
        )
    }
    d, v, F = (
        (np.asarray(x, np.float64) ** 2).ravel() for x in (params["a"] - start["a"], g["a"], F["a"])
    )
    for estimate, pair in {"v": (v, F), "d^2 v": (d * v, d * F), "d^2": (d, d * F)}.items():
        leaf, rho, entries = found[estimate]
        assert (leaf, entries) == ("a", 128)
        assert rho == pytest.approx(spearmanr(*pair).statistic, abs=1e-6)


def test_entries_that_did_not_move_are_left_out():
    start = {"a": jnp.ones((8, 16))}
    params = {"a": start["a"].at[:2].add(1.0)}
    tx = om.moma(1e-3)
    opt_state = tx.update(params, tx.init(params), params)[1]
    rows = list(fisher.compared(program.State(params, opt_state), start, params))
    assert {entries for *_, entries in rows} == {32}


def test_both_optimizers_and_the_page(monkeypatch, tmp_path, small):
    monkeypatch.setattr(fisher, "QUICK", small)
    monkeypatch.setattr(fisher, "SEQUENCES", 2)
    monkeypatch.setattr(fisher, "RATES", {small.optimizer: 5e-3, "adamw": 1e-3})
    monkeypatch.setattr("sys.argv", ["fisher", "--quick", "--out", str(tmp_path)])
    side.side_study(fisher.__doc__, fisher.BLOCK, fisher.COLUMNS, fisher.rows)
    with (tmp_path / "results" / "fisher.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["optimizer"], r["step"]) for r in rows} == {
        (o, s)
        for o in (small.optimizer, "adamw")
        for s in "2468"  # nothing moves in the first
    }
    assert {r["leaf"] for r in rows if r["leaf"].endswith("kernel")} == {
        f"blocks/0/{name}/kernel" for name in ("query", "key", "value", "out", "up", "down")
    }
    page = (tmp_path / "RESULTS.md").read_text()
    own = [
        float(r["rho"])
        for r in rows
        if (r["optimizer"], r["step"], r["estimate"]) == ("adamw", "8", "v")
        and r["leaf"].endswith("kernel")
    ]
    assert f"{np.mean(own):.2f} ±" in next(
        x for x in page.splitlines() if "| adamw | F, by v |" in x
    )
    assert (tmp_path / "results" / "fisher.png").read_bytes().startswith(b"\x89PNG")
