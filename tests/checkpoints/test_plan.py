"""Recipes, globs, plans, comparisons and files of curvature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from optax_moma import checkpoints
from optax_moma._globs import matches
from optax_moma.checkpoints import Expert, Recipe, Rule
from optax_moma.checkpoints._recipe import interpolated

ocp = pytest.importorskip("orbax.checkpoint").v1


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("a/*", ["a/b"], ["a", "a/b/c", "b/a/b"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab/c"]),
        ("**/b", ["b", "a/b", "c/a/b"], ["ab", "a/cb"]),
        ("**", ["a", "a/b"], []),
        ("a?c/*", ["abc/d"], ["ac/d", "a/c/d"]),
        ("l_{0..10}/w", ["l_0/w", "l_10/w"], ["l_11/w", "l_1"]),
        ("{a,b.c}/w", ["a/w", "b.c/w"], ["bxc/w", "c/w"]),
        ("a,b", ["a,b"], ["a"]),
        ("a.b(c)", ["a.b(c)"], ["axb(c)"]),
    ],
)
def test_globs(glob, yes, no):
    assert matches([glob], [*yes, *no]) == yes


def test_gradient_values():
    assert [interpolated([0.0, 1.0, 0.0], x) for x in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 0]


def test_a_recipe_in_yaml_is_the_recipe_in_python(tmp_path):
    (tmp_path / "recipe.yaml").write_text("""
        base: {path: base, params: params}
        experts:
          math: {path: math, weight: 0.5, curvature: opt_state}
          code: code
        method: {name: curvature_ties, density: 0.3}
        rules:
          - {match: ["**/bias", "**/scale"], method: average}
          - {match: "layers_*/**", values: {density: [0.2, 0.4]}}
          - {else: base}
        seed: 3
        output: {dtype: bfloat16}
    """)
    recipe = Recipe(
        base={"path": "base", "params": "params"},
        experts={"math": Expert(path="math", weight=0.5, curvature="opt_state"), "code": "code"},
        method={"name": "curvature_ties", "density": 0.3},
        rules=[
            Rule(match=["**/bias", "**/scale"], method="average"),
            Rule(match="layers_*/**", values={"density": [0.2, 0.4]}),
            Rule(otherwise="base"),
        ],
        seed=3,
        output={"dtype": "bfloat16"},
    )
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded.model_dump() == recipe.model_dump()
    assert loaded.where("base") == tmp_path / "base"


def test_plan_counts(world):
    rules = [
        {"match": "layers_*/kernel", "keep": "math"},
        {"match": ["**/bias", "embedding"], "method": "average"},
    ]
    found = checkpoints.plan(world.recipe("moma", rules=rules))
    assert found.problems == []
    sizes = {
        n: math.prod(s) * np.dtype(d).itemsize
        for n, (s, d) in checkpoints.inspect(world.folder / "base").items()
    }
    assert found.leaves == len(sizes) == 12
    assert found.write_bytes == sum(sizes.values())
    kept = sum(sizes[f"layers_{i}/kernel"] for i in range(3))
    read_alike = 3 * (sum(sizes.values()) - kept) + kept
    # What is merged by moma reads second moments too: R, C of the matrices, nu of the rest.
    assert read_alike < found.read_bytes < read_alike + 3 * sum(sizes.values())
    assert [(rule.match, rule.action, len(rule.names)) for rule in found.rules] == [
        ("layers_*/kernel", "copied from math", 3),
        ("**/bias, embedding", "average", 4),
        ("(no rule)", "moma: 2 matrices, 2 averaged", 5),
    ]
    assert found.rules[1].names == ["embedding", *(f"layers_{i}/bias" for i in range(3))]
    base, code, math_ = found.models
    assert (base.name, base.params, base.step, base.curvature) == ("base", "", None, None)
    assert (math_.params, math_.step, math_.gradients) == ("params", 3, 3)
    assert math_.curvature == "moma (opt_state/1/0)"
    assert code.dtypes == ["bfloat16", "float32", "int32"] and code.bytes == sum(sizes.values())
    assert math_.drift is None  # What moma merges has no matrix that is large enough to tell.
    math_ = checkpoints.plan(world.recipe("moma")).models[-1]
    w, w0 = (np.float64(x["embedding"]) for x in (world.experts["math"], world.base))
    drift = np.linalg.norm(w - w0) / np.linalg.norm(w0)
    cosine = np.sum(w * w0) / np.linalg.norm(w) / np.linalg.norm(w0)
    np.testing.assert_allclose([math_.drift, math_.cosine], [drift, cosine], rtol=1e-5)
    assert found.coverage == {"code": (2, 2), "math": (2, 2)}  # of the matrices
    assert found.passes == 1 and found.peak_bytes > 1e8


def test_plan_tells_of_rounding(tmp_path):
    """Of a base in half precision the merge of wide experts may be the base again."""
    base = {"w": jnp.full((16, 16), 0.02, jnp.bfloat16), "b": jnp.ones(3)}
    ocp.save(tmp_path / "base", base)
    ocp.save(tmp_path / "a", {**base, "w": base["w"].astype(jnp.float32) + 1e-5})
    recipe = {"base": str(tmp_path / "base"), "experts": {"a": str(tmp_path / "a")}}
    recipe["method"] = "task_arithmetic"
    said = "w: the experts have float32, but the merge is rounded to bfloat16 as the base is"
    (warning,) = checkpoints.plan(recipe).warnings
    assert warning.startswith(said) and "output: {dtype: float32} keeps" in warning
    assert checkpoints.merge(recipe, tmp_path / "out").warnings == [warning]
    assert np.array_equal(checkpoints.load(tmp_path / "out")["w"], base["w"])
    recipe["output"] = {"dtype": "float32"}
    assert checkpoints.plan(recipe).warnings == []
    checkpoints.merge(recipe, tmp_path / "wide")
    assert np.all(checkpoints.load(tmp_path / "wide")["w"] > np.float32(base["w"]))


def test_plan_counts_matrices(tmp_path):
    """Leaves of three axes and more are averaged unless axes fit: plan says so."""
    shapes = {"q": (4, 2, 3), "token": (1, 1, 4), "w": (4, 4), "bias": (4,)}
    tree = {f"h_{i}": {k: np.ones(s) for k, s in shapes.items()} for i in range(2)}
    ocp.save(tmp_path / "a", {**tree, "n": np.arange(2)})
    recipe = {"base": str(tmp_path / "a"), "experts": {"b": str(tmp_path / "a")}}
    found = checkpoints.plan(recipe | {"method": "tsv_m"})
    (rule,), (warning,) = found.rules, found.warnings
    assert rule.action == "tsv_m: 2 matrices, 6 averaged"
    assert warning.startswith("the method averages h_{0..1}/q (4, 2, 3): by its axes")
    assert '{match: "h_{0..1}/q", values: {axes: ...}}' in warning
    rules = [{"match": "*/q", "values": {"axes": "mnn"}}, {"match": "*/w", "method": "average"}]
    found = checkpoints.plan(recipe | {"method": [{"name": "umtam"}], "rules": rules[1:]})
    assert [rule.action for rule in found.rules] == [
        "average",
        "umtam: 0 matrices, 6 as in the base",
    ]
    found = checkpoints.plan(recipe | {"method": "tsv_m", "rules": rules})
    assert found.warnings == []
    assert found.rules[0].action == "tsv_m (axes mnn): 2 matrices"
    rules = [{"match": "*/{q,token}", "stacked": True}]
    found = checkpoints.plan(recipe | {"method": "tsv_m", "rules": rules})
    assert found.warnings == [] and found.rules[0].action.endswith("stacks: 4 matrices")


def test_plan_of_two_passes(world):
    steps = [{"name": "trim", "density": 0.3, "scope": "global"}, "elect", "mean"]
    one, three = checkpoints.plan(world.recipe("ties")), checkpoints.plan(world.recipe(steps))
    assert (one.passes, three.passes) == (1, 3)
    assert three.read_bytes == 3 * one.read_bytes


def test_plan_reads_metadata_only(world, monkeypatch):
    from optax_moma.checkpoints import _orbax

    read = _orbax.read

    def read_numbers(*arguments):
        arrays = read(*arguments)
        # The integers, which are copied, must be alike.
        large = [n for n, x in arrays.items() if x.shape != () and not n.endswith("buckets")]
        assert not large, "plan reads arrays"
        return arrays

    monkeypatch.setattr(_orbax, "read", read_numbers)
    recipe = world.recipe("moma", check_base=False)
    assert checkpoints.plan(recipe).problems == []


@pytest.mark.parametrize("kind", ["moma", "adam", "adafactor"])
def test_a_file_of_curvature(world, tmp_path, equal_bits, kind):
    """Merging with the file gives the bits of merging with the state it came from."""
    tx = {
        "moma": om.moma(1e-3, rank=2, min_dim_size_to_factor=16),
        "adam": optax.adam(1e-3, b2=0.99),
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    }[kind]
    floats = {k: v for k, v in world.base.items() if k not in ("buckets", "blocks")}
    grads = jax.tree.map(lambda x: jnp.abs(x) * 1e-3, floats)
    state = jax.jit(tx.update)(grads, tx.init(floats), floats)[1]
    ocp.save(tmp_path / "math", {"params": world.experts["math"], "opt_state": state})
    recipe = world.recipe("moma", ignore=["blocks/**", "buckets"])
    recipe["experts"]["math"] = {"path": str(tmp_path / "math"), "curvature": {"b2": 0.99}}
    checkpoints.merge(recipe, tmp_path / "state")

    source = checkpoints.CurvatureSource(b2=0.99, missing=0.0)
    file = tmp_path / "math.safetensors"
    size = checkpoints.export_curvature(tmp_path / "math", file, source=source)
    assert size == file.stat().st_size
    recipe["experts"]["math"]["curvature"] = str(file)
    checkpoints.merge(recipe, tmp_path / "file")
    equal_bits(checkpoints.load(tmp_path / "file"), checkpoints.load(tmp_path / "state"))

    with pytest.raises(FileExistsError):
        checkpoints.export_curvature(tmp_path / "math", file, source=source)
    with pytest.raises(ValueError, match="no curvature for blocks/0/w"):
        checkpoints.export_curvature(tmp_path / "math", file, force=True)


def test_compare(tmp_path):
    base = {"w": np.float32([[3.0, 4.0]]), "still": np.ones(3, np.float32), "n": np.arange(2)}
    a, b = dict(base), dict(base)
    a["w"], b["w"] = base["w"] + [[1.0, 1.0]], base["w"] + [[-1.0, 2.0]]
    a["w"], b["w"] = a["w"].astype(np.float32), b["w"].astype(np.float32)
    va, vb = np.float32([[4.0, 0.0]]), np.float32([[1.0, 3.0]])
    ocp.save(tmp_path / "base", base)
    for name, params, v in (("a", a, va), ("b", b, vb)):
        adam = optax.ScaleByAdamState(jnp.int32(100000), {"w": v}, {"w": v})
        ocp.save(tmp_path / name, {"params": params, "opt_state": (adam, optax.EmptyState())})
    first, last = checkpoints.compare(tmp_path / "base", tmp_path / "a", tmp_path / "b")
    assert (first.name, last.name) == ("w", "still")
    np.testing.assert_allclose(first.drift, [math.sqrt(2) / 5, math.sqrt(5) / 5], rtol=1e-6)
    assert first.conflict == pytest.approx(1 - (0 + 3) / (2 + 3))
    # sqrt(v): (2, 0) and (1, sqrt 3)
    assert first.overlap == pytest.approx(2 / (2 * 2))
    assert last.drift == (0.0, 0.0) and last.conflict == 0.0 and last.overlap is None

    # A base that is nothing but params has no such part.
    paths = [tmp_path / name for name in ("base", "a", "b")]
    assert checkpoints.compare(*paths, params="params") == [first, last]
    with pytest.raises(ValueError, match="base: there is no 'parms' at the top; there is"):
        checkpoints.compare(*paths, params="parms")
    with pytest.raises(ValueError, match="a: there is no 'parms' at the top; did you mean"):
        checkpoints.load(paths[1], params="parms")

    ocp.save(tmp_path / "c", {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match="2 problems") as caught:
        checkpoints.compare(tmp_path / "base", tmp_path / "c")
    assert "lacks n, still" in str(caught.value) and "shape (2, 2)" in str(caught.value)


def test_leaves_that_are_no_arrays(tmp_path):
    """Texts and Python's numbers are passed by, as they are by inspect."""
    params = {"w": jnp.ones((2, 3)), "name": "bert", "layers": [2, jnp.ones(2)]}
    state = optax.adam(1e-3).init({"w": params["w"], "layers": [None, jnp.ones(2)]})
    ocp.save(tmp_path / "a", {"params": params, "opt_state": state})
    loaded = checkpoints.load(tmp_path / "a")
    assert (loaded["name"], loaded["layers"][0]) == (None, None)
    assert loaded["layers"][1].shape == (2,)
    found = checkpoints.compare(tmp_path / "a", tmp_path / "a")
    assert [(leaf.name, leaf.drift) for leaf in found] == [("layers/1", (0.0,)), ("w", (0.0,))]
    file = tmp_path / "v.safetensors"
    checkpoints.export_curvature(tmp_path / "a", file)
    assert sorted(checkpoints.inspect(file)) == ["layers/1", "w"]


def test_memory_of_the_widest_matrix(tmp_path):
    """It is not the largest leaf that a method of whole matrices works hardest on."""
    rng = np.random.default_rng(0)
    shapes = {"long": (8, 4096), "wide": (1024, 8)}
    for name in ("base", "a", "b"):
        tree = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
        ocp.save(tmp_path / name, tree)
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in "ab"},
        "method": "ace",
    }
    whole = checkpoints.plan(recipe).peak_bytes
    without = checkpoints.plan(recipe | {"rules": [{"match": "wide", "keep": "a"}]}).peak_bytes
    # The Grams of the experts and of their sum, 1024 x 1024 each.
    assert 2 * 4 * 1024**2 < whole - without < 20 * 4 * 1024**2
