"""Everything that can be wrong is said before any work, all at once, and nothing is written."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_moma import checkpoints
from optax_moma.checkpoints import Recipe

ocp = pytest.importorskip("orbax.checkpoint").v1


def refused(recipe, tmp_path, *fragments):
    """Both plan and merge refuse; what they say has the fragments; nothing is left behind."""
    before = sorted(p.name for p in tmp_path.iterdir())
    try:
        said = "\n".join(checkpoints.plan(recipe).problems)
    except ValueError as error:
        said = str(error)
    with pytest.raises(ValueError) as caught:
        checkpoints.merge(recipe, tmp_path / "out")
    for fragment in fragments:
        assert fragment in said, said
        assert fragment in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"metod": "ties"}, ["unknown key 'metod'", "did you mean 'method'?"]),
        (
            {"method": {"name": "ties", "densty": 0.2}},
            ["unknown option of ties 'densty'", "'density'"],
        ),
        ({"method": "tis"}, ["unknown method 'tis'", "did you mean 'ties'?"]),
        ({"method": {"name": "ties", "density": 1.5}}, ["density must be from 0 to 1"]),
        ({"method": "select"}, ["select needs density"]),
        ({"method": ["trim"]}, ["trim needs density"]),
        ({"experts": {}}, ["experts"]),
        ({"seed": -1}, ["seed"]),
        ({"output": {"dtype": "int8"}}, ["output.dtype"]),
        ({"rules": [{"match": "*", "keep": "maths"}]}, ["unknown model 'maths'", "'math'"]),
        ({"rules": [{"match": "*"}]}, ["a rule has either keep:, or"]),
        ({"rules": [{"else": "base"}, {"match": "*", "keep": "base"}]}, ["else: comes last"]),
        ({"rules": [{"match": "*", "values": {"densty": 1}}]}, ["densty"]),
        ({"rules": [{"match": "*", "weights": {"mth": 1}}]}, ["unknown expert 'mth'", "'math'"]),
        ({"base": "gs://bucket/base"}, ["not a local path"]),
        ({"base": {"path": "base", "item": "../secret"}}, ["not a path"]),
    ],
)
def test_schema(world, tmp_path, change, fragments):
    refused({**world.recipe("ties"), **change}, tmp_path, *fragments)


def test_all_schema_problems_at_once(world):
    recipe = {**world.recipe("average"), "seed": "x", "check_base": "perhaps"}
    with pytest.raises(ValueError, match="2 problems") as caught:
        Recipe.of(recipe)
    assert "seed" in str(caught.value) and "check_base" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: !!python/object/apply:os.getcwd []\nexperts: {a: a}", "not valid YAML"),
        ("method: average\nmethod: ties\nexperts: {a: a}", "given twice"),
        ("- method", "must be a mapping"),
        ("method: [", "not valid YAML"),
    ],
)
def test_yaml(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    refused(tmp_path / "recipe.yaml", tmp_path, said)


def test_recipe_that_is_not_there(tmp_path):
    refused(tmp_path / "no.yaml", tmp_path, "Cannot read the recipe")


def test_rules_that_match_nothing(world, tmp_path):
    rules = [
        {"match": "layer_0/kernel", "keep": "base"},
        {"match": "layers_*/**", "method": "average"},
        {"match": "layers_1/*", "keep": "base"},
        {"match": "{a,b", "keep": "base"},
    ]
    refused(
        world.recipe("average", rules=rules, ignore=["head/**"]),
        tmp_path,
        "rule 0: layer_0/kernel matches none of 12 leaves; the closest path is layers_0/kernel",
        "rule 2: every leaf that layers_1/* matches falls under an earlier rule",
        "opening brace",
        "ignore: head/** matches none",
    )


def test_gradient_without_layers(world, tmp_path):
    rule = {"match": "embedding", "values": {"scale": [0.0, 1.0]}}
    refused(world.recipe("task_arithmetic", rules=[rule]), tmp_path, "embedding has no number")


def save_expert(world, tmp_path, change):
    params = {**world.experts["math"]}
    change(params)
    ocp.save(tmp_path / "math", {"params": params})
    recipe = world.recipe("average")
    recipe["experts"]["math"]["path"] = str(tmp_path / "math")
    return recipe


def test_structure(world, tmp_path):
    def change(params):
        params["gains"] = params.pop("gain")
        params["embedding"] = jnp.zeros((25, 16))
        params["buckets"] = jnp.zeros(5)

    recipe = save_expert(world, tmp_path, change)
    refused(recipe, tmp_path, "expert 'math' lacks leaves that the base has: gain; it has gains")
    refused(recipe, tmp_path, "expert 'math' has leaves that the base lacks: gains")
    recipe["ignore"] = ["gain", "gains"]
    refused(recipe, tmp_path, "expert 'math', embedding: shape (25, 16), but the base has (24, 16)")
    refused(recipe, tmp_path, "expert 'math', buckets: dtype float32, but the base has int32")


def test_a_leaf_that_experts_lack_is_kept_by_a_rule(world, tmp_path):
    recipe = save_expert(world, tmp_path, lambda params: params.pop("gain"))
    refused(recipe, tmp_path, "lacks leaves")
    recipe["rules"] = [{"match": "gain", "keep": "base"}]
    checkpoints.merge(recipe, tmp_path / "out")
    assert checkpoints.load(tmp_path / "out")["gain"] == world.base["gain"]


def test_values_all_faults_in_all_leaves(world, tmp_path):
    """They are found while merging; still nothing is written, and all are told."""

    def change(params):
        params["embedding"] = params["embedding"].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
        params["norm"] = {"scale": params["norm"]["scale"].at[3].set(-jnp.inf)}
        params["buckets"] = params["buckets"].at[2].set(7)

    recipe = save_expert(world, tmp_path, change)
    before = sorted(p.name for p in tmp_path.iterdir())
    for chunk_bytes in (1, 1 << 20):
        with pytest.raises(ValueError, match="3 problems") as caught:
            checkpoints.merge(recipe, tmp_path / "out", chunk_bytes=chunk_bytes)
        said = str(caught.value)
        assert "expert 'math', embedding: 2 values that are not finite" in said
        assert "expert 'math', norm/scale: 1 values that are not finite" in said
        assert "expert 'math', buckets: 1 values of dtype int32 that differ" in said
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_nan_in_a_kept_leaf(world, tmp_path):
    change = lambda params: params.update(gain=jnp.float32(jnp.nan))
    recipe = save_expert(world, tmp_path, change)
    recipe["rules"] = [{"match": "gain", "keep": "math"}]
    with pytest.raises(ValueError, match="expert 'math', gain: 1 values that are not finite"):
        checkpoints.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_curvature_that_is_none(world, tmp_path, value):
    state = optax.adam(1e-3).init({k: v for k, v in world.base.items() if k != "buckets"})
    nu = {**state[0].nu, "embedding": jnp.full((24, 16), value)}
    state = (state[0]._replace(nu=nu, count=jnp.int32(20)), *state[1:])
    ocp.save(tmp_path / "math", {"params": world.experts["math"], "opt_state": state})
    recipe = world.recipe("fisher")
    recipe["experts"]["math"]["path"] = str(tmp_path / "math")
    with pytest.raises(ValueError, match="expert 'math', embedding: 384 values that are negative"):
        checkpoints.merge(recipe, tmp_path / "out")


def test_missing_curvature(world, tmp_path):
    part = {k: v for k, v in world.base.items() if k not in ("buckets", "embedding")}
    params = world.experts["math"]
    ocp.save(tmp_path / "math", {"params": params, "opt_state": optax.adam(1e-3).init(part)})
    recipe = world.recipe("moma")
    recipe["experts"]["math"]["path"] = str(tmp_path / "math")
    refused(recipe, tmp_path, "expert 'math' has no curvature for embedding", "missing: 0.0")
    recipe["experts"]["math"]["curvature"] = {"missing": 0.0}
    assert checkpoints.plan(recipe).coverage["math"] == (10, 11)
    checkpoints.merge(recipe, tmp_path / "merged")

    recipe["experts"]["math"] = {"path": str(world.folder / "base")}
    refused(recipe, tmp_path, "holds no optimizer state with second moments")
    recipe["experts"]["math"] = {"path": str(tmp_path / "math"), "curvature": "optstate"}
    refused(recipe, tmp_path, "there is no 'optstate'", "did you mean 'opt_state'?")


def test_curvature_of_another_model(world, tmp_path):
    other = optax.adam(1e-3).init({**world.base, "embedding": jnp.zeros((3, 3))})
    ocp.save(tmp_path / "math", {"params": world.experts["math"], "opt_state": other})
    recipe = world.recipe("fisher")
    recipe["experts"]["math"]["path"] = str(tmp_path / "math")
    refused(recipe, tmp_path, "expert 'math'", "embedding", "(24, 16)", "(3, 3)")


def test_contract(world, tmp_path):
    recipe = world.recipe("ties")
    recipe["experts"]["math"]["weight"] = -1
    del recipe["base"]
    refused(recipe, tmp_path, "base: the method works on task vectors", "weights: -1.0 for expert")
    refused(world.recipe({"name": "trim", "density": 0.5}), tmp_path, "it never combines")


def test_wrong_base(world, tmp_path):
    rng = np.random.default_rng(9)
    other = {**world.base, "embedding": jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)}
    ocp.save(tmp_path / "base", other)
    recipe = world.recipe("ties", base=str(tmp_path / "base"))
    said = "expert 'code', expert 'math': not fine-tuned from this base"
    refused(recipe, tmp_path, said, "check_base: false")
    recipe["check_base"] = False
    assert checkpoints.plan(recipe).problems == []


def test_paths(world, tmp_path):
    recipe = world.recipe("average")
    recipe["experts"]["math"]["path"] = str(world.folder / "maths")
    recipe["base"] = str(world.folder)
    refused(recipe, tmp_path, "does not exist; there is", "the base:", "cannot be read")
    recipe = world.recipe("average")
    recipe["experts"]["math"]["params"] = "parms"
    refused(recipe, tmp_path, "there is no 'parms'", "did you mean 'params'?")


def test_damaged_orbax(world, tmp_path):
    """Metadata that are truncated are found by plan, arrays that are by merge."""
    recipe = save_expert(world, tmp_path, lambda params: None)
    data = [p for p in (tmp_path / "math").rglob("*") if p.is_file() and p.parent.name == "d"]
    largest = max(data, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "math/state/_METADATA").write_text("{")
    refused(recipe, tmp_path, "expert 'math'", "cannot be read")


@pytest.mark.parametrize("damage", ["truncated", "header", "no file"])
def test_damaged_safetensors(world, tmp_path, damage):
    recipe = {"method": "average", "experts": {"a": str(tmp_path / "a.safetensors")}}
    base = {"path": str(world.folder / "base")}
    checkpoints.merge({"method": "average", "experts": {"a": base}}, tmp_path / "a.safetensors")
    file = tmp_path / "a.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-10])
        refused(recipe, tmp_path, "truncated")
    elif damage == "header":
        file.write_bytes(b"\xff" * 8 + content[8:])
        refused(recipe, tmp_path, "no safetensors file")
    else:
        file.unlink()
        refused(recipe, tmp_path, "does not exist")


def test_output(world, tmp_path):
    recipe = world.recipe("average")
    checkpoints.merge(recipe, tmp_path / "out")
    with pytest.raises(FileExistsError, match="force"):
        checkpoints.merge(world.recipe("ties"), tmp_path / "out")
    checkpoints.merge(world.recipe("ties"), tmp_path / "out", force=True)
    assert checkpoints.verify(tmp_path / "out").problems == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="in the place of expert 'math'"):
        checkpoints.merge(recipe, world.folder / "math", force=True)
    with pytest.raises(ValueError, match="in the place of the base"):
        checkpoints.merge(recipe, world.folder, force=True)


def test_only_what_the_recipe_names_is_read(world, tmp_path, monkeypatch):
    """Paths are relative to the recipe, not to where the command runs."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(world.folder / "base")
    (tmp_path / "models/recipe.yaml").write_text("method: average\nexperts: {a: base}\n")
    monkeypatch.chdir(world.folder)
    assert checkpoints.plan(tmp_path / "models/recipe.yaml").problems == []
    (tmp_path / "recipe.yaml").write_text("method: average\nexperts: {a: base}\n")
    assert "does not exist" in checkpoints.plan(tmp_path / "recipe.yaml").problems[0]
