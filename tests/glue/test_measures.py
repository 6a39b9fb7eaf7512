"""Measures of agreement, overlap and conflict against their definitions in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import optax_moma as om
from experiments.glue import measures
from experiments.glue.experts import Expert, Statistics


def test_agreement_is_spearman_over_what_changed():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)
    base = {"kernel": draw(12, 10), "bias": draw(4)}
    delta = {"kernel": draw(12, 10).at[8:].set(0), "bias": jnp.zeros(4)}
    encoder = {name: base[name] + delta[name] for name in base}
    fisher = {"kernel": draw(12, 10), "bias": draw(4)}
    v = om.Factored(draw(12, 1), draw(1, 10))
    early = om.Factored(draw(12, 1), draw(1, 10))
    statistics = Statistics(
        {"kernel": v, "bias": draw(4)}, {}, [{"kernel": early, "bias": draw(4)}]
    )
    trained = Expert(encoder, {}, statistics)
    found = {
        (kind, estimate): (rho, entries)
        for kind, estimate, leaf, rho, entries in measures.agreements(trained, base, fisher)
        if leaf == "kernel"
    }
    moved = np.s_[:8]
    F = np.asarray(fisher["kernel"])[moved].ravel()
    d = np.asarray(encoder["kernel"] - base["kernel"])[moved].ravel()
    for name, w in (("R, C", v), ("R, C after 1 of 4 parts", early)):
        own = np.asarray(w.row * w.col)[moved].ravel()
        rho, entries = found["curvature", name]
        assert entries == 80
        assert rho == pytest.approx(spearmanr(own, F).statistic, abs=1e-6)
    rho, _ = found["saliency", "magnitude"]
    assert rho == pytest.approx(spearmanr(d**2, d**2 * F).statistic, abs=1e-3)
    assert ("saliency", "path integral") not in found


def test_overlap_is_one_for_proportional_and_zero_for_disjoint_curvature():
    a = {"x": np.array([1.0, 3.0, 0.0]), "y": np.array([0.0, 2.0])}
    assert measures.overlap(a, {"x": 5 * a["x"], "y": a["y"]}) == pytest.approx(1)
    b = {"x": np.array([0.0, 0.0, 1.0]), "y": np.array([1.0, 0.0])}
    assert measures.overlap(a, b) == 0
    c = {"x": np.array([1.0, 1.0, 2.0]), "y": np.zeros(2)}
    want = 3 / 5 * (np.sqrt(1) + np.sqrt(3)) / 4
    assert measures.overlap(a, c) == pytest.approx(want, rel=1e-5)


def test_conflict():
    base = {"v": np.zeros(3), "w": np.zeros(1)}
    a = {"v": np.array([1.0, 2, -1]), "w": np.array([0.0])}
    b = {"v": np.array([1.0, -1, -2]), "w": np.array([3.0])}
    found = measures.conflict(a, b, base)
    assert found["cosine"] == pytest.approx(1 / np.sqrt(6 * 15))
    assert found["sign_conflict"] == pytest.approx(1 - (2 + 1 + 3 + 3) / (2 + 3 + 3 + 3))
