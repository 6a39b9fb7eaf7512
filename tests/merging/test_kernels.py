"""Masks, geometric, spectral and Gram methods against their formulas in NumPy with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma import merging
from optax_moma.merging import (
    average,
    band,
    breadcrumbs,
    chain,
    consensus,
    della,
    drop,
    drop_by_magnitude,
    elect,
    iso_c,
    iso_cts,
    karcher,
    knots,
    magmax,
    match_norm,
    mean,
    merge,
    model_stock,
    regmean,
    sce,
    slerp,
    ties,
    total,
    trim,
    tsv_m,
    weigh,
    wudi,
    wudi_adam,
)

K, M, N = 3, 8, 5
KEY = jax.random.key(0)


def problem(seed=0, size=0.1):
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=(M, N)).astype(np.float32), "b": np.zeros(7, np.float32)}
    experts = [
        jax.tree.map(lambda x: (x + size * rng.normal(size=x.shape)).astype(np.float32), base)
        for _ in range(K)
    ]
    d = {n: np.stack([e[n] - base[n] for e in experts]).astype(np.float64) for n in base}
    return base, experts, d


def check(merged, base, delta, name, rtol=1e-6):
    want = base[name] + delta
    np.testing.assert_allclose(merged[name], want, rtol=rtol, atol=rtol * np.abs(want).max())


def ratio(a, b):
    return np.where(b == 0, 0, a / np.where(b == 0, 1, b))


def svd(x):
    return np.linalg.svd(x, full_matrices=False)


def polar(x):
    u, _, vt = svd(x)
    return u @ vt


def test_breadcrumbs():
    base, experts, d = problem(1)
    merged = merge(breadcrumbs(density=0.5, top=0.1, scale=0.7), experts, base=base)
    for name in base:
        flat = np.abs(d[name]).reshape(K, -1)
        n = flat.shape[1]
        outliers, kept = int(0.1 * n), max(1, int(0.5 * n))
        ranks = (-flat).argsort(1).argsort(1).reshape(d[name].shape)
        mask = (ranks >= outliers) & (ranks < outliers + kept)
        check(merged, base, 0.7 * (mask * d[name]).sum(0), name)
    # No outliers at top = 0: a plain trim.
    one = merge(chain(band(0.4, 0.0), total()), experts, base=base)
    two = merge(chain(trim(0.4), total()), experts, base=base)
    np.testing.assert_array_equal(one["w"], two["w"])
    with pytest.raises(ValueError, match=r"density \+ top must be at most 1"):
        band(0.95, 0.1)


def test_match_norm_restores_the_norm_of_dare():
    base, experts, d = problem(2)
    masked = chain(drop(0.5, rescale=False), total())
    matched = chain(drop(0.5, rescale=False), match_norm(), total())
    for t in range(K):
        one = [experts[t]]
        raw = merge(masked, one, base=base, key=KEY)
        whole = merge(matched, one, base=base, key=KEY)
        for name in base:
            kept = np.asarray(raw[name], np.float64) - base[name]
            factor = np.abs(d[name][t]).sum() / np.abs(kept).sum()
            check(whole, base, factor * kept, name, rtol=2e-6)


def test_della_keeps_and_rescales_by_rank():
    m, n, density, spread = 11, 4_000, 0.5, 0.3
    rng = np.random.default_rng(3)
    expert = {"w": rng.normal(size=(m, n)).astype(np.float32)}
    base = {"w": np.zeros((m, n), np.float32)}
    merged = merge(chain(drop_by_magnitude(density, spread), total()), [expert], base=base, key=KEY)
    rank = np.abs(expert["w"]).argsort(0).argsort(0)
    p = density + spread * (2 * rank / (m - 1) - 1)
    kept = np.asarray(merged["w"]) != 0
    np.testing.assert_allclose(np.asarray(merged["w"])[kept], (expert["w"] / p)[kept], rtol=2e-6)
    for r in range(m):
        expected = density + spread * (2 * r / (m - 1) - 1)
        assert abs(kept[rank == r].mean() - expected) < 4 * np.sqrt(0.25 / n)
    # Without a spread it is DARE, and its chain elects and averages as TIES does.
    base, experts, _ = problem(3)
    one = merge(della(0.4, 0.0), experts, base=base, key=KEY)
    two = merge(chain(drop(0.4), elect(), mean()), experts, base=base, key=KEY)
    # Close relative to the base: base + delta may cancel.
    np.testing.assert_allclose(one["w"], two["w"], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"density \+ spread must be at most 1, got 0\.9 \+ 0\.2"):
        drop_by_magnitude(0.9, 0.2)
    with pytest.raises(ValueError, match=r"spread must be from 0 to 0\.1, got 0\.2"):
        drop_by_magnitude(0.1, 0.2)
    for hundredths in range(51):
        della((100 - hundredths) / 100, hundredths / 100)
        della(hundredths / 100, hundredths / 100)


def test_della_ranks_the_entries_of_one_output():
    """Whatever axes hold its inputs; leaves that are no matrices as a whole."""
    rng = np.random.default_rng(4)
    spread = lambda x, axes: np.asarray(
        merge(
            chain(drop_by_magnitude(0.5, 0.5, axes=axes), total()),
            [{"w": jnp.asarray(x)}],
            base={"w": jnp.zeros(x.shape)},
            key=KEY,
        )["w"]
    )
    x = rng.normal(size=(5, 3, 7)).astype(np.float32)
    # Along its ranks from 0 to 1 the first entry is always dropped, the last always kept.
    for axes, axis in (("mnn", 0), ("nmn", 1), ("nnm", 2)):
        kept, rank = spread(x, axes), np.abs(x).argsort(axis).argsort(axis)
        assert not kept[rank == 0].any()
        np.testing.assert_allclose(kept[rank == x.shape[axis] - 1], x[rank == x.shape[axis] - 1])
        p = rank / (x.shape[axis] - 1)
        np.testing.assert_allclose(kept[kept != 0], (x / np.where(p, p, 1))[kept != 0], rtol=1e-6)
    whole = np.abs(x).argsort(None).argsort().reshape(x.shape) / (x.size - 1)
    kept = spread(x, "mn")
    np.testing.assert_allclose(
        kept[kept != 0], (x / np.where(whole, whole, 1))[kept != 0], rtol=1e-6
    )
    alone = spread(x[:1, :1, 0], "mn")  # kept or not, as by a coin
    assert alone in (0, 2 * x[0, 0, 0])


def test_magmax():
    base, experts, d = problem(4)
    weights = [0.5, -2.0, 1.0]
    merged = merge(magmax(0.7), experts, base=base, weights=weights)
    for name in base:
        x = np.stack([w * y for w, y in zip(weights, d[name], strict=True)])
        index = np.abs(x).argmax(0)[None]
        check(merged, base, 0.7 * np.take_along_axis(x, index, 0)[0], name)


@pytest.mark.parametrize("size", [0.1, 1e-25])
def test_sce(size):
    _, experts, d = problem(4)
    base = jax.tree.map(np.zeros_like, experts[0])
    experts = [
        {n: (size * x[n][t]).astype(np.float32) for n in base} for t, x in enumerate([d] * K)
    ]
    merged = merge(sce(0.3), experts, base=base)
    for name in base:
        x = np.stack([e[name] for e in experts]).astype(np.float64)
        variance = x.var(0)
        k = max(1, int(0.3 * variance.size))
        e = x * (variance >= np.sort(variance, axis=None)[-k])
        c = (e**2).mean(tuple(range(1, e.ndim)), keepdims=True)
        agree = (np.sign(e) == np.sign(e.sum(0))) & (e != 0)
        want = ratio((c * agree * e).sum(0), (c * agree).sum(0))
        np.testing.assert_allclose(merged[name], want, rtol=2e-6, atol=1e-7 * size)


def test_consensus():
    base, experts, d = problem(5)
    merged = merge(chain(consensus(0.5, 2), total()), experts, base=base)
    for name in base:
        x = d[name]
        masks = np.abs(x) > 0.5 * np.abs(x.sum(0) - x)
        check(merged, base, (masks.sum(0) >= 2) * x.sum(0), name)
    with pytest.raises(ValueError, match=r"one for each of the 3 experts, got the shape \(2,\)"):
        merge(chain(consensus(np.array([0.2, 0.4])), total()), experts, base=base)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_slerp(with_base, size):
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(2, 4, 5)).astype(np.float32)
    # A small size gives nearly parallel vectors: the straight line.
    b = (a + size * b).astype(np.float32)
    base = np.ones((4, 5), np.float32) if with_base else None
    origin = 1.0 if with_base else 0.0
    merged = merge(
        slerp(), [{"w": a}, {"w": b}], weights=[1, 3], base=None if base is None else {"w": base}
    )
    x, y = a.astype(np.float64) - origin, b.astype(np.float64) - origin
    cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    if cosine > 0.9995:
        want = 0.25 * x + 0.75 * y
    else:
        w = np.arccos(cosine)
        want = (np.sin(0.25 * w) * x + np.sin(0.75 * w) * y) / np.sin(w)
    np.testing.assert_allclose(merged["w"], want + origin, rtol=2e-6, atol=2e-6)


def test_karcher_is_where_the_tangents_cancel():
    _, experts, d = problem(7, size=1.0)
    weights = [1.0, 2.0, 0.5]
    merged = merge(karcher(30), experts, weights=weights)
    share = np.array(weights) / sum(weights)
    for name in d:
        x = np.stack([e[name].ravel() for e in experts]).astype(np.float64)
        lengths = np.linalg.norm(x, axis=1)
        got = np.asarray(merged[name], np.float64).ravel()
        np.testing.assert_allclose(np.linalg.norm(got), share @ lengths, rtol=1e-6)
        u, units = got / np.linalg.norm(got), x / lengths[:, None]
        cosine = units @ u
        across = units - cosine[:, None] * u
        angle = np.arccos(cosine)
        tangent = (share * angle / np.sin(angle)) @ across
        assert np.linalg.norm(tangent) < 1e-6


def test_karcher_of_two_is_slerp_and_one_step_is_the_formula():
    base, experts, d = problem(8)
    two = [experts[0], experts[1]]
    norms = [np.linalg.norm(d["w"][t]) for t in (0, 1)]
    # Two of one length.
    two[1] = {**two[1], "w": (base["w"] + d["w"][1] * norms[0] / norms[1]).astype(np.float32)}
    one, other = (merge(m, two, base=base)["w"] for m in (karcher(), slerp()))
    np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)

    x = d["w"].reshape(K, -1)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    u = units.mean(0) / np.linalg.norm(units.mean(0))
    angle = np.arccos(units @ u)
    tangent = ((angle / np.sin(angle))[:, None] * (units - np.cos(angle)[:, None] * u)).mean(0)
    size = np.linalg.norm(tangent)
    u = np.cos(size) * u + np.sin(size) / size * tangent
    want = np.linalg.norm(x, axis=1).mean() * u.reshape(M, N)
    check(merge(karcher(1), experts, base=base), base, want, "w")


def test_model_stock():
    base, experts, d = problem(9)
    experts = [jax.tree.map(lambda x: x + np.float32(0.05), e) for e in experts]
    d = {n: np.stack([e[n] - base[n] for e in experts]).astype(np.float64) for n in base}
    merged = merge(model_stock(), experts, base=base)
    for name in base:
        x = d[name].reshape(K, -1)
        units = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosine = (units @ units.T)[np.triu_indices(K, 1)].mean()
        assert cosine > 0.05
        r = K * cosine / (1 + (K - 1) * cosine)
        check(merged, base, r * d[name].mean(0), name)
    opposite = [{"w": jnp.ones(2)}, {"w": -jnp.ones(2) * 2}]
    merged = merge(model_stock(), opposite, base={"w": jnp.zeros(2)})
    np.testing.assert_array_equal(merged["w"], [0, 0])


SPECTRAL = {
    "tsv_m": tsv_m(),
    "iso_c": iso_c(),
    "iso_cts": iso_cts(),
    "knots": chain(knots(mean())),
    "wudi": wudi(),
    "wudi_adam": wudi_adam(steps=3),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_leaves_that_are_no_matrices_are_averaged(name):
    base, experts, d = problem(10)
    merged = merge(SPECTRAL[name], experts, base=base)
    check(merged, base, d["b"].mean(0), "b")
    # And an expert that did not change the matrix does no harm.
    still = merge(SPECTRAL[name], [base, base], base=base)
    np.testing.assert_array_equal(still["w"], base["w"])


def test_tsv_m():
    base, experts, d = problem(11)
    weights = np.array([1.0, 0.5, 2.0])
    merged = merge(tsv_m(scale=0.9), experts, base=base, weights=list(weights))
    rank = N // K
    parts = [svd(w * x) for w, x in zip(weights, d["w"], strict=True)]
    u = np.concatenate([p[0][:, :rank] for p in parts], 1)
    s = np.concatenate([p[1][:rank] for p in parts])
    vt = np.concatenate([p[2][:rank] for p in parts])
    check(merged, base, 0.9 * polar(u) @ np.diag(s) @ polar(vt), "w", rtol=3e-6)


def test_iso_c():
    base, experts, d = problem(12)
    u, s, vt = svd(d["w"].sum(0))
    check(merge(iso_c(1.5), experts, base=base), base, 1.5 * s.mean() * u @ vt, "w", rtol=3e-6)


def test_iso_cts():
    base, experts, d = problem(13)
    own = round(N * (1 - 0.4)) // K
    shared = N - K * own
    assert own == 1 and shared == 2
    w = d["w"].transpose(0, 2, 1)  # (out, in), as in the paper.
    u, s, vt = (x[..., :shared] for x in svd(w.sum(0)))
    vt = svd(w.sum(0))[2][:shared]
    us, ss, vts = [u], [s], [vt]
    for x in w:
        ut, st, vtt = svd(x - u @ u.T @ x)
        us.append(ut[:, :own])
        ss.append(st[:own])
        vts.append(vtt[:own])
    want = np.concatenate(ss).mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vts))
    check(merge(iso_cts(common=0.4), experts, base=base), base, want.T, "w", rtol=3e-6)
    # All directions from the sum: Iso-C.
    one, two = (merge(m, experts, base=base)["w"] for m in (iso_cts(common=1.0), iso_c()))
    np.testing.assert_allclose(one, two, rtol=3e-6, atol=3e-6)


def test_knots_merges_in_a_shared_basis():
    rng = np.random.default_rng(14)
    base = {"w": np.zeros((M, N), np.float32)}
    experts = [
        {"w": (rng.normal(size=(M, 1)) @ rng.normal(size=(1, N))).astype(np.float32)}
        for _ in range(2)
    ]
    x = np.stack([e["w"] for e in experts]).astype(np.float64)
    # Without masks the basis does not matter.
    whole = merge(chain(knots(mean())), experts, base=base, weights=[1.0, 3.0])
    check(whole, base, 0.25 * x[0] + 0.75 * x[1], "w", rtol=3e-6)
    # With masks: TIES on coefficients; two experts of rank one span two directions.
    merged = merge(chain(knots(trim(0.3), elect(), mean(), rank=2)), experts, base=base)
    u, s, vt = svd(x.reshape(2 * M, N))
    own = (u[:, :2] * s[:2]).reshape(2, M, 2)
    flat = np.abs(own).reshape(2, -1)
    threshold = np.sort(flat, 1)[:, -int(0.3 * flat.shape[1])]
    say = own * (np.abs(own) >= threshold[:, None, None])
    agree = (say != 0) & (np.sign(say) == np.sign(say.sum(0)))
    want = ratio((agree * own).sum(0), agree.sum(0)) @ vt[:2]
    check(merged, base, want, "w", rtol=3e-6)
    for steps, text in [
        ((trim(0.5),), "add mean"),
        ((weigh(), mean()), "basis"),
        ((trim(0.5, scope="global"), mean()), "basis"),
    ]:
        with pytest.raises(ValueError, match=text):
            knots(*steps)


@pytest.mark.parametrize("with_base", [False, True])
def test_regmean(with_base):
    base, experts, _ = problem(18)
    rng = np.random.default_rng(19)
    inputs = rng.normal(size=(K, 30, M)).astype(np.float32)
    grams = [{"w": z.T @ z / 30, "b": None} for z in inputs]
    weights = np.array([1.0, 2.0, 0.5])
    merged = merge(
        regmean(ratio=0.9, ridge=0.0),
        experts,
        base=base if with_base else None,
        curvature=grams,
        weights=weights,
    )
    a, b = 0.0, 0.0
    for w, tree, e in zip(weights, grams, experts, strict=True):
        g = tree["w"].astype(np.float64)
        g = w * (0.9 * g + 0.1 * np.diag(np.diag(g)))
        a, b = a + g, b + g @ e["w"].astype(np.float64)
    want = np.linalg.solve(a, b)
    np.testing.assert_allclose(merged["w"], want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    mean_b = np.average([e["b"] for e in experts], axis=0, weights=weights)
    np.testing.assert_allclose(merged["b"], mean_b, rtol=2e-6, atol=1e-6)
    # Inputs that no expert has ever seen leave the mean.
    dead = [{"w": g["w"] * (np.arange(M) > 2) * (np.arange(M) > 2)[:, None]} for g in grams]
    merged = merge(regmean(), experts, curvature=dead)
    mean_w = np.mean([e["w"] for e in experts], axis=0)
    np.testing.assert_allclose(merged["w"][:3], mean_w[:3], rtol=1e-6, atol=1e-6)
    # A Gram that one expert lacks: the mean.
    some = [grams[0], {"b": None}, grams[2]]
    np.testing.assert_allclose(
        merge(regmean(), experts, curvature=some)["w"], mean_w, rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("grams", "text"),
    [
        ({"w": jnp.eye(N)}, r"expert 1, w: shape \(5, 5\), but a kernel of shape \(8, 5\)"),
        ({"b": jnp.eye(7)}, "expert 1, b: a Gram for a leaf that is no matrix; make it None"),
        ({"w": jnp.eye(M, dtype=jnp.int32)}, "expert 1, w: not a floating-point array"),
        ({"v": jnp.eye(M)}, "expert 1 has leaves that the model lacks: v"),
        ({"w": jnp.full((M, M), jnp.nan)}, "expert 1, w: 64 values that are not finite; leave"),
    ],
)
def test_a_wrong_gram_is_named(grams, text):
    _, experts, _ = problem(20)
    with pytest.raises(ValueError, match=text):
        merge(regmean(), experts, curvature=[{"w": -jnp.eye(M)}, grams, {}])


def test_grams_and_curvatures_do_not_mix():
    with pytest.raises(ValueError, match="Grams in another"):
        chain(weigh(), *regmean().steps)


def wudi_terms(x):
    norms = (x**2).sum((1, 2))
    a = sum(t @ t.T / n for t, n in zip(x, norms, strict=True))
    b = sum(t @ t.T @ t / n for t, n in zip(x, norms, strict=True))
    return a, b, x.sum(0)


@pytest.mark.parametrize("size", [0.1, 1e-12])
def test_wudi_is_the_minimiser(size):
    _, _, d = problem(15)
    base = {"w": np.zeros((M, N), np.float32)}
    experts = [{"w": (size * x).astype(np.float32)} for x in d["w"]]
    merged = merge(wudi(ridge=0.1), experts, base=base)["w"]
    x = np.stack([e["w"] for e in experts]).astype(np.float64)
    a, b, start = wudi_terms(x)
    c = 0.1 * np.trace(a) / M
    want = np.linalg.solve(a + c * np.eye(M), b + c * start)
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=2e-6 * np.abs(want).max())

    def loss(y):
        fit = sum(((t.T @ (y - t)) ** 2).sum() / (t**2).sum() for t in x)
        return fit + c * ((y - start) ** 2).sum()

    # No direction goes down from there.
    best, rng = loss(want), np.random.default_rng(0)
    for _ in range(20):
        assert loss(want + 0.01 * size * rng.normal(size=want.shape)) > best


def test_wudi_adam_is_adam_from_the_sum():
    base, experts, d = problem(16)
    merged = merge(wudi_adam(learning_rate=1e-3, steps=25), experts, base=base)
    a, b, x = wudi_terms(d["w"])
    m = v = 0.0
    for t in range(1, 26):
        # The gradient in the library's units, where the largest entry is one.
        g = 2 * (a @ x - b) / np.abs(d["w"]).max()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - 1e-3 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    check(merged, base, x, "w", rtol=1e-5)


def test_spectral_merges_follow_masks_and_transforms():
    base, experts, d = problem(17)
    flat = np.abs(d["w"]).reshape(K, -1)
    threshold = np.sort(flat, 1)[:, -int(0.5 * flat.shape[1])]
    x = d["w"] * (np.abs(d["w"]) >= threshold[:, None, None])
    u, s, vt = svd(x.sum(0))
    method = chain(trim(0.5), *iso_c().steps)
    check(merge(method, experts, base=base), base, s.mean() * u @ vt, "w", rtol=3e-6)

    def score(factor):
        return jnp.sum(merge(tsv_m(factor), experts, base=base)["w"])

    slope = score(1.0) - score(0.0)
    np.testing.assert_allclose(jax.jit(jax.grad(score))(0.3), slope, rtol=1e-4)


@pytest.mark.parametrize("method", [slerp(), karcher(), model_stock(), average(), ties()])
def test_masked_out_leaves_and_zeros_are_finite(method):
    base = {"w": jnp.zeros((3, 2)), "s": jnp.zeros(())}
    merged = merge(method, [base, base], base=base)
    for leaf in jax.tree.leaves(merged):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_number_of_experts():
    with pytest.raises(ValueError, match="experts: the method takes at most 2, got 3"):
        merge(slerp(), [jnp.ones(2)] * 3)
    with pytest.raises(ValueError, match="experts: the method needs at least 2, got 1"):
        merge(model_stock(), [jnp.ones(2)], base=jnp.ones(2))


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2), (2, 3, 4)])
@pytest.mark.parametrize("method", [merging.slerp, merging.model_stock])
def test_each_filter_on_its_own(method, shape):
    """As if every output were a leaf; vectors are merged whole."""
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.normal(size=shape).astype(np.float32), "b": np.ones(3, np.float32)}
    base, *experts = (draw() for _ in range(3))
    found = merging.merge(method(scope="filter"), experts, base=base, weights=[2.0, 1.0])
    parts = lambda tree: {str(i): tree["w"][..., i] for i in range(shape[-1])}
    alone = merging.merge(
        method(), [parts(e) for e in experts], base=parts(base), weights=[2.0, 1.0]
    )
    expected = np.stack([alone[str(i)] for i in range(shape[-1])], axis=-1)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6, atol=1e-6)
    whole = merging.merge(method(), experts, base=base, weights=[2.0, 1.0])
    assert np.max(np.abs(whole["w"] - expected)) > 1e-3
    np.testing.assert_array_equal(found["b"], whole["b"])


def test_scope_of_directions():
    with pytest.raises(ValueError, match="scope must be 'leaf' or 'filter'"):
        merging.model_stock(scope="row")
