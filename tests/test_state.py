"""Bytes and layouts of states, against shapes counted by hand and arrays that exist."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_moma as om


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def dense(m: int, n: int) -> dict:
    return {"kernel": array(m, n), "bias": array(n)}


def norm(n: int) -> dict:
    return {"scale": array(n), "bias": array(n)}


def bert_base() -> dict:
    d, hidden = 768, 3072
    layer = {
        **{name: dense(d, d) for name in ("query", "key", "value", "output")},
        "attention_norm": norm(d),
        "up": dense(d, hidden),
        "down": dense(hidden, d),
        "output_norm": norm(d),
    }
    return {
        "word": array(30522, d),
        "position": array(512, d),
        "token_type": array(2, d),
        "norm": norm(d),
        "layers": [layer] * 12,
        "pooler": dense(d, d),
    }


def gpt2() -> dict:
    d = 768
    block = {
        "norm_1": norm(d),
        "attention": dense(d, 3 * d),
        "projection": dense(d, d),
        "norm_2": norm(d),
        "up": dense(d, 4 * d),
        "down": dense(4 * d, d),
    }
    return {
        "tokens": array(50257, d),  # also the head
        "positions": array(1024, d),
        "blocks": [block] * 12,
        "norm": norm(d),
    }


@pytest.mark.parametrize(("shapes", "count"), [(bert_base, 109_482_240), (gpt2, 124_439_808)])
def test_share_of_adamw(shapes, count):
    """At most 3.5 % of AdamW's bytes, counted leaf by leaf, saliency included."""
    params = shapes()
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == count
    adamw = om.state_size(optax.adamw(1e-3), params).total_bytes
    assert adamw == 8 * count + 4
    size = om.state_size(om.moma(1e-3, rank=32), params)
    numbers = sum(
        34 * sum(leaf.shape) + 32 if min(leaf.shape) >= 128 and leaf.ndim == 2 else 3 * leaf.size
        for leaf in leaves
    )
    assert size.total_bytes == 4 * numbers + 4 + 8  # the state's three scalars
    assert size.total_bytes <= 0.035 * adamw


TREE = {"kernel": jnp.ones((12, 8)), "stack": jnp.ones((3, 8, 16)), "bias": jnp.ones(8)}


@pytest.mark.parametrize(
    "tx",
    [
        om.moma(optax.constant_schedule(1e-3), 2, min_dim_size_to_factor=8, mu_dtype=jnp.bfloat16),
        optax.chain(optax.clip_by_global_norm(1.0), om.umtam(1e-3, 2)),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        optax.sgd(1e-3),
    ],
    ids=["moma", "umtam", "adafactor", "sgd"],
)
def test_bytes_are_those_of_the_arrays(tx):
    size = om.state_size(tx, TREE)
    assert size.total_bytes == sum(x.nbytes for x in jax.tree.leaves(tx.init(TREE)))
    assert sum(size.by_field.values()) == size.total_bytes
    assert list(size.by_field.values()) == sorted(size.by_field.values(), reverse=True)


def test_bytes_by_field():
    fields = om.state_size(om.moma(1e-3, 2, min_dim_size_to_factor=8), TREE).by_field
    assert fields == {
        "V": 4 * 2 * (8 + 3 * 16),
        "U": 4 * 2 * (12 + 3 * 8),
        "C": 4 * (8 + 3 * 16),
        "saliency_col": 4 * (8 + 3 * 16),
        "R": 4 * (12 + 3 * 8),
        "saliency_row": 4 * (12 + 3 * 8),
        "s": 4 * 2 * (1 + 3),
        "mu": 4 * 8,
        "nu": 4 * 8,
        "saliency": 4 * 8,
        "count": 4,
        "mu_weight": 4,
        "nu_weight": 4,
    }


class Model(NamedTuple):
    kernel: Any
    bias: Any


def test_bytes_by_field_for_parameters_with_attributes():
    """NamedTuples, dataclasses, Equinox modules: their names are not those of the state."""
    named = Model(TREE["kernel"], TREE["bias"])
    tx = om.moma(1e-3, 2, min_dim_size_to_factor=8)
    assert om.state_size(tx, named) == om.state_size(tx, named._asdict())


class Gaussian(NamedTuple):
    """Leaves that are called as the state's own fields are."""

    mu: Any
    count: Any


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2)])
@pytest.mark.parametrize(
    "params",
    [
        [TREE["kernel"], TREE["bias"]],
        (TREE["kernel"], TREE["bias"], TREE["stack"]),
        Gaussian(TREE["kernel"], TREE["bias"]),
        TREE["kernel"],
    ],
    ids=["list", "tuple", "NamedTuple", "bare"],
)
def test_bytes_by_field_whatever_the_parameters_are_called(params, wrap):
    """A chain's state is a tuple: its first link is not the first parameter."""
    plain = dict(enumerate(jax.tree.leaves(params)))
    tx = wrap(om.moma(1e-3, 2, min_dim_size_to_factor=8))
    found, expected = (om.state_size(tx, tree) for tree in (params, {"tree": plain}))
    assert found.by_field == expected.by_field
    assert list(found.matrices.values()) == list(expected.matrices.values())


def test_views_of_the_factored_leaves():
    """What the rule made of each; the others are kept entry by entry."""
    params = {
        "layers": {"query": array(3, 16, 2, 4), "up": array(3, 16, 8), "bias": array(3, 8)},
        "kernel": array(12, 8),
        "small": array(12, 4),
    }
    views = {"kernel": (12, 8), "layers/query": (3, 16, 8), "layers/up": (3, 16, 8)}
    tx = optax.chain(optax.clip(1.0), om.moma(1e-3, 2, min_dim_size_to_factor=8))
    assert om.state_size(tx, params).matrices == views
    umtam = {"kernel": (12, 8), "small": (12, 4), "layers/bias": (3, 8)}
    umtam |= {"layers/query": (3, 128), "layers/up": (3, 128)}
    assert om.state_size(om.umtam(1e-3, 2), params).matrices == umtam
    assert om.state_size(optax.adamw(1e-3), params).matrices == {}


def test_state_size_makes_no_array():
    size = om.state_size(om.moma(1e-3), {"w": array(10**6, 10**6)})  # 4 TB
    assert size.total_bytes == 4 * (34 * 2 * 10**6 + 32) + 12


# PartitionSpecs

SHAPES = {"kernel": array(16, 8), "stack": array(3, 8, 16), "heads": array(16, 4, 2)}
SHAPES |= {"bias": array(8), "scale": array()}
SPECS = {
    "kernel": P("fsdp", "tensor"),
    "stack": P(None, "tensor", "fsdp"),
    "heads": P("fsdp", "tensor"),
    "bias": P("tensor"),
    "scale": None,
}
NOTHING = optax.MaskedNode()
MOMA = om.ScaleByMomaState(
    count=P(),
    mu_weight=P(),
    nu_weight=P(),
    U={"kernel": P("fsdp", None), "stack": P(None, "tensor", None), "heads": P("fsdp", None)},
    s={"kernel": P(None), "stack": P(None, None), "heads": P(None)},
    V={"kernel": P("tensor", None), "stack": P(None, "fsdp", None), "heads": P("tensor", None)},
    R={"kernel": P("fsdp"), "stack": P(None, "tensor"), "heads": P("fsdp")},
    C={"kernel": P("tensor"), "stack": P(None, "fsdp"), "heads": P("tensor")},
    saliency_row={"kernel": P("fsdp"), "stack": P(None, "tensor"), "heads": P("fsdp")},
    saliency_col={"kernel": P("tensor"), "stack": P(None, "fsdp"), "heads": P("tensor")},
    mu={"bias": P("tensor"), "scale": P()},
    nu={"bias": P("tensor"), "scale": P()},
    saliency={"bias": P("tensor"), "scale": P()},
)
MOMA = MOMA._replace(
    **{
        field: dict.fromkeys(SHAPES, NOTHING) | value
        for field, value in MOMA._asdict().items()
        if isinstance(value, dict)
    }
)
ADAM = optax.ScaleByAdamState(count=P(), mu=SPECS | {"scale": P()}, nu=SPECS | {"scale": P()})


def assert_specs(found, expected):
    """Equal up to trailing None, and with the structure of the state."""
    is_spec = lambda x: isinstance(x, P)
    found, found_def = jax.tree.flatten(found, is_leaf=is_spec)
    expected, expected_def = jax.tree.flatten(expected, is_leaf=is_spec)
    assert found_def == expected_def

    def plain(spec):
        axes = list(spec)
        while axes and axes[-1] is None:
            axes.pop()
        return axes

    assert [plain(spec) for spec in found] == [plain(spec) for spec in expected]


def moma(learning_rate=1e-3):
    return om.moma(learning_rate, 2, min_dim_size_to_factor=8)


EMPTY = optax.EmptyState()


def test_specs_of_moma_in_a_chain():
    tx = optax.chain(optax.clip_by_global_norm(1.0), moma(optax.constant_schedule(1e-3)))
    expected = (EMPTY, (MOMA, EMPTY, optax.ScaleByScheduleState(count=P())))
    assert_specs(om.state_partition_specs(tx, SHAPES, SPECS), expected)


def test_specs_of_multi_steps():
    found = om.state_partition_specs(optax.MultiSteps(moma(), 4), SHAPES, SPECS)
    assert_specs(found.inner_opt_state, (MOMA, EMPTY, EMPTY))
    assert_specs(found.acc_grads, SPECS | {"scale": P()})
    assert found.mini_step == P()


def test_specs_of_inject_hyperparams():
    static = ("rank", "min_dim_size_to_factor", "orthogonal_block_size")
    injected = optax.inject_hyperparams(om.moma, static_args=static)
    tx = injected(1e-3, rank=2, min_dim_size_to_factor=8)
    found = om.state_partition_specs(tx, SHAPES, SPECS)
    assert_specs(found.inner_state, (MOMA, EMPTY, EMPTY))
    assert found.hyperparams["learning_rate"] == P()


def test_specs_of_adamw():
    found = om.state_partition_specs(optax.adamw(1e-3), SHAPES, SPECS)
    assert_specs(found, (ADAM, EMPTY, EMPTY))


def test_specs_of_adafactor_have_the_structure_of_its_state():
    """It makes its sums without shardings: they are replicated."""
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    found = om.state_partition_specs(tx, SHAPES, SPECS)
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(tx.init, SHAPES))
    assert all(isinstance(spec, P) for spec in jax.tree.leaves(found))


def test_specs_of_umtam():
    params, specs = {"kernel": SHAPES["kernel"]}, {"kernel": SPECS["kernel"]}
    state = om.state_partition_specs(om.umtam(1e-3, 2), params, specs)[0]
    for field in ("error", "base", "saliency"):
        assert_specs(getattr(state, field), specs)


def test_specs_may_name_several_axes_at_once():
    specs = {"kernel": P(("data", "fsdp"), None)}
    found = om.state_partition_specs(moma(), {"kernel": SHAPES["kernel"]}, specs)[0]
    assert_specs(found.R["kernel"], P(("data", "fsdp")))
    assert_specs(found.C["kernel"], P())


SPREAD_ROWS = {
    "kernel": P(("fsdp", "tensor")),
    "stack": P(None, ("tensor", "fsdp")),
    "heads": P(("fsdp", "tensor")),
}
SPREAD_COLS = {
    "kernel": P(("tensor", "fsdp")),
    "stack": P(None, ("fsdp", "tensor")),
    "heads": P(("tensor", "fsdp")),
}
MESH_4X2 = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))


def test_a_spread_state_has_no_copies_along_the_axes_of_its_parameter():
    state, *_ = om.state_partition_specs(moma(), SHAPES, SPECS, spread_over=MESH_4X2)
    for field in ("U", "R", "saliency_row"):
        assert_specs({k: getattr(state, field)[k] for k in SPREAD_ROWS}, SPREAD_ROWS)
    for field in ("V", "C", "saliency_col"):
        assert_specs({k: getattr(state, field)[k] for k in SPREAD_COLS}, SPREAD_COLS)
    assert_specs((state.mu, state.nu, state.count), (MOMA.mu, MOMA.nu, P()))


def test_a_state_spreads_only_where_its_sizes_divide():
    """12 rows lie over 4 devices, not over 8; 20 columns over 2 and not over 8; a rank of 2."""
    params, specs = {"w": array(12, 20)}, {"w": P("fsdp", "tensor")}
    state, *_ = om.state_partition_specs(moma(), params, specs, spread_over=MESH_4X2)
    assert_specs((state.U["w"], state.R["w"]), (P("fsdp", "tensor"), P("fsdp")))
    assert_specs((state.V["w"], state.C["w"]), (P("tensor"), P("tensor")))


def test_what_lies_as_its_parameter_does_not_spread():
    """A dense moment would travel whole: only thin arrays may be gathered every step."""
    params, specs = {"w": array(16, 16)}, {"w": P(None, "fsdp")}
    adamw, umtam = (
        om.state_partition_specs(tx, params, specs, spread_over=MESH_4X2)[0]
        for tx in (optax.adamw(1e-3), om.umtam(1e-3, 2))
    )
    for field in (adamw.mu, adamw.nu, umtam.error, umtam.base):
        assert_specs(field["w"], specs["w"])


@pytest.mark.parametrize("box", [list, Gaussian._make], ids=["list", "NamedTuple"])
def test_a_state_spreads_by_the_paths_of_its_parameters(box):
    """In a list, and in a NamedTuple whose fields are called as the state's."""
    params, specs = (box([x["kernel"], x["bias"]]) for x in (SHAPES, SPECS))
    state, *_ = om.state_partition_specs(moma(), params, specs, spread_over=MESH_4X2)
    assert_specs((state.U[0], state.C[0]), (SPREAD_ROWS["kernel"], SPREAD_COLS["kernel"]))
    assert_specs((state.mu[1], state.count, state.mu_weight), (SPECS["bias"], P(), P()))


def test_a_leaf_that_is_none_has_no_specs():
    params, specs = SHAPES | {"absent": None}, SPECS | {"absent": None}
    found, *_ = om.state_partition_specs(moma(), params, specs, spread_over=MESH_4X2)
    assert jax.tree.structure(found) == jax.tree.structure(jax.eval_shape(moma().init, params)[0])
    assert_specs(found.R["kernel"], SPREAD_ROWS["kernel"])


def test_specs_of_a_replicated_model():
    found = om.state_partition_specs(moma(), SHAPES, dict.fromkeys(SHAPES))
    assert_specs(found[0], jax.tree.map(lambda _: P(), MOMA, is_leaf=lambda x: isinstance(x, P)))


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ({"kernel": P()}, "tree like params"),
        (SPECS | {"kernel": {"nested": P()}}, "tree like params"),
        (SPECS | {"bias": P(None, "fsdp")}, "'bias'"),
    ],
    ids=["missing", "nested", "long"],
)
def test_specs_that_do_not_fit(specs, words):
    with pytest.raises(ValueError, match="spec") as raised:
        om.state_partition_specs(moma(), SHAPES, specs)
    assert words in str(raised.value)


def test_specs_of_shardings():
    """As parameters at hand have them; the mesh to spread over must know their axes."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    lay = lambda spec: spec and jax.sharding.NamedSharding(mesh, spec)
    shardings = {name: lay(spec) for name, spec in SPECS.items()}
    assert_specs(
        om.state_partition_specs(moma(), SHAPES, shardings),
        om.state_partition_specs(moma(), SHAPES, SPECS),
    )
    other = jax.sharding.AbstractMesh((2,), ("fsdp",))
    with pytest.raises(ValueError, match=r"'bias'.*names 'tensor', which the mesh"):
        om.state_partition_specs(moma(), SHAPES, SPECS, spread_over=other)


def test_specs_hold_for_the_arrays():
    """What is predicted is where `init` puts the state on a mesh of eight devices."""
    mesh = jax.make_mesh(
        (4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    place = lambda x, spec: jax.device_put(
        np.zeros(x.shape, x.dtype), jax.sharding.NamedSharding(mesh, spec or P())
    )
    with jax.set_mesh(mesh):
        params = {name: place(SHAPES[name], SPECS[name]) for name in SHAPES}
        state = moma().init(params)
    found = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    assert_specs(found, (MOMA, EMPTY, EMPTY))
