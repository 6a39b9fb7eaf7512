"""Everything that can be wrong is said before any work, all at once, and nothing is written."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_moma import checkpoints
from optax_moma.checkpoints import Recipe
from optax_moma.checkpoints._source import open_checkpoint
from optax_moma.merging import MergeError

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

    recipe = save_expert(world, tmp_path, change)
    before = sorted(p.name for p in tmp_path.iterdir())
    for chunk_bytes in (1, 1 << 20):
        with pytest.raises(ValueError, match="2 problems") as caught:
            checkpoints.merge(recipe, tmp_path / "out", chunk_bytes=chunk_bytes)
        said = str(caught.value)
        assert "expert 'math', embedding: 2 values that are not finite" in said
        assert "expert 'math', norm/scale: 1 values that are not finite" in said
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_integers_that_differ(world, tmp_path, monkeypatch):
    """Small ones are compared before the merge, and all are while it copies them."""

    def change(params):
        params["buckets"] = params["buckets"].at[2].set(7)

    recipe = save_expert(world, tmp_path, change)
    said = "expert 'math', buckets: other values than in the base"
    refused(recipe, tmp_path, said, 'a rule {match: "buckets", keep: base}', "ignore:")
    monkeypatch.setattr(checkpoints._job, "_FEW_ENTRIES", 4)
    assert checkpoints.plan(recipe).problems == []
    with pytest.raises(MergeError, match=said):
        checkpoints.merge(recipe, tmp_path / "out")
    recipe["rules"] = [{"match": "buckets", "keep": "math"}]
    checkpoints.merge(recipe, tmp_path / "out")
    assert checkpoints.load(tmp_path / "out")["buckets"].tolist() == [0, 1, 7, 3, 4]


def test_many_integers_that_differ_have_one_remedy(tmp_path):
    for i, name in enumerate("ab"):
        counters = {f"l_{j}": {"n": np.array(i * j)} for j in range(3)}
        ocp.save(tmp_path / name, {"w": np.ones(2), **counters})
    recipe = {"experts": {n: str(tmp_path / n) for n in "ab"}, "method": "average"}
    (problem,) = checkpoints.plan(recipe).problems
    assert problem.startswith("expert 'b', l_1/n, l_2/n: other values than in expert 'a'")
    assert '{match: "**/n", keep: a}' in problem


def test_nan_in_a_kept_leaf(world, tmp_path):
    change = lambda params: params.update(gain=jnp.float32(jnp.nan))
    recipe = save_expert(world, tmp_path, change)
    recipe["rules"] = [{"match": "gain", "keep": "math"}]
    with pytest.raises(ValueError, match="expert 'math', gain: 1 values that are not finite"):
        checkpoints.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_not_finite(tmp_path):
    """It may overflow where its inputs do not; allow_nonfinite lets it."""
    for name, value in (("base", 0), ("a", 6e4), ("b", 6e4)):
        ocp.save(tmp_path / name, {"w": jnp.full(3, value, jnp.float16)})
    recipe = {
        "method": {"name": "task_arithmetic", "scale": 1.0},
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in "ab"},
    }
    with pytest.raises(MergeError, match="w: 3 values of float16 that are not finite"):
        checkpoints.merge(recipe, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    checkpoints.merge(recipe | {"output": {"dtype": "float32"}}, tmp_path / "wide")
    assert checkpoints.load(tmp_path / "wide")["w"].tolist() == [2 * float(np.float16(6e4))] * 3
    checkpoints.merge(recipe | {"allow_nonfinite": True}, tmp_path / "merged")
    assert np.isinf(checkpoints.load(tmp_path / "merged")["w"]).all()


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
    recipe = world.recipe("ota")
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


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_wrong_base_of_matrices_too_large_to_read(tmp_path, monkeypatch, suffix):
    """Their first rows tell; of a stack, those of the first layer."""
    monkeypatch.setattr(checkpoints._job, "_SAMPLE", 300)
    rng = np.random.default_rng(0)
    shapes = {"stack": (3, 20, 25), "w": (40, 50)}
    draw = lambda: {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    trees = {"base": draw(), "other": draw()}
    for name in ("a", "b"):
        trees[name] = {k: (x + 0.1 * rng.normal(size=x.shape)) for k, x in trees["base"].items()}
    for name, tree in trees.items():
        tree = {k: np.float32(x) for k, x in tree.items()}
        save = write if suffix else ocp.save
        save(tmp_path / f"{name}{suffix}", tree)
        first = open_checkpoint(tmp_path / f"{name}{suffix}").read_start("stack", 300)
        assert np.array_equal(first, tree["stack"][:1, :12])
    recipe = {
        "base": str(tmp_path / f"base{suffix}"),
        "experts": {name: str(tmp_path / f"{name}{suffix}") for name in "ab"},
        "method": "task_arithmetic",
    }
    found = checkpoints.plan(recipe)
    w0, w = (np.float64(np.float32(trees[name]["stack"][0, :12])) for name in ("base", "a"))
    drift = np.linalg.norm(w - w0) / np.linalg.norm(w0)
    assert found.problems == [] and found.models[1].drift == pytest.approx(drift, rel=1e-5)
    recipe["experts"]["b"] = str(tmp_path / f"other{suffix}")
    refused(recipe, tmp_path, "expert 'b': not fine-tuned from this base, the cosine of stack is")


def test_paths(world, tmp_path):
    recipe = world.recipe("average")
    recipe["experts"]["math"]["path"] = str(world.folder / "maths")
    recipe["base"] = str(world.folder)
    inside = "it holds the folders base, code, math: name one"
    refused(recipe, tmp_path, "does not exist; there is", "the base:", inside)
    recipe = world.recipe("average")
    recipe["experts"]["math"]["params"] = "parms"
    refused(recipe, tmp_path, "there is no 'parms'", "did you mean 'params'?")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "math is no Orbax checkpoint and has no *.safetensors; it is empty"),
        (
            ["config.json", "pytorch_model.bin"],
            "it holds pytorch_model.bin: convert it with save_pretrained(safe_serialization=True)",
        ),
        (["one/x", "other/y", "z"], "math is no Orbax checkpoint and has no *.safetensors"),
        (["one/x.safetensors", "other/y"], "it holds the folders one: name one"),
    ],
)
def test_folders_that_are_no_checkpoints(world, tmp_path, files, said):
    (tmp_path / "math").mkdir()
    for file in files:
        (tmp_path / "math" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "math" / file).touch()
    recipe = world.recipe("average")
    recipe["experts"]["math"]["path"] = str(tmp_path / "math")
    refused(recipe, tmp_path, said)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"model\.gguf is no Orbax checkpoint and no safetensors"):
        checkpoints.inspect(tmp_path / "model.gguf")


# Orbax gives up at the first array that it cannot read. TensorStore's threads then report the
# others to an event loop that is closed, and nobody is there to catch what that raises.
reading_in_vain = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@reading_in_vain
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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"experts": {"a": {"path": "a", "wieght": 1}}},
            "experts.a: unknown key 'wieght'; did you",
        ),
        (
            {"experts": {"a": {"path": "a", "curvature": {"misssing": 0}}}},
            "experts.a.curvature: unknown key 'misssing'; did you mean 'missing'?",
        ),
        (
            {"base": {"path": "a", "parms": "x"}},
            "base: unknown key 'parms'; did you mean 'params'?",
        ),
        ({"rules": [{"mach": "*", "keep": "base"}]}, "rules.0: unknown key 'mach'"),
        ({"output": {"dtyp": "float32"}}, "output: unknown key 'dtyp'; did you mean 'dtype'?"),
        ({"experts": {"a": {"item": "state"}}}, "experts.a.path is missing"),
        ({"experts": {"base": "a"}}, "experts.base: this is what the base is called"),
        ({"experts": {"": "a"}}, "one has no name"),
        ({"experts": {"a": "x", "b": "./x"}}, "experts.b: the same checkpoint as 'a'"),
        ({"experts": {"a": {"path": "a", "weight": float("nan")}}}, "weight: must be a finite"),
        ({"experts": {"a": {"path": "a", "weight": True}}}, "weight: must be a finite number"),
        ({"experts": {"a": {"path": "a", "step": -1}}}, 'a number of at least 0, or "latest"'),
        ({"experts": {"a": {"path": "a", "curvature": {"b2": 1.0}}}}, "b2"),
        ({"experts": {"a": {"path": "a", "curvature": {"missing": -1}}}}, "missing"),
        ({"method": "peft.tis"}, "did you mean 'peft.ties'?"),
        ({"method": "dare_ties"}, "did you mean 'mergekit.dare_ties' or 'peft.dare_ties'?"),
        ({"method": "mergekit.slerp"}, "did you mean 'slerp'? optax-moma methods lists all"),
        ({"method": "passthrough"}, "did you mean a rule with keep:?"),
        ({"method": "xyz"}, "unknown method 'xyz'; optax-moma methods lists all"),
        ({"method": {"name": "ties", "density": "half"}}, "density must be a number, got 'half'"),
        ({"method": {"density": 0.5}}, "a method is a name, or a mapping with name:"),
        ({"method": []}, "a chain of steps has at least one step"),
        ({"method": [{"name": "trm", "density": 0.2}]}, "did you mean 'trim'?"),
        ({"method": {"name": "knots", "steps": 3}}, "steps must be a list of steps"),
        ({"rules": [{"match": "*", "values": {"scale": [1]}}]}, "at least two numbers"),
        ({"rules": [{"match": "*", "values": {"scale": [0, "x"]}}]}, "finite number, got 'x'"),
        ({"rules": [{"match": "*", "values": {"density": [0, 2]}}]}, "from 0 to 1, got 2"),
        ({"rules": [{"match": "*", "weights": {"math": []}}]}, "at least two numbers"),
        ({"rules": [{"match": "*", "weights": {"math": [0, float("inf")]}}]}, "finite number"),
        ({"rules": [{"else": "bse"}]}, "unknown method 'bse'"),
        ({"rules": [{"else": "base", "keep": "math"}]}, "stands alone"),
        ({"base": None, "rules": [{"else": "base"}]}, "the recipe has no base:"),
    ],
)
def test_more_of_the_schema(world, tmp_path, change, said):
    refused({**world.recipe("ties"), **change}, tmp_path, said)


# Ten lines that stand for 10**9 numbers.
BOMB = "x0: &x0 [1]\n" + "".join(
    f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 10)}]\n" for i in range(9)
)


def test_problems_of_every_kind_at_once(world, tmp_path):
    """A typo in one place does not hide the others: not in the schema, nor in what it names."""
    recipe = world.recipe({"name": "ties", "densty": 1}, seed=-1, colour="red")
    recipe["experts"]["math"] |= {"weigth": 1, "step": "soon"}
    with pytest.raises(MergeError) as caught:
        Recipe.of(recipe)
    assert len(caught.value.problems) == 5

    recipe = world.recipe("moma", ignore=["hed/**"])
    recipe["rules"] = [{"match": "embeddings", "keep": "base"}, {"match": "gain", "keep": "math"}]
    recipe["experts"] = {
        "code": {"path": str(world.folder / "code"), "weight": -1, "curvature": "optstate"},
        "math": str(world.folder / "maths"),
    }
    problems = checkpoints.plan(recipe).problems
    for said in ("ignore: hed/**", "rule 0:", "-1.0 for expert 'code'", "'optstate'", "maths does"):
        assert any(said in problem for problem in problems), (said, problems)
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "its aliases stand for too much"),
        ("method: &x [*x]\nexperts: {a: a}", "its aliases stand for too much"),
        ("method: average\nexperts: {a: a}\nignore: [**/bias]", "a glob that starts with *"),
        ("method: " + "[" * 5000, "not valid YAML"),
        ("method: average\nexperts: {a: a}\n# " + "x" * (1 << 20), "larger than a megabyte"),
        ("method: average\nexperts: {a: a}\x00", "not valid YAML"),
        ("method: average\nexperts: {? [a]: a}", "not valid YAML"),
        ("method: average\nexperts: {a: !!python/name:os.system a}", "not valid YAML"),
        ("method: average\nexperts: {1: a}", "experts.1"),
        ("{}", "2 problems"),
        ("", "must be a mapping"),
    ],
)
def test_more_yaml(tmp_path, text, said):
    (tmp_path / "recipe.yaml").write_text(text)
    refused(tmp_path / "recipe.yaml", tmp_path, said)


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "recipe.yaml", tmp_path, "Cannot read the recipe")
    (tmp_path / "folder.yaml").mkdir()
    refused(tmp_path / "folder.yaml", tmp_path, "Cannot read the recipe")


def test_aliases(tmp_path):
    text = "method: &m {name: ties, density: 0.3}\nexperts: {a: a}\nrules: [{else: *m}]"
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml").rules[0].otherwise["density"] == 0.3


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "method: {name: wudi, ridge: 1e-6}\nexperts: {a: {path: a, weight: 5E+1}}"
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.method["ridge"] == 1e-6 and recipe.experts["a"].weight == 50.0


class TestFiles:
    """Files that are not what they are taken for; models as safetensors, which are quick."""

    @pytest.fixture
    def recipe(self, tmp_path):
        """A base, two experts and their files of curvature."""
        rng = np.random.default_rng(0)
        base = {"w": rng.normal(size=(20, 30)), "b": rng.normal(size=30)}
        for name in ("base", "a", "b"):
            noise = 0.05 * (name != "base")
            tree = {k: np.float32(x + noise * rng.normal(size=x.shape)) for k, x in base.items()}
            write(tmp_path / f"{name}.safetensors", tree)
            notes = checkpoints._source.CURVATURE_FORMAT
            v = {k: np.float32(rng.random(x.shape)) for k, x in base.items()}
            write(tmp_path / f"{name}-curvature.safetensors", v, notes)
        return {
            "base": str(tmp_path / "base.safetensors"),
            "experts": {
                name: {
                    "path": str(tmp_path / f"{name}.safetensors"),
                    "curvature": str(tmp_path / f"{name}-curvature.safetensors"),
                }
                for name in ("a", "b")
            },
            "method": "moma",
        }

    def test_they_merge(self, recipe, tmp_path):
        assert checkpoints.plan(recipe).problems == []
        assert checkpoints.merge(recipe, tmp_path / "out.safetensors").leaves == 2

    @pytest.mark.parametrize("file", ["a", "a-curvature"])
    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda content: content[:-7], "truncated"),
            (lambda content: content[:20], "truncated"),
            (lambda content: content[:5], "safetensors"),
            (lambda content: b"", "safetensors"),
            (lambda content: bytes(range(256)) * 40, "safetensors"),
            (lambda content: content[:8] + b"[" + content[9:], "cannot be read"),
            (lambda content: content.replace(b'"F32"', b'"X32"'), "unknown dtype"),
            (lambda content: content.replace(b"[20,30]", b"[20,31]"), "not that of its shape"),
        ],
    )
    def test_damaged(self, recipe, tmp_path, file, damage, said):
        path = tmp_path / f"{file}.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        refused(recipe, tmp_path, "expert 'a'", said)

    def test_a_model_for_a_file_of_curvature(self, recipe, tmp_path):
        recipe["experts"]["a"]["curvature"] = recipe["base"]
        refused(recipe, tmp_path, "is no file that export-curvature wrote")

    def test_a_file_of_curvature_for_a_model(self, recipe, tmp_path):
        recipe["experts"]["a"]["path"] = recipe["experts"]["a"]["curvature"]
        refused(recipe, tmp_path, "expert 'a'", "holds curvature, not a model")

    def test_no_curvature_beside_safetensors(self, recipe, tmp_path):
        del recipe["experts"]["a"]["curvature"]
        refused(recipe, tmp_path, "the curvature of expert 'a'", "holds no optimizer state")

    def test_curvature_of_another_model(self, recipe, tmp_path):
        notes = checkpoints._source.CURVATURE_FORMAT
        v = {"w": np.ones((30, 20), np.float32), "c": np.ones(30, np.float32)}
        write(tmp_path / "a-curvature.safetensors", v, notes)
        recipe["method"] = "ota"
        refused(recipe, tmp_path, "expert 'a' has no curvature for b", "w", "(30, 20)", "(20, 30)")

    def test_curvature_with_faults(self, recipe, tmp_path):
        notes = checkpoints._source.CURVATURE_FORMAT
        v = {"w": np.ones((20, 30), np.float32), "b": np.ones(30, np.float32)}
        v["w"][3, 4], v["b"][5] = -1, np.nan
        write(tmp_path / "a-curvature.safetensors", v, notes)
        with pytest.raises(MergeError) as caught:
            checkpoints.merge(recipe | {"method": "ota"}, tmp_path / "out")
        for name in ("w", "b"):
            said = f"the curvature of expert 'a', {name}: 1 values that are negative or not finite"
            assert any(p.startswith(said) for p in caught.value.problems)
        assert not (tmp_path / "out").exists()

    def test_outputs_that_would_replace_an_input(self, recipe, tmp_path):
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        for output, label in [
            ("recipe.yaml", "the recipe"),
            ("a.safetensors", "expert 'a'"),
            ("a-curvature.safetensors", "the curvature of a"),
        ]:
            with pytest.raises(MergeError, match=f"in the place of {label}"):
                checkpoints.merge(tmp_path / "recipe.yaml", tmp_path / output, force=True)
        with pytest.raises(OSError):
            checkpoints.merge(recipe, tmp_path / "recipe.yaml/out")
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    def test_numbers_of_experts_and_weights(self, recipe, tmp_path):
        refused(
            recipe | {"method": "slerp", "experts": {"a": recipe["base"]}}, tmp_path, "experts:"
        )
        zero = {n: {**e, "weight": 0} for n, e in recipe["experts"].items()}
        refused(recipe | {"experts": zero}, tmp_path, "weights: all are zero")
        rule = {"match": "*", "stacked": True, "weights": {"a": [1, -1]}}
        refused(recipe | {"rules": [rule]}, tmp_path, "not negative")

    def test_a_model_beside_its_curvature(self, recipe, tmp_path):
        """In one folder: the model is what is not curvature; moments never pass for weights."""
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for kind, to in (("", "model"), ("-curvature", "moments")):
                file = tmp_path / f"{name}{kind}.safetensors"
                file.rename(tmp_path / name / f"{to}.safetensors")
            recipe["experts"][name] = str(tmp_path / name)
        w = checkpoints.load(tmp_path / "a")["w"]
        assert np.array_equal(w, checkpoints.load(tmp_path / "a/model.safetensors")["w"])
        recipe["method"] = "average"
        checkpoints.merge(recipe, tmp_path / "merged")
        mean = (w + checkpoints.load(tmp_path / "b")["w"]) / 2
        np.testing.assert_allclose(checkpoints.load(tmp_path / "merged")["w"], mean, atol=1e-6)
        recipe["method"] = "moma"
        for name in ("a", "b"):
            recipe["experts"][name] = {
                "path": str(tmp_path / name),
                "curvature": str(tmp_path / name / "moments.safetensors"),
            }
        assert checkpoints.plan(recipe).problems == []
        recipe["experts"]["a"]["curvature"] = {"path": str(tmp_path / "a")}
        refused(recipe, tmp_path, "is no file that export-curvature wrote")

    def test_a_folder_of_several_models(self, recipe, tmp_path):
        (tmp_path / "x").mkdir()
        for name, to in (("a", "model"), ("b", "consolidated")):
            shutil.copy(tmp_path / f"{name}.safetensors", tmp_path / "x" / f"{to}.safetensors")
        recipe = recipe | {"method": "average", "experts": {"x": str(tmp_path / "x")}}
        refused(
            recipe,
            tmp_path,
            "it holds consolidated.safetensors, model.safetensors; name the file that is meant",
        )

    def test_stacks(self, recipe, tmp_path):
        write(
            tmp_path / "s.safetensors",
            {"g": np.array(1, np.float32), "w": np.ones((2, 3), np.float32)},
        )
        recipe = {"experts": {"s": str(tmp_path / "s.safetensors")}, "method": "average"}
        rule = {"match": "*", "stacked": True}
        refused(recipe | {"rules": [rule]}, tmp_path, "rule 0: stacked: g has no layers")
        steps = [{"name": "trim", "density": 0.3, "scope": "global"}, "mean"]
        rule = {"match": "w", "stacked": True, "method": steps}
        refused(recipe | {"rules": [rule]}, tmp_path, "looks at all leaves first")


class TestShards:
    """A folder's index says which of its files make the model."""

    @pytest.fixture
    def folder(self, tmp_path):
        tree = {f"l.{i}.w": np.full((2, 3), i, np.float32) for i in range(4)}
        names = list(tree)
        shards = {f"model-{i + 1}-of-2.safetensors": names[2 * i : 2 * i + 2] for i in range(2)}
        for file, own in shards.items():
            write(tmp_path / file, {name: tree[name] for name in own})
        write(tmp_path / "consolidated.safetensors", {"layers.0": np.ones(3, np.float32)})
        self.index(tmp_path, {name: file for file, own in shards.items() for name in own})
        return tmp_path

    def index(self, folder, places):
        text = json.dumps({"metadata": {"total_size": 96}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)

    def test_only_what_it_lists_is_read(self, folder):
        found = checkpoints.load(folder)
        assert list(found) == ["l"]
        assert [found["l"][str(i)]["w"][0, 0] for i in range(4)] == [0, 1, 2, 3]
        (folder / "model.safetensors.index.json").unlink()
        assert set(checkpoints.load(folder)) == {"layers", "l"}

    @pytest.mark.parametrize(
        ("places", "said"),
        [
            ({"l.0.w": "model-3-of-3.safetensors"}, "model-3-of-3.safetensors is not there, which"),
            ({"l.0.w": "../model.safetensors"}, "is not there, which"),
            ({"x": "model-1-of-2.safetensors"}, "model-1-of-2.safetensors has no x, which"),
            ({}, "lists no files"),
        ],
    )
    def test_what_it_lists_is_not_there(self, folder, places, said):
        self.index(folder, places)
        with pytest.raises(ValueError, match=said):
            checkpoints.load(folder)

    def test_names_that_are_one_path(self, tmp_path):
        write(tmp_path / "a.safetensors", {"a.b": np.ones(2), "a/b": np.zeros(2)})
        with pytest.raises(ValueError, match=r"two tensors have the path a/b, one is a[./]b"):
            checkpoints.load(tmp_path / "a.safetensors")


def test_curvature_inside_an_orbax_checkpoint(world, tmp_path):
    """A file that export-curvature wrote there does not make it another checkpoint."""
    params = {k: v for k, v in world.experts["math"].items() if k != "buckets"}
    state = optax.adam(1e-3).init(params)
    ocp.save(tmp_path / "math", {"params": params, "opt_state": state})
    before = checkpoints.inspect(tmp_path / "math")
    file = tmp_path / "math/curvature.safetensors"
    checkpoints.export_curvature(tmp_path / "math", file)
    assert checkpoints.inspect(tmp_path / "math") == before
    recipe = world.recipe("fisher", ignore=["buckets"])
    recipe["experts"] = {"math": {"path": str(tmp_path / "math"), "curvature": str(file)}}
    assert checkpoints.plan(recipe | {"check_base": False}).coverage == {"math": (11, 11)}


class TestFactors:
    """What means something only as a product is not merged factor by factor."""

    def recipe(self, tmp_path, **leaves):
        for name in ("base", "a", "b"):
            tree = {"w": np.ones((4, 4)), **{k.replace("__", "."): x for k, x in leaves.items()}}
            write(tmp_path / f"{name}.safetensors", tree)
        files = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")}
        return {"base": files.pop("base"), "experts": files, "method": "average"}

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("q__lora_A__weight", "q__lora_B__weight"),
            ("q__lora_A__default__weight", "q__lora_B__default__weight"),
            ("q__kernel_lora_a", "q__kernel_lora_b"),
            ("lora_unet_down_0__lora_down__weight", "lora_unet_down_0__lora_up__weight"),
            ("e__lora_embedding_A", "e__lora_embedding_B"),
        ],
    )
    def test_adapters(self, tmp_path, one, other):
        recipe = self.recipe(tmp_path, **{one: np.ones((4, 1)), other: np.ones((1, 4))})
        names = [name.replace("__", "/") for name in (one, other)]
        said = "merge each adapter into its base first (merge_and_unload in peft)"
        refused(recipe, tmp_path, " and ".join(names), said, "ignore:", "keep:")
        # One factor frozen, or both left out or taken from one model: nothing is multiplied wrong.
        for change in (
            {"ignore": names},
            {"rules": [{"match": names[0], "keep": "base"}]},
            {"rules": [{"match": names, "keep": "a"}]},
        ):
            assert checkpoints.plan(recipe | change).problems == []

    def test_what_only_looks_like_an_adapter(self, tmp_path):
        leaves = {"q__lora_alpha": np.ones(2), "q__lora_A": np.ones(2), "k__lora_B": np.ones(2)}
        assert checkpoints.plan(self.recipe(tmp_path, **leaves)).problems == []

    def test_weights_with_scales(self, tmp_path):
        leaves = {"q__weight": np.ones((4, 4)), "q__weight_scale_inv": np.ones((1, 1))}
        recipe = self.recipe(tmp_path, **leaves)
        refused(recipe, tmp_path, "q/weight and q/weight_scale_inv", "multiplied out first")


def test_methods_that_need_grams(world, tmp_path):
    for method in ("regmean", [{"name": "regmean", "ratio": 0.5}]):
        refused(world.recipe(method), tmp_path, "regmean needs the Grams", "merging.input_grams")
    rule = {"match": "embedding", "values": {"ridge": 0.1}, "method": "regmean"}
    refused(world.recipe("average", rules=[rule]), tmp_path, "rules.0", "regmean needs the Grams")


@pytest.mark.parametrize(
    "rule",
    [{"values": {"density": [0.1, 0.9]}}, {"weights": {"math": [0, 1]}}],
)
def test_a_global_method_has_no_layers(world, tmp_path, rule):
    rule = {"match": "layers_*/kernel", "method": "fusion_bench.ties", **rule}
    said = "rule 0: a list of values: a method that looks at all leaves first has no layers"
    refused(world.recipe("average", rules=[rule]), tmp_path, said)
    one = {"match": "layers_*/kernel", "method": "fusion_bench.ties", "values": {"density": 0.4}}
    assert checkpoints.plan(world.recipe("average", rules=[one])).problems == []


def write(path, tree, notes=None):
    from safetensors.numpy import save_file

    save_file(tree, path, notes)


@reading_in_vain
def test_an_orbax_checkpoint_without_its_arrays(world, tmp_path):
    recipe = save_expert(world, tmp_path, lambda params: None)
    for file in (tmp_path / "math").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoints.merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.merging").exists()
