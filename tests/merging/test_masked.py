"""Experts kept as one task vector and masks, against the papers' formulas in NumPy with float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma.merging import (
    chain,
    consensus,
    emr,
    masked_expert,
    merge,
    tall_masks,
    total,
)

K = 3


def problem(seed=0):
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=(6, 5)), "b": rng.normal(size=7), "s": rng.normal(size=())}
    base = jax.tree.map(np.float32, base)
    experts = [
        jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), base)
        for _ in range(K)
    ]
    d = {n: np.stack([e[n].astype(np.float64) - base[n] for e in experts]) for n in base}
    return base, experts, d


def close(got, want, rtol=2e-6):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * max(1, np.abs(want).max()))


def bits(tree):
    return {n: np.unpackbits(np.asarray(x)) for n, x in tree.items()}


def test_emr():
    base, experts, d = problem()
    merged = emr(experts, base=base)
    for n in base:
        sign = np.where(d[n].sum(0) > 0, 1, -1)
        agree = d[n] * sign > 0
        want = sign * (np.abs(d[n]) * agree).max(0)
        close(merged.delta[n], want)
        for t in range(K):
            mask = bits(merged.masks[str(t)])[n][: want.size].reshape(want.shape)
            np.testing.assert_array_equal(mask, agree[t])
    for t in range(K):
        sign = {n: np.where(x.sum(0) > 0, 1, -1) for n, x in d.items()}
        agree = {n: d[n][t] * sign[n] > 0 for n in d}
        uni = {n: sign[n] * (np.abs(d[n]) * (d[n] * sign[n] > 0)).max(0) for n in d}
        whole = sum(np.abs(d[n][t]).sum() for n in d)
        scale = whole / sum(np.abs(uni[n] * agree[n]).sum() for n in d)
        close(merged.scales[str(t)], scale)
        kept = masked_expert(merged, str(t), base=base)
        for n in base:
            close(kept[n], base[n] + scale * agree[n] * uni[n])


@pytest.mark.parametrize("threshold", [0.0, 0.4, [0.2, 0.9, 0.5], np.array([0.2, 0.9, 0.5])])
def test_tall_masks_and_their_consensus(threshold):
    base, experts, d = problem(1)
    of_each = np.broadcast_to(threshold, 3)
    threshold = jnp.asarray(threshold) if isinstance(threshold, list) else threshold
    merged = tall_masks(dict(zip("abc", experts, strict=True)), base=base, threshold=threshold)
    agreed = {n: 0 for n in base}
    for t, name in enumerate("abc"):
        kept = masked_expert(merged, name, base=base)
        for n in base:
            # |theta_0 - theta_t| > |theta_multi - theta_t| * threshold
            multi = d[n].sum(0)
            mask = np.abs(d[n][t]) > of_each[t] * np.abs(multi - d[n][t])
            close(kept[n], base[n] + mask * multi)
            agreed[n] = agreed[n] + bits(merged.masks[name])[n][: mask.size].reshape(mask.shape)
    whole = merge(chain(consensus(threshold, 2), total()), experts, base=base)
    for n in base:
        close(whole[n], base[n] + (agreed[n] >= 2) * d[n].sum(0))


@pytest.mark.parametrize("method", [emr, tall_masks])
def test_one_expert_is_kept_as_it_is(method):
    base, experts, _ = problem(2)
    merged = method({"only": experts[0]}, base=base)
    jax.tree.map(close, masked_expert(merged, "only", base=base), experts[0])
    # Experts without a change are the base, and do no harm to another.
    merged = method({"still": base, "only": experts[0]}, base=base)
    jax.tree.map(np.testing.assert_array_equal, masked_expert(merged, "still", base=base), base)
    jax.tree.map(close, masked_expert(merged, "only", base=base), experts[0])
    # Experts that change different entries are all kept.
    zeros = {"w": np.zeros(6, np.float32)}
    one, two = {"w": np.float32([1, 0, 0, -2, 0, 0])}, {"w": np.float32([0, 3, 0, 0, -1, 0])}
    merged = method([one, two], base=zeros)
    for name, expert in (("0", one), ("1", two)):
        np.testing.assert_array_equal(masked_expert(merged, name, base=zeros)["w"], expert["w"])


@pytest.mark.parametrize("method", [emr, tall_masks])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_trees_dtypes_and_bytes(method, dtype):
    base, experts, _ = problem(3)
    low = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    rest = {"steps": np.arange(3), "empty": {}, "none": None}
    wrap = lambda tree: {"layer": low(tree), **rest}
    merged = method([wrap(e) for e in experts], base=wrap(base))
    assert {x.dtype for x in jax.tree.leaves(merged.delta)} == {jnp.dtype(dtype)}
    assert [x.nbytes for x in jax.tree.leaves(merged.masks["0"])] == [1, 1, 4]  # b, s, w
    assert set(merged.masks) == {"0", "1", "2"}
    kept = masked_expert(merged, "1", base=wrap(base))
    assert jax.tree.structure(kept) == jax.tree.structure(wrap(base))
    np.testing.assert_array_equal(kept["steps"], rest["steps"])
    assert kept["layer"]["w"].dtype == dtype
    # The order of experts by name does not matter, and all can be jitted.
    named = {f"e{9 - t}": wrap(e) for t, e in enumerate(experts)}
    one, two = (method(e, base=wrap(base)) for e in (named, dict(sorted(named.items()))))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    jitted = jax.jit(lambda: masked_expert(method(named, base=wrap(base)), "e8", base=wrap(base)))()
    jax.tree.map(lambda a, b: close(np.float64(a), np.float64(b), 1e-2), jitted, kept)


def test_what_is_wrong_is_named():
    base, experts, _ = problem(4)
    merged = emr({"math": experts[0], "code": experts[1]}, base=base)
    with pytest.raises(ValueError, match="no expert 'maths'; did you mean 'math'"):
        masked_expert(merged, "maths", base=base)
    with pytest.raises(ValueError, match="no expert 'x'; there are code, math"):
        masked_expert(merged, "x", base=base)
    for other in ({**base, "w": base["w"].T}, {"w": base["w"], "s": base["s"], "b": np.ones(3)}):
        with pytest.raises(ValueError, match=r"not the base .*: [bw] differ in name or shape"):
            masked_expert(merged, "math", base=other)
    with pytest.raises(ValueError, match="lacks leaves that the base has: b"):
        emr([{"w": base["w"], "s": base["s"]}], base=base)
    with pytest.raises(ValueError, match="pass base="):
        tall_masks(experts, base=None)
    with pytest.raises(ValueError, match="values that are not finite"):
        emr([{**base, "b": np.full(7, np.nan, np.float32)}], base=base)
    for wrong in (-1, np.array([0.2, -1.0])):
        with pytest.raises(ValueError, match="threshold must be at least 0"):
            tall_masks(experts, base=base, threshold=wrong)
    with pytest.raises(ValueError, match=rf"of the {len(experts)} experts, got the shape \(1, 2\)"):
        tall_masks(experts, base=base, threshold=np.ones((1, 2)))
