"""What a recipe can say, by the numbers that come out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from optax_moma import checkpoints, merging
from optax_moma._globs import collapsed, layers, renamed

ocp = pytest.importorskip("orbax.checkpoint").v1


def merged(recipe, tmp_path):
    checkpoints.merge(recipe, tmp_path / "merged", force=True)
    return checkpoints.load(tmp_path / "merged")


class TestRename:
    def test_names(self):
        names = ["h/0/attn/k", "h/11/b", "wte", "x"]
        found = renamed({"h/*/**": "layers_*/**", "wte": "embedding"}, names)
        assert found == ["layers_0/attn/k", "layers_11/b", "embedding", "x"]
        assert renamed({"**/w": "**/kernel"}, ["w", "a/b/w"]) == ["kernel", "a/b/kernel"]
        # The first that matches decides.
        assert renamed({"a": "b", "*": "c_*"}, ["a", "d"]) == ["b", "c_d"]

    @pytest.mark.parametrize(
        ("renames", "said"),
        [
            ({"h/*": "x"}, "'h/*' has the wildcards *, but 'x' has none"),
            ({"g/*": "x/*"}, "g/* matches none of 3 leaves; the closest path is h/0"),
            ({"h/?": "{a,b}?"}, "a new name is one"),
            ({"h/0": "wte"}, "h/0 and wte would both be wte"),
            ({"h/{0": "x"}, "opening brace"),
        ],
    )
    def test_wrong_names(self, renames, said):
        with pytest.raises(ValueError) as error:
            renamed(renames, ["h/0", "h/1", "wte"])
        assert said in str(error.value)

    @pytest.mark.parametrize("with_base", [True, False])
    def test_a_checkpoint_with_other_names(self, world, tmp_path, equal_bits, with_base):
        """Renamed back, it merges with the same bits, curvature included."""
        other = lambda tree: {
            "wte": tree["embedding"],
            "h": [tree[f"layers_{i}"] for i in range(3)],
            "norm": tree["norm"],
            "gain": tree["gain"],
        }
        tree, state = world.experts["math"], world.states["math"][1][0]
        moved = state._replace(
            **{
                field: other(value)
                for field, value in state._asdict().items()
                if isinstance(value, dict)
            }
        )
        ocp.save(tmp_path / "math", {"params": other(tree), "opt_state": [moved]})
        recipe = world.recipe("moma", ignore=["blocks/**", "buckets"])
        if not with_base:
            recipe |= {"method": "fisher"}
            del recipe["base"]
        expected = merged(recipe, tmp_path)
        rename = {"wte": "embedding", "h/*/**": "layers_*/**"}
        recipe["experts"]["math"] = {"path": str(tmp_path / "math"), "rename": rename}
        equal_bits(merged(recipe, tmp_path), expected)

        file = tmp_path / "math.safetensors"
        checkpoints.export_curvature(tmp_path / "math", file)
        recipe["experts"]["math"]["curvature"] = str(file)
        equal_bits(merged(recipe, tmp_path), expected)

    def test_a_renamed_base_gives_the_output_its_names(self, world, tmp_path):
        recipe = world.recipe({"name": "task_arithmetic", "scale": 1.0}, ignore=["blocks/**"])
        rename = {"layers_*/**": "model/layers/*/**"}
        recipe["base"]["rename"] = rename
        for expert in recipe["experts"].values():
            expert["rename"] = rename
        found = merged(recipe, tmp_path)
        assert set(found["model"]["layers"]) == {"0", "1", "2"}
        w0, *w = (x["layers_1"]["bias"] for x in (world.base, *world.experts.values()))
        bias = found["model"]["layers"]["1"]["bias"]
        np.testing.assert_allclose(bias, np.float64(w[0]) + w[1] - w0, rtol=1e-5, atol=1e-6)


class TestGradients:
    def test_layers(self):
        names = ["enc1/layers_0/w", "enc1/layers_12/w"]
        assert layers(names) == {names[0]: 0, names[1]: 12}
        assert layers(["a", "b1"]) is None
        assert layers(["b1/x", "b1/y"]) == {"b1/x": 1, "b1/y": 1}

    def test_weights_and_several_values(self, world, tmp_path):
        """Values at 0, 1/2 and 1 of [1, 0, 2] and of [3, 1]."""
        rule = {
            "match": "layers_*/bias",
            "method": "task_arithmetic",
            "values": {"scale": [1, 0, 2]},
            "weights": {"code": [3, 1]},
        }
        found = merged(world.recipe("average", rules=[rule]), tmp_path)
        for layer, (scale, code) in enumerate([(1, 3), (0, 2), (2, 1)]):
            take = lambda tree, name=f"layers_{layer}": np.float64(tree[name]["bias"])
            w0 = take(world.base)
            moved = code * (take(world.experts["code"]) - w0) + take(world.experts["math"]) - w0
            bias = take(found)
            np.testing.assert_allclose(bias, w0 + scale * moved, rtol=1e-5, atol=1e-6)

    def test_the_number_that_differs_is_the_layer(self, tmp_path):
        """Not the 2 that all paths begin with."""
        draw = lambda seed: np.random.default_rng(seed).normal(size=4).astype(np.float32)
        for seed, name in enumerate(("base", "a")):
            tree = {"block2": {f"l{i}": {"w": draw(seed)} for i in (3, 7)}}
            ocp.save(tmp_path / name, tree)
        recipe = {
            "base": str(tmp_path / "base"),
            "experts": {"a": str(tmp_path / "a")},
            "method": "task_arithmetic",
            "rules": [{"match": "**", "values": {"scale": [0, 1]}}],
        }
        found = merged(recipe, tmp_path)["block2"]
        np.testing.assert_allclose(found["l3"]["w"], draw(0), rtol=1e-6)
        np.testing.assert_allclose(found["l7"]["w"], draw(1), rtol=1e-6)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """The same model twice: layers as leaves of their own, and stacked."""
    folder = tmp_path_factory.mktemp("stacks")
    rng = np.random.default_rng(0)
    base = {str(i): {"w": rng.normal(size=(16, 24)), "b": rng.normal(size=24)} for i in "012"}
    base = jax.tree.map(np.float32, base)
    stack = lambda tree: jax.tree.map(lambda *x: jnp.stack(x), *tree.values())
    for name in ("base", "a", "b"):
        tree = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), base)
        tree = base if name == "base" else tree
        nu = jax.tree.map(lambda x: rng.random(x.shape).astype(np.float32), base)
        for place, shape in (("single", dict), ("stack", stack)):
            params, v = {"layers": shape(tree)}, {"layers": shape(nu)}
            adam = optax.ScaleByAdamState(jnp.int32(50), v, v)
            ocp.save(folder / place / name, {"params": params, "opt_state": adam})
    return folder


class TestStacks:
    """Scanned layers: the leading axis of a leaf counts them."""

    def both(self, stacks, tmp_path, method, rule):
        results = []
        for place, stacked in (("single", {}), ("stack", {"stacked": True})):
            recipe = {
                "base": str(stacks / place / "base"),
                "experts": {name: str(stacks / place / name) for name in ("a", "b")},
                "method": method,
                "rules": [{"match": "layers/**", **rule, **stacked}] if rule or stacked else [],
            }
            results.append(merged(recipe, tmp_path)["layers"])
        single, stack = results
        for leaf in ("w", "b"):
            layers = np.stack([single[i][leaf] for i in "012"])
            assert np.array_equal(stack[leaf], layers)
        return stack

    @pytest.mark.parametrize(
        ("method", "rule"),
        [
            ("ties", {}),
            ("curvature_ties", {"values": {"density": [0.1, 0.9]}}),
            ("moma", {"values": {"power": [0.0, 1.0]}}),
            ("tsv_m", {"values": {"scale": [0.0, 1.0]}, "weights": {"a": [1, 0]}}),
            ("fisher", {"method": "ota", "weights": {"b": [0.5, 0, 2]}}),
        ],
    )
    def test_a_stack_has_the_bits_of_its_layers(self, stacks, tmp_path, method, rule):
        self.both(stacks, tmp_path, method, rule)

    def test_the_numbers(self, stacks, tmp_path):
        rule = {"values": {"scale": [0, 2]}, "weights": {"a": [1, 0]}}
        found = self.both(stacks, tmp_path, "task_arithmetic", rule)
        base, a, b = (
            checkpoints.load(stacks / "stack" / n)["layers"]["w"] for n in ("base", "a", "b")
        )
        scale, weight = np.array([0, 1, 2])[:, None, None], np.array([1, 0.5, 0])[:, None, None]
        w0 = np.float64(base)
        expected = w0 + scale * (weight * (np.float64(a) - w0) + np.float64(b) - w0)
        np.testing.assert_allclose(found["w"], expected, rtol=1e-5, atol=1e-6)

    def test_factored_curvature_of_a_stack(self, tmp_path):
        """moma keeps R and C of each layer of a stack."""
        rng = np.random.default_rng(1)
        tx = om.moma(1e-3, rank=2, min_dim_size_to_factor=8)
        base = {"w": jnp.asarray(rng.normal(size=(3, 16, 24)), jnp.float32)}
        ocp.save(tmp_path / "base", base)
        experts, curvature = {}, {}
        for name in ("a", "b"):
            params = {"w": base["w"] + 0.1 * rng.normal(size=(3, 16, 24))}
            grads = {"w": jnp.asarray(rng.normal(size=(3, 16, 24)), jnp.float32)}
            _, state = jax.jit(tx.update)(grads, tx.init(params), params)
            ocp.save(tmp_path / name, {"params": params, "opt_state": state})
            experts[name], curvature[name] = params, om.curvature_from(state, params)
        recipe = {
            "base": str(tmp_path / "base"),
            "experts": {name: str(tmp_path / name) for name in experts},
            "method": "moma",
            "rules": [{"match": "w", "stacked": True}],
        }
        found = merged(recipe, tmp_path)["w"]
        layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
        for i in range(3):
            expected = merging.merge(
                merging.moma(),
                {name: layer(tree, i) for name, tree in experts.items()},
                base=layer(base, i),
                curvature={name: layer(tree, i) for name, tree in curvature.items()},
            )
            assert np.array_equal(found[i], expected["w"])


def test_curvature_of_matrices_alone(tmp_path, equal_bits):
    """A bias needs none: it is averaged."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    base, experts, curvature = {"w": draw(4, 6), "b": draw(6)}, {}, {}
    ocp.save(tmp_path / "base", base)
    for name in ("a", "b"):
        experts[name], nu = {"w": draw(4, 6), "b": draw(6)}, {"w": draw(4, 6) ** 2}
        state = optax.ScaleByAdamState(jnp.int32(20), nu, nu)
        ocp.save(tmp_path / name, {"params": experts[name], "opt_state": state})
        curvature[name] = om.curvature_from(state, {"w": experts[name]["w"]})
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in experts},
        "method": "moma",
    }
    expected = merging.merge(merging.moma(), experts, base=base, curvature=curvature)
    equal_bits(merged(recipe, tmp_path), expected)


class TestNotFinite:
    def test_let_through(self, world, tmp_path):
        params = dict(world.experts["math"])
        params["embedding"] = params["embedding"].at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
        params["gain"] = jnp.float32(jnp.nan)
        ocp.save(tmp_path / "math", {"params": params})
        recipe = world.recipe("average", rules=[{"match": "gain", "keep": "math"}])
        recipe["experts"]["math"]["path"] = str(tmp_path / "math")
        with pytest.raises(merging.MergeError, match="allow_nonfinite") as caught:
            merged(recipe, tmp_path)
        assert len(caught.value.problems) == 2
        found = merged(recipe | {"allow_nonfinite": True}, tmp_path)
        mean = (
            np.float32(params["embedding"]) + np.float32(world.experts["code"]["embedding"])
        ) / 2
        np.testing.assert_allclose(found["embedding"], mean, rtol=1e-6)
        assert np.isnan(found["embedding"][0, 0]) and np.isinf(found["embedding"][1, 1])
        assert np.isnan(found["gain"])


class TestZeroCurvature:
    def recipe(self, world, tmp_path, moved, **source):
        """A state that has seen twenty gradients, and none of one leaf."""
        params = dict(world.experts["math"])
        floats = {k: v for k, v in params.items() if k != "buckets"}
        if not moved:
            params["embedding"] = world.base["embedding"]
        nu = jax.tree.map(jnp.ones_like, floats) | {"embedding": jnp.zeros((24, 16))}
        state = optax.ScaleByAdamState(jnp.int32(20), nu, nu)
        ocp.save(tmp_path / "math", {"params": params, "opt_state": state})
        recipe = world.recipe("moma")
        recipe["experts"]["math"] = {"path": str(tmp_path / "math"), "curvature": source or None}
        return recipe

    def test_of_a_leaf_that_was_trained(self, world, tmp_path):
        recipe = self.recipe(world, tmp_path, moved=True)
        with pytest.raises(merging.MergeError) as caught:
            merged(recipe, tmp_path)
        (problem,) = caught.value.problems
        assert problem.startswith("the curvature of expert 'math', embedding: all zero")
        assert "missing: 0.0" in problem and not (tmp_path / "merged").exists()

    def test_of_a_leaf_that_was_frozen(self, world, tmp_path):
        """The other expert alone decides, as if this one had no say."""
        recipe = self.recipe(world, tmp_path, moved=False)
        found = merged(recipe, tmp_path)
        recipe["experts"].pop("math")
        np.testing.assert_array_equal(found["embedding"], merged(recipe, tmp_path)["embedding"])

    def test_with_another_in_its_place(self, world, tmp_path):
        """Given 4, sqrt is 2: so a weighted mean of what is known."""
        recipe = self.recipe(world, tmp_path, moved=True, missing=4.0)
        recipe["method"] = {"name": "ota", "density": 1.0, "power": 0.5}
        found = merged(recipe, tmp_path)["embedding"]
        v = world.curvature()["code"]["embedding"]
        v = np.float64(v.row) * np.float64(v.col)
        w0, code, math = (
            np.float64(x["embedding"])
            for x in (world.base, world.experts["code"], world.experts["math"])
        )
        expected = w0 + (np.sqrt(v) * (code - w0) + 2 * (math - w0)) / (np.sqrt(v) + 2)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_an_expert_s_own_leaves_are_kept(tmp_path, equal_bits, suffix):
    """A head that the base lacks, beside heads of others that are not wanted."""
    base = {"w": np.ones((2, 3), np.float32)}
    ocp.save(tmp_path / "base", base)
    trees = {}
    for i, name in enumerate("ab"):
        head = {"kernel": np.full((3, 2), i, np.float32), "bias": np.arange(2)}
        trees[name] = {"w": base["w"] + 2 * i, "heads": {"out": head, name: np.array(i)}}
        ocp.save(tmp_path / name, trees[name])
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in "ab"},
        "method": "average",
        "rules": [{"match": "heads/out/*", "keep": "b"}],
    }
    (problem,) = [p for p in checkpoints.plan(recipe).problems if "expert 'b'" in p]
    assert "has leaves that the base lacks: heads/b; leave" in problem
    recipe["rules"] += [{"match": "heads/*", "keep": "b"}, {"match": "heads/a", "keep": "a"}]
    found = checkpoints.plan(recipe)
    assert (found.problems, found.leaves) == ([], 5)
    output = tmp_path / f"out{suffix}"
    checkpoints.merge(recipe, output)
    assert checkpoints.verify(output).problems == []
    heads = trees["b"]["heads"] | {"a": trees["a"]["heads"]["a"]}
    merged = checkpoints.load(output)
    equal_bits(merged, jax.tree.map(jnp.asarray, {"w": base["w"] + 1, "heads": heads}))
    ocp.save(tmp_path / "c", base | {"heads": [np.ones(2)]})
    recipe["experts"] = {"c": str(tmp_path / "c")}
    recipe["rules"] = [{"match": "heads/*", "keep": "c"}]
    assert "rule 0: heads/0 of expert 'c' cannot be added" in checkpoints.plan(recipe).problems[0]


class TestAges:
    def save(self, path, params, count, step):
        nu = jax.tree.map(jnp.ones_like, {k: v for k, v in params.items() if k != "buckets"})
        state = optax.ScaleByAdamState(jnp.int32(count), nu, nu)
        ocp.save(path, {"params": params, "opt_state": state, "step": jnp.int32(step)})

    def test_a_state_of_another_time(self, world, tmp_path):
        self.save(tmp_path / "math", world.experts["math"], 2000, 2000)
        self.save(tmp_path / "earlier", world.experts["math"], 500, 500)
        recipe = world.recipe("fisher", check_base=False)
        recipe["experts"] = {"math": {"path": str(tmp_path / "math")}}
        found = checkpoints.plan(recipe)
        assert found.warnings == found.problems == []
        assert (found.models[-1].step, found.models[-1].gradients) == (2000, 2000)
        said = "the curvature of expert 'math' is of step 500, but the expert is of step 2000"
        for source in ("earlier", "earlier.safetensors"):
            if source.endswith(".safetensors"):
                checkpoints.export_curvature(tmp_path / "earlier", tmp_path / source)
            recipe["experts"]["math"]["curvature"] = {"path": str(tmp_path / source)}
            found = checkpoints.plan(recipe)
            assert found.warnings == [said] and found.problems == []
            assert found.models[-1].gradients == 500

    def test_a_state_of_few_gradients_or_none(self, world, tmp_path):
        recipe = world.recipe("fisher", check_base=False)
        for count in (3, 0):
            self.save(tmp_path / f"{count}", world.experts["math"], count, 7)
            recipe["experts"] = {"math": {"path": str(tmp_path / f"{count}")}}
            found = checkpoints.plan(recipe)
            if count:
                assert "noisy: it was estimated from 3 gradients" in found.warnings[0]
            else:
                assert "its optimizer state has seen no gradient" in found.problems[0]

    def test_states_of_different_ages(self, world, tmp_path):
        """How much each is worth depends on a decay that Adam's state does not record."""
        recipe = world.recipe("fisher", check_base=False)
        for name, count in (("code", 20), ("math", 2000)):
            self.save(tmp_path / name, world.experts[name], count, 7)
            recipe["experts"][name] = {"path": str(tmp_path / name)}
        (warning,) = checkpoints.plan(recipe).warnings
        assert "different numbers of gradients, code 20, math 2,000, and" in warning
        assert checkpoints.plan({**recipe, "method": "curvature_ties"}).warnings == []
        for expert in recipe["experts"].values():
            expert["curvature"] = {"b2": 0.999}
        assert checkpoints.plan(recipe).warnings == []


def test_methods_by_name(world, tmp_path, equal_bits):
    """All that make a step can be named, and only those; also steps that take steps."""
    from optax_moma.checkpoints._recipe import METHODS

    assert {"ties", "trim", "knots", "wudi"} <= METHODS.keys()
    assert not {"chain", "merge", "Contract", "MergeError"} & METHODS.keys()
    knots = {"name": "knots", "steps": [{"name": "trim", "density": 0.5}, "elect", "mean"]}
    recipe = world.recipe(knots, ignore=["blocks/**", "gain", "buckets"])
    found = merged(recipe, tmp_path)
    keep = {"embedding", "layers_0", "layers_1", "layers_2", "norm", "empty"}
    part = lambda tree: {k: v for k, v in tree.items() if k in keep}
    method = merging.knots(merging.trim(0.5), merging.elect(), merging.mean())
    expected = merging.merge(
        method, {n: part(e) for n, e in world.experts.items()}, base=part(world.base)
    )
    equal_bits({k: v for k, v in found.items() if k in keep}, {k: expected[k] for k in found})


def test_collapsed():
    names = ["l0/w", "l1/w", "l2/w", "emb", "x/0/1", "x/0/3", "fc1x/a"]
    assert {glob: len(found) for glob, found in collapsed(names).items()} == {
        "l{0..2}/w": 3,
        "emb": 1,
        "x/0/{1,3}": 2,
        "fc1x/a": 1,
    }
