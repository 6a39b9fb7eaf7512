"""The streamed merge has the bits of the merge in memory, whatever the chunks and the layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from optax_moma import checkpoints, merging

ocp_v0 = pytest.importorskip("orbax.checkpoint")
ocp = ocp_v0.v1

METHODS = {
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
    [*((name, 8000) for name in METHODS), ("global ties", 1), ("dare", 1 << 20)],
)
def test_equals_the_merge_in_memory(world, tmp_path, equal_bits, name, chunk_bytes):
    spec, method = METHODS[name]
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
