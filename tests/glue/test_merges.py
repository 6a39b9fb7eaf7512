"""The table of methods, the grids and the stages that use them, in small."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.glue import merges, stages
from experiments.glue.experts import Expert, Statistics
from experiments.glue.merges import ABLATIONS, METHODS, Published
from optax_moma import merging
from optax_moma.merging import merge


def models(seed, k=3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    trees = [{"w": draw(6, 8), "b": draw(8)} for _ in range(k + 1)]
    squared = lambda: jax.tree.map(lambda x: x**2 * 1e-3, {"w": draw(6, 8), "b": draw(8)})
    return trees[0], trees[1:], [squared() for _ in range(k)]


def test_the_published_merge_taken_apart_is_the_published_merge():
    base, experts, curvature = models(0)
    for density in (0.2, 0.7, 1.0):
        want = merge(merging.umtam(density), experts, base=base, curvature=curvature)
        step = merging.chain(Published(density))
        got = merge(step, experts, base=base, curvature=curvature)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
        np.testing.assert_array_equal(got["b"], base["b"])


def test_each_ablation_changes_the_merge():
    trees = models(1)
    matrices = jax.tree.map(lambda tree: {"w": tree["w"]}, trees, is_leaf=lambda x: "w" in x)

    def merged_by(name, models=matrices):
        method, (base, experts, curvature) = ABLATIONS[name], models
        if method.curvature == "factored":
            curvature = [merges.factored(v) for v in curvature]
        (setting, *_) = method.settings()
        step = method.make(**setting | ({"density": 0.5} if "density" in setting else {}))
        return merge(step, experts, base=base, curvature=curvature)["w"]

    found = {name: merged_by(name) for name in ABLATIONS}
    wholes = ("moma", "curvature TIES", "UMTAM")
    # These differ where there are several leaves, embeddings, or floors that matter.
    elsewhere = {
        "curvature TIES, global threshold",
        "moma, embeddings averaged",
        "UMTAM, no floors",
    }
    for name in ABLATIONS.keys() - {*wholes, *elsewhere}:
        whole = next(whole for whole in wholes if name.startswith(whole))
        assert not np.allclose(found[name], found[whole]), name
    names = ("curvature TIES, global threshold", "curvature TIES")
    assert not np.allclose(*(merged_by(name, trees) for name in names))
    # Floors matter where curvature is as small as that of real gradients.
    base, experts, curvature = matrices
    tiny = base, experts, [{"w": v["w"] * 1e-9} for v in curvature]
    whole, without = (merged_by(name, tiny) for name in ("UMTAM", "UMTAM, no floors"))
    assert not np.allclose(whole, without)
    np.testing.assert_allclose(without, found["UMTAM, no floors"], rtol=1e-4)


def sided(seed, side):
    """A matrix merged by sides, and by its normal equations, one unknown an entry."""
    base, experts, curvature = models(seed)
    d, v = (
        [np.asarray(tree["w"] - shift, np.float64) for tree in trees]
        for trees, shift in ((experts, base["w"]), (curvature, 0))
    )
    left, right = 0, 0
    for d_t, v_t in zip(d, v, strict=True):
        G = d_t * np.sqrt(v_t)
        A, B = G @ G.T / np.sum(G**2), G.T @ G / np.sum(G**2)
        if side == "both":
            A, B = (0.97 * x + 0.03 * np.diag(np.diag(x) + 1e-6 / len(x)) for x in (A, B))
            A, B = A * len(A), B * len(B)
        else:
            B = np.eye(len(B))
        left = left + np.kron(A, B)
        right = right + np.kron(A, B) @ d_t.ravel()
    if side == "inputs":
        c = 0.1 * 3 / len(A)
        left, right = left + c * np.eye(len(left)), right + c * np.mean(d, axis=0).ravel()
    merged = merge(
        merging.chain(merges.Sides(side, steps=200)), experts, base=base, curvature=curvature
    )
    expected = base["w"] + np.linalg.solve(left, right).reshape(d[0].shape)
    return merged, expected, np.mean([tree["b"] for tree in experts], axis=0)


@pytest.mark.parametrize("side", ["inputs", "both"])
def test_sides_solve_their_equations(side):
    merged, matrix, vector = sided(2, side)
    np.testing.assert_allclose(merged["w"], matrix, rtol=3e-3, atol=3e-3)
    np.testing.assert_allclose(merged["b"], vector, rtol=1e-5, atol=1e-6)


def test_embeddings_are_averaged_by_methods_for_layers():
    rng = np.random.default_rng(0)
    draw = lambda: {"words": rng.normal(size=(6, 4)), "w": rng.normal(size=(5, 4))}
    base, one, two = (jax.tree.map(jnp.float32, draw()) for _ in range(3))
    experts = {"a": Expert(one, {}, Statistics({}, {}, [])), "b": Expert(two, {}, None)}
    curvature = dict.fromkeys("ab", jax.tree.map(jnp.square, base))
    apart, whole = (
        merges.merged(ABLATIONS[name], {}, experts, base, curvature)
        for name in ("moma, embeddings averaged", "moma")
    )
    np.testing.assert_allclose(apart["words"], (one["words"] + two["words"]) / 2, atol=1e-6)
    assert not np.allclose(apart["words"], whole["words"])
    np.testing.assert_array_equal(apart["w"], whole["w"])


def test_the_climb_stops_where_it_has_clearly_gone_down():
    seen = dict(merges.climb(lambda s: -abs(s - 2.0), (0.1, 0.5, 1.0, 2.0, 3.0, 4.0)))
    assert seen == {1.0: -1.0, 2.0: 0.0, 3.0: -1.0, 0.5: -1.5}
    flat = dict(merges.climb(lambda s: 0.5, merges.SCALES))
    assert list(flat) != list(merges.SCALES) and sorted(flat) == sorted(merges.SCALES)


def test_grids_are_the_same_for_all():
    assert METHODS["TIES"].settings() == [
        {"density": density, "scale": 1.0} for density in merges.DENSITIES
    ]
    assert METHODS["UMTAM"].settings() == [{"density": d} for d in merges.DENSITIES]
    assert METHODS["average"].settings() == [{}]
    assert METHODS["TSV-M"].settings() == [{"scale": 1.0}]


@pytest.mark.parametrize("table", [METHODS, ABLATIONS], ids=["methods", "ablations"])
def test_every_point_of_every_grid_is_a_method_and_without_arguments_the_default(table):
    for method in table.values():
        for setting in method.settings():
            method.make(**setting)
    own = {"Breadcrumbs": merging.breadcrumbs(), "DELLA": merging.della()}
    for name, default in own.items():
        assert METHODS[name].make() == default


@pytest.fixture
def quick(small, monkeypatch):
    """Two experts, few methods and points."""
    monkeypatch.setattr(merges, "SCALES", (0.5, 1.0))
    monkeypatch.setattr(merges, "DENSITIES", (0.2, 1.0))
    monkeypatch.setattr(stages, "RATE_TASKS", ("cola",))
    monkeypatch.setattr(stages.saliency, "DENSITIES", (0.2, 0.9))
    monkeypatch.setattr(
        stages, "fisher_of", lambda study, recipe: jax.tree.map(jnp.ones_like, study.base)
    )
    stages.learning_rates(small, "moma")
    return small


def lines(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_merge_is_tuned_on_one_half_of_dev_and_shown_on_the_other(quick, tmp_path):
    study = quick._replace(results=tmp_path)
    (tmp_path / "rates.csv").write_text((quick.results / "rates.csv").read_text())
    methods = {name: METHODS[name] for name in ("average", "DARE")}
    sets = [("cola", "sts")]
    stages.merge(study, "moma", 0, methods, sets, "held", "merges")
    rows = lines(tmp_path / "merges.csv")
    assert [(r["method"], r["tuned"], r["task"]) for r in rows] == [
        (name, tuned, task)
        for name, tuned in [
            ("base", "False"),
            ("experts", "False"),
            *((name, tuned) for name in methods for tuned in ("False", "True")),
        ]
        for task in ("cola", "sts")
    ]
    for row in rows:
        if row["method"] == "experts":
            assert float(row["share"]) == 1
    tuning = lines(tmp_path / "merges_tuning.csv")
    for name in methods:
        own = [r for r in tuning if r["method"] == name]
        assert len(own) == len(methods[name].settings()) * 2
        best = max(own, key=lambda r: float(r["score"]))
        chosen = [r for r in rows if r["method"] == name and r["tuned"] == "True"]
        assert {(r["setting"], r["scale"]) for r in chosen} == {(best["setting"], best["scale"])}
    halves = stages.halves(study).tasks["cola"].splits
    tune, held = (set(map(bytes, halves[part].tokens)) for part in ("tune", "held"))
    assert len(tune) == len(held) == 16 and not tune & held
    # Again, and again on test: nothing is tuned anew.
    before = (tmp_path / "merges_tuning.csv").read_text()
    stages.merge(study, "moma", 0, methods, sets, "held", "merges")
    assert lines(tmp_path / "merges.csv") == rows
    stages.merge(study, "moma", 0, methods, sets, "test", "merges")
    assert (tmp_path / "merges_tuning.csv").read_text() == before
    assert len(lines(tmp_path / "merges.csv")) == 2 * len(rows)


def expert_of(tree, curvature):
    return Expert(tree, {}, Statistics(curvature, {}, []))


def test_methods_for_layers_average_the_embeddings():
    rng = np.random.default_rng(0)
    trees = [
        {name: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for name in ("words", "layers")}
        for _ in range(3)
    ]
    experts = {name: expert_of(tree, None) for name, tree in zip("ab", trees[1:], strict=True)}
    got = merges.merged(METHODS["TSV-M"], {"scale": 1.0}, experts, trees[0], None)
    np.testing.assert_allclose(got["words"], (trees[1]["words"] + trees[2]["words"]) / 2, rtol=1e-5)
    parts = [{"layers": tree["layers"]} for tree in trees]
    want = merge(merging.tsv_m(), parts[1:], base=parts[0])["layers"]
    np.testing.assert_allclose(got["layers"], want, rtol=1e-5)
    assert set(got) == {"words", "layers"}


def test_sequential_methods_take_the_experts_in_turn():
    base, trees, curvature = models(2)
    experts = {
        name: expert_of(tree, v) for name, tree, v in zip("abc", trees, curvature, strict=True)
    }
    method = METHODS["Perturb-and-Merge"]
    own = merges.given(method, experts, None, None)
    got = merges.merged(method, {}, experts, base, own)
    step = merging.perturb_and_merge()
    state = step.init(base)
    for tree, v in zip(trees, curvature, strict=True):
        state = step.update(state, tree, v)
    jax.tree.map(np.testing.assert_array_equal, got, step.params(state))


def test_what_each_method_is_given():
    _, trees, curvature = models(3, k=1)
    experts = {"a": expert_of(trees[0], curvature[0])}
    fisher, grams = (lambda name: f"F of {name}"), (lambda name: f"G of {name}")
    given = {
        name: merges.given(METHODS[name], experts, fisher, grams)
        for name in ("TIES", "Fisher (data)", "RegMean (data)", "moma")
    }
    assert given["TIES"] is None
    assert given["Fisher (data)"] == {"a": "F of a"}
    assert given["RegMean (data)"] == {"a": "G of a"}
    assert given["moma"]["a"] is curvature[0]
    sums = merges.given(ABLATIONS["moma, row and column sums"], experts, fisher, grams)
    np.testing.assert_allclose(
        jnp.sum(sums["a"]["w"].row * sums["a"]["w"].col), jnp.sum(curvature[0]["w"]), rtol=1e-5
    )
