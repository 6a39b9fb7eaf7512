"""Our merges against what mergekit, peft and fusion_bench return for the same small trees.

The files are made by ``make_golden.py``. All is float32 on both sides, to 1e-6 of a leaf's largest
entry. Methods that draw are compared given the peer's masks. Where we mean to differ, a test says
how.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optax_moma.merging import (
    Contract,
    average,
    breadcrumbs,
    chain,
    consensus,
    dare,
    doge,
    emr,
    fisher,
    fusion_bench,
    iso_c,
    iso_cts,
    karcher,
    merge,
    merge_step,
    mergekit,
    model_stock,
    multislerp,
    opcm,
    peft,
    regmean,
    slerp,
    task_arithmetic,
    ties,
    total,
    trim,
    tsv_m,
    wudi_adam,
)
from optax_moma.merging._steps import Chain

RANDOM = ("kernel", "bias", "stack")
MATRICES = ("kernel", "square", "bias")
MODEL = ("kernel", "square", "bias", "stack")
VOTE = (*RANDOM, "vote")
KEY = jax.random.key(0)


def load(peer: str) -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / f"{peer}.npz") as file:
        return dict(file)


GOLDEN = {peer: load(peer) for peer in ("mergekit", "peft", "fusion_bench")}


def tree(peer: str, what: str, leaves: tuple[str, ...] = VOTE) -> dict[str, np.ndarray]:
    """Returns leaves of a file; matrices as in Flax, (fan-in, fan-out)."""
    found = {n: GOLDEN[peer][f"{what}/{n}"] for n in leaves if f"{what}/{n}" in GOLDEN[peer]}
    assert found, f"{peer} has no {what}"
    return {n: np.swapaxes(x, -1, -2) if n in ("kernel", "square") else x for n, x in found.items()}


def base_and_experts(peer: str, leaves: tuple[str, ...]) -> tuple[dict, list[dict]]:
    stacked = tree(peer, "experts", leaves)
    experts = [{n: x[t] for n, x in stacked.items()} for t in range(3)]
    return tree(peer, "base", leaves), experts


def assert_near(got: Any, want: np.ndarray, leaf: str, rtol: float = 1e-6) -> None:
    """The same to rtol of the largest entry."""
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max()
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=0, atol=rtol * scale, err_msg=leaf
    )


def assert_same(got: dict, want: dict, rtol: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for leaf in want:
        assert_near(got[leaf], want[leaf], leaf, rtol)


def weights_of(peer: str) -> list[float]:
    return GOLDEN[peer]["weights"].tolist()


@merge_step
class Imposed:
    """Stands for a step that draws: masks one leaf as a peer's masks say."""

    mask: Any
    factor: float

    @property
    def contract(self) -> Contract:
        return Contract(base=True)

    def __call__(self, leaf):
        return leaf._replace(delta=self.factor * leaf.delta, weight=leaf.weight * self.mask)


def with_masks(method: Chain, masks: np.ndarray) -> Chain:
    """Returns the method with a peer's masks in place of the one step that draws."""
    (position,) = (i for i, step in enumerate(method.steps) if step.contract.key)
    draws: Any = method.steps[position]
    factor = 1 / draws.density if draws.rescale else 1.0
    imposed = Imposed(jnp.asarray(masks, jnp.float32), factor)
    return Chain((*method.steps[:position], imposed, *method.steps[position + 1 :]))


# mergekit -----------------------------------------------------------------------------------------

MERGEKIT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "task_arithmetic": (task_arithmetic(0.4), (*VOTE, "tied")),
    "ties": (mergekit.ties(0.5, 0.8), RANDOM),
    "ties density 1": (mergekit.ties(), (*VOTE, "tied")),
    "ties total": (mergekit.ties(0.5, normalize=False), RANDOM),
    "ties rescale": (mergekit.ties(0.5, rescale=True), RANDOM),
    "breadcrumbs": (breadcrumbs(0.5, 0.12, 0.4), RANDOM),
    "breadcrumbs_ties": (mergekit.breadcrumbs_ties(0.5, 0.12, 0.4), RANDOM),
}


@pytest.mark.parametrize("name", MERGEKIT)
def test_mergekit(name):
    method, leaves = MERGEKIT[name]
    base, experts = base_and_experts("mergekit", leaves)
    got = merge(method, experts, base=base, weights=weights_of("mergekit"))
    assert_same(got, tree("mergekit", name, leaves))


@pytest.mark.parametrize(("density", "leaves"), [(1.0, (*VOTE, "tied")), (0.4, RANDOM)])
def test_mergekit_sce(density, leaves):
    base, experts = base_and_experts("mergekit", leaves)
    got = merge(mergekit.sce(density), experts, base=base)
    assert_same(got, tree("mergekit", f"sce {density}", leaves))


def test_mergekit_model_stock():
    base, experts = base_and_experts("mergekit", RANDOM)
    assert_same(merge(model_stock(), experts, base=base), tree("mergekit", "model_stock", RANDOM))


@pytest.mark.parametrize(
    ("name", "method", "count", "weights", "with_base"),
    [
        ("linear", average(), 3, None, False),
        ("multislerp", multislerp(), 3, None, False),
        ("multislerp with base", multislerp(), 3, None, True),
        ("karcher", karcher(30), 3, [1.0] * 3, False),
        ("slerp", slerp(), 2, [0.7, 0.3], False),
        ("nuslerp", slerp(), 2, None, False),
        ("nuslerp with base", slerp(), 2, None, True),
    ],
)
def test_mergekit_geometric(name, method, count, weights, with_base):
    base, experts = base_and_experts("mergekit", RANDOM)
    got = merge(
        method,
        experts[:count],
        base=base if with_base else None,
        weights=weights or weights_of("mergekit")[:count],
    )
    assert_same(got, tree("mergekit", name, RANDOM))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dare_linear", mergekit.dare_linear(0.5)),
        ("dare_ties", mergekit.dare_ties(0.5)),
        ("della", mergekit.della(0.5, 0.2)),
        ("della_linear", mergekit.della_linear(0.5, 0.2)),
    ],
)
def test_mergekit_given_its_masks(name, method):
    base, experts = base_and_experts("mergekit", RANDOM)
    masks = tree("mergekit", f"{name}.mask", RANDOM)
    want = tree("mergekit", name, RANDOM)
    for leaf in RANDOM:
        one = [{leaf: e[leaf]} for e in experts]
        imposed = with_masks(method, masks[leaf])
        got = merge(imposed, one, base={leaf: base[leaf]}, weights=weights_of("mergekit"))
        assert_near(got[leaf], want[leaf], leaf)


def test_mergekit_della_keeps_by_rank_as_often_as_ours():
    """Both draw independently: each frequency is within four standard errors of the formula."""
    theirs = GOLDEN["mergekit"]["della.kept/by rank of 11, 4000 rows"]
    expected = 0.5 + 0.2 * (2 * np.arange(11) / 10 - 1)
    ours = merge(
        mergekit.della_linear(0.5, 0.2, rescale=False),
        [{"w": np.tile(np.arange(1.0, 12.0, dtype=np.float32)[:, None], 4000)}],
        base={"w": np.zeros((11, 4000), np.float32)},
        key=KEY,
    )["w"]
    for kept in (theirs, (np.asarray(ours) != 0).mean(1)):
        assert np.all(np.abs(kept - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def bfloat16(name: str) -> np.ndarray:
    return GOLDEN["mergekit"][f"bfloat16/{name}"].view(ml_dtypes.bfloat16)


def test_mergekit_with_bfloat16_inputs():
    """Bit for bit where both compute in float32; its default, all in bfloat16, is further off."""
    base, *experts = bfloat16("inputs")
    weights = weights_of("mergekit")

    def ours(cast: Callable) -> np.ndarray:
        trees = [{"w": cast(x)} for x in experts]
        return merge(mergekit.ties(), trees, base={"w": cast(base)}, weights=weights)["w"]

    got = np.asarray(ours(lambda x: x))
    assert got.dtype == ml_dtypes.bfloat16
    exact = np.asarray(ours(lambda x: x.astype(np.float32)), np.float64)
    # float32 sums in two orders may fall on two sides of the middle between two bfloat16 numbers.
    theirs = bfloat16("ties float32")
    assert np.mean(got.view(np.uint16) == theirs.view(np.uint16)) > 0.95
    np.testing.assert_allclose(got.astype(float), theirs.astype(float), rtol=2**-7)
    off = np.abs(bfloat16("ties default").astype(np.float64) - exact).mean()
    assert np.abs(got.astype(np.float64) - exact).mean() < off


# peft ---------------------------------------------------------------------------------------------

PEFT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "task_arithmetic": (task_arithmetic(1.0), (*VOTE, "tied")),
    "magnitude_prune": (chain(trim(0.5), total()), RANDOM),
    "ties total": (peft.ties(0.5), RANDOM),
    "ties frequency": (peft.ties(0.5, vote="count"), RANDOM),
    "ties total density 1": (peft.ties(1.0), ("vote", "tied")),
    "ties frequency density 1": (peft.ties(1.0, vote="count"), ("vote", "tied")),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft(name):
    method, leaves = PEFT[name]
    base, experts = base_and_experts("peft", leaves)
    got = merge(method, experts, base=base, weights=weights_of("peft"))
    # peft returns task vectors.
    want = tree("peft", name, leaves)
    assert_same(got, {n: base[n] + want[n] for n in want})


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("dare_linear", dare(0.5)),
        ("dare_ties total", peft.dare_ties(0.5)),
        ("dare_ties frequency", peft.dare_ties(0.5, vote="count")),
    ],
)
def test_peft_given_its_masks(name, method):
    base, experts = base_and_experts("peft", RANDOM)
    masks, want = tree("peft", "dare.mask", RANDOM), tree("peft", name, RANDOM)
    for leaf in RANDOM:
        one = [{leaf: e[leaf]} for e in experts]
        imposed = with_masks(method, masks[leaf])
        got = merge(imposed, one, base={leaf: base[leaf]}, weights=weights_of("peft"))
        assert_near(got[leaf], base[leaf] + want[leaf], leaf)


# fusion_bench -------------------------------------------------------------------------------------


def one_more(density: float, leaves: tuple[str, ...]) -> float:
    """Returns the density that keeps as many entries as fusion_bench does: one more."""
    base, _ = base_and_experts("fusion_bench", leaves)
    n = sum(x.size for x in base.values())
    return (int(density * n) + 1) / n


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "density", "leaves"),
    [("ties", 0.3, MODEL), ("ties vote", 0.99, (*MODEL, "vote", "tied"))],
)
def test_fusion_bench_ties(name, density, leaves, combine):
    base, experts = base_and_experts("fusion_bench", leaves)
    method = fusion_bench.ties(one_more(density, leaves), 1.0, combine)
    got = merge(method, experts, base=base)
    want = tree("fusion_bench", f"{name} {combine}", leaves)
    assert_same(got, {n: base[n] + want[n] for n in want})


@pytest.mark.parametrize(
    ("name", "method", "leaves", "with_base"),
    [
        ("simple_average", average(), RANDOM, False),
        ("tsv_m", tsv_m(), MATRICES, True),
        ("iso_c", iso_c(), MATRICES, True),
        ("iso_cts 0.5", iso_cts(common=0.5), MATRICES, True),
        ("iso_cts 0.6", iso_cts(common=0.6), MATRICES, True),
        ("wudi", wudi_adam(steps=50), MATRICES, True),
    ],
)
def test_fusion_bench(name, method, leaves, with_base):
    base, experts = base_and_experts("fusion_bench", leaves)
    got = merge(method, experts, base=base if with_base else None)
    want = tree("fusion_bench", name, leaves)
    # Its functions on task vectors return one.
    assert_same(got, {n: base[n] + want[n] for n in want} if with_base else want)


def test_fusion_bench_slerp():
    _, experts = base_and_experts("fusion_bench", RANDOM)
    got = merge(slerp(), experts[:2], weights=[0.7, 0.3])
    assert_same(got, tree("fusion_bench", "slerp", RANDOM))


@pytest.mark.parametrize("normalized", [False, True])
def test_fusion_bench_fisher(normalized):
    _, experts = base_and_experts("fusion_bench", MODEL)
    stacked = tree("fusion_bench", "fisher.curvature", MODEL)
    curvature = [{n: x[t] for n, x in stacked.items()} for t in range(3)]
    weights = np.array(weights_of("fusion_bench"))
    if normalized:
        weights /= [np.sqrt(sum((x**2).sum() for x in c.values())) for c in curvature]
    got = merge(fisher(), experts, curvature=curvature, weights=weights)
    assert_same(
        got, tree("fusion_bench", "fisher normalized" if normalized else "fisher", MODEL), 2e-6
    )


def test_fusion_bench_regmean():
    _, experts = base_and_experts("fusion_bench", ("kernel", "bias"))
    grams = GOLDEN["fusion_bench"]["regmean.gram/kernel"]
    got = merge(
        regmean(ratio=0.9, ridge=0.0),
        experts,
        curvature=[{"kernel": g, "bias": None} for g in grams],
    )
    assert_same(got, tree("fusion_bench", "regmean", ("kernel", "bias")), 2e-6)


def test_fusion_bench_tall_masks():
    base, experts = base_and_experts("fusion_bench", RANDOM)
    masks = tree("fusion_bench", "tall.mask", RANDOM)
    got = merge(chain(consensus(0.4, experts=2), total()), experts, base=base)
    for leaf in RANDOM:
        total_delta = sum(e[leaf] - base[leaf] for e in experts)
        want = base[leaf] + (masks[leaf].sum(0) >= 2) * total_delta
        assert_near(got[leaf], want, leaf)


def test_fusion_bench_emr():
    """Its rescalers weigh all leaves alike, ours all entries: of one leaf they are the same."""
    base, experts = base_and_experts("fusion_bench", MODEL)
    merged = emr(experts, base=base)
    assert_same(merged.delta, tree("fusion_bench", "emr", MODEL))
    masks = tree("fusion_bench", "emr.mask", MODEL)
    for t, packed in enumerate(merged.masks.values()):
        for leaf, bits in packed.items():
            found = np.unpackbits(np.asarray(bits), count=base[leaf].size)
            np.testing.assert_array_equal(found.reshape(base[leaf].shape), masks[leaf][t])
    one = emr([{"kernel": e["kernel"]} for e in experts], base={"kernel": base["kernel"]})
    scales = {leaf: GOLDEN["fusion_bench"][f"emr.rescaler/{leaf}"] for leaf in ("kernel", "model")}
    assert_near(list(one.scales.values()), scales["kernel"], "kernel")
    ours = np.array(list(merged.scales.values()))
    assert 1e-4 < np.abs(ours - scales["model"]).max() < 0.1


def model(name: str) -> dict[str, np.ndarray]:
    """Returns the parameters of a small model; kernels as in Flax."""
    start = f"model/{name}/"
    found = {n[len(start) :]: x for n, x in GOLDEN["fusion_bench"].items() if n.startswith(start)}
    return {n: x.T if x.ndim == 2 else x for n, x in found.items()}


def test_fusion_bench_opcm():
    method = opcm(alpha=0.5)
    state = method.init(model("_pretrained_"))
    for t in range(3):
        state = method.update(state, model(f"expert{t}"))
    assert_same(method.params(state), model("opcm"))


def test_fusion_bench_doge():
    """Where nothing is dropped. It leaves biases and norms at the base, ours averages them."""
    base, want = model("_pretrained_"), model("doge")
    got = merge(doge(density=1.0), [model(f"expert{t}") for t in range(3)], base=base)
    for leaf, x in want.items():
        if x.ndim == 2:
            assert_near(got[leaf], x, leaf)
            assert np.abs(x - base[leaf]).max() > 1e-3
        else:
            np.testing.assert_array_equal(x, base[leaf])
            average = np.mean([model(f"expert{t}")[leaf] for t in range(3)], 0)
            assert_near(got[leaf], average, leaf)


# Where we mean to differ --------------------------------------------------------------------------


def test_we_keep_all_entries_that_tie_at_a_trim():
    """mergekit and peft keep exactly half of a leaf, whichever of the entries that tie."""
    base, experts = base_and_experts("peft", ("tied",))
    sizes = np.abs(np.stack([e["tied"] for e in experts]))
    n = sizes.shape[1]
    want = GOLDEN["peft"]["magnitude_prune/tied"]
    got = merge(chain(trim(0.5), total()), experts, base=base, weights=weights_of("peft"))
    kth = -np.sort(-sizes)[:, n // 2 - 1]
    assert ((sizes >= kth[:, None]).sum(1) > n // 2).all()
    mask = sizes >= kth[:, None]
    weighted = np.array(weights_of("peft"))[:, None] * np.stack([e["tied"] for e in experts])
    assert_near(got["tied"], (mask * weighted).sum(0), "tied")
    assert np.abs(want - got["tied"]).max() > 0.4


def test_our_tied_votes_keep_the_base():
    """Where mergekit takes the positive side: one of two experts, by the names' order alone."""
    base, experts = base_and_experts("mergekit", ("vote",))
    weights = weights_of("mergekit")
    theirs = merge(mergekit.ties(), experts, base=base, weights=weights)["vote"]
    ours = merge(ties(1.0), experts, base=base, weights=weights)["vote"]
    d = np.stack([e["vote"] - base["vote"] for e in experts])
    tied = np.array(weights) @ d == 0
    assert tied.sum() == 3 and (d[:, tied] != 0).any(0).sum() == 2
    np.testing.assert_array_equal(ours[tied], base["vote"][tied])
    assert (np.asarray(theirs - base["vote"])[tied] >= 0).all()
    np.testing.assert_array_equal(ours[~tied], theirs[~tied])


def test_fusion_bench_keeps_one_entry_more():
    base, experts = base_and_experts("fusion_bench", MODEL)
    got = merge(fusion_bench.ties(0.3, 1.0, "sum"), experts, base=base)
    want = tree("fusion_bench", "ties sum", MODEL)
    other = sum((np.abs(got[n] - base[n] - want[n]) > 1e-6).sum() for n in want)
    assert 1 <= other <= 3


def test_mergekit_lets_negative_weights_cancel_and_we_refuse_them():
    base, experts = {"w": np.zeros(2, np.float32)}, [{"w": np.ones(2, np.float32)}]
    with pytest.raises(ValueError, match="negative"):
        merge(mergekit.ties(), experts, base=base, weights=[-0.5])
    merged = merge(mergekit.ties(normalize=False), experts, base=base, weights=[-0.5])
    np.testing.assert_array_equal(merged["w"], [-0.5, -0.5])


def test_our_model_stock_never_leaves_the_base_backwards():
    """mergekit's does, where task vectors oppose each other on the whole: the "vote" leaf."""
    base, experts = base_and_experts("mergekit", ("vote",))
    d = np.stack([e["vote"] - base["vote"] for e in experts]).astype(np.float64)
    u = d / np.linalg.norm(d, axis=1, keepdims=True)
    c = np.mean([u[0] @ u[1], u[0] @ u[2], u[1] @ u[2]])
    assert c < 0
    theirs = GOLDEN["mergekit"]["model_stock/vote"]
    assert_near(theirs, base["vote"] + 3 * c / (1 + 2 * c) * d.mean(0), "vote")
    np.testing.assert_array_equal(merge(model_stock(), experts, base=base)["vote"], base["vote"])
