"""Searches for numbers, DF-Merge and norm-aware weights against dense formulas in NumPy."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.merging import (
    chain,
    df_merge,
    diagonal_fisher,
    elect,
    mean,
    merge,
    norm_aware,
    search,
    ties,
    total,
    trim,
)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


BASE = {"w": normal(4, 3), "b": normal(3)}
EXPERTS = {
    name: {n: x + 0.5 * normal(*x.shape, seed=seed) for n, x in BASE.items()}
    for name, seed in (("math", 1), ("code", 2))
}
DELTA = {name: {n: np.float64(e[n]) - BASE[n] for n in BASE} for name, e in EXPERTS.items()}


def check(found, wanted, rtol=1e-6):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def hill(x, y):
    return 1 - (x - 0.3) ** 2 - 2 * (y + 1.0) ** 2


BOX = {"x": (0.0, 1.0), "y": (-2.0, 1.0)}


def test_search_finds_the_top_of_a_hill():
    pytest.importorskip("bayes_opt")
    found = search(hill, BOX, random=4, steps=9)
    assert found.score == hill(**found.numbers) == max(s for _, s in found.trials) > 0.98
    assert len(found.trials) == 13
    assert all(
        0 <= numbers["x"] <= 1 and -2 <= numbers["y"] <= 1 and score == hill(**numbers)
        for numbers, score in found.trials
    )
    # Random trials alone do worse.
    assert max(score for _, score in found.trials[:4]) < found.score


def test_search_is_determined_by_its_seed():
    pytest.importorskip("bayes_opt")
    one, two = (search(hill, BOX, random=3, steps=2, seed=1) for _ in range(2))
    assert one == two
    assert search(hill, BOX, random=1, steps=0, seed=2).trials[0] != one.trials[0]


def test_search_never_falls_below_its_start():
    pytest.importorskip("bayes_opt")
    best = {"x": 0.3, "y": -1.0}
    found = search(hill, BOX, start=[best], random=2, steps=2)
    assert found.numbers == best and found.trials[0] == (best, 1.0)
    # Flat scores, and the same point twice.
    flat = search(lambda x, y: 0.5, BOX, start=[best, best], random=2, steps=4)
    assert flat.numbers == best and flat.score == 0.5 and len(flat.trials) == 8


def test_search_tunes_a_merge():
    pytest.importorskip("bayes_opt")
    wanted = merge(ties(0.6, 0.8), EXPERTS, base=BASE)

    def score(scale, density):
        merged = merge(ties(density, scale), EXPERTS, base=BASE)
        return -sum(jnp.sum((merged[n] - wanted[n]) ** 2) for n in BASE)

    found = search(score, {"scale": (0, 1.5), "density": (0.05, 1)}, random=4, steps=6)
    assert found.score > -0.05 > score(scale=1.0, density=0.2)


@pytest.mark.parametrize(
    ("error", "arguments", "text"),
    [
        (ValueError, {"bounds": {}}, "at least one number"),
        (ValueError, {"bounds": [(0, 1)]}, "at least one number"),
        (ValueError, {"bounds": {"x": (1, 1), "y": (0, 1)}}, r"x must have \(least, greatest\)"),
        (ValueError, {"bounds": {"x": 1, "y": (0, 1)}}, r"x must have \(least, greatest\)"),
        (ValueError, {"bounds": {"x": (0, np.inf), "y": (0, 1)}}, "x must have"),
        (ValueError, {"start": [{"x": 0.5}]}, "must have the names in bounds"),
        (ValueError, {"start": [{"x": 0.5, "y": 2.0}]}, "y=2.0 is outside"),
        (ValueError, {"random": 0}, "the first trial is random or in start"),
        (ValueError, {"steps": -1}, "must not be negative"),
        (ValueError, {"score": lambda x, y: np.nan}, "score: it is nan for {'x'"),
        (TypeError, {"score": lambda x, y: None}, "score must return a number"),
        (TypeError, {"score": lambda x, y: np.ones(2)}, "score must return a number"),
    ],
)
def test_search_with_bad_input(error, arguments, text):
    pytest.importorskip("bayes_opt")
    with pytest.raises(error, match=text):
        search(**{"score": hill, "bounds": BOX, "steps": 1, **arguments})


def test_search_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bayes_opt", None)
    with pytest.raises(ImportError, match=r"optax-moma\[search\]"):
        search(hill, BOX)


def linear(params, x):
    return x @ params["w"] + params["b"]


DATA = {"math": normal(6, 4, seed=7), "code": normal(9, 4, seed=8)}


def fisher(name, params):
    return diagonal_fisher(linear, params, [DATA[name]])


def dense_fisher(name, params):
    """The Fisher information of a softmax regression in closed form."""
    x = DATA[name].astype(np.float64)
    z = x @ params["w"] + params["b"]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    variance = p * (1 - p)
    return {"w": np.einsum("ni,nc->ic", x**2, variance) / len(x), "b": variance.mean(0)}


def test_df_merge():
    c = {"math": 0.7, "code": 0.2}
    merged = df_merge(c, EXPERTS, fisher, base=BASE)
    scaled = {t: {n: c[t] * DELTA[t][n] for n in BASE} for t in c}
    f = {t: dense_fisher(t, {n: BASE[n] + scaled[t][n] for n in BASE}) for t in c}
    for n in BASE:
        wanted = BASE[n] + 2 * sum(f[t][n] * scaled[t][n] for t in c) / sum(f[t][n] for t in c)
        check(merged[n], wanted, rtol=1e-5)


def test_df_merge_rounds_once():
    narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    base, experts = narrow(BASE), {t: narrow(e) for t, e in EXPERTS.items()}
    dtypes, estimate = [], {t: jax.tree.map(lambda x: jnp.abs(x) + 0.1, DELTA[t]) for t in DELTA}

    def fisher(name, params):
        dtypes.extend(x.dtype for x in jax.tree.leaves(params))
        return estimate[name]

    merged = df_merge({"math": 0.7, "code": 0.2}, experts, fisher, base=base)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    f, b = {t: wide(v) for t, v in estimate.items()}, wide(base)
    for n in BASE:
        moved = {t: c * (wide(experts[t])[n] - b[n]) for t, c in (("math", 0.7), ("code", 0.2))}
        say = sum(f[t][n] for t in moved)
        want = b[n] + 2 * sum(f[t][n] * moved[t] for t in moved) / say
        assert merged[n].dtype == jnp.bfloat16
        # Half a unit in the last place of 8 bits.
        np.testing.assert_allclose(np.asarray(merged[n], np.float64), want, rtol=2**-8)


def test_df_merge_of_lists_and_of_nothing_learned():
    experts = list(EXPERTS.values())
    names = list(EXPERTS)
    one = df_merge([0.7, 0.2], experts, lambda t, params: fisher(names[t], params), base=BASE)
    two = df_merge({"math": 0.7, "code": 0.2}, EXPERTS, fisher, base=BASE)
    jax.tree.map(lambda x, y: check(x, np.asarray(y)), one, two)

    # Without information anywhere the scaled task vectors are added up.
    zero = df_merge([0.7, 0.2], experts, lambda t, p: jax.tree.map(jnp.zeros_like, p), base=BASE)
    for n in BASE:
        check(zero[n], BASE[n] + 0.7 * DELTA["math"][n] + 0.2 * DELTA["code"][n], rtol=1e-5)

    base = df_merge([0.0, 0.0], experts, lambda t, p: p, base=jax.tree.map(jnp.abs, BASE))
    check(base["w"], np.abs(BASE["w"]))
    with pytest.raises(ValueError, match=r"coefficients are for \[0\], but the experts are \[0, 1"):
        df_merge([0.5], experts, fisher, base=BASE)


def test_df_merge_finds_its_coefficients():
    pytest.importorskip("bayes_opt")
    labels = {name: np.argmax(linear(EXPERTS[name], x), -1) for name, x in DATA.items()}

    def likelihood(params):
        logp = {name: jax.nn.log_softmax(linear(params, x)) for name, x in DATA.items()}
        return sum(float(logp[n][np.arange(len(y)), y].mean()) for n, y in labels.items())

    def score(**c):
        return likelihood(df_merge(c, EXPERTS, fisher, base=BASE))

    bounds = {name: (0, 1) for name in EXPERTS}
    found = search(score, bounds, random=4, steps=4)
    assert found.score == likelihood(df_merge(found.numbers, EXPERTS, fisher, base=BASE))
    assert found.score > likelihood(BASE)


@pytest.mark.parametrize("base", [BASE, None])
def test_norm_aware(base):
    vectors = DELTA if base else EXPERTS
    merged = merge(chain(norm_aware(), mean()), EXPERTS, base=base)
    summed = merge(chain(norm_aware(), total()), EXPERTS, base=BASE)
    for n in BASE:
        norms = {t: np.linalg.norm(np.float64(vectors[t][n])) for t in EXPERTS}
        share = {t: (1 / norms[t]) / sum(1 / m for m in norms.values()) for t in norms}
        wanted = sum(share[t] * np.float64(EXPERTS[t][n]) for t in EXPERTS)
        check(merged[n], wanted)
        if base:
            check(summed[n], wanted)  # The shares add up to one.


def test_norm_aware_in_other_methods_and_at_the_edge():
    weights = {n: {t: 1 / np.linalg.norm(DELTA[t][n]) for t in EXPERTS} for n in BASE}
    rest = (trim(0.5), elect(), mean())
    merged = merge(chain(norm_aware(), *rest), EXPERTS, base=BASE)
    for n in BASE:
        one = merge(
            chain(*rest), {t: e[n] for t, e in EXPERTS.items()}, base=BASE[n], weights=weights[n]
        )
        check(merged[n], np.asarray(one))
    # Squares that a float32 cannot hold; an expert that did not move; none that did.
    experts = [{"w": jnp.array([3e-30, 0.0])}, {"w": jnp.array([0.0, 1e-30])}, {"w": jnp.zeros(2)}]
    zero = {"w": jnp.zeros(2)}
    merged = merge(chain(norm_aware(), mean()), experts, base=zero)
    check(merged["w"], np.array([0.75e-30, 0.75e-30]))
    still = merge(chain(norm_aware(), mean()), [zero, zero], base=zero)
    assert not still["w"].any()
    alone = merge(chain(norm_aware(), mean()), [zero, zero], weights=[1.0, 3.0])
    assert not alone["w"].any()
