"""ACE, DOGE and PCB, against the papers' formulas in NumPy with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.checkpoints._recipe import METHODS, build_method
from optax_moma.merging import ace, chain, compete, doge, merge, pcb, total

K = 3


def problem(shape=(7, 5), sizes=(1.0, 1.0, 1.0), seed=0):
    rng = np.random.default_rng(seed)
    base = {"w": np.float32(rng.normal(size=shape)), "b": np.float32(rng.normal(size=6))}
    experts = [
        {n: np.float32(x + 0.3 * s * rng.normal(size=x.shape)) for n, x in base.items()}
        for s in sizes
    ]
    d = {n: np.stack([e[n].astype(np.float64) - base[n] for e in experts]) for n in base}
    return base, experts, d


def check(got, base, delta, rtol):
    want = base + delta
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def published_ace(tau, eps, threshold, share):
    """As in the authors' code: tau are matrices (out, in)."""
    k, out, fan_in = tau.shape
    traces = np.array([np.trace(w.T @ w) for w in tau])
    logs = np.log(traces + 1e-12)
    uneven = np.var(logs, ddof=1) / (np.mean(logs) ** 2 + 1e-12) > threshold
    top, bottom, covariances = np.zeros((out, fan_in)), np.zeros((fan_in, fan_in)), []
    for w in tau:
        w = w - np.ones((out, 1)) * w.mean(0)
        s, e = w.T @ w, eps
        if uneven:
            trace = np.trace(s) + 1e-12
            s, e = s / trace, eps / trace
        covariances.append(s)
        s = s + e * np.eye(fan_in)
        top, bottom = top + w @ s, bottom + s
    c = np.sum(covariances, axis=0).mean(0)
    if uneven:
        c = c / (traces.mean() + 1e-12)
    merged = top @ np.linalg.inv(bottom + np.ones((fan_in, 1)) * c)
    if uneven:
        rest = sum(w @ (s - bottom / k) for w, s in zip(tau, covariances, strict=True))
        u, s, vt = np.linalg.svd(rest + merged, full_matrices=False)
        rank = int(s.size * share)
        merged = merged + s[:rank].mean() * u[:, :rank] @ vt[:rank]
    return merged, uneven


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
@pytest.mark.parametrize("sizes", [(0.1, 0.12, 0.09), (3.0, 0.2, 0.5)])
def test_ace(shape, sizes):
    base, experts, d = problem(shape, sizes, seed=1)
    weights = np.array([1.0, 0.5, 2.0])
    x = weights[:, None, None] * d["w"]
    want, uneven = published_ace(np.swapaxes(x, 1, 2), 1e-2, 0.3, 0.45)
    assert uneven == (sizes[0] == 3.0)
    method = ace(1e-2, share=0.45, scale=0.8)
    merged = merge(method, experts, base=base, weights=list(weights))
    check(merged["w"], base["w"], 0.8 * want.T, rtol=2e-5)
    mean = np.average(d["b"], axis=0, weights=weights)
    check(merged["b"], base["b"], 0.8 * mean, rtol=2e-6)


def test_ace_of_one_expert_of_none_and_of_a_stack():
    base, experts, d = problem(seed=2)
    # With a ridge that is all, one expert is its own mean: centred, as in the authors' code.
    only = merge(ace(1e8), experts[:1], base=base)["w"]
    centred = d["w"][0] - d["w"][0].mean(1, keepdims=True)
    check(only, base["w"], centred, rtol=1e-5)
    still = merge(ace(), [base, base], base=base)
    np.testing.assert_array_equal(still["w"], base["w"])
    stacked = [
        {"w": np.stack([e["w"], f["w"]])} for e, f in zip(experts, experts[::-1], strict=True)
    ]
    merged = merge(ace(axes="bmn"), stacked, base={"w": np.stack([base["w"]] * 2)})["w"]
    for i, part in enumerate((experts, experts[::-1])):
        np.testing.assert_allclose(merged[i], merge(ace(), part, base=base)["w"], rtol=1e-6)
    with pytest.raises(ValueError, match="eps must be above 0"):
        ace(0.0)


def published_doge(tau, density, norm, lr, steps, subspace):
    """As published, tau (out, in), but masks per matrix, and Adam's epsilon relative to them."""
    k, out, fan_in = tau.shape
    lam = np.array([norm / np.linalg.norm(w) for w in tau])
    rank = min(out, fan_in)
    lead = [np.linalg.svd(w, full_matrices=False)[0][:, : rank // k] for w in tau]
    u = np.linalg.svd(np.concatenate(lead, 1), full_matrices=False)[0][:, : rank // subspace]
    size = np.abs(tau).max()
    delta, m, v = np.zeros((out, fan_in)), 0.0, 0.0

    def loss(delta):
        total = np.einsum("t,toi->oi", lam, tau) + lam.sum() * delta
        return sum((((w * (w - total)).sum(1)) ** 2).sum() for w in tau)

    first = loss(delta)
    for t in range(1, steps + 1):
        total = np.einsum("t,toi->oi", lam, tau) + lam.sum() * delta
        g = sum(-2 * lam.sum() * (w * (w - total)).sum(1)[:, None] * w for w in tau)
        g = (g - u @ u.T @ g) / size**3  # The gradient of the loss for entries of order one.
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        delta = delta - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert loss(delta) < first
    flat = np.abs(tau).reshape(k, -1)
    last = np.sort(flat, 1)[:, -int(density * flat.shape[1])]
    mask = np.abs(tau) >= last[:, None, None]
    return np.einsum("t,toi->oi", lam, mask * (tau + delta)), mask


@pytest.mark.parametrize("shape", [(8, 6), (6, 9)])
def test_doge(shape):
    base, experts, d = problem(shape, seed=3)
    want, mask = published_doge(np.swapaxes(d["w"], 1, 2), 0.4, 0.9, 3e-3, 20, 3)
    merged = merge(doge(0.4, 0.9, 3e-3, 20, 3), experts, base=base)
    check(merged["w"], base["w"], want.T, rtol=2e-5)
    check(merged["b"], base["b"], d["b"].mean(0), rtol=2e-6)
    # Without steps of any size it is task arithmetic of trimmed and normalised task vectors.
    lam = 0.9 / np.linalg.norm(d["w"].reshape(K, -1), axis=1)
    plain = np.einsum("t,tio->io", lam, np.swapaxes(mask, 1, 2) * d["w"])
    still = merge(doge(0.4, 0.9, 0.0, 1, 3), experts, base=base)
    check(still["w"], base["w"], plain, rtol=2e-6)
    assert np.abs(merged["w"] - still["w"]).max() > 1e-2


def test_doge_of_many_of_none_and_of_a_stack():
    base, experts, _ = problem((4, 3), (1.0,) * 5, seed=4)
    method = doge(steps=3)
    assert np.all(np.isfinite(merge(method, experts, base=base)["w"]))
    still = merge(method, [base, base], base=base)
    np.testing.assert_array_equal(still["w"], base["w"])
    # An expert that changed nothing changes nothing.
    one = merge(method, experts[:2], base=base)["w"]
    two = merge(method, [*experts[:2], base], base=base)["w"]
    np.testing.assert_allclose(two, one, atol=2e-4)
    stacked = [
        {"w": np.stack([e["w"], f["w"]])} for e, f in zip(experts, experts[::-1], strict=True)
    ]
    whole = {"w": np.stack([base["w"]] * 2)}
    merged = merge(doge(steps=3, axes="bmn"), stacked, base=whole)["w"]
    for i, part in enumerate((experts, experts[::-1])):
        np.testing.assert_allclose(merged[i], merge(method, part, base=base)["w"], rtol=1e-6)


def published_pcb(tau, density, tail):
    """As published for flat task vectors of k models, but tails and ranks rounded down.

    With a rank of one the published shares are 0 / 0: here the best entry has a share of one.
    """
    k, n = tau.shape
    size = np.sort(np.abs(tau), 1)
    cut = int(tail * n)
    clipped = np.clip(np.abs(tau), size[:, [cut]], size[:, [n - 1 - cut]])
    norm01 = lambda x: (x - x.min(1, keepdims=True)) / np.ptp(x, 1, keepdims=True)
    score = np.exp(k * norm01(clipped) ** 2) * np.tanh(tau * tau.sum(0))
    last = np.sort(score, 1)[:, [-max(1, int(density * n))]]
    best = score.max(1, keepdims=True)
    if int(density * n) <= 1:
        share = 1.0 * (score == best)
    else:
        share = norm01(np.maximum(score, last))
    clipped = np.sign(tau) * clipped
    say = share.sum(0)
    return np.where(say == 0, 0, (share * clipped).sum(0) / np.where(say == 0, 1, say))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (130, 200)])
def test_pcb(density, shape):
    base, experts, d = problem(shape, (1.0, 0.5, 2.0), seed=5)
    merged = merge(pcb(density, scale=1.1), experts, base=base)
    for n in base:
        want = published_pcb(d[n].reshape(K, -1), density, 1e-4).reshape(base[n].shape)
        check(merged[n], base[n], 1.1 * want, rtol=2e-5)
    if shape[0] > 100:  # Some entries are clipped.
        assert int(1e-4 * d["w"][0].size) == 2


def test_pcb_at_the_edges():
    base, experts, _ = problem(seed=6)
    np.testing.assert_array_equal(merge(pcb(0.0), experts, base=base)["w"], base["w"])
    np.testing.assert_array_equal(merge(pcb(), [base, base], base=base)["w"], base["w"])
    # A leaf of one entry has no competition but between the experts.
    one = [jnp.float32(1.0), jnp.float32(3.0)]
    assert float(merge(pcb(scale=1.0), one, base=jnp.float32(0.0))) == 2.0
    assert float(merge(pcb(scale=1.0), [*one, jnp.float32(0.0)], base=jnp.float32(0.0))) == 2.0
    empty = {"w": np.zeros((0, 3), np.float32)}
    assert merge(pcb(), [empty, empty], base=empty)["w"].shape == (0, 3)
    # Units of the task vectors do not matter once they are small.
    zeros = jax.tree.map(np.zeros_like, base)
    small = [jax.tree.map(lambda x: np.float32(1e-4) * x, e) for e in experts]
    smaller = [jax.tree.map(lambda x: np.float32(2.0**-10) * x, e) for e in small]
    one, two = (merge(pcb(0.3), e, base=zeros) for e in (small, smaller))
    np.testing.assert_allclose(two["w"] * 1024, one["w"], rtol=1e-4, atol=1e-7)
    # Weights have a say in the vote and in the mean.
    alone = merge(pcb(0.3), experts, base=base, weights=[1.0, 0.0, 0.0])["w"]
    single = merge(pcb(0.3), experts[:1], base=base)["w"]
    assert np.mean(np.asarray(alone) != base["w"]) == np.mean(np.asarray(single) != base["w"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ace(threshold=-1),
        lambda: ace(share=1.5),
        lambda: ace(axes="mm"),
        lambda: doge(1.5),
        lambda: doge(steps=0),
        lambda: doge(subspace=0),
        lambda: pcb(2.0),
        lambda: pcb(scale=float("nan")),
        lambda: compete(-0.1),
    ],
)
def test_numbers_are_checked(make):
    with pytest.raises(ValueError, match="must"):
        make()


def test_numbers_can_be_traced_and_differentiated():
    base, experts, _ = problem(seed=7)

    def score(factor, eps):
        method = chain(*ace(eps, scale=factor).steps)
        return merge(method, experts, base=base)["w"][0, 0]

    slope = jax.jit(jax.grad(score))(0.3, 1e-2)
    np.testing.assert_allclose(slope, score(1.0, 1e-2) - score(0.0, 1e-2), rtol=1e-4)
    masked = jax.jit(lambda density: merge(chain(compete(density), total()), experts, base=base))
    whole = merge(chain(compete(0.4), total()), experts, base=base)["w"]
    np.testing.assert_allclose(masked(0.4)["w"], whole, rtol=1e-6)


def test_recipes_know_the_methods():
    known = {"ace", "doge", "pcb", "compete", "regmean", "wudi", "tsv_m"}
    assert known <= METHODS.keys()
    # What is no step of a merge is no method of a recipe.
    assert not {"emr", "tall_masks", "masked_expert", "opcm", "running_mean"} & METHODS.keys()
    base, experts, _ = problem(seed=8)
    spec = [{"name": "compete", "density": 0.3}, "mean", {"name": "scale", "factor": 0.5}]
    for method, want in (
        (build_method({"name": "pcb", "density": 0.3, "scale": 0.5}, {}), pcb(0.3, 0.5)),
        (build_method(spec, {}), pcb(0.3, 0.5)),
        (build_method("ace", {"eps": 1e-2}), ace(1e-2)),
        (build_method({"name": "doge", "steps": 2}, {"density": 0.5}), doge(0.5, steps=2)),
    ):
        one, two = (merge(m, experts, base=base)["w"] for m in (method, want))
        np.testing.assert_array_equal(one, two)
