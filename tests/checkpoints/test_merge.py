"""The streamed merge has the bits of the merge in memory, whatever the chunks and the layout."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from optax_moma import checkpoints, merging
from optax_moma.checkpoints import _orbax, _safetensors
from optax_moma.checkpoints._recipe import METHODS, build_method, one_sided
from optax_moma.checkpoints._source import open_checkpoint
from optax_moma.merging._leaf import compute_dtype

ocp_v0 = pytest.importorskip("orbax.checkpoint")
ocp = ocp_v0.v1

IN_MEMORY = {
    "average": ("average", merging.average()),
    "ties": ({"name": "ties", "density": 0.3}, merging.ties(0.3)),
    "dare": ({"name": "dare", "density": 0.5}, merging.dare(0.5)),
    "della": ({"name": "della", "density": 0.5}, merging.della(0.5)),
    "fisher": ("fisher", merging.fisher()),
    "moma": ("moma", merging.moma()),
    "global ties": (
        [{"name": "trim", "density": 0.3, "scope": "global"}, "elect", "mean"],
        merging.chain(merging.trim(0.3, scope="global"), merging.elect(), merging.mean()),
    ),
}


def in_memory(world, method, **more):
    curvature = world.curvature() if method.contract.curvature else None
    return om.merge(
        method,
        world.experts,
        base=world.base,
        curvature=curvature,
        key=jax.random.key(0) if method.contract.key else None,
        **more,
    )


@pytest.mark.parametrize(
    ("name", "chunk_bytes"),
    [*((name, 8000) for name in IN_MEMORY), ("global ties", 1), ("dare", 1 << 20)],
)
def test_equals_the_merge_in_memory(world, tmp_path, equal_bits, name, chunk_bytes):
    spec, method = IN_MEMORY[name]
    done = checkpoints.merge(world.recipe(spec), tmp_path / "out", chunk_bytes=chunk_bytes)
    equal_bits(checkpoints.load(tmp_path / "out"), in_memory(world, method))
    assert done.leaves == 12 and done.resumed == 0
    assert checkpoints.verify(tmp_path / "out").problems == []
    # What Orbax itself restores has the structure of the base, lists and empty dicts included.
    restored = ocp.load(tmp_path / "out", world.base)
    assert jax.tree.structure(restored) == jax.tree.structure(world.base)


def test_weights_and_seed(world, tmp_path, equal_bits):
    recipe = world.recipe({"name": "dare", "density": 0.4}, seed=7)
    recipe["experts"]["math"]["weight"] = 0.25
    checkpoints.merge(recipe, tmp_path / "out")
    weights = {"code": 1.0, "math": 0.25}
    expected = om.merge(
        merging.dare(0.4), world.experts, base=world.base, weights=weights, key=jax.random.key(7)
    )
    equal_bits(checkpoints.load(tmp_path / "out"), expected)


def test_rules(world, tmp_path):
    recipe = world.recipe(
        {"name": "task_arithmetic", "scale": 0.5},
        rules=[
            {"match": "embedding", "keep": "base"},
            {"match": "layers_0/*", "method": "average"},
            {"match": "layers_1/kernel", "keep": "math"},
            {"match": "layers_2/**", "values": {"scale": 2.0}, "weights": {"code": 0.0}},
            {"else": "base"},
        ],
    )
    checkpoints.merge(recipe, tmp_path / "out")
    found = checkpoints.load(tmp_path / "out")
    base, math, code = world.base, world.experts["math"], world.experts["code"]
    assert np.array_equal(found["embedding"], base["embedding"])
    assert np.array_equal(found["gain"], base["gain"])
    assert np.array_equal(found["layers_1"]["kernel"], math["layers_1"]["kernel"])
    assert np.array_equal(found["layers_1"]["bias"], base["layers_1"]["bias"])
    mean = (np.float64(math["layers_0"]["bias"]) + np.float64(code["layers_0"]["bias"])) / 2
    np.testing.assert_allclose(found["layers_0"]["bias"], mean, rtol=1e-6)
    w = np.float64(base["layers_2"]["kernel"])
    moved = w + 2.0 * (np.float64(math["layers_2"]["kernel"]) - w)
    np.testing.assert_allclose(found["layers_2"]["kernel"], moved, rtol=1e-5, atol=1e-6)


def test_gradient_over_layers(world, tmp_path):
    rule = {"match": "layers_*/kernel", "values": {"scale": [0.0, 1.0]}}
    recipe = world.recipe({"name": "task_arithmetic", "scale": 9.0}, rules=[rule, {"else": "base"}])
    checkpoints.merge(recipe, tmp_path / "out")
    found = checkpoints.load(tmp_path / "out")
    for layer, scale in enumerate((0.0, 0.5, 1.0)):
        name = f"layers_{layer}"
        w = np.float64(world.base[name]["kernel"])
        deltas = sum(np.float64(e[name]["kernel"]) - w for e in world.experts.values())
        np.testing.assert_allclose(found[name]["kernel"], w + scale * deltas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_base", [True, False])
def test_output_dtype_is_rounded_once(world, tmp_path, with_base):
    recipe = world.recipe("average", output={"dtype": "bfloat16"})
    if not with_base:
        del recipe["base"]
    checkpoints.merge(recipe, tmp_path / "out")
    found = checkpoints.load(tmp_path / "out")
    assert found["embedding"].dtype == found["norm"]["scale"].dtype == jnp.bfloat16
    assert found["buckets"].dtype == jnp.int32
    exact = om.merge(merging.average(), world.experts, base=world.base if with_base else None)
    rounded = exact["embedding"].astype(jnp.bfloat16)
    assert np.array_equal(found["embedding"], rounded)

    recipe["output"] = {"dtype": "float32"}
    checkpoints.merge(recipe, tmp_path / "wide")
    scale = checkpoints.load(tmp_path / "wide")["norm"]["scale"]
    mean = sum(np.float64(e["norm"]["scale"]) for e in world.experts.values()) / 2
    # Both experts have 8 bits: their mean is exact in float32, and was not in bfloat16.
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, mean, rtol=3e-7)


def save_v0(path, tree):
    with ocp_v0.CheckpointManager(path) as manager:
        manager.save(3, args=ocp_v0.args.StandardSave(tree))


def save_v0_items(path, tree):
    with ocp_v0.CheckpointManager(path) as manager:
        items = {"state": ocp_v0.args.StandardSave(tree), "notes": ocp_v0.args.JsonSave({"x": 1})}
        manager.save(3, args=ocp_v0.args.Composite(**items))


def save_flat(path, tree):
    with ocp_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


@pytest.mark.parametrize("save", [ocp.save, save_v0, save_v0_items, save_flat])
def test_layouts_of_orbax(world, tmp_path, equal_bits, save):
    steps = save in (save_v0, save_v0_items)
    recipe = world.recipe("moma")
    for name, params in world.experts.items():
        save(tmp_path / name, {"params": params, "opt_state": world.states[name]})
        recipe["experts"][name] = {"path": str(tmp_path / name)}
        if steps:
            recipe["experts"][name]["step"] = "latest"
        if save is save_v0_items:
            recipe["experts"][name]["item"] = "state"
    checkpoints.merge(recipe, tmp_path / "out")
    equal_bits(checkpoints.load(tmp_path / "out"), in_memory(world, merging.moma()))


class TestFlax:
    """Trained with Flax's own classes, saved as people save them."""

    @pytest.mark.parametrize("pure", [True, False])
    def test_nnx(self, tmp_path, equal_bits, pure):
        nnx = pytest.importorskip("flax.nnx")

        class MLP(nnx.Module):
            def __init__(self, rngs):
                self.hidden = nnx.Linear(8, 16, rngs=rngs)
                self.out = nnx.Linear(16, 4, rngs=rngs)

        curvature, experts, recipe = {}, {}, {"method": "moma", "experts": {}}
        base = MLP(nnx.Rngs(0))
        flat = nnx.to_pure_dict if pure else lambda state: state
        ocp.save(tmp_path / "base", {"params": flat(nnx.state(base, nnx.Param))})
        recipe["base"] = {"path": str(tmp_path / "base")}
        for seed, name in enumerate(("a", "b"), start=1):
            model = MLP(nnx.Rngs(0))
            optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
            for _ in range(2):
                key = jax.random.key(seed)
                state = nnx.state(model, nnx.Param)
                grads = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape), state)
                optimizer.update(model, grads)
            state = nnx.state(model, nnx.Param)
            optimizer_state = nnx.state(optimizer)
            ocp.save(
                tmp_path / name,
                {"params": flat(state), "optimizer": flat(optimizer_state)},
            )
            recipe["experts"][name] = {"path": str(tmp_path / name)}
            experts[name] = nnx.to_pure_dict(state)
            raw = nnx.to_pure_dict(optimizer_state)["opt_state"]
            curvature[name] = om.curvature_from(raw, experts[name])
        checkpoints.merge(recipe, tmp_path / "out")
        pure_base = nnx.to_pure_dict(nnx.state(base, nnx.Param))
        expected = om.merge(merging.moma(), experts, base=pure_base, curvature=curvature)
        found = checkpoints.load(tmp_path / "out")
        assert len(jax.tree.leaves(found)) == 4
        equal_bits(jax.tree.leaves(found), jax.tree.leaves(expected))

    def test_linen(self, tmp_path, equal_bits):
        linen = pytest.importorskip("flax.linen")
        from flax.training.train_state import TrainState

        model = linen.Dense(4)
        params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
        ocp.save(tmp_path / "base", {"params": params})
        recipe = {"method": "fisher", "base": str(tmp_path / "base"), "experts": {}}
        experts, curvature = [], []
        for seed in range(2):
            tx = optax.adamw(1e-2)
            state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
            grads = jax.tree.map(
                lambda x, seed=seed: jax.random.normal(jax.random.key(seed), x.shape), params
            )
            state = state.replace(step=jnp.int32(0)).apply_gradients(grads=grads)
            ocp.save(tmp_path / f"{seed}", state)
            recipe["experts"][f"{seed}"] = f"{tmp_path}/{seed}"
            experts.append(state.params)
            curvature.append(om.curvature_from(state.opt_state, state.params))
        checkpoints.merge(recipe, tmp_path / "out")
        expected = om.merge(merging.fisher(), experts, base=params, curvature=curvature)
        equal_bits(checkpoints.load(tmp_path / "out"), expected)


def test_safetensors_in_and_out(world, tmp_path, equal_bits):
    """Written and read by us, and by the safetensors library."""
    plain = {k: v for k, v in world.base.items() if k not in ("blocks", "empty")}
    recipe = world.recipe("average", ignore=["blocks/**"])
    checkpoints.merge(recipe, tmp_path / "out.safetensors")
    assert checkpoints.verify(tmp_path / "out.safetensors").problems == []
    expected = om.merge(
        merging.average(),
        {n: {k: e[k] for k in plain} for n, e in world.experts.items()},
        base=plain,
    )
    found = checkpoints.load(tmp_path / "out.safetensors")
    equal_bits(found, expected)

    library = pytest.importorskip("safetensors")
    with library.safe_open(tmp_path / "out.safetensors", framework="np") as file:
        assert "layers_0.kernel" in file.keys()
        kernel = file.get_tensor("layers_0.kernel")
        assert np.array_equal(kernel, expected["layers_0"]["kernel"])
    from safetensors.numpy import save_file

    (tmp_path / "shards").mkdir()
    save_file(
        {"a.w": np.float32([[1, 2]]), "b": np.float16([3])}, tmp_path / "shards/1.safetensors"
    )
    save_file({"c.w": np.int32([4])}, tmp_path / "shards/2.safetensors")
    again = {"method": "average", "experts": {"x": str(tmp_path / "shards")}}
    checkpoints.merge(again, tmp_path / "orbax")
    found = checkpoints.load(tmp_path / "orbax")
    assert found["a"]["w"].tolist() == [[1, 2]] and found["c"]["w"].tolist() == [4]
    assert found["b"].dtype == jnp.float16


def test_manifest(world, tmp_path):
    checkpoints.merge(world.recipe("moma"), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["recipe"]["method"] == "moma"
    assert manifest["versions"]["jax"] == jax.__version__
    assert set(manifest["leaves"]) >= {"embedding", "layers_0/kernel", "blocks/1/w", "gain"}
    assert set(manifest["inputs"]) == {
        "base",
        "code",
        "math",
        "code (curvature)",
        "math (curvature)",
    }
    assert len(manifest["inputs"]["base"]) == 12
    # The orbax metadata carries the digests too.
    custom = ocp.metadata(tmp_path / "out").custom_metadata
    assert custom["leaves"] == manifest["leaves"]


def test_progress_ends_at_the_total(world, tmp_path):
    seen = []
    checkpoints.merge(
        world.recipe("moma"),
        tmp_path / "out",
        progress=lambda *x: seen.append(x),
        chunk_bytes=3000,
    )
    done = [d for d, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] and len(seen) > 4


def test_curvature_of_a_part_that_was_trained_with_more(tmp_path):
    """An encoder trained with a head, both with a leaf of one name: the encoder's is taken."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    whole = lambda: {"encoder": {"kernel": draw(8, 8)}, "kernel": draw(8, 8)}
    tx, base, trees, curvature = optax.adam(1e-3), draw(8, 8), {}, {}
    ocp.save(str(tmp_path / "base"), {"kernel": base})
    for name in ("a", "b"):
        params = whole()
        _, state = tx.update(whole(), tx.init(params), params)
        ocp.save(str(tmp_path / name), {"params": params, "opt_state": state})
        trees[name] = params["encoder"]
        curvature[name] = om.curvature_from(state, params)["encoder"]
    recipe = checkpoints.Recipe.model_validate(
        {
            "base": str(tmp_path / "base"),
            "experts": {n: {"path": str(tmp_path / n), "params": "params/encoder"} for n in trees},
            "method": "fisher",
            "check_base": False,
        }
    )
    checkpoints.merge(recipe, tmp_path / "merged")
    expected = om.merge(om.merging.fisher(), trees, base={"kernel": base}, curvature=curvature)
    np.testing.assert_array_equal(
        checkpoints.load(tmp_path / "merged")["kernel"], expected["kernel"]
    )


class TestLists:
    """Layers in lists, as many write them in JAX, are streamed one leaf at a time too."""

    def save(self, folder, layers=12):
        """Twelve, as texts sort 10 before 2; lists in lists, and what has no arrays among them."""
        rng = np.random.default_rng(0)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        trees = {}
        for name in ("base", "a", "b"):
            blocks = [{"w": draw(8, 8), "heads": [draw(8), draw(8)]} for _ in range(layers)]
            plain = [draw(4) for _ in range(11)]
            trees[name] = {"blocks": blocks, "plain": plain, "odd": [[], {}, [draw(2)]]}
            ocp.save(folder / name, trees[name])
        recipe = {
            "base": str(folder / "base"),
            "experts": {name: str(folder / name) for name in "ab"},
            "method": {"name": "task_arithmetic", "scale": 0.5},
        }
        base, *experts = trees.values()
        method = merging.task_arithmetic(0.5)
        return recipe, om.merge(method, dict(zip("ab", experts, strict=True)), base=base)

    def test_leaf_by_leaf(self, tmp_path, equal_bits, monkeypatch):
        recipe, expected = self.save(tmp_path)
        parts, save_part = [], _orbax.save_part
        monkeypatch.setattr(
            _orbax,
            "save_part",
            lambda path, tree, custom: (
                parts.append(len(jax.tree.leaves(tree))),
                save_part(path, tree, custom),
            ),
        )
        done = checkpoints.merge(recipe, tmp_path / "out", chunk_bytes=1)
        assert done.leaves == len(parts) == 12 * 3 + 11 + 1 and set(parts) == {1}
        equal_bits(checkpoints.load(tmp_path / "out"), expected)
        assert checkpoints.verify(tmp_path / "out").problems == []
        # To Orbax too they are lists.
        equal_bits(ocp.load(tmp_path / "out", expected), expected)
        structure = jax.tree.structure(ocp.metadata(tmp_path / "out").metadata)
        assert structure == jax.tree.structure(expected)
        # Orbax before 0.12 opens a list only if its elements come in their order.
        about = json.loads((tmp_path / "out/state/_METADATA").read_text())
        keys = [leaf["key_metadata"] for leaf in about["tree_metadata"].values()]
        places = [int(key[1]["key"]) for key in keys if key[0]["key"] == "plain"]
        assert places == list(range(11))

    def test_to_safetensors(self, tmp_path):
        recipe, expected = self.save(tmp_path)
        checkpoints.merge(recipe, tmp_path / "out.safetensors", chunk_bytes=1)
        found = checkpoints.load(tmp_path / "out.safetensors")
        for i, block in enumerate(expected["blocks"]):
            assert np.array_equal(found["blocks"][str(i)]["w"], block["w"])

    def test_of_lists_alone(self, tmp_path, equal_bits):
        for name in "ab":
            ocp.save(tmp_path / name, [[jnp.ones(3)], {"w": jnp.zeros(2)}])
        recipe = {"experts": {n: str(tmp_path / n) for n in "ab"}, "method": "average"}
        checkpoints.merge(recipe, tmp_path / "out", chunk_bytes=1)
        equal_bits(checkpoints.load(tmp_path / "out"), [[jnp.ones(3)], {"w": jnp.zeros(2)}])


def save_tensors(path, tree, **notes):
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.asarray(x, np.float32) for name, x in tree.items()}, path, notes or None)


class TestNotes:
    """What a merged file says of itself is what its inputs say."""

    def notes(self, recipe, tmp_path):
        safe_open = pytest.importorskip("safetensors").safe_open
        checkpoints.merge(recipe, tmp_path / "out.safetensors", force=True)
        with safe_open(tmp_path / "out.safetensors", framework="np") as file:
            return file.metadata()

    @pytest.mark.parametrize(
        ("a", "b", "said"),
        [
            ({"format": "pt"}, {"format": "pt"}, {"format": "pt"}),
            ({"format": "pt", "x": "1"}, {"format": "pt", "x": "2"}, {"format": "pt"}),
            ({"format": "pt"}, {"format": "flax"}, {}),
            ({"format": "pt"}, {}, {}),
            ({}, {}, {}),
        ],
    )
    def test_of_files(self, tmp_path, a, b, said):
        save_tensors(tmp_path / "a.safetensors", {"w": np.ones((2, 3))}, **a)
        save_tensors(tmp_path / "b.safetensors", {"w": np.ones((2, 3))}, **b)
        recipe = {"experts": {n: str(tmp_path / f"{n}.safetensors") for n in "ab"}}
        recipe["method"] = "average"
        assert self.notes(recipe, tmp_path) == said | {"merged_by": "optax_moma"}

    def test_of_shards_and_of_orbax(self, tmp_path):
        for i, name in enumerate(("w", "v")):
            save_tensors(tmp_path / f"a/{i}.safetensors", {name: np.ones(3)}, format="pt")
        ocp.save(tmp_path / "b", {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)})
        for experts, said in (("a", {"format": "pt"}), ("b", {"format": "flax"}), ("ab", {})):
            recipe = {"experts": {n: str(tmp_path / n) for n in experts}, "method": "average"}
            assert self.notes(recipe, tmp_path) == said | {"merged_by": "optax_moma"}


class TestSides:
    """PyTorch's linear layers are (fan-out, fan-in): a recipe says so, or is refused."""

    @pytest.fixture
    def recipe(self, tmp_path):
        rng = np.random.default_rng(0)
        for name in ("base", "a", "b"):
            tree = {"w": rng.normal(size=(6, 4)), "emb": rng.normal(size=(5, 4))}
            save_tensors(tmp_path / f"{name}.safetensors", tree, format="pt")
        return {
            "base": str(tmp_path / "base.safetensors"),
            "experts": {name: str(tmp_path / f"{name}.safetensors") for name in "ab"},
            "check_base": False,
        }

    @pytest.mark.parametrize(
        "method",
        [
            {"name": "moma", "power": 0},
            "wudi",
            [{"name": "knots", "steps": ["mean"]}],
            [{"name": "trim", "density": 0.5}, "doge"],
        ],
        ids=repr,
    )
    def test_not_said(self, recipe, tmp_path, method):
        (problem,) = checkpoints.plan(recipe | {"method": method}).problems
        assert "the base is a file of PyTorch (format: pt)" in problem
        assert "axes: nm, and by a rule axes: mn for embeddings" in problem
        with pytest.raises(checkpoints.MergeError, match="fan-out, fan-in"):
            checkpoints.merge(recipe | {"method": method}, tmp_path / "out.safetensors")

    def test_under_rules(self, recipe):
        recipe["method"] = {"name": "wudi", "axes": "nm"}
        assert checkpoints.plan(recipe).problems == []
        recipe["rules"] = [{"match": "emb", "method": "wudi"}]
        (problem,) = checkpoints.plan(recipe).problems
        assert problem.startswith("rule 0: wudi takes matrices as (fan-in, fan-out)")
        recipe["rules"][0]["values"] = {"axes": "mn"}
        assert checkpoints.plan(recipe).problems == []
        recipe["rules"] = [{"match": "emb", "method": "wudi", "values": {"ridge": 0.5}}]
        assert len(checkpoints.plan(recipe).problems) == 1
        recipe["method"] = "average"
        recipe["rules"] = [{"match": "emb", "keep": "a"}]
        assert checkpoints.plan(recipe).problems == []

    def test_by_filter(self, recipe):
        method = {"name": "model_stock", "scope": "filter"}
        (problem,) = checkpoints.plan(recipe | {"method": method}).problems
        assert problem.endswith("say model_stock scope: leaf")
        assert checkpoints.plan(recipe | {"method": "model_stock"}).problems == []

    def test_said(self, recipe, tmp_path):
        """It merges as the transposes do in Flax; and the embedding as it is."""
        recipe["method"] = {"name": "wudi", "ridge": 0.3, "axes": "nm"}
        recipe["rules"] = [{"match": "emb", "values": {"axes": "mn"}}]
        checkpoints.merge(recipe, tmp_path / "out.safetensors")
        found = checkpoints.load(tmp_path / "out.safetensors")
        base, *experts = (
            checkpoints.load(tmp_path / f"{name}.safetensors") for name in ("base", "a", "b")
        )
        turned = lambda tree: {"w": tree["w"].T, "emb": tree["emb"]}
        method = merging.wudi(0.3)
        expected = om.merge(method, list(map(turned, experts)), base=turned(base))
        np.testing.assert_allclose(found["w"], expected["w"].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["emb"], expected["emb"], rtol=1e-4, atol=1e-5)
        other = om.merge(method, experts, base=base)["w"]
        assert np.abs(found["w"] - other).max() > 0.01

    def test_which_methods_have_sides(self):
        """Only those that need not be told give the transpose of the merge for transposes."""
        rng = np.random.default_rng(0)
        base, *experts = ({"w": np.float32(rng.normal(size=(6, 4)))} for _ in range(4))
        curvature = [{"w": np.float32(rng.random((6, 4)))} for _ in experts]
        turned = lambda tree: jax.tree.map(jnp.transpose, tree)
        needed = {"knots": {"steps": [{"name": "trim", "density": 0.3}, "elect", "mean"]}}
        needed |= {
            "drop_by_magnitude": {"density": 0.5},
            "iso_cts": {"common": 0.4},
            "wudi_adam": {"steps": 3, "learning_rate": 0.1},
            "doge": {"steps": 5, "learning_rate": 0.1, "norm": 2.0},
        }
        for name, method in METHODS.items():
            if "axes" not in inspect.signature(method).parameters:
                continue
            spec = {"name": name, **needed.get(name, {})}
            step = build_method(spec, {})
            if not step.contract.combines:
                step = build_method([spec, "mean"], {})
            more = {"key": jax.random.key(0) if step.contract.key else None}
            v = curvature if step.contract.curvature else None
            one = om.merge(step, experts, base=base, curvature=v, **more)["w"]
            v = None if v is None else turned(v)
            other = om.merge(step, turned(experts), base=turned(base), curvature=v, **more)["w"].T
            same = np.allclose(one, other, rtol=1e-3, atol=1e-3)
            assert same == (name not in one_sided(spec, {})), name


def test_tensors_keep_their_names(tmp_path):
    """Their paths have slashes here, whether they have dots or slashes in the file."""
    save_tensors(tmp_path / "a.safetensors", {"enc/w.0": np.ones(3), "enc.b": np.ones(2)})
    recipe = {"method": "average", "experts": {"a": {"path": str(tmp_path / "a.safetensors")}}}
    checkpoints.merge(recipe, tmp_path / "out.safetensors")
    names = _safetensors.opened(tmp_path / "out.safetensors", "").tensors
    assert sorted(names) == ["enc.b", "enc/w.0"]
    assert checkpoints.verify(tmp_path / "out.safetensors").problems == []
    recipe["experts"]["a"] |= {"params": "enc", "rename": {"b": "c/d"}}
    checkpoints.merge(recipe, tmp_path / "part.safetensors")
    names = _safetensors.opened(tmp_path / "part.safetensors", "").tensors
    assert sorted(names) == ["c.d", "w.0"]


def test_files_that_cannot_hold_the_leaves(tmp_path):
    tree = {"a.b": {"w": np.ones(2)}, "a": {"b": {"w": np.ones(2)}}, "q": jnp.ones(3, jnp.int4)}
    ocp.save(tmp_path / "a", tree)
    recipe = {"experts": {"a": str(tmp_path / "a")}, "method": "average"}
    with pytest.raises(checkpoints.MergeError) as caught:
        checkpoints.merge(recipe, tmp_path / "out.safetensors")
    one, other = sorted(caught.value.problems)
    assert one.startswith("a.b/w and a/b/w would both be a.b.w in out.safetensors") or (
        one.startswith("a/b/w and a.b/w would both be a.b.w in out.safetensors")
    )
    assert other.startswith("q: safetensors have no int4")
    assert checkpoints.merge(recipe, tmp_path / "out").leaves == 3


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_eight_bit_floats(tmp_path, dtype, kind):
    """Merged in float32, and rounded once."""
    try:
        compute_dtype([jnp.ones(1, dtype)])
    except ValueError:
        pytest.skip("merges do not know 8-bit floats yet")
    rng = np.random.default_rng(0)
    suffix = ".safetensors" if kind == "safetensors" else ""
    trees = {n: {"w": jnp.asarray(rng.normal(size=(16, 8)), dtype)} for n in ("base", "a", "b")}
    for name, tree in trees.items():
        if not suffix:
            ocp.save(tmp_path / name, tree)
            continue
        writer = _safetensors.Writer(tmp_path / f"{name}.safetensors", tree, {})
        writer.write(tree)
        writer.close()
    recipe = {
        "base": str(tmp_path / f"base{suffix}"),
        "experts": {name: str(tmp_path / f"{name}{suffix}") for name in "ab"},
        "method": {"name": "task_arithmetic", "scale": 0.5},
        "check_base": False,
    }
    w0, a, b = (np.float32(tree["w"]) for tree in trees.values())
    exact = w0 + np.float32(0.5) * ((a - w0) + (b - w0))
    assert checkpoints.plan(recipe).problems == []
    checkpoints.merge(recipe, tmp_path / f"out{suffix}")
    found = checkpoints.load(tmp_path / f"out{suffix}")["w"]
    assert found.dtype == dtype
    assert np.array_equal(np.float32(found), np.float32(exact.astype(dtype)))
    recipe["output"] = {"dtype": "float32"}
    checkpoints.merge(recipe, tmp_path / f"wide{suffix}")
    found = checkpoints.load(tmp_path / f"wide{suffix}")["w"]
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    # Where others have more bits, they decide; without a base too.
    ocp.save(tmp_path / "half", {"w": trees["b"]["w"].astype(jnp.bfloat16)})
    mixed = {"experts": {"a": recipe["experts"]["a"], "b": str(tmp_path / "half")}}
    checkpoints.merge(mixed | {"method": "average"}, tmp_path / "mixed")
    found = checkpoints.load(tmp_path / "mixed")["w"]
    assert found.dtype == jnp.bfloat16
    assert np.array_equal(np.float32(found), np.float32(((a + b) / 2).astype(jnp.bfloat16)))
    # NaN is found whether a format has infinities or not.
    trees["a"]["w"] = trees["a"]["w"].at[3, 2].set(jnp.nan)
    ocp.save(tmp_path / "faulty", trees["a"])
    recipe["experts"]["a"] = str(tmp_path / "faulty")
    with pytest.raises(checkpoints.MergeError, match="expert 'a', w: 1 values that are not finite"):
        checkpoints.merge(recipe, tmp_path / "none")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_sixty_four_bits(tmp_path, suffix):
    """JAX has none by default; what was saved with as many is merged and written with as many."""
    rng = np.random.default_rng(0)
    trees = {name: {"w": rng.normal(size=(4, 8))} for name in ("base", "a", "b")}
    for name, tree in trees.items():
        ocp.save(tmp_path / name, tree | {"ids": 2**40 + np.arange(5), "v": np.float32([1, 2])})
    recipe = {
        "base": str(tmp_path / "base"),
        "experts": {name: str(tmp_path / name) for name in "ab"},
        "method": "average",
        "check_base": False,
    }
    output, mean = tmp_path / f"out{suffix}", (trees["a"]["w"] + trees["b"]["w"]) / 2
    for without_base in (False, True):
        if without_base:
            del recipe["base"]
        checkpoints.merge(recipe, output, force=True)
        assert checkpoints.verify(output).problems == []
        found = open_checkpoint(output).read(["w", "ids", "v"])
        assert (found["w"].dtype, found["v"].dtype) == (np.float64, np.float32)
        np.testing.assert_allclose(found["w"], mean, rtol=1e-14)
        assert found["ids"].tolist() == [2**40 + i for i in range(5)]
    rules = [{"match": "*", "keep": "b"}]
    checkpoints.merge(recipe | {"rules": rules}, output, force=True)
    found = open_checkpoint(output).read(["w", "ids"])
    assert np.array_equal(found["w"], trees["b"]["w"]) and found["ids"][0] == 2**40
    recipe["output"] = {"dtype": "float64"}
    recipe["ignore"] = ["w"]
    checkpoints.merge(recipe, output, force=True)
    found = open_checkpoint(output).read(["v"])["v"]
    assert found.dtype == np.float64 and found.tolist() == [1, 2]
