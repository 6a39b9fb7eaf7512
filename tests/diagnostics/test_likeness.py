"""Drift, conflict, overlap and alignment against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_moma as om
from optax_moma.diagnostics import cka, curvature_overlap, drift, sign_conflict


def models(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    draw = lambda: {"a": rng.normal(size=(5, 4)), "b": {"c": rng.normal(size=3)}}
    return [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), draw()) for _ in range(count)]


def test_drift():
    base, expert = models(2)
    found = drift(expert, base)
    for got, w, w0 in zip(*map(jax.tree.leaves, (found, expert, base)), strict=True):
        want = np.linalg.norm(np.float64(w) - w0) / np.linalg.norm(np.float64(w0))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert drift(jnp.array([3.0, 4.0]), jnp.zeros(2)) == 5


def test_sign_conflict():
    base, *experts = models(4)
    found = sign_conflict(experts, base)
    d = np.stack([np.float64(e["a"]) - base["a"] for e in experts])
    want = 1 - np.sum(np.abs(d.sum(0))) / np.sum(np.abs(d))
    np.testing.assert_allclose(found["a"], want, rtol=1e-5)
    agreeing = [jax.tree.map(lambda x: x + 1, base), jax.tree.map(lambda x: x + 2, base)]
    opposed = [jax.tree.map(lambda x: x + 1, base), jax.tree.map(lambda x: x - 1, base)]
    for pair, conflict in ((agreeing, 0), (opposed, 1), ([base, base], 0)):
        np.testing.assert_allclose(
            jax.tree.leaves(sign_conflict(pair, base)), [conflict] * 2, atol=1e-6
        )


def test_curvature_overlap_is_the_same_for_dense_and_factored():
    rng = np.random.default_rng(1)
    rows, cols = rng.lognormal(size=(3, 5, 1)), rng.lognormal(size=(3, 1, 4))
    factored = [
        {"w": om.Factored(jnp.asarray(r), jnp.asarray(c))} for r, c in zip(rows, cols, strict=True)
    ]
    whole = rows * cols
    roots = np.sqrt(whole) / np.sqrt(whole.sum((1, 2), keepdims=True))
    want = np.mean([np.sum(roots[s] * roots[t]) for s, t in ((0, 1), (0, 2), (1, 2))])
    for curvatures in (factored, [{"w": jnp.asarray(v)} for v in whole]):
        np.testing.assert_allclose(curvature_overlap(curvatures)["w"], want, rtol=1e-5)


def test_overlap_of_tiny_and_of_no_curvature():
    v = jnp.array([1e-18, 4e-18])
    np.testing.assert_allclose(curvature_overlap([v, 7 * v]), 1, rtol=1e-5)
    assert curvature_overlap([v, jnp.zeros(2)]) == 0


def test_cka():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 5))
    y[:, :3] += x[:, :3]
    X, Y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    want = norm(Y.T @ X) ** 2 / norm(X.T @ X) / norm(Y.T @ Y)
    np.testing.assert_allclose(cka(jnp.asarray(x), jnp.asarray(y)), want, rtol=1e-5)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    turned = jnp.asarray(1e-6 * x @ rotation + 3e-6)
    np.testing.assert_allclose(cka(jnp.asarray(x), turned), 1, rtol=1e-4)
    assert cka(jnp.asarray(x), jnp.ones((40, 2))) == 0


def test_what_does_not_fit():
    base, expert = models(2)
    with pytest.raises(ValueError, match="at least two trees, got 1"):
        sign_conflict([expert], base)
    with pytest.raises(ValueError, match="at least two trees, got 1"):
        curvature_overlap([base])
    with pytest.raises(ValueError, match="params is not a tree like base"):
        drift({"a": expert["a"]}, base)
    with pytest.raises(
        ValueError, match=r"'b/c' has shape \(3,\) in base and \(4,\) in experts\[1\]"
    ):
        sign_conflict([expert, expert | {"b": {"c": jnp.ones(4)}}], base)
    with pytest.raises(ValueError, match=r"curvatures\[1\] is not a tree like curvatures\[0\]"):
        curvature_overlap([base, {"a": base["a"]}])
    with pytest.raises(ValueError, match=r"\(examples, p\)"):
        cka(jnp.ones((3, 2)), jnp.ones((4, 2)))
