"""Sharded leaves stay sharded, and merge to the bits of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om
from optax_moma import merging
from optax_moma.merging import fusion_bench, mergekit, peft
from optax_moma.merging._sums import fixed_mean, fixed_sum

METHODS = {
    "average": merging.average(),
    "task arithmetic": merging.task_arithmetic(),
    "ties": merging.ties(0.3),
    "global ties": merging.chain(
        merging.trim(0.3, scope="global"), merging.elect(), merging.mean()
    ),
    "peft ties": peft.ties(0.3),
    "fusion_bench ties": fusion_bench.ties(0.3),
    "dare": merging.dare(0.3),
    "mergekit dare": mergekit.dare_ties(0.4),
    "della": merging.della(0.4),
    "breadcrumbs": merging.breadcrumbs(0.5),
    "fisher": merging.fisher(),
    "ota": merging.ota(),
    "curvature ties": merging.curvature_ties(),
    "curvature ties, power 0.3": merging.curvature_ties(power=0.3),
    "umtam": merging.umtam(0.3),
    "sce": merging.sce(0.5),
    "pcb": merging.pcb(0.3),
    "consensus": merging.chain(merging.consensus(), merging.total()),
    "norm aware": merging.chain(merging.norm_aware(), merging.mean()),
    "slerp": merging.slerp(),
    "karcher": merging.karcher(1),
    "multislerp": merging.multislerp(),
    "model stock": merging.model_stock(),
    "wudi": merging.wudi(),
    "moma": merging.moma(),
    "tsv": merging.tsv_m(),
    "iso": merging.iso_c(),
}
SPECS = (P("x", "y"), P("x"), P(None, ("x", "y")))
# A mesh with its axes in the types goes through other code; not every method needs its own look.
EXPLICIT = (
    "average",
    "ties",
    "global ties",
    "della",
    "fisher",
    "curvature ties",
    "moma",
    "pcb",
    "model stock",
    "tsv",
)


def models(name, shape, factored=False):
    rng = np.random.default_rng(0)
    method = METHODS[name]
    draw = lambda *shape: np.abs(rng.normal(size=shape)).astype(np.float32) ** 3 * 1e-6
    base, *experts = ({"w": rng.normal(size=shape).astype(np.float32)} for _ in range(4))
    experts = experts[: method.contract.max_experts]
    v = None
    if method.contract.curvature:
        m, n = shape
        one = (lambda: om.Factored(draw(m, 1), draw(1, n))) if factored else (lambda: draw(m, n))
        v = [{"w": one()} for _ in experts]
    key = jax.random.key(0) if method.contract.key else None
    return method, experts, {"base": base, "curvature": v, "key": key}


def merged_on_eight(mesh, spec, method, experts, more):
    def put(x):
        axes = (axis if n > 1 else None for axis, n in zip((*spec, None), x.shape, strict=False))
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    inputs = jax.tree.map(put, (experts, more["base"], more["curvature"]))
    with jax.set_mesh(mesh):
        experts, base, v = inputs
        return om.merge(method, experts, base=base, curvature=v, key=more["key"])["w"]


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(n, AxisType.Auto) for n in METHODS] + [(n, AxisType.Explicit) for n in EXPLICIT],
)
def test_bits_of_one_device(name, axis_type):
    method, experts, more = models(name, (40, 48))
    expected = np.asarray(om.merge(method, experts, **more)["w"])
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    for spec in SPECS if name == "curvature ties" else SPECS[:1]:
        found = merged_on_eight(mesh, spec, method, experts, more)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
        assert np.asarray(found).tobytes() == expected.tobytes(), spec


@pytest.mark.parametrize("name", ["fisher", "ota", "curvature ties", "moma", "umtam"])
def test_bits_of_one_device_with_factored_curvature(name):
    method, experts, more = models(name, (128, 136), factored=True)
    expected = np.asarray(om.merge(method, experts, **more)["w"])
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for spec in SPECS[:1]:
        found = merged_on_eight(mesh, spec, method, experts, more)
        assert np.asarray(found).tobytes() == expected.tobytes(), spec


@pytest.mark.parametrize("shape", [(7,), (3000,), (24, 40), (8, 3, 16)])
@pytest.mark.parametrize("kind", ["signed", "skew", "equal", "zero", "one large"])
def test_sums_are_exact_and_the_same_in_any_order(shape, kind):
    rng = np.random.default_rng(1)
    x = {
        "signed": rng.normal(size=shape),
        "skew": np.abs(rng.normal(size=shape)) ** 9 * 1e-18,
        "equal": np.full(shape, 0.1),
        "zero": np.zeros(shape),
        "one large": np.where(np.arange(np.prod(shape)).reshape(shape) == 5, 1.0, 1e-6),
    }[kind].astype(np.float32)
    bound = np.max(np.abs(x))
    total = np.asarray(jax.jit(fixed_sum)(x, bound))
    exact = np.sum(x, dtype=np.float64)
    # A few roundings of the sum itself, and what is below the last digit of the largest term.
    assert abs(total - exact) <= 2.0**-23 * abs(exact) + x.size * bound * 2.0**-56
    rows = np.asarray(fixed_sum(x, bound, [-1]))
    np.testing.assert_allclose(rows, x.sum(-1, dtype=np.float64), rtol=3e-7, atol=1e-9 * bound)
    np.testing.assert_allclose(fixed_mean(x, bound), np.mean(x, dtype=np.float64), rtol=3e-7)
    shuffled = rng.permutation(x.ravel()).reshape(shape)
    assert np.asarray(fixed_sum(shuffled, bound)).tobytes() == total.tobytes()
    # A bound that is too high by far costs nothing visible.
    np.testing.assert_allclose(fixed_sum(x, 1e3 * bound), exact, rtol=3e-7, atol=1e-9 * bound)


def test_sums_of_fixed_bits_are_traced_like_sums():
    x = jnp.arange(6.0).reshape(2, 3)
    grad = jax.grad(lambda x: fixed_sum(x**2, 25.0))(x)
    np.testing.assert_allclose(grad, 2 * x)
    np.testing.assert_array_equal(jax.vmap(lambda r: fixed_sum(r, 5.0))(x), x.sum(1))
    np.testing.assert_array_equal(fixed_sum(x, jnp.array([3.0, 4.0, 5.0]), [0]), x.sum(0))
    assert fixed_sum(jnp.float32(3), 3.0) == 3 and fixed_sum(jnp.zeros((0, 2)), 1.0) == 0
    assert np.isnan(fixed_sum(jnp.array([1.0, jnp.nan]), jnp.nan))
    assert np.isposinf(fixed_sum(jnp.array([1.0, jnp.inf]), jnp.inf))
    with jax.enable_x64(True):
        y = np.random.default_rng(0).normal(size=(50, 60))
        total = fixed_sum(jnp.asarray(y), np.max(np.abs(y)))
        np.testing.assert_allclose(total, y.sum(), rtol=1e-14)
