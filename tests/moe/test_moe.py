"""Layers that merge experts: against loops in NumPy, dense Kronecker products, and each other."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_moma as om

nnx = pytest.importorskip("flax.nnx")

from optax_moma.moe import (  # noqa: E402
    Dense,
    ExpertWeights,
    KroneckerMetric,
    MergedLinear,
    MergedMLP,
    Router,
    SparseMLP,
    fold,
    metric_from_curvature,
    upcycle,
)

E, M, N, HIDDEN = 3, 6, 8, 4
METHODS = ("soft", "domain", "ties", "dare")


def rngs():
    return nnx.Rngs(0)


def shaken(module, size: float = 0.5):
    """The module with every parameter moved at random, so that nothing is zero or the identity."""
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(7)
    moved = [jnp.asarray(x + size * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return nnx.merge(graph, treedef.unflatten(moved))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def wide(x) -> np.ndarray:
    return np.asarray(x[...], np.float64)


def metric_in_numpy(metric, delta: np.ndarray) -> np.ndarray:
    """By dense Kronecker products."""
    A, B, C, D = (wide(f) for f in (metric.A, metric.B, metric.C, metric.D))
    return np.stack(
        [
            sum(
                np.kron(A[e, k], B[e, k]) @ t @ np.kron(C[e, k], D[e, k]).T
                for k in range(A.shape[1])
            )
            for e, t in enumerate(delta)
        ]
    )


# The metric


@pytest.mark.parametrize("shape", [(6, 8), (4, 15)])
def test_metric_is_a_sum_of_kronecker_products(shape):
    metric = shaken(KroneckerMetric(E, *shape, rank=3, rngs=rngs()))
    delta = draw(E, *shape)
    want = metric_in_numpy(metric, wide(delta))
    np.testing.assert_allclose(metric(delta), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_metric_starts_as_the_identity_and_every_term_learns_something_else():
    metric = KroneckerMetric(E, M, N, rank=4, rngs=rngs())
    delta, target = draw(E, M, N), draw(E, M, N, seed=1)
    np.testing.assert_array_equal(metric(delta), delta)
    grads = nnx.jit(nnx.grad(lambda metric: jnp.sum((metric(delta) - target) ** 2)))(metric)
    A = wide(grads["A"])
    assert np.all(np.abs(A).max(axis=(0, 2, 3)) > 0.1)
    for k, l in itertools.combinations(range(4), 2):
        assert np.abs(A[:, k] - A[:, l]).max() > 0.1


def test_memory_of_a_metric_does_not_grow_with_its_rank():
    """Of a gradient's temporaries: terms are worked off one by one."""

    def temporaries(rank):
        metric = KroneckerMetric(E, 48, 64, rank=rank, rngs=rngs())
        graph, state = nnx.split(metric)
        loss = lambda state, delta: jnp.sum(nnx.merge(graph, state)(delta) ** 2)
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = grad.lower(state, draw(E, 48, 64)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    factors = 4 * E * (6**2 + 8**2 + 8**2 + 8**2)  # bytes of one more term
    assert temporaries(8) - temporaries(2) <= 6 * 4 * factors
    assert temporaries(2) < 8 * 4 * E * 48 * 64


@pytest.mark.parametrize("shape", [(7, 8), (8, 13), (1, 4)])
def test_shapes_that_do_not_factor(shape):
    with pytest.raises(ValueError, match=r"the fan-(in|out) of \d+ does not factor.*rank=None"):
        KroneckerMetric(E, *shape, rank=1, rngs=rngs())
    ExpertWeights(*shape, E, rank=None, rngs=rngs())


def curvatures(m: int = 6, n: int = 8) -> list:
    rng = np.random.default_rng(0)
    sums = [(rng.lognormal(size=(m, 1)), rng.lognormal(size=(1, n))) for _ in range(E)]
    return [om.Factored(jnp.asarray(r, jnp.float32), jnp.asarray(c, jnp.float32)) for r, c in sums]


@pytest.mark.parametrize("power", [-0.5, 0.5])
def test_metric_from_curvature_of_whole_rank_is_its_power(power):
    given = curvatures()
    metric = metric_from_curvature(given, rank=2 * 2, power=power)
    delta = draw(E, 6, 8)
    for v, found, t in zip(given, metric(delta), delta, strict=True):
        factor = (np.float64(v.row) * v.col) ** power
        np.testing.assert_allclose(found, factor / factor.mean() * t, rtol=1e-4)


def test_metric_from_curvature_of_lower_rank_is_the_closest():
    """The singular values of both vectors' matrices, multiplied, sorted, and cut off."""
    v = curvatures(6, 16)[0]
    whole = np.float64(metric_from_curvature([v], rank=8)(jnp.ones((1, 6, 16)))[0])
    row, col = whole[:, 0].reshape(2, 3), whole[0].reshape(4, 4)
    row, col = (np.linalg.svd(x, compute_uv=False) for x in (row, col))
    spectrum = np.multiply.outer(row, col) / whole[0, 0]
    for rank in (1, 3):
        cut = np.float64(metric_from_curvature([v], rank=rank)(jnp.ones((1, 6, 16)))[0])
        lost = np.sort(spectrum.ravel())[::-1][rank:]
        np.testing.assert_allclose(np.linalg.norm(whole - cut), np.linalg.norm(lost), rtol=1e-3)


def test_metric_from_curvature_ignores_scale_and_dead_rows():
    v = curvatures()[0]
    tiny = om.Factored(v.row, v.col * 1e-18)
    ones = jnp.ones((1, 6, 8))
    found = metric_from_curvature([v], 4)(ones)
    np.testing.assert_allclose(metric_from_curvature([tiny], 4)(ones), found, rtol=1e-4)
    dead = om.Factored(jnp.ones((6, 1)).at[2].set(0), jnp.ones((1, 8)))
    live = metric_from_curvature([dead], 4, power=-0.5)(ones)
    assert jnp.all(jnp.isfinite(live)) and jnp.all(live[0, 2] > 0)
    nothing = om.Factored(jnp.zeros((6, 1)), jnp.zeros((1, 8)))
    np.testing.assert_allclose(metric_from_curvature([nothing])(ones), ones, rtol=1e-5)


def test_metric_from_curvature_of_a_trained_layer():
    """From moma's state of three experts into a layer."""
    tx, kernel = om.moma(1e-3, 2, min_dim_size_to_factor=4), draw(M, N)
    found, update = [], jax.jit(tx.update)
    for seed in range(E):
        _, state = update(draw(M, N, seed=seed), tx.init(kernel), kernel)
        found.append(om.curvature_from(state, kernel))
    weights = ExpertWeights(M, N, E, rank=2, rngs=rngs())
    weights.metric = metric_from_curvature(found, rank=2)
    plain = ExpertWeights(M, N, E, rngs=rngs())
    gates = jnp.full((1, E), 1 / E)
    got, want = weights.merged(gates).kernel, plain.merged(gates).kernel
    assert got.shape == (1, M, N) and float(jnp.abs(got - want).max()) > 1e-3


def test_curvatures_that_do_not_fit():
    with pytest.raises(ValueError, match="one Factored per expert"):
        metric_from_curvature([jnp.ones((6, 8))])
    with pytest.raises(ValueError, match="of one shape"):
        metric_from_curvature([*curvatures(6, 8), *curvatures(8, 6)])
    with pytest.raises(ValueError, match="does not factor"):
        metric_from_curvature(curvatures(7, 8))


# Merging


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("method", METHODS)
def test_layer_is_its_formula(method, rank):
    scale = 1.0 if method == "soft" else 0.7
    weights = shaken(ExpertWeights(M, N, E, method=method, scale=scale, rank=rank, rngs=rngs()))
    gates, x = jax.nn.softmax(draw(5, E)), draw(5, 2, M, seed=1)
    W, b = wide(weights.kernels), wide(weights.biases)
    soft = method == "soft"
    W0, b0 = (W.mean(0), b.mean(0)) if soft else (wide(weights.base), wide(weights.base_bias))
    t, u = W - W0, b - b0
    step = t if rank is None else metric_in_numpy(weights.metric, t)
    bias_step = u
    if method == "ties":
        step = step * (np.sign(t) == np.sign(t.sum(0)))
        bias_step = u * (np.sign(u) == np.sign(u.sum(0)))
        assert 0 < np.mean(step == 0) < 1
    want = []
    for s, tokens in zip(wide(gates), wide(x), strict=True):
        kernel = W0 + scale * sum(s[e] * step[e] for e in range(E))
        want.append(tokens @ kernel + b0 + scale * sum(s[e] * bias_step[e] for e in range(E)))
    np.testing.assert_allclose(weights(x, gates), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_fresh_metric_gives_the_euclidean_merge(method):
    gates = jax.nn.softmax(draw(5, E))
    with_metric, without = (
        ExpertWeights(M, N, E, method=method, rank=rank, rngs=rngs()).merged(gates)
        for rank in (3, None)
    )
    np.testing.assert_allclose(with_metric.kernel, without.kernel, rtol=1e-5, atol=1e-6)


def test_domain_of_scale_one_is_soft_merging():
    domain, soft = (
        ExpertWeights(M, N, E, method=method, rngs=rngs()) for method in ("domain", "soft")
    )
    domain.base[...] = draw(M, N, seed=5)  # any base: it cancels out
    gates, x = jax.nn.softmax(draw(4, E)), draw(4, 2, M)
    np.testing.assert_allclose(domain(x, gates), soft(x, gates), rtol=1e-4, atol=1e-5)


def test_dare_drops_entries_in_training_only():
    weights = ExpertWeights(40, 50, E, method="dare", drop=0.25, rngs=rngs())
    start = Dense(weights.base[...], weights.base_bias[...])
    whole = weights.steps(start).kernel
    dropped = weights.steps(start, jax.random.key(0)).kernel
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped, np.where(kept, whole / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.02
    assert np.all(np.abs(kept.mean((0, 1)) - 0.75) < 0.25)  # entries, not channels


def test_starts_as_one_dense_layer():
    weights = ExpertWeights(M, N, E, rank=2, rngs=rngs())
    merged = weights.merged(jnp.full(E, 1 / E))
    np.testing.assert_allclose(merged.kernel, weights.base[...], atol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(weights.kernels[0], weights.kernels[1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 2])
def test_folded_equals_unfolded(method, rank):
    scale = 1.0 if method == "soft" else 0.7
    kwargs = {"method": method, "scale": scale, "rank": rank, "segment": 2}
    mlp = shaken(MergedMLP(M, N, E, **kwargs, rngs=rngs()))
    x = draw(3, 6, M)
    want, routing = mlp(x)
    served = fold(nnx.Dict(inner=mlp))["inner"]  # found wherever it lies
    assert served.up.metric is None and (rank is None) == (mlp.up.metric is None)
    got, again = served(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(again.gates, routing.gates)
    assert all(size > 0 for size in jax.tree.leaves(jax.tree.map(jnp.size, nnx.state(served))))


# One base for all layers


def test_shared_base_passes_through_the_layers():
    layers = [
        shaken(MergedMLP(M, N, E, rank=2, scale=0.5, own_base=False, rngs=nnx.Rngs(i)))
        for i in (0, 1)
    ]
    assert all(layer.up.base is None and layer.up.base_bias is None for layer in layers)
    base = (Dense(draw(M, N), draw(N)), Dense(draw(N, M), draw(M)))
    up = layers[0].up
    after = wide(base[0].kernel) + 0.5 / E * metric_in_numpy(
        up.metric, wide(up.kernels) - wide(base[0].kernel)
    ).sum(0)
    second = layers[0].propagated(base)
    np.testing.assert_allclose(second[0].kernel, after, rtol=1e-4, atol=1e-4)
    x = draw(2, 5, M)
    want = layers[1](layers[0](x, base=base)[0], base=second)[0]
    layers[0].up.fold(base[0])
    layers[0].down.fold(base[1])
    np.testing.assert_allclose(layers[0].propagated(base)[0].kernel, after, rtol=1e-4, atol=1e-4)
    found = layers[1](layers[0](x, base=base)[0], base=layers[0].propagated(base))[0]
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))


def test_a_base_too_many_or_too_few():
    gates, x = jnp.full((1, E), 1 / E), draw(1, 2, M)
    own, none = (ExpertWeights(M, N, E, own_base=own, rngs=rngs()) for own in (True, False))
    soft = ExpertWeights(M, N, E, method="soft", rngs=rngs())
    for weights in (own, soft):
        with pytest.raises(ValueError, match="soft merging, or to a layer that has its own"):
            weights(x, gates, base=Dense(draw(M, N), draw(N)))
    with pytest.raises(ValueError, match="no base of its own"):
        none(x, gates)
    with pytest.raises(ValueError, match="no base of its own"):
        fold(nnx.Dict(layer=none))
    for base in (Dense(draw(N, M), draw(N)), Dense(draw(M, N))):
        with pytest.raises(ValueError, match="layers that share a base must be of one shape"):
            none(x, gates, base=base)


# Routing


def test_causal_segments():
    """What changes in segment n + 1 changes no output up to n, to the bit, and later ones do."""
    mlp = shaken(MergedMLP(M, N, E, segment=4, method="ties", rank=2, rngs=rngs()))
    x = draw(2, 16, M)
    y, routing = mlp(x)
    for n in range(4):
        z, after = mlp(x.at[:, 4 * n :].add(draw(2, 16 - 4 * n, M, seed=1)))
        np.testing.assert_array_equal(z[:, : 4 * n], y[:, : 4 * n])
        np.testing.assert_array_equal(after.gates[:, : n + 1], routing.gates[:, : n + 1])
        assert jnp.all(jnp.any(z[:, 4 * n :] != y[:, 4 * n :], axis=-1))
        assert n == 3 or jnp.all(after.gates[:, n + 1] != routing.gates[:, n + 1])
    np.testing.assert_allclose(routing.gates[:, 0], 1 / E, rtol=1e-6)


def test_segments_are_routed_by_the_mean_of_the_one_before():
    mlp = shaken(MergedMLP(M, N, E, segment=4, first="own", rngs=rngs()))
    x = draw(2, 12, M)
    means = x.reshape(2, 3, 4, M).mean(2)
    gates = mlp(x)[1].gates
    np.testing.assert_allclose(gates[:, 1:], mlp.router(means[:, :2]).gates, rtol=1e-5)
    np.testing.assert_allclose(gates[:, 0], mlp.router(means[:, 0]).gates, rtol=1e-5)
    first = lambda mlp: jnp.sum(mlp(x)[0][:, :4] ** 2)
    later = lambda mlp: jnp.sum(mlp(x)[0][:, 4:] ** 2)
    assert np.all(wide(nnx.jit(nnx.grad(first))(mlp)["router"]["gate"]) == 0)
    assert np.any(wide(nnx.jit(nnx.grad(later))(mlp)["router"]["gate"]) != 0)


def test_one_segment_alone_has_no_routing_loss():
    y, routing = MergedMLP(M, N, E, segment=4, rngs=rngs())(draw(2, 4, M))
    assert y.shape == (2, 4, M) and routing.loss == 0
    np.testing.assert_allclose(routing.gates, np.full((2, 1, E), 1 / E), rtol=1e-6)


def test_padding_is_not_routed_by():
    layer = shaken(MergedLinear(M, N, E, method="soft", rngs=rngs()))
    x, mask = draw(2, 5, M), jnp.arange(5) < jnp.array([[3], [5]])
    y, routing = layer(x, mask=mask)
    cut, alone = layer(x[:1, :3])
    np.testing.assert_allclose(routing.gates[:1], alone.gates, rtol=1e-5)
    np.testing.assert_allclose(y[:1, :3], cut, rtol=1e-4, atol=1e-5)
    assert jnp.all(jnp.isfinite(layer(x, mask=jnp.zeros((2, 5), bool))[0]))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\)"):
        layer(x, mask=mask[:, :4])


def test_gates_are_the_softmax_of_the_largest_logits():
    router = shaken(Router(M, 5, k=2, rngs=rngs()))
    x = draw(7, M)
    logits = wide(x) @ wide(router.gate)
    for row, found in zip(logits, router(x).gates, strict=True):
        top = np.argsort(row)[-2:]
        want = np.zeros(5)
        want[top] = np.exp(row[top]) / np.exp(row[top]).sum()
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-7)


def test_of_equal_logits_k_are_chosen():
    gates = Router(M, 5, k=2, rngs=rngs())(jnp.zeros((3, M))).gates
    np.testing.assert_array_equal(np.sort(gates), [[0, 0, 0, 0.5, 0.5]] * 3)


def test_loss_is_that_of_importance_and_load():
    router = shaken(Router(M, 5, k=2, rngs=rngs()))
    routing = router(draw(9, M))
    gates = wide(routing.gates)
    cv = lambda total: np.var(total, ddof=1) / total.mean() ** 2
    np.testing.assert_allclose(routing.loss, cv(gates.sum(0)) + cv((gates > 0).sum(0)), rtol=1e-4)
    assert Router(M, 1, rngs=rngs())(draw(9, M)).loss == 0


def test_load_in_training_is_how_often_an_expert_would_be_used():
    """The expected number of units, by drawing one expert's noise anew ten thousand times."""
    router, x = shaken(Router(M, 5, k=2, rngs=rngs())), draw(4, M)
    key = jax.random.key(3)
    clean = wide(x) @ wide(router.gate)
    deviation = np.log1p(np.exp(wide(x) @ wide(router.noise))) + 0.01
    noisy = clean + deviation * np.float64(jax.random.normal(key, (4, 5)))
    rng = np.random.default_rng(0)
    load = np.zeros(5)
    for e in range(5):
        others = np.sort(np.delete(noisy, e, axis=1), axis=1)[:, -2]
        again = clean[:, e] + deviation[:, e] * rng.normal(size=(10_000, 4))
        load[e] = np.mean(again > others, axis=0).sum()
    gates = wide(router(x, key).gates)
    assert np.all((gates > 0).sum(1) == 2)
    cv = lambda total: np.var(total, ddof=1) / total.mean() ** 2
    np.testing.assert_allclose(router(x, key).loss, cv(gates.sum(0)) + cv(load), rtol=0.03)
    assert np.any(wide(nnx.jit(nnx.grad(lambda r: r(x, key).loss))(router)["noise"]) != 0)


# The reference


@pytest.mark.parametrize("k", [1, 2, E])
def test_sparse_experts_mix_outputs(k):
    mlp = shaken(SparseMLP(M, N, E, k=k, rngs=rngs()))
    x = draw(2, 5, M)
    y, routing = mlp(x)
    up, b, down, c = (
        wide(p) for p in (mlp.up.kernels, mlp.up.biases, mlp.down.kernels, mlp.down.biases)
    )
    want = np.zeros((2, 5, M))
    for e in range(E):
        hidden = np.float64(nnx.gelu(jnp.asarray(wide(x) @ up[e] + b[e])))
        want += wide(routing.gates)[..., e, None] * (hidden @ down[e] + c[e])
    np.testing.assert_allclose(y, want, rtol=1e-3, atol=1e-3)
    assert np.all((wide(routing.gates) > 0).sum(-1) == k)


# Upcycling


def test_upcycled_with_even_gates_is_the_dense_layer():
    dense = Dense(draw(M, N), draw(N, seed=1))
    for method in METHODS[:2]:
        weights = ExpertWeights(M, N, E, method=method, rank=2, rngs=rngs())
        upcycle(weights, dense, key=jax.random.key(0), spread=0.3)
        x = draw(1, 4, M)
        y = weights(x, jnp.full((1, E), 1 / E))
        np.testing.assert_allclose(y, x @ dense.kernel + dense.bias, rtol=1e-4, atol=1e-4)
        spread = np.std(wide(weights.kernels) - wide(dense.kernel)) * np.sqrt(E / (E - 1))
        np.testing.assert_allclose(
            spread, 0.3 * np.sqrt(np.mean(wide(dense.kernel) ** 2)), rtol=0.2
        )


def test_upcycled_from_trained_experts():
    dense, experts = Dense(draw(M, N)), [Dense(draw(M, N, seed=i)) for i in range(1, E + 1)]
    weights = ExpertWeights(M, N, E, use_bias=False, scale=0.5, rngs=rngs())
    upcycle(weights, dense, experts)
    merged = weights.merged(jnp.eye(E)).kernel
    for e in range(E):
        np.testing.assert_allclose(
            merged[e], (dense.kernel + experts[e].kernel) / 2, rtol=1e-5, atol=1e-6
        )


def test_upcycling_what_does_not_fit():
    weights = ExpertWeights(M, N, E, rngs=rngs())
    dense = Dense(draw(M, N), draw(N))
    with pytest.raises(ValueError, match="either trained experts, or a key"):
        upcycle(weights, dense)
    with pytest.raises(ValueError, match="the layer has 3 experts, got 2"):
        upcycle(weights, dense, [dense] * 2)
    with pytest.raises(ValueError, match=r"dense has a kernel of shape \(8, 6\)"):
        upcycle(weights, Dense(draw(N, M), draw(N)), key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"experts\[2\] has .* bias of shape None"):
        upcycle(weights, dense, [dense, dense, Dense(draw(M, N))])


# In use


def test_trains_under_jit_and_the_metric_moves():
    mlp = MergedMLP(M, N, E, segment=4, method="dare", rank=2, rngs=rngs())
    optimizer = nnx.Optimizer(mlp, optax.adam(1e-2), wrt=nnx.Param)
    x = draw(8, 8, M)
    target = jnp.roll(x, 1, axis=1) @ draw(M, M, seed=1)
    loss = nnx.jit(lambda mlp: jnp.mean((mlp(x)[0] - target) ** 2))

    @nnx.jit
    def step(mlp, optimizer, key):
        def whole(mlp):
            y, routing = mlp(x, key=key)
            return jnp.mean((y - target) ** 2) + 1e-2 * routing.loss

        optimizer.update(mlp, nnx.grad(whole)(mlp))

    before = loss(mlp)
    for key in jax.random.split(jax.random.key(0), 60):
        step(mlp, optimizer, key)
    assert loss(mlp) < 0.8 * before
    assert float(jnp.abs(mlp.up.metric.A[:, 1]).max()) > 1e-2


def test_states_of_half_precision_stay_so():
    for mlp in (MergedMLP(M, N, E, rank=1, rngs=rngs()), SparseMLP(M, N, E, rngs=rngs())):
        x = draw(2, 4, M)
        y = mlp(x.astype(jnp.bfloat16))[0]
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(y), mlp(x)[0], atol=0.05)


@pytest.mark.parametrize("spec", [P("expert"), P(None, None, "width")], ids=str)
def test_runs_sharded_on_eight_devices(spec):
    """The batch over all devices, experts over two, their widths over four: as on one device."""
    mesh = jax.make_mesh((2, 4), ("expert", "width"), axis_types=(AxisType.Auto,) * 2)
    mlp = shaken(MergedMLP(8, 16, 2, segment=4, method="ties", rank=2, rngs=rngs()), 0.1)
    graph, state = nnx.split(mlp)
    x = draw(8, 8, 8)

    def loss(state, x):
        y, routing = nnx.merge(graph, state)(x)
        return jnp.mean(y**2) + routing.loss

    want, want_grads = jax.jit(jax.value_and_grad(loss))(state, x)
    place = lambda w: jax.device_put(
        w, NamedSharding(mesh, spec if w.ndim == 3 and w.shape[0] == 2 else P())
    )
    placed = jax.tree.map(place, state)
    tokens = jax.device_put(x, NamedSharding(mesh, P(("expert", "width"))))
    found, grads = jax.jit(jax.value_and_grad(loss))(placed, tokens)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-5 * float(jnp.abs(w).max()) + 1e-7)
    assert len(placed["up"]["kernels"][...].sharding.device_set) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertWeights(M, N, E, method="mean", rngs=rngs()), "method must be one of"),
        (lambda: ExpertWeights(M, N, E, method="soft", scale=0.5, rngs=rngs()), "no scale"),
        (lambda: ExpertWeights(M, N, E, drop=1.0, rngs=rngs()), "drop must lie in"),
        (lambda: ExpertWeights(M, N, 0, rngs=rngs()), "experts must be at least 1"),
        (lambda: ExpertWeights(M, N, E, rank=0, rngs=rngs()), "rank must be at least 1"),
        (lambda: Router(M, E, k=4, rngs=rngs()), "k must be at most the number of experts, 3"),
        (lambda: MergedMLP(M, N, E, segment=0, rngs=rngs()), "segment must be at least 1"),
        (lambda: MergedMLP(M, N, E, segment=4, first="none", rngs=rngs()), "first must be"),
        (
            lambda: MergedMLP(M, N, E, segment=4, rngs=rngs())(draw(2, 10, M)),
            "a length of 10 does not divide into segments of 4",
        ),
    ],
)
def test_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_package_does_not_import_flax():
    code = "import sys, optax_moma; assert not {'flax', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
