"""Merges of experts one at a time, against closed forms and the published recursions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_moma._moments import Factored
from optax_moma.merging import (
    MergeError,
    average,
    fisher,
    merge,
    moma,
    opcm,
    perturb_and_merge,
    running_mean,
    running_moma,
    tsv_m,
)

ocp = pytest.importorskip("orbax.checkpoint")

M, N = 6, 4
ALL = {
    "mean": running_mean(power=0),
    "cmm": running_mean(),
    "cmm_mixing": running_mean(0.4),
    "cmm_normalized": running_mean(normalize=True),
    "moma": running_moma(),
    "opcm": opcm(),
    "perturb_and_merge": perturb_and_merge(),
}


def problem(tasks=5, seed=0, shape=(M, N), dtype=np.float32):
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=shape).astype(dtype), "b": rng.normal(size=5).astype(dtype)}
    experts = [
        {n: (x + 0.1 * rng.normal(size=x.shape)).astype(dtype) for n, x in base.items()}
        for _ in range(tasks)
    ]
    curvature = [
        {n: (1e-9 * rng.lognormal(size=x.shape)).astype(dtype) for n, x in base.items()}
        for _ in range(tasks)
    ]
    return base, experts, curvature


def run(method, base, experts, curvature=None):
    state = method.init(base)
    for t, expert in enumerate(experts):
        state = method.update(state, expert, None if curvature is None else curvature[t])
    return method.params(state)


def check(merged, want, rtol=1e-6):
    for name, x in want.items():
        np.testing.assert_allclose(merged[name], x, rtol=rtol, atol=rtol * np.abs(x).max())


def wide(x):
    return np.asarray(x, np.float64)


def deltas(base, experts, name):
    return [wide(e[name]) - wide(base[name]) for e in experts]


@pytest.mark.parametrize("tasks", [1, 2, 12])
@pytest.mark.parametrize("axes", ["mn", "bmn"])
def test_a_running_moma_is_the_merge_at_once(tasks, axes):
    base, experts, curvature = problem(tasks, shape=(M, N) if axes == "mn" else (3, M, N))
    if tasks > 2:  # One did not move a matrix, another has no curvature there.
        experts[1]["w"], curvature[2]["w"] = base["w"], 0 * base["w"]
    numbers = {"scale": 0.7, "power": 0.4, "ridge": 0.05, "axes": axes}
    merged = run(running_moma(**numbers), base, experts, curvature)
    at_once = merge(moma(**numbers), experts, base=base, curvature=curvature)
    check(merged, at_once)
    assert not np.allclose(at_once["w"], merge(average(), experts, base=base)["w"], atol=1e-3)
    without = run(running_moma(power=0, axes=axes), base, experts)
    check(without, merge(moma(power=0, axes=axes), experts, base=base))


@pytest.mark.parametrize("tasks", [1, 2, 12])
def test_a_running_mean_is_the_mean_at_once(tasks):
    base, experts, curvature = problem(tasks)
    for v in curvature:
        v["b"][0] = 0  # Nobody has any: the plain mean.
    curvature[-1]["b"][1] = 0
    merged = run(running_mean(), base, experts, curvature)
    want = {}
    for n in base:
        v = np.stack([wide(c[n]) for c in curvature])
        v = np.where(v.sum(0) == 0, 1, v)
        want[n] = (v * np.stack([wide(e[n]) for e in experts])).sum(0) / v.sum(0)
    check(merged, want)
    check(merged, merge(fisher(), experts, curvature=curvature))
    check(run(running_mean(), base, experts[::-1], curvature[::-1]), merged)
    check(run(running_mean(power=0), base, experts), merge(average(), experts))
    root = run(running_mean(power=0.5), base, experts, curvature)
    v = np.sqrt(np.stack([wide(c["w"]) for c in curvature]))
    w = (v * np.stack([wide(e["w"]) for e in experts])).sum(0) / v.sum(0)
    check(root, {"w": w})


def test_with_a_mixing_rate_the_say_of_a_task_decays():
    base, experts, curvature = problem(6)
    alpha, t = 0.3, 6
    say = np.array([(1 - alpha) ** (t - 1)] + [alpha * (1 - alpha) ** (t - s) for s in range(2, 7)])
    merged = run(running_mean(alpha), base, experts, curvature)
    v = np.stack([s * wide(c["w"]) for s, c in zip(say, curvature, strict=True)])
    x = np.stack([wide(e["w"]) for e in experts])
    check(merged, {"w": (v * x).sum(0) / v.sum(0)})
    plain = run(running_mean(alpha, power=0), base, experts)
    check(plain, {"w": np.einsum("t,tij->ij", say, x)})
    # Without any curvature the same shares hold.
    zeros = [jax.tree.map(np.zeros_like, c) for c in curvature]
    check(run(running_mean(alpha), base, experts, zeros), {"w": plain["w"]})
    check(run(running_mean(1.0), base, experts, curvature), experts[-1])


def test_normalized_curvatures_have_scales_of_their_own():
    base, experts, curvature = problem()
    merged = run(running_mean(normalize=True), base, experts, curvature)
    v = np.stack([wide(c["w"]) / wide(c["w"]).mean() for c in curvature])
    x = np.stack([wide(e["w"]) for e in experts])
    check(merged, {"w": (v * x).sum(0) / v.sum(0)})
    scaled = [jax.tree.map(lambda y, t=t: y * 10.0**t, c) for t, c in enumerate(curvature)]
    check(run(running_mean(normalize=True), base, experts, scaled), merged)


@pytest.mark.parametrize("name", ["cmm", "cmm_mixing", "cmm_normalized", "perturb_and_merge"])
def test_factored_curvature_is_its_product(name):
    base, experts, curvature = problem(4)
    rng = np.random.default_rng(1)
    for c in curvature:
        c["w"] = Factored(rng.lognormal(size=(M, 1)), 1e-12 * rng.lognormal(size=(1, N)))
    dense = [{**c, "w": (c["w"].row * c["w"].col).astype(np.float32)} for c in curvature]
    factored = [{**c, "w": Factored(*(x.astype(np.float32) for x in c["w"]))} for c in curvature]
    check(run(ALL[name], base, experts, factored), run(ALL[name], base, experts, dense), rtol=2e-6)


def published_opcm(d, alpha, matrix):
    """The recursion as published, with full singular vectors, on lists of task vectors by name."""
    merged, scale, norms = {n: x[0] for n, x in d.items()}, 1.0, []
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))
    for t in range(len(d["b"])):
        norms.append(norm({n: x[t] for n, x in d.items()}))
        if t == 0:
            continue
        total = {}
        for n in d:
            new = d[n][t]
            if n in matrix:
                u, s, vt = np.linalg.svd(merged[n])
                p = u.T @ new @ vt.T
                np.fill_diagonal(p, 0)
                q = int(np.argmax(np.cumsum(s) / s.sum() > alpha))
                p[:q, :q] = 0
                new = u @ p @ vt
            total[n] = scale * merged[n] + new
        scale = norm(total) / np.mean(norms)
        merged = {n: x / scale for n, x in total.items()}
    return merged


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_opcm_is_the_published_recursion(shape, alpha):
    base, experts, _ = problem(4, seed=2, shape=shape)
    d = {n: deltas(base, experts, n) for n in base}
    want = published_opcm(d, alpha, {"w"})
    merged = run(opcm(alpha), base, experts)
    check(merged, {n: base[n] + x for n, x in want.items()}, rtol=3e-6)


def test_opcm_keeps_the_first_expert_and_the_norm():
    base, experts, _ = problem(3)
    check(run(opcm(), base, experts[:1]), experts[0])
    merged = run(opcm(), base, experts)
    norm = lambda x: np.sqrt(sum(((wide(x[n]) - base[n]) ** 2).sum() for n in base))
    np.testing.assert_allclose(norm(merged), np.mean([norm(e) for e in experts]), rtol=2e-6)
    # An expert without a change before the others: nothing to project on.
    half = {n: base[n] + x[0] / 2 for n, x in ((n, deltas(base, experts, n)) for n in base)}
    check(run(opcm(), base, [base, experts[0]]), half)
    still = run(opcm(), base, [base, base])
    check(still, base)
    # A stack of layers is projected layer by layer: as two models with one layer, but one norm.
    stack = {"w": np.stack([e["w"] for e in experts[:2]])}
    others = [{"w": np.stack([base["w"], base["w"]])}, stack, {"w": stack["w"][::-1]}]
    merged = run(opcm(axes="bmn"), others[0], others[1:])["w"]
    d = deltas(base, experts[:2], "w")
    totals = []
    for a, b in (d, d[::-1]):
        u, s, vt = np.linalg.svd(a)
        p = u.T @ b @ vt.T
        np.fill_diagonal(p, 0)
        q = int(np.argmax(np.cumsum(s) / s.sum() > 0.5))
        p[:q, :q] = 0
        totals.append(a + u @ p @ vt)
    total = np.stack(totals)
    size = np.sqrt((d[0] ** 2).sum() + (d[1] ** 2).sum())
    check({"w": merged}, {"w": base["w"] + total * size / np.linalg.norm(total)}, rtol=3e-6)


def test_a_direction_the_merge_never_took_is_not_projected_out():
    base = {"w": np.zeros((4, 3), np.float32)}
    one, two = ({"w": np.zeros((4, 3), np.float32)} for _ in range(2))
    one["w"][0, 0] = 1
    two["w"][:] = np.arange(12).reshape(4, 3) + 1
    merged = run(opcm(), base, [one, two])["w"]
    want = two["w"].astype(np.float64)
    want[0, 0] = 1  # The only direction of the merge: it stays as it was.
    norms = 1.0, np.linalg.norm(two["w"])
    np.testing.assert_allclose(merged, want * np.mean(norms) / np.linalg.norm(want), rtol=2e-6)


@pytest.mark.parametrize("units", [1.0, 1e-20, 1e15])
def test_perturb_and_merge_is_the_published_step(units):
    base, experts, curvature = problem(5, seed=3)
    curvature = [{n: np.float32(units) * v for n, v in c.items()} for c in curvature]
    flat = lambda tree: np.concatenate([wide(tree[n]).ravel() for n in ("b", "w")])
    theta, seen = flat(base), []
    for e, c in zip(experts, curvature, strict=True):
        seen.append((flat(e), flat(c)))
        step = flat(e) - theta
        slope = sum(((theta - x) * h) @ step for x, h in seen)
        theta = theta - slope / sum((step * h) @ step for _, h in seen) * step
    merged = run(perturb_and_merge(), base, experts, curvature)
    np.testing.assert_allclose(flat(merged), theta, rtol=2e-6, atol=2e-6)


def test_perturb_and_merge_without_curvature_is_the_mean():
    base, experts, curvature = problem(4)
    zeros = [jax.tree.map(np.zeros_like, c) for c in curvature]
    check(run(perturb_and_merge(), base, experts, zeros), merge(average(), experts))
    check(run(perturb_and_merge(), base, [base, base], zeros), base)


@pytest.mark.parametrize("name", ALL)
def test_one_expert_and_equal_experts_give_that_expert(name):
    base, experts, curvature = problem(2)
    check(run(ALL[name], base, experts[:1], curvature), experts[0])
    check(run(ALL[name], base, []), base)
    if name != "opcm":
        check(run(ALL[name], base, [experts[0]] * 3, [curvature[0]] * 3), experts[0])


@pytest.mark.parametrize("name", ALL)
def test_the_state_does_not_grow_and_survives_jit_scan_and_orbax(name, tmp_path):
    base, experts, curvature = problem(4)
    base = {"layer": base, "steps": np.arange(3), "empty": {}, "none": None, "s": np.float32(1)}
    wrap = lambda x, s: {**base, "layer": x, "s": np.float32(s)}
    experts = [wrap(e, s) for s, e in enumerate(experts)]
    curvature = [
        {"layer": c, "s": np.float32(1e-9), "steps": None, "empty": {}, "none": None}
        for c in curvature
    ]
    method = ALL[name]
    first = method.init(base)
    shapes = lambda s: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), s)
    state, jitted = first, jax.jit(method.init)(base)
    for e, c in zip(experts, curvature, strict=True):
        state, jitted = method.update(state, e, c), jax.jit(method.update)(jitted, e, c)
        assert shapes(state) == shapes(first) == shapes(jitted)
    merged = method.params(state)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_array_equal(merged["steps"], base["steps"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.jit(method.params)(jitted), merged)

    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    body = lambda state, new: (method.update(state, *new), None)
    scanned, _ = jax.lax.scan(body, first, (stack(experts), stack(curvature)))
    jax.tree.map(close, method.params(scanned), merged)

    half = method.init(base)
    for e, c in zip(experts[:2], curvature[:2], strict=True):
        half = method.update(half, e, c)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", half)
        checkpointer.wait_until_finished()
        half = checkpointer.restore(tmp_path / "state", jax.eval_shape(method.init, base))
    for e, c in zip(experts[2:], curvature[2:], strict=True):
        half = method.update(half, e, c)
    jax.tree.map(np.testing.assert_array_equal, method.params(half), merged)


@pytest.mark.parametrize("name", ALL)
def test_low_precision_is_kept_in_float32_and_rounded_once(name):
    base, experts, curvature = problem(7)
    low = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
    base, experts = low(base), [low(e) for e in experts]
    merged = run(ALL[name], base, experts, curvature)
    up = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    exact = run(ALL[name], up(base), [up(e) for e in experts], curvature)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(merged))
    jax.tree.map(np.testing.assert_array_equal, merged, low(exact))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        base, experts, curvature = problem(6, dtype=np.float64)
        base["b"] = base["b"].astype(np.float32)
        for method in (running_mean(), perturb_and_merge()):
            merged = run(method, base, experts, curvature)
            assert merged["w"].dtype == jnp.float64 and merged["b"].dtype == jnp.float32
        v = np.stack([c["w"] for c in curvature])
        x = np.stack([e["w"] for e in experts])
        merged = run(running_mean(), base, experts, curvature)
        check(merged, {"w": (v * x).sum(0) / v.sum(0)}, 1e-14)
        plain = run(running_mean(power=0), base, experts)
        check(plain, {"w": x.mean(0)}, 1e-14)
        d = {n: deltas(base, experts, n) for n in base}
        merged = run(opcm(), base, experts)
        check(merged, {"w": base["w"] + published_opcm(d, 0.5, {"w"})["w"]}, 1e-12)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"expert": {"w": np.zeros((M, N), np.float32)}}, "lacks leaves that the base has: b"),
        ({"expert": {"w": np.zeros((N, M), np.float32), "b": np.zeros(5, np.float32)}}, "w: shape"),
        ({"expert": {"w": np.full((M, N), np.nan), "b": np.zeros(5)}}, "w: 24 values that are not"),
        ({"curvature": None}, "curvature: the method needs one tree per expert"),
        ({"curvature": {"w": np.ones((M, N))}}, "curvature of expert 0 lacks leaves"),
        ({"curvature": {"w": np.ones((N, M)), "b": np.ones(5)}}, "read from another model's"),
        ({"curvature": {"w": np.ones((M, N)), "b": -np.ones(5)}}, "b: 5 values that are negative"),
    ],
)
@pytest.mark.parametrize("name", ["cmm", "perturb_and_merge"])
def test_what_is_wrong_with_an_arrival_is_named(name, change, text):
    base, experts, curvature = problem(1)
    arguments = {"expert": experts[0], "curvature": curvature[0], **change}
    state = ALL[name].init(base)
    with pytest.raises(MergeError, match=text):
        ALL[name].update(state, arguments["expert"], arguments["curvature"])
    if "expert" in change:
        for other in (opcm(), running_mean(power=0)):
            with pytest.raises(MergeError, match=text):
                other.update(other.init(base), arguments["expert"])


def test_arguments_are_checked():
    for make in (
        lambda: running_mean(1.5),
        lambda: running_mean(power=-1),
        lambda: opcm(2.0),
        lambda: opcm(axes="q"),
    ):
        with pytest.raises(ValueError, match="must"):
            make()
    # A method for merge() is something else, and the other way around.
    with pytest.raises(TypeError, match="must be a merge method"):
        merge(running_mean(), [jnp.ones(2)])
    assert not hasattr(tsv_m(), "update")


@pytest.mark.parametrize("name", ALL)
def test_of_nothing(name):
    for nothing in ({}, {"w": np.zeros((0, 3), np.float32)}):
        state = ALL[name].update(ALL[name].init(nothing), nothing, nothing)
        assert jax.tree.map(np.shape, ALL[name].params(state)) == jax.tree.map(np.shape, nothing)
