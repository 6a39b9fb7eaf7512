"""Eight devices: the same steps as on one, states that stay where they are, and little traffic."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om

RANK = 4
LAYERS, WIDTH, HIDDEN, CLASSES = 2, 64, 128, 32

SHAPES = {
    "layers": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH), "scale": (WIDTH,)},
    "out": {"kernel": (WIDTH, CLASSES), "bias": (CLASSES,)},
}
FSDP_AND_TENSOR = {
    "layers": {
        "up": P(None, "fsdp", "tensor"),
        "down": P(None, "tensor", "fsdp"),
        "scale": P("fsdp"),
    },
    "out": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")},
}
FSDP_ONLY = {
    "layers": {"up": P(None, "fsdp"), "down": P(None, None, "fsdp"), "scale": P()},
    "out": {"kernel": P(("fsdp", "tensor")), "bias": P()},
}
LAYERS_APART = {
    "layers": {"up": P("tensor", "fsdp"), "down": P("tensor"), "scale": P()},
    "out": {"kernel": P(None, ("tensor", "fsdp")), "bias": P("fsdp")},
}
PARAM_SPECS = {
    "fsdp x tensor": FSDP_AND_TENSOR,
    "fsdp": FSDP_ONLY,
    "layers apart": LAYERS_APART,
}


class Problem(NamedTuple):
    """Least squares with a weight per entry: gradients of full rank, the same on any mesh."""

    params: dict
    targets: dict
    weights: dict

    def loss(self, params: dict) -> jax.Array:
        term = lambda p, t, w: jnp.sum(w * (p - t) ** 2)
        return optax.tree.sum(jax.tree.map(term, params, self.targets, self.weights))


@pytest.fixture(scope="module")
def problem() -> Problem:
    rng = np.random.default_rng(0)

    def draw(transform):
        return jax.tree.map(
            lambda shape: transform(rng.normal(size=shape)).astype(np.float32),
            SHAPES,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    return Problem(draw(lambda x: 0.1 * x), draw(lambda x: x), draw(np.exp))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request) -> Mesh:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(request.param,) * 2)


@pytest.fixture(params=PARAM_SPECS, ids=lambda name: name.replace(" ", "_"))
def param_specs(request) -> dict:
    return PARAM_SPECS[request.param]


def optimizer() -> optax.GradientTransformationExtraArgs:
    return om.moma(
        1e-2,
        rank=RANK,
        min_dim_size_to_factor=32,
        weight_decay=0.1,
        orthogonal_block_size=8,  # to these matrices what 128 is to those of a model 1,024 wide
    )


def place(tree, specs, mesh: Mesh):
    return jax.tree.map(
        lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)),
        specs,
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )


def step(tx, problem: Problem, params, state):
    updates, state = tx.update(jax.grad(problem.loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def on_mesh(problem: Problem, param_specs, mesh: Mesh) -> tuple[Problem, optax.OptState]:
    """The problem and the state of its optimizer, each leaf placed by its spec."""
    tx = optimizer()
    state_specs = om.state_partition_specs(tx, problem.params, param_specs)
    placed = Problem(*(place(tree, param_specs, mesh) for tree in problem))
    return placed, place(tx.init(problem.params), state_specs, mesh)


def assert_lies_as(tree, specs, mesh: Mesh):
    spec_of = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    assert len(leaves) == len(spec_of)
    for (path, leaf), spec in zip(leaves, spec_of, strict=True):
        wanted = NamedSharding(mesh, spec)
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (
            jax.tree_util.keystr(path), leaf.shape, leaf.sharding, spec
        )  # fmt: skip


@pytest.fixture(scope="module")
def alone(problem: Problem) -> dict:
    """The parameters after five steps on one device."""
    tx = optimizer()
    one_step = jax.jit(lambda params, state: step(tx, problem, params, state))
    params, state = problem.params, tx.init(problem.params)
    for _ in range(5):
        params, state = one_step(params, state)
    return params


def assert_same_params(params, alone):
    for p, q in zip(jax.tree.leaves(alone), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(q, p, rtol=0, atol=1e-5 * np.abs(p).max())


def test_five_steps_equal_one_device_and_only_thin_arrays_travel(problem, alone, param_specs, mesh):
    """Everything stays where it is. The update communicates thin factors and sums over them, never
    (a part of) a gradient; the gradient of this loss communicates nothing.
    """
    tx = optimizer()
    placed, state = on_mesh(problem, param_specs, mesh)
    params = placed.params
    with jax.set_mesh(mesh):
        one_step = jax.jit(lambda params, state: step(tx, placed, params, state))
        compiled = one_step.lower(params, state).compile()
        for _ in range(5):
            params, state = compiled(params, state)

    assert_same_params(params, alone)
    assert_lies_as(params, param_specs, mesh)
    assert_lies_as(state, om.state_partition_specs(tx, problem.params, param_specs), mesh)
    assert_thin(collectives(compiled.as_text()))


def test_specs_have_the_structure_of_the_state(problem):
    specs = om.state_partition_specs(optimizer(), problem.params, FSDP_AND_TENSOR)
    structure = jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P))
    assert structure == jax.tree.structure(jax.eval_shape(optimizer().init, problem.params))


def test_specs_do_not_depend_on_the_mesh_around(problem, mesh):
    tx = optimizer()
    outside = om.state_partition_specs(tx, problem.params, FSDP_AND_TENSOR)
    with jax.set_mesh(mesh):
        assert om.state_partition_specs(tx, problem.params, FSDP_AND_TENSOR) == outside


def test_specs_are_what_init_gives_on_an_explicit_mesh(problem, param_specs):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    tx = optimizer()
    specs = om.state_partition_specs(tx, problem.params, param_specs)
    with jax.set_mesh(mesh):
        params = place(problem.params, param_specs, mesh)
        assert_lies_as(tx.init(params), specs, mesh)
        assert_lies_as(jax.jit(tx.init)(params), specs, mesh)


COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-gather|all-reduce|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, elements of its largest result) of every collective in a compiled program's text."""
    found = []
    for match in COLLECTIVE.finditer(hlo):
        shapes = re.findall(r"\w+\[([\d,]*)\]", match["result"])
        sizes = [math.prod(int(d) for d in shape.split(",") if d) for shape in shapes]
        found.append((match["kind"], max(sizes)))
    return found


def assert_thin(found: list[tuple[str, int]]):
    """A device holds LAYERS x WIDTH x HIDDEN / 8 = 2048 entries of a gradient."""
    most = LAYERS * HIDDEN * RANK
    assert found
    assert max(size for _, size in found) <= most < LAYERS * WIDTH * HIDDEN // 8, found


def test_the_reader_of_collectives_sees_a_gathered_matrix(mesh):
    rows = NamedSharding(mesh, P("fsdp", "tensor"))
    whole = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.float32, sharding=rows)
    gather = jax.jit(lambda x: jax.sharding.reshard(x, whole))
    if mesh.axis_types[0] == AxisType.Auto:
        gather = jax.jit(lambda x: x, out_shardings=whole)
    with jax.set_mesh(mesh):
        kinds = collectives(gather.lower(x).compile().as_text())
    assert max(size for _, size in kinds) == WIDTH * HIDDEN


def laid(tree, specs, mesh: Mesh):
    """The same values, moved inside a program to where the specs say."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if mesh.axis_types[0] == AxisType.Explicit:
        return jax.tree.map(jax.sharding.reshard, tree, shardings)
    return jax.lax.with_sharding_constraint(tree, shardings)


def test_a_spread_state_takes_equal_steps_and_only_thin_arrays_travel(
    problem, alone, param_specs, mesh
):
    """Between two steps a device holds as small a share of the factors as of their parameter."""
    tx = optimizer()
    at_work = om.state_partition_specs(tx, problem.params, param_specs)
    at_rest = om.state_partition_specs(tx, problem.params, param_specs, spread_over=mesh)
    placed = Problem(*(place(tree, param_specs, mesh) for tree in problem))
    params, state = placed.params, place(tx.init(problem.params), at_rest, mesh)

    def one_step(params, state):
        params, state = step(tx, placed, params, laid(state, at_work, mesh))
        return params, laid(laid(state, at_work, mesh), at_rest, mesh)

    with jax.set_mesh(mesh):
        compiled = jax.jit(one_step).lower(params, state).compile()
        for _ in range(5):
            params, state = compiled(params, state)

    assert_same_params(params, alone)
    assert_lies_as(state, at_rest, mesh)
    for room, name in (("layers", "up"), ("layers", "down"), ("out", "kernel")):
        lies = NamedSharding(mesh, param_specs[room][name])
        devices = math.prod(SHAPES[room][name]) // math.prod(lies.shard_shape(SHAPES[room][name]))
        for field in ("U", "V", "R", "C"):
            x = getattr(state[0], field)[room][name]
            assert x.addressable_shards[0].data.size * devices == x.size
    assert_thin(collectives(compiled.as_text()))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "optax-moma[tpu]"',
)
def test_a_tpu_slice_only_sums_thin_arrays():
    """Compiled ahead of time for v5e:2x4, by the real compiler, which needs no TPU."""
    # In a process of its own: libtpu reads the environment when it is loaded.
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    worker = Path(__file__).parent.parent / "sharding_worker_tpu.py"
    done = subprocess.run(
        [sys.executable, worker], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = collectives(done.stdout)
    assert {kind for kind, _ in found} == {"all-reduce"}, found
    assert max(size for _, size in found) <= 2 * 1024 * 16, found  # (stacked, n, rank)
