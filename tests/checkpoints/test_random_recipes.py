"""Random recipes on random trees: they survive being written down, and merge as in memory."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("hypothesis")
safetensors = pytest.importorskip("safetensors.numpy")

import yaml  # noqa: E402
from hypothesis import HealthCheck, given, reject, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from optax_moma import checkpoints, merging  # noqa: E402
from optax_moma.checkpoints import Recipe  # noqa: E402
from optax_moma.checkpoints._recipe import build_method  # noqa: E402
from optax_moma.cli import app  # noqa: E402

NAMES = [f"{part}.{i}.{leaf}" for part in ("a", "b") for i in range(3) for leaf in ("w", "g")]
GLOBS = ["a/**", "**/w", "b/{0..1}/*", "*/2/?", "**"]
SHAPES = [(), (5,), (3, 4)]
EXPERTS = ["x", "y", "z"]
numbers = st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 3))
methods = st.one_of(
    st.sampled_from(["average", "task_arithmetic", "ties", "dare", "sce", "peft.ties"]),
    st.fixed_dictionaries({"name": st.just("ties"), "density": numbers, "scale": numbers}),
    st.just([{"name": "trim", "density": 0.5}, "elect", "mean", {"name": "scale", "factor": 2.0}]),
)
rules = st.one_of(
    st.fixed_dictionaries({"match": st.sampled_from(GLOBS), "method": methods}),
    st.fixed_dictionaries(
        {
            "match": st.sampled_from(GLOBS),
            "method": st.just("task_arithmetic"),
            "values": st.fixed_dictionaries({"scale": st.lists(numbers, min_size=2, max_size=4)}),
            "weights": st.dictionaries(st.sampled_from(EXPERTS), numbers),
        }
    ),
    st.fixed_dictionaries(
        {"match": st.sampled_from(GLOBS), "keep": st.sampled_from(["base", *EXPERTS])}
    ),
)
recipes = st.fixed_dictionaries(
    {
        "base": st.just({"path": "base.safetensors"}),
        "experts": st.fixed_dictionaries(
            {
                name: st.fixed_dictionaries(
                    {"path": st.just(f"{name}.safetensors"), "weight": numbers.map(lambda w: w + 1)}
                )
                for name in EXPERTS
            }
        ),
        "method": methods,
        "rules": st.lists(rules, max_size=2),
        "seed": st.integers(0, 2**40),
        "check_base": st.just(False),
    }
)
trees = st.fixed_dictionaries(
    {
        name: st.tuples(st.sampled_from(SHAPES), st.sampled_from(["float32", "float16", "int32"]))
        for name in NAMES
    }
)


@settings(max_examples=40, deadline=None)
@given(recipes)
def test_a_recipe_survives_being_written_down(recipe):
    first = Recipe.of(recipe)
    written = first.model_dump(mode="json", by_alias=True)
    for text in (json.dumps(written), yaml.safe_dump(written)):
        assert Recipe.of(yaml.safe_load(text)).model_dump() == first.model_dump()


@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(recipe=recipes, tree=trees, seed=st.integers(0, 99))
def test_the_command_line_has_the_bits_of_the_notebook(tmp_path, recipe, tree, seed):
    rng = np.random.default_rng(seed)
    integers = {n: rng.integers(0, 9, shape) for n, (shape, _) in tree.items()}

    def draw(name):
        shape, dtype = tree[name]
        x = integers[name] if dtype == "int32" else rng.normal(size=shape)
        return np.asarray(x, dtype)

    models = {m: {n: draw(n) for n in NAMES} for m in ("base", *EXPERTS)}
    for model, leaves in models.items():
        safetensors.save_file(leaves, tmp_path / f"{model}.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = tmp_path / "out.safetensors"
    arguments = ["merge", str(tmp_path / "recipe.yaml"), str(output), "--force"]
    done = CliRunner().invoke(app, arguments)
    if done.exit_code:
        # Only a rule that an earlier one leaves nothing.
        problems = checkpoints.plan(tmp_path / "recipe.yaml").problems
        assert done.exit_code == 2 and all("falls under an earlier rule" in p for p in problems)
        reject()
    found = safetensors.load_file(output)

    plain = {name: expert["weight"] for name, expert in recipe["experts"].items()}
    left = list(NAMES)
    for rule in [*recipe["rules"], {"match": "**", "method": recipe["method"]}]:
        names = [n for n in left if matched(rule["match"], n.replace(".", "/"))]
        left = [n for n in left if n not in names]
        if "keep" in rule:
            for name in names:
                assert same(found[name], models[rule["keep"]][name])
            continue
        layers = sorted({int(name.split(".")[1]) for name in names})
        for name in names:
            position = layers.index(int(name.split(".")[1])) / max(len(layers) - 1, 1)
            at = {
                option: float(np.interp(position, np.linspace(0, 1, len(values)), values))
                for option, values in rule.get("values", {}).items()
            }
            merged = merging.merge(
                build_method(rule["method"], at),
                {m: {"/".join(name.split(".")): models[m][name]} for m in EXPERTS},
                base={"/".join(name.split(".")): models["base"][name]},
                weights=plain | rule.get("weights", {}),
                key=jax.random.key(recipe["seed"]),
            )
            assert same(found[name], next(iter(merged.values())))
    assert not left


def matched(glob, path):
    """The globs of this file, written out."""
    part, layer, leaf = path.split("/")
    return {
        "a/**": part == "a",
        "**/w": leaf == "w",
        "b/{0..1}/*": part == "b" and layer in "01",
        "*/2/?": layer == "2",
        "**": True,
    }[glob]


def same(x, y):
    x, y = np.asarray(x), np.asarray(y)
    return (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
