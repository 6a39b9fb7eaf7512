"""The optimizers inside Optax's wrappers and JAX's transformations, against the bare optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import optax_moma as om


def assert_close(actual, desired, rtol=1e-5):
    """Every leaf agrees to `rtol` of its own largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        np.testing.assert_allclose(a, d, rtol=0, atol=rtol * max(np.abs(d).max(), 1e-30))


def assert_equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, d in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == d.dtype
        np.testing.assert_array_equal(a, d)


def test_masked_updates_only_the_marked_leaves(make, params, grads, run, bare):
    mask = {name: name != "bias" for name in params}
    moved, _ = run(optax.masked(make(), mask), params, grads)
    untransformed = params["bias"] + sum(g["bias"] for g in grads)
    assert_close(moved, bare[0] | {"bias": untransformed})


def test_partition_keeps_the_parts_apart(make, params, grads, run, bare):
    labels = {name: "ours" if name == "kernel" else "sgd" for name in params}
    tx = optax.partition({"ours": make(), "sgd": optax.sgd(0.1)}, labels)
    together, _ = run(tx, params, grads)
    sgd, _ = run(optax.sgd(0.1), params, grads)
    assert_close(together, sgd | {"kernel": bare[0]["kernel"]})


def test_multi_steps_is_the_step_on_the_mean_gradient(make, params, grads, run):
    tx = optax.MultiSteps(make(), every_k_schedule=2).gradient_transformation()
    accumulated, state = run(tx, params, grads)
    mean = [jax.tree.map(lambda a, b: (a + b) / 2, *grads[i : i + 2]) for i in (0, 2)]
    direct, inner_state = run(make(), params, mean)
    assert_close(accumulated, direct, rtol=1e-4)
    assert jax.tree.structure(state.inner_opt_state) == jax.tree.structure(inner_state)


def test_multi_steps_rests_between(make, params, grads):
    tx = optax.MultiSteps(make(), every_k_schedule=2).gradient_transformation()
    updates, _ = jax.jit(tx.update)(grads[0], tx.init(params), params)
    assert_equal(updates, optax.tree.zeros_like(params))


INJECTED = {
    "moma": (
        om.moma,
        ("rank", "min_dim_size_to_factor", "orthogonal_block_size"),
        {"min_dim_size_to_factor": 8},
    ),
    "umtam": (om.umtam, ("rank",), {}),
}


@pytest.mark.parametrize("name", INJECTED)
def test_hyperparameters_can_be_injected_and_changed(name, params, grads, run):
    factory, static, settings = INJECTED[name]
    injected = optax.inject_hyperparams(factory, static_args=static)
    tx = injected(learning_rate=1e-2, rank=4, b1=0.8, b2=0.95, **settings)
    bare = factory(1e-2, 4, 0.8, 0.95, **settings)
    moved, state = run(tx, params, grads)
    direct, _ = run(bare, params, grads)
    assert_close(moved, direct)
    assert not set(static) & set(state.hyperparams)

    update = jax.jit(tx.update)
    before, _ = update(grads[0], state, moved)
    state.hyperparams["learning_rate"] = jnp.asarray(3e-2)
    after, _ = update(grads[0], state, moved)
    assert_close(after, jax.tree.map(lambda u: 3 * u, before))


@pytest.mark.parametrize("name", INJECTED)
def test_hyperparameters_can_be_schedules(name, params, grads, run):
    factory, static, settings = INJECTED[name]
    rate = optax.linear_schedule(1e-2, 1e-3, 4)
    injected = optax.inject_hyperparams(factory, static_args=static)
    kernel, steps = params["kernel"], [g["kernel"] for g in grads]
    through_injection, _ = run(injected(learning_rate=rate, rank=4, **settings), kernel, steps)
    through_argument, _ = run(factory(rate, rank=4, **settings), kernel, steps)
    assert_close(through_injection, through_argument)


@pytest.mark.parametrize("name", INJECTED)
def test_hyperparameters_of_bfloat16_gradients(name, params, grads, run):
    """Injected numbers take the gradients' type, where b2 = 0.999 is 1 and nothing trains."""
    factory, static, settings = INJECTED[name]
    low, *steps = jax.tree.map(lambda x: x.astype(jnp.bfloat16), [params, *grads])
    plain = optax.inject_hyperparams(factory, static_args=static)
    with pytest.raises(TypeError, match=r"b1 must not be a bfloat16.*hyperparam_dtype=jnp.float32"):
        plain(learning_rate=1e-2, rank=4, **settings).init(low)
    wide = optax.inject_hyperparams(
        factory, static_args=static, hyperparam_dtype=jnp.dtype("float32")
    )
    # Parameters that are wide tell the small steps; those are rounded to bfloat16.
    move = lambda tx: jax.tree.map(jnp.subtract, run(tx, params, steps)[0], params)
    moved = move(wide(learning_rate=1e-2, rank=4, **settings))
    assert_close(moved, move(factory(1e-2, rank=4, **settings)), rtol=0.01)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(moved))


def test_apply_if_finite_skips_a_bad_step(make, params, grads, run):
    tx = optax.apply_if_finite(make(), max_consecutive_errors=3)
    bad = grads[1] | {"kernel": grads[1]["kernel"].at[0, 0].set(jnp.nan)}
    with_bad, _ = run(tx, params, [grads[0], bad, grads[2]])
    without, _ = run(make(), params, [grads[0], grads[2]])
    assert_close(with_bad, without)


def test_flatten_runs_it_as_one_vector(make, params, grads, run):
    flat, _ = run(optax.flatten(make()), params, grads)
    ravel = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    vector, _ = run(make(), ravel(params), [ravel(g) for g in grads])
    np.testing.assert_allclose(ravel(flat), vector, rtol=1e-5)


def test_frozen_leaves_stay(make, params, grads, run, bare):
    frozen = {name: name == "bias" for name in params}
    moved, _ = run(optax.chain(make(), optax.transforms.freeze(frozen)), params, grads)
    assert_close(moved, bare[0] | {"bias": params["bias"]})


def test_chain_with_clipping(make, params, grads, run):
    tx = optax.chain(optax.clip_by_global_norm(0.1), make())
    clipped = [jax.tree.map(lambda x, g=g: x * 0.1 / optax.tree.norm(g), g) for g in grads]
    chained, _ = run(tx, params, grads)
    by_hand, _ = run(make(), params, clipped)
    assert_close(chained, by_hand, rtol=1e-4)


def test_scan_is_the_loop(make, params, grads, bare):
    tx = make()

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
    assert_close(scanned, bare[0])


def test_vmap_is_the_loop_over_models(make, params, grads, run):
    tx = make()
    models = [params, jax.tree.map(lambda p: -2 * p, params), jax.tree.map(jnp.square, params)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)

    @jax.jit
    @jax.vmap
    def two_steps(params, first, second):
        state = tx.init(params)
        for g in (first, second):
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params

    moved = two_steps(stack(models), stack(grads[:3]), stack(grads[1:]))
    for i in (0, 2):
        alone, _ = run(tx, models[i], [grads[i], grads[i + 1]])
        assert_close(jax.tree.map(lambda x, i=i: x[i], moved), alone)


def test_cond_carries_the_state(make, params, grads):
    tx = make()

    @jax.jit
    def maybe(go, g, state, params):
        skip = lambda: (optax.tree.zeros_like(g), state)
        return jax.lax.cond(go, lambda: tx.update(g, state, params), skip)

    state = tx.init(params)
    _, kept = maybe(False, grads[0], state, params)
    assert_equal(kept, state)
    updates, _ = maybe(True, grads[0], state, params)
    assert_close(updates, jax.jit(tx.update)(grads[0], state, params)[0])


def test_donated_buffers_are_reused(make, params, grads, bare):
    tx = make()

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, params)
    state = tx.init(params)
    for g in grads:
        old_params, old_state = params, state
        params, state = step(params, state, g)
        assert all(x.is_deleted() for x in jax.tree.leaves((old_params, old_state)))
    assert_close(params, bare[0])


def test_map_params_reaches_each_state_leaf_once(make, params):
    tx = make()
    state = tx.init(params)
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(state), strict=True)
    number = jax.tree.unflatten(jax.tree.structure(state), range(len(leaves)))
    of_params, of_others = [], []

    def note(seen):
        return lambda i: (seen.append(i), i)[1]

    optax.tree.map_params(tx, note(of_params), number, transform_non_params=note(of_others))
    assert sorted(of_params + of_others) == list(range(len(leaves)))
    counts = {i for i, path in enumerate(paths) if ".count" in jax.tree_util.keystr(path)}
    assert counts and counts <= set(of_others)
    # The first moment of a leaf without a matrix has the leaf's own shape, and is reached.
    assert {params["bias"].shape} <= {leaves[i].shape for i in of_params}


def test_map_params_with_dimension_numbers_as_a_tree(params):
    """It runs init on a placeholder without leaves, which no tree of numbers is like."""
    numbers = jax.tree.map(lambda p: Axes(-2, -1) if p.ndim > 1 else None, params)
    tx = om.moma(1e-2, 2, min_dim_size_to_factor=8, weight_dimension_numbers=numbers)
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert_equal(same, state)


@pytest.mark.parametrize("empty", [{}, [], {"a": {}, "b": None}])
def test_trees_without_leaves(make, empty):
    tx = make()
    updates, state = jax.jit(tx.update)(empty, tx.init(empty), empty)
    assert updates == empty
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(empty))


def test_a_leaf_without_a_gradient_stays(make, params, grads):
    """Optax allows None for the gradient of a leaf; its update is None."""
    tx = make()
    state = tx.init(params)
    update = jax.jit(tx.update)
    whole, _ = update(grads[0], state, params)
    for absent, present in (("kernel", "bias"), ("bias", "kernel")):
        updates, new_state = update(grads[0] | {absent: None}, state, params)
        assert updates[absent] is None
        assert_close(updates[present], whole[present])
        assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_init_needs_shapes_only(make, params):
    tx = make()
    params = params | {"stack": jnp.ones((3, 8, 16), jnp.bfloat16)}
    shapes = jax.eval_shape(lambda: params)
    type_of = lambda x: (jnp.shape(x), jnp.result_type(x))
    from_shapes = jax.tree.map(type_of, tx.init(shapes))
    assert from_shapes == jax.tree.map(type_of, tx.init(params))
    assert from_shapes == jax.tree.map(type_of, jax.eval_shape(tx.init, shapes))


def test_state_can_be_saved_and_carried(make, params, bare):
    """No zero-size array (Orbax refuses them), no Python number, no weak type, no drift."""
    state, later = make().init(params), bare[1]
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array) and leaf.size > 0 and not leaf.weak_type
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, later)


def test_update_compiles_once(make, params, grads):
    tx = make()
    update = jax.jit(tx.update)
    state = tx.init(params)
    for g in grads:
        _, state = update(g, state, params)
    assert update._cache_size() == 1


def test_unknown_extra_arguments_are_ignored(make, params, grads):
    tx = make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    update = jax.jit(tx.update)
    with_extra, _ = update(grads[0], state, params, value=jnp.float32(1.0), loss_scale=2)
    assert_equal(with_extra, update(grads[0], state, params)[0])


def test_params_may_be_a_bare_array_a_list_or_a_tuple(make, params, grads, run):
    """At full rank, where the start of the subspace, drawn by the leaf's path, cannot matter."""
    tx = make(rank=8, clipped=False)  # clipping goes by the columns of U, which depend on the start
    kernel, steps = params["kernel"], [g["kernel"] for g in grads]
    moved, _ = run(tx, kernel, steps)
    for box in (lambda x: [x], lambda x: {"deep": (x,)}):
        boxed, _ = run(tx, box(kernel), [box(g) for g in steps])
        assert_close(boxed, box(moved))
