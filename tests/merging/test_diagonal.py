"""Every diagonal method against its formula, written out in NumPy with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma._moments import Factored
from optax_moma.merging import (
    average,
    chain,
    curvature_ties,
    dare,
    drop,
    elect,
    fisher,
    fusion_bench,
    mean,
    merge,
    ota,
    peft,
    scale,
    task_arithmetic,
    ties,
    total,
    trim,
    umtam,
    weigh,
)

SHAPES = {"kernel": (13, 7), "bias": (9,), "stack": (3, 5, 4), "gain": ()}
K = 4


def inputs(seed=0, curvature_scale=1e-9):
    rng = np.random.default_rng(seed)

    def tree(draw):
        return {name: draw(shape) for name, shape in SHAPES.items()}

    base = tree(lambda s: rng.normal(size=s).astype(np.float32))
    experts = [
        {n: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32) for n, x in base.items()}
        for _ in range(K)
    ]
    curvature = [
        tree(lambda s: (curvature_scale * rng.lognormal(sigma=2, size=s)).astype(np.float32))
        for _ in range(K)
    ]
    weights = rng.uniform(0.5, 2, K)
    return base, experts, curvature, weights


def doubles(base, experts, curvature, weights, name):
    """Returns task vectors, curvature and weights of a leaf as float64, experts first."""
    # The subtraction is the library's own, in float32: a threshold must see the same numbers.
    d = np.stack([e[name] - base[name] for e in experts]).astype(np.float64)
    v = np.stack([c[name] for c in curvature]).astype(np.float64)
    return d, v, weights.reshape((-1,) + (1,) * (d.ndim - 1))


def top(score, density):
    """Returns the mask of the k largest entries of each row."""
    flat = score.reshape(len(score), -1)
    k = max(1, int(np.floor(density * flat.shape[1])))
    threshold = np.sort(flat, axis=1)[:, -k]
    return (flat >= threshold[:, None]).reshape(score.shape)


def ratio(numerator, denominator):
    return np.where(denominator == 0, 0, numerator / np.where(denominator == 0, 1, denominator))


def elected(say):
    return np.sign(say) == np.sign(say.sum(0))


def check(merged, base, expected, name):
    """The task vector is right to 1e-6 of its largest entry, and the params to float32."""
    want = np.asarray(base[name], np.float64) + expected
    got = np.asarray(merged[name], np.float64)
    assert merged[name].dtype == base[name].dtype
    assert merged[name].shape == base[name].shape
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def average_delta(d, v, w):
    return (w * d).sum(0) / w.sum(0)


def ties_delta(d, v, w, density=0.3, factor=0.8):
    say = top(np.abs(d), density) * w
    say = say * elected(say * d)
    return factor * ratio((say * d).sum(0), say.sum(0))


def fisher_delta(d, v, w):
    return (w * v * d).sum(0) / (w * v).sum(0)


def ota_delta(d, v, w, density=0.4, power=0.5):
    say = w * top(v * d**2, density) * v**power
    return ratio((say * d).sum(0), say.sum(0))


def curvature_ties_delta(d, v, w, density=0.3, power=0.5, factor=0.7):
    axes = tuple(range(1, d.ndim))
    h = w * top(d**2 * v**power, density) * (v / v.mean(axes, keepdims=True)) ** power
    say = h * elected(h * d)
    return factor * ratio((say * d).sum(0), say.sum(0))


def umtam_delta(d, v, w, density=0.2):
    if d.ndim != 3:
        return np.zeros(d.shape[1:])
    rows, cols = v.sum(2, keepdims=True), v.sum(1, keepdims=True)
    h = np.sqrt(np.maximum(rows, 1e-8) * np.maximum(cols, 1e-8))
    s = d**2 * h
    mask = top(s, density)
    sign = np.sign((mask * s * (d > 0)).sum(0) - (mask * s * (d < 0)).sum(0))
    agree = mask * (np.sign(d) == sign) * (sign != 0)
    h = w * h / (h.max((1, 2), keepdims=True) + 1e-8)
    return (agree * h * d).sum(0) / np.maximum((agree * h).sum(0), 1e-8)


FORMULAS = {
    "average": (average(), average_delta),
    "task_arithmetic": (task_arithmetic(0.4), lambda d, v, w: 0.4 * (w * d).sum(0)),
    "ties": (ties(density=0.3, scale=0.8), ties_delta),
    "fisher": (fisher(), fisher_delta),
    "ota": (ota(density=0.4), ota_delta),
    "curvature_ties": (curvature_ties(density=0.3, scale=0.7), curvature_ties_delta),
    "umtam": (umtam(), umtam_delta),
    "total_of_trimmed": (
        chain(trim(0.5), total(), scale(2.0)),
        lambda d, v, w: 2.0 * (w * top(np.abs(d), 0.5) * d).sum(0),
    ),
    "normalised_fisher": (
        chain(weigh(2.0), mean()),
        lambda d, v, w: fisher_delta(
            d, (v / v.mean(tuple(range(1, v.ndim)), keepdims=True)) ** 2, w
        ),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("curvature_scale", [1.0, 1e-9, 1e-30])
def test_method_equals_formula(name, curvature_scale):
    method, formula = FORMULAS[name]
    base, experts, curvature, weights = inputs(1, curvature_scale)
    merged = merge(method, experts, base=base, curvature=curvature, weights=weights)
    for leaf in SHAPES:
        expected = formula(*doubles(base, experts, curvature, weights, leaf))
        check(merged, base, expected, leaf)


@pytest.mark.parametrize("method", [average(), fisher()])
def test_without_a_base_parameters_are_averaged(method):
    base, experts, curvature, weights = inputs(2)
    merged = merge(method, experts, curvature=curvature, weights=weights)
    for leaf in SHAPES:
        x = np.stack([e[leaf] for e in experts]).astype(np.float64)
        _, v, w = doubles(base, experts, curvature, weights, leaf)
        h = w * v if method.contract.curvature else w * np.ones_like(v)
        np.testing.assert_allclose(
            np.asarray(merged[leaf]), (h * x).sum(0) / h.sum(0), rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize(
    "method",
    [ties(0.3), ota(0.4), curvature_ties(0.3), fisher(), chain(weigh(), mean())],
    ids=["ties", "ota", "curvature_ties", "fisher", "weigh"],
)
def test_factored_curvature_equals_the_same_curvature_dense(method):
    base, experts, _, _ = inputs(3)
    rng = np.random.default_rng(4)
    factored, dense = [], []
    for _ in range(K):
        f, g = {}, {}
        for name, shape in SHAPES.items():
            if len(shape) < 2:
                f[name] = g[name] = rng.lognormal(size=shape).astype(np.float32)
                continue
            row = rng.lognormal(size=(*shape[:-1], 1)).astype(np.float32)
            col = rng.lognormal(size=(*shape[:-2], 1, shape[-1])).astype(np.float32)
            f[name], g[name] = Factored(jnp.asarray(row), jnp.asarray(col)), row * col
        factored.append(f)
        dense.append(g)
    one = merge(method, experts, base=base, curvature=factored)
    two = merge(method, experts, base=base, curvature=dense)
    # A mixture of both kinds, as from experts trained with different optimizers.
    three = merge(method, experts, base=base, curvature=[*factored[:2], *dense[2:]])
    for name in SHAPES:
        np.testing.assert_allclose(one[name], two[name], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(three[name], two[name], rtol=2e-6, atol=1e-7)


def test_factored_rows_and_columns_of_umtam_are_those_of_the_product():
    rng = np.random.default_rng(5)
    base = {"w": np.zeros((6, 5), np.float32)}
    experts = [{"w": rng.normal(size=(6, 5)).astype(np.float32)} for _ in range(3)]
    row = rng.lognormal(size=(3, 6, 1)).astype(np.float32)
    col = rng.lognormal(size=(3, 1, 5)).astype(np.float32)
    curvature = [
        {"w": Factored(jnp.asarray(r), jnp.asarray(c))} for r, c in zip(row, col, strict=True)
    ]
    merged = merge(umtam(0.5), experts, base=base, curvature=curvature)
    d = np.stack([e["w"] for e in experts]).astype(np.float64)
    expected = umtam_delta(d, (row * col).astype(np.float64), np.ones((3, 1, 1)), 0.5)
    check(merged, base, expected, "w")


def test_dare_is_the_formula_with_its_own_masks():
    base, experts, _, weights = inputs(6)
    key = jax.random.key(3)
    merged = merge(dare(density=0.3, scale=0.5), experts, base=base, weights=weights, key=key)
    # The masks, from merging ones: an entry of a single expert is dropped or scaled by 1 / 0.3.
    zeros = jax.tree.map(np.zeros_like, base)
    ones = jax.tree.map(np.ones_like, base)
    masks = []
    for t in range(K):
        say = [float(t == s) for s in range(K)]
        masks.append(
            merge(
                chain(drop(0.3, rescale=False), total()),
                [ones] * K,
                base=zeros,
                weights=say,
                key=key,
            )
        )
    kept = 0
    for name in SHAPES:
        d, _, w = doubles(base, experts, experts, weights, name)
        m = np.stack([mask[name] for mask in masks]).astype(np.float64)
        assert set(np.unique(m)) <= {0.0, 1.0}
        kept += m.sum()
        check(merged, base, 0.5 * (w * m * d).sum(0) / 0.3, name)
    n = K * sum(int(np.prod(s)) for s in SHAPES.values())
    assert abs(kept / n - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)


def test_two_drops_of_a_chain_are_independent():
    base, expert = {"w": np.zeros(20_000, np.float32)}, {"w": np.ones(20_000, np.float32)}
    method = chain(drop(0.5, rescale=False), drop(0.5, rescale=False), total())
    merged = merge(method, [expert], base=base, key=jax.random.key(0))
    assert abs(float(np.mean(merged["w"])) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 20_000)


@pytest.mark.parametrize(
    "method", [ota(0.5), curvature_ties(0.5), fisher(), chain(weigh(), mean())]
)
def test_a_leaf_without_curvature_stays_finite(method):
    base = {"used": np.zeros(4, np.float32), "unused": np.ones(3, np.float32)}
    experts = [
        {"used": np.full(4, t, np.float32), "unused": np.ones(3, np.float32)} for t in (1, 2)
    ]
    curvature = [{"used": np.ones(4, np.float32), "unused": np.zeros(3, np.float32)}] * 2
    merged = merge(method, experts, base=base, curvature=curvature)
    np.testing.assert_array_equal(merged["unused"], base["unused"])
    assert np.isfinite(merged["used"]).all() and (merged["used"] > 0).all()


def test_zero_curvature_everywhere_falls_back_to_the_weighted_mean():
    experts = [{"w": np.array([1.0, 2.0], np.float32)}, {"w": np.array([3.0, 6.0], np.float32)}]
    zero = [{"w": np.zeros(2, np.float32)}] * 2
    merged = merge(fisher(), experts, curvature=zero, weights=[3.0, 1.0])
    np.testing.assert_allclose(merged["w"], [1.5, 3.0], rtol=1e-7)
    # One expert that never saw a gradient leaves the leaf to the other.
    one = [{"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}]
    merged = merge(chain(weigh(), mean()), experts, curvature=one)
    np.testing.assert_array_equal(merged["w"], experts[1]["w"])


def test_ties_keeps_the_base_on_a_tied_vote_and_where_all_is_trimmed():
    base = {"w": np.array([5.0, 5.0, 5.0], np.float32)}
    experts = [{"w": base["w"] + d} for d in ([1, 3, 0], [-1, 3, 0])]
    experts = jax.tree.map(np.float32, experts)
    merged = merge(ties(density=1.0), experts, base=base)
    np.testing.assert_array_equal(merged["w"], [5.0, 8.0, 5.0])


def test_trim_keeps_ties_and_never_zeros():
    base = {"w": np.zeros(6, np.float32)}
    expert = {"w": np.array([2, -2, 2, 1, 0, 0], np.float32)}

    def kept(density):
        return merge(chain(trim(density), total()), [expert], base=base)["w"]

    np.testing.assert_array_equal(kept(0.0), np.zeros(6))
    np.testing.assert_array_equal(kept(0.01), [2, -2, 2, 0, 0, 0])
    np.testing.assert_array_equal(kept(0.5), [2, -2, 2, 0, 0, 0])
    np.testing.assert_array_equal(kept(0.67), [2, -2, 2, 1, 0, 0])
    np.testing.assert_array_equal(kept(0.9), [2, -2, 2, 1, 0, 0])
    # What is kept shows in the weights: zeros have a say at density 1 only.
    merged = merge(chain(trim(1.0), mean()), [expert, {"w": np.ones(6, np.float32)}], base=base)
    np.testing.assert_array_equal(merged["w"], (expert["w"] + 1) / 2)


@pytest.mark.parametrize("by", ["magnitude", "saliency"])
def test_global_trim_has_one_threshold_per_expert(by):
    base, experts, curvature, _ = inputs(7)
    method = chain(trim(0.25, by=by, scope="global"), elect(), mean())
    merged = merge(method, experts, base=base, curvature=curvature)
    leaves = {n: doubles(base, experts, curvature, np.ones(K), n) for n in SHAPES}
    scores = {
        n: np.abs(d) * (np.sqrt(v) if by == "saliency" else 1) for n, (d, v, _) in leaves.items()
    }
    mask = top(np.concatenate([s.reshape(K, -1) for s in scores.values()], 1), 0.25)
    start = 0
    for name, (d, _, _) in leaves.items():
        size = d[0].size
        m = mask[:, start : start + size].reshape(d.shape)
        start += size
        say = m * elected(m * d)
        check(merged, base, ratio((say * d).sum(0), say.sum(0)), name)


def test_two_global_trims_follow_each_other():
    base, experts, curvature, _ = inputs(8)
    method = chain(trim(0.3, scope="global"), trim(0.1, by="saliency", scope="global"), total())
    assert method.contract.passes == 4
    merged = merge(method, experts, base=base, curvature=curvature)
    flat = {}
    for name in SHAPES:
        d, v, _ = doubles(base, experts, curvature, np.ones(K), name)
        flat[name] = (d.reshape(K, -1), v.reshape(K, -1))
    d, v = (np.concatenate([flat[n][i] for n in SHAPES], 1) for i in (0, 1))
    mask = top(np.abs(d), 0.3) & top(np.abs(d) * np.sqrt(v), 0.1)
    got = np.concatenate([np.ravel(merged[n] - base[n]) for n in SHAPES])
    np.testing.assert_allclose(got, (mask * d).sum(0), rtol=1e-5, atol=1e-6)
    assert 0 < mask.sum() < top(np.abs(d), 0.3).sum()


def test_elections_and_means_are_their_formulas():
    """Every vote with every fate of a tie, on entries that tie in one vote or another."""
    rng = np.random.default_rng(9)
    base = {"a": np.zeros(400, np.float32), "b": np.zeros((20, 15), np.float32)}
    # Small integers and weights of halves: the sums are exact, and often zero.
    experts = [
        {n: rng.integers(-2, 3, x.shape).astype(np.float32) for n, x in base.items()}
        for _ in range(3)
    ]
    weights = np.array([0.5, 1.0, 1.0])
    d = {n: np.stack([e[n] for e in experts]).astype(np.float64) for n in base}
    say = {n: weights.reshape((-1,) + (1,) * (x.ndim - 1)) for n, x in d.items()}
    votes = {
        "weighted": {n: say[n] * d[n] for n in d},
        "unweighted": d,
        "count": {n: np.sign(d[n]) for n in d},
    }
    majorities = set()
    for vote, cast in votes.items():
        signs = np.concatenate([np.sign(x.sum(0)).ravel() for x in cast.values()])
        majority = np.sign(signs.sum())
        majorities.add(majority)
        assert (signs == 0).sum() > 50
        for tied, winner in {"base": 0, "positive": 1, "majority": majority}.items():
            for by in ("weight", "count"):
                method = chain(elect(vote=vote, tied=tied), mean(by=by))
                merged = merge(method, experts, base=base, weights=weights)
                for n in d:
                    sign = np.sign(cast[n].sum(0))
                    sign = np.where(sign == 0, winner, sign)
                    agree = (np.sign(d[n]) == sign) * (sign != 0)
                    divisor = (agree * (say[n] if by == "weight" else 1)).sum(0)
                    check(merged, base, ratio((agree * say[n] * d[n]).sum(0), divisor), n)
    # A majority of either sign: the same with all signs turned.
    turned = [{n: -x for n, x in e.items()} for e in experts]
    method = chain(elect(tied="majority"), total())
    one, two = (merge(method, e, base=base, weights=weights) for e in (experts, turned))
    for n in base:
        np.testing.assert_array_equal(one[n], -two[n])
    assert majorities <= {-1.0, 1.0}


def test_a_majority_is_of_what_earlier_steps_left():
    """Three passes: two for the trim, one for the majority; a count may have negative weights."""
    base = {"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}
    experts = [
        {"a": np.array([4.0, -1.0, -1.0], np.float32), "b": np.array([-3.0, -1.0], np.float32)},
        {"a": np.array([-4.0, -1.0, -1.0], np.float32), "b": np.array([-3.0, -1.0], np.float32)},
    ]
    tail = (elect(vote="unweighted", tied="majority"), mean(by="count"))
    method = chain(trim(0.4, scope="global"), *tail)
    assert method.contract.passes == 3
    # Left are the fours, which tie, and the threes, which are the negative majority.
    merged = merge(method, experts, base=base, weights=[1.0, -2.0])
    np.testing.assert_array_equal(merged["a"], [8.0, 0.0, 0.0])
    np.testing.assert_array_equal(merged["b"], [1.5, 0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: elect(vote="mass"), "vote must be one of weighted, unweighted, count, got 'mass'"),
        (lambda: elect(tied="zero"), "tied must be one of base, positive, majority, got 'zero'"),
        (lambda: mean(by="weights"), "by must be 'weight' or 'count', got 'weights'"),
        (lambda: peft.ties(0.5, vote="total"), "vote must be 'unweighted' or 'count'"),
        (lambda: fusion_bench.ties(combine="max"), "combine must be 'sum' or 'mean', got 'max'"),
    ],
)
def test_switches_name_what_they_know(make, message):
    with pytest.raises(ValueError, match=message):
        make()
