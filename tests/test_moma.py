"""`moma` against a NumPy transcription of its equations, its identities, and bad input."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import optax_moma as om

SMALL = {"min_dim_size_to_factor": 1}
CLIPPED = SMALL | {"orthogonal_block_size": None}
PLAIN = CLIPPED | {"clip_spectral": np.inf, "clip_rms": np.inf}
RANK_3 = om.scale_by_moma(3, **SMALL)
RULES = {"blocks": RANK_3, "clipped": om.scale_by_moma(3, **CLIPPED)}


def draws(*shape: int, steps: int = 10, seed: int = 0, dtype=np.float32) -> list[np.ndarray]:
    """A mean and noise around it, one array per step."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=shape)
    return [np.asarray(mean + rng.normal(size=shape), dtype) for _ in range(steps)]


@functools.cache
def jitted(tx):
    """One compilation for all the runs of a test with the same optimizer."""
    return jax.jit(lambda g, state: tx.update(g, state, g))


def run(tx, grads, state=None):
    """The updates of every step, and the state at the end; the weights are the gradients."""
    update = jitted(tx)
    state = tx.init(grads[0]) if state is None else state
    trajectory = []
    for g in grads:
        updates, state = update(g, state)
        trajectory.append(updates)
    return trajectory, state


def momentum(state) -> np.ndarray:
    U, s, V = (np.asarray(x, np.float64) for x in (state.U, state.s, state.V))
    return U * s[..., None, :] @ np.swapaxes(V, -1, -2)


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_close(actual, desired, rtol=2e-5, what=""):
    """Relative to the largest entry: of a small one only the absolute error is meaningful."""
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape
    error = np.abs(actual - desired).max() / np.abs(desired).max()
    assert error <= rtol, f"{what}: relative error {error:.2e}"


class Transcript:
    """The equations of the optimizer for one matrix, in float64; QR in place of Cholesky-QR."""

    def __init__(
        self, V, n_rows, *, b1=0.9, b2=0.999, residual=1.0, clip_spectral=1.0, clip_rms=1.0
    ):
        self.V, self.M = np.asarray(V, np.float64), np.zeros((n_rows, len(V)))
        self.b1, self.b2, self.residual = b1, b2, residual
        self.clip_spectral, self.clip_rms = clip_spectral, clip_rms
        self.R, self.C, self.t = np.zeros(n_rows), np.zeros(len(V)), 0

    def preconditioned(self, G):
        self.t += 1
        self.R = self.b2 * self.R + (1 - self.b2) * (G**2).sum(1)
        self.C = self.b2 * self.C + (1 - self.b2) * (G**2).sum(0)
        return G / np.sqrt(np.outer(self.R, self.C) / self.R.sum() / (1 - self.b2**self.t))

    def step(self, G):
        hat = self.preconditioned(np.asarray(G, np.float64))
        target = self.b1 * self.M + (1 - self.b1) * hat
        Q = np.linalg.qr(target @ self.V)[0]
        self.M, self.V = Q @ Q.T @ target, target.T @ Q
        inside = self.M / (1 - self.b1**self.t)
        moved = np.linalg.norm(Q.T @ inside, axis=1, keepdims=True)
        largest = self.clip_spectral * np.sqrt(max(inside.shape))
        inside = Q @ (Q.T @ inside * np.minimum(1, largest / moved))
        delta = inside + self.residual * (hat - Q @ Q.T @ hat)
        return delta * min(1, self.clip_rms / rms(delta))


@pytest.mark.parametrize(
    ("shape", "settings", "x64"),
    [
        ((9, 14), {}, False),
        ((9, 14), {}, True),
        ((14, 9), {"residual": 0.3, "clip_rms": np.inf}, False),
        ((14, 9), {"b1": 0.8, "b2": 0.95, "clip_rms": 0.4}, True),
        ((9, 14), {"clip_spectral": np.inf}, False),
        ((9, 14), {"clip_spectral": 0.3, "clip_rms": np.inf}, False),
    ],
    ids=["clipped", "clipped x64", "no rms", "clipped further x64", "no spectral", "spectral"],
)
def test_ten_steps_are_the_equations(shape, settings, x64):
    rate = optax.linear_schedule(1.0, 0.1, 10)
    rows, cols = np.zeros(shape[0]), np.zeros(shape[1])
    rtol, dtype = (1e-6, np.float64) if x64 else (2e-5, np.float32)  # weights are float32
    with jax.enable_x64(True) if x64 else nullcontext():
        tx = om.scale_by_moma(4, learning_rate=rate, **settings, **CLIPPED)
        grads = draws(*shape, dtype=dtype)
        exact = Transcript(tx.init(grads[0]).V, shape[0], **settings)
        updates, state = run(tx, grads)
        assert updates[0].dtype == dtype
        updates, state = jax.tree.map(np.asarray, (updates, state))
    for t, (g, update) in enumerate(zip(grads, updates, strict=True)):
        delta = exact.step(g)
        assert_close(update, delta, rtol, f"update {t}")
        gain = (1 - 0.09 * t) * g * delta
        rows, cols = rows + gain.sum(1), cols + gain.sum(0)
    assert_close(momentum(state), exact.M, rtol, "U s V^T")
    assert_close(state.R, exact.R, rtol, "R")
    assert_close(state.C, exact.C, rtol, "C")
    assert_close(state.saliency_row, rows, rtol, "saliency_row")
    assert_close(state.saliency_col, cols, rtol, "saliency_col")
    assert_close(state.mu_weight, 1 - exact.b1**10, 1e-6)
    assert_close(state.nu_weight, 1 - exact.b2**10, 1e-6)
    assert state.count == 10


@pytest.mark.parametrize("clip_rms", [0.4, 1.0, np.inf])
def test_ten_steps_of_a_vector_are_adam_with_clipping(clip_rms):
    grads, b1, b2 = draws(7), 0.9, 0.99
    updates, state = run(om.scale_by_moma(b1=b1, b2=b2, clip_rms=clip_rms), grads)
    mu = nu = saliency = np.zeros(7)
    for t, (g, update) in enumerate(zip(grads, updates, strict=True), start=1):
        g = np.asarray(g, np.float64)
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        step = mu / (1 - b1**t) / np.sqrt(nu / (1 - b2**t))
        step *= min(1, clip_rms / rms(step))
        saliency = saliency + g * step
        assert_close(update, step, what=f"update {t}")
    assert_close(state.mu, mu)
    assert_close(state.nu, nu)
    assert_close(state.saliency, saliency)


def test_the_alias_decays_weights_beside_the_gradient():
    params = {"w": jnp.ones((6, 8)), "b": jnp.full(8, 2.0)}
    grads = {"w": draws(6, 8)[0], "b": draws(8)[0]}
    (delta,), _ = run(om.scale_by_moma(2, **SMALL), [grads])
    tx = om.moma(0.1, 2, weight_decay=0.5, mask={"w": True, "b": False}, **SMALL)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(updates["w"], -0.1 * (np.asarray(delta["w"]) + 0.5))
    assert_close(updates["b"], -0.1 * np.asarray(delta["b"]))


def test_saliency_is_the_path_integral_of_the_emitted_updates():
    """minus gradient times change of the weights, with a schedule, entry by entry or summed."""
    names = {"w": (6, 8), "stack": (3, 6, 8), "b": (5,)}
    columns = {name: draws(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}
    grads = [{name: column[t] for name, column in columns.items()} for t in range(10)]
    tx = om.moma(optax.cosine_decay_schedule(0.1, 12), 2, min_dim_size_to_factor=6)
    updates, (state, *_) = run(tx, grads)
    pairs = list(zip(grads, updates, strict=True))
    path = {name: -sum(np.asarray(g[name], float) * u[name] for g, u in pairs) for name in names}
    for name in ("w", "stack"):
        assert_close(state.saliency_row[name], path[name].sum(-1), 1e-5)
        assert_close(state.saliency_col[name], path[name].sum(-2), 1e-5)
    assert_close(state.saliency["b"], path["b"], 1e-5)


@pytest.mark.parametrize(("rule", "share"), [(SMALL, 0.5), (CLIPPED, 1.0)], ids=RULES)
def test_half_of_what_is_outside_the_subspace_is_applied_with_blocks_and_all_without(rule, share):
    grads = draws(8, 11)
    updates, _ = run(om.scale_by_moma(3, **rule), grads)
    same, _ = run(om.scale_by_moma(3, residual=share, **rule), grads)
    less, _ = run(om.scale_by_moma(3, residual=share / 2, **rule), grads)
    np.testing.assert_array_equal(updates, same)
    assert np.abs(np.subtract(updates, less)).max() > 0.01


def test_saliency_can_be_left_out():
    grads = {"w": draws(8, 11)[0], "b": draws(5)[0]}
    plain, state = run(om.scale_by_moma(3, saliency=False, **SMALL), [grads])
    kept, _ = run(RANK_3, [grads])
    assert not jax.tree.leaves((state.saliency, state.saliency_row, state.saliency_col))
    assert_close(plain[0]["w"], kept[0]["w"], 1e-5)


# Identities


@pytest.mark.parametrize("rule", RULES)
def test_permutations_commute(rule):
    grads, tx = draws(8, 11), RULES[rule]
    rng = np.random.default_rng(0)
    rows, cols = rng.permutation(8), rng.permutation(11)
    shuffle = lambda x: np.asarray(x)[rows][:, cols]
    plain, state = run(tx, grads)
    start = tx.init(grads[0])
    mixed, mixed_state = run(tx, [shuffle(g) for g in grads], start._replace(V=start.V[cols]))
    for a, b in zip(mixed, plain, strict=True):
        assert_close(a, shuffle(b))
    assert_close(momentum(mixed_state), shuffle(momentum(state)))
    assert_close(mixed_state.saliency_col, np.asarray(state.saliency_col)[cols])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale, rule):
    tx = RULES[rule]
    grads = [{"w": w, "b": b} for w, b in zip(draws(8, 11), draws(5), strict=True)]
    scaled = [jax.tree.map(lambda x: x * np.float32(scale), g) for g in grads]
    plain, _ = run(tx, grads)
    other, _ = run(tx, scaled)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_gradients_of_rank_one_are_kept_exactly(rank):
    u, v = draws(9)[0], draws(12)[1]
    sizes = [1.0, 3.0, 0.2, 5.0, 1.0, 0.01, 2.0, 1.0]
    grads = [np.outer(size * u, v).astype(np.float32) for size in sizes]
    updates, state = run(om.scale_by_moma(rank, **PLAIN), grads)
    exact = Transcript(np.zeros((12, 1)), 9)
    average = np.zeros((9, 12))
    for t, (g, update) in enumerate(zip(grads, updates, strict=True), start=1):
        average = 0.9 * average + 0.1 * exact.preconditioned(np.asarray(g, np.float64))
        assert_close(update, average / (1 - 0.9**t), 2e-5, f"update {t}")
    assert_close(momentum(state), average, 1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_at_full_rank_the_momentum_is_the_dense_average(shape):
    grads = draws(*shape)
    updates, state = run(om.scale_by_moma(20, **PLAIN), grads)
    exact, average = Transcript(np.zeros((shape[1], 1)), shape[0]), np.zeros(shape)
    for g in grads:
        average = 0.9 * average + 0.1 * exact.preconditioned(np.asarray(g, np.float64))
    assert_close(momentum(state), average, 1e-5)
    if shape[0] <= shape[1]:  # nothing lies outside of a square Q
        assert_close(updates[-1], average / (1 - 0.9**10), 1e-5)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6)])
def test_no_direction_of_the_momentum_moves_further_than_in_an_orthogonal_update(shape):
    """A constant gradient of few directions, whose factors have come to its singular vectors."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.choice([-1.0, 1.0], size=(size, 6)))[0][:, :3] for size in shape)
    g = np.asarray(u * [4.0, 2.0, 1e-2] @ v.T, np.float32)
    settings = CLIPPED | {"clip_rms": np.inf}
    (*_, clipped), state = run(om.scale_by_moma(3, **settings), [g] * 30)
    (*_, free), _ = run(om.scale_by_moma(3, clip_spectral=np.inf, **settings), [g] * 30)
    (left, values, right), largest = np.linalg.svd(free, full_matrices=False), 30**0.5
    assert values[0] > 1.2 * largest > largest / 1.2 > values[2]  # else nothing is tested
    assert_close(clipped, left * np.minimum(values, largest) @ right, 1e-4)
    assert_close(state.s, values[:3] * (1 - 0.9**30), 1e-4)  # what is remembered is not clipped


# Leaves that are seen as matrices


def stacked_start(tx, grads, state):
    """The state of one layer, with the start of that layer in the stack."""
    return [tx.init(grads)._replace(V=V) for V in state.V]


@pytest.mark.parametrize(
    "rule",
    [{}, {"orthogonal_block_size": 5}, CLIPPED, CLIPPED | {"clip_rms": 0.3}],
    ids=["default", "blocks", "clipped", "clipped further"],
)
def test_a_stack_is_its_layers(rule):
    """Each by its own size: of the first the gradients have rank one, which is cut further."""
    grads = draws(3, 8, 11)
    for g in grads:
        g[0] = g[0, :, :1] * g[0, :1]
    tx = om.scale_by_moma(2, **rule | {"min_dim_size_to_factor": 8})
    start = tx.init(grads[0])
    together, state = run(tx, grads)
    assert state.U.shape == (3, 8, 2) and state.R.shape == (3, 8)
    for i, alone in enumerate(stacked_start(tx, grads[0][0], start)):
        updates, layer = run(tx, [g[i] for g in grads], alone)
        assert_close(together[-1][i], updates[-1])
        assert_close(momentum(state)[i], momentum(layer))
        assert_close(state.saliency_row[i], layer.saliency_row)


def test_every_matrix_of_a_stack_is_clipped_by_its_own_rms():
    (g,) = draws(3, 8, 11, steps=1)
    settings = CLIPPED | {"min_dim_size_to_factor": 8}
    (free,), _ = run(om.scale_by_moma(2, clip_rms=np.inf, **settings), [g])
    (clipped,), _ = run(om.scale_by_moma(2, clip_rms=0.1, **settings), [g])
    assert len({round(rms(layer), 3) for layer in free}) == 3  # else one factor would do
    for layer, own in zip(clipped, np.asarray(free), strict=True):
        assert_close(layer, own * 0.1 / rms(own))


VIEWS = {
    "transposed": (Axes(1, 0), lambda g: g.T),
    "heads": (None, lambda g: g.reshape(8, 3, 4)),
    "heads named": (Axes(0, (1, 2)), lambda g: g.reshape(8, 3, 4)),
    "heads first": (Axes((0, 1), 2), lambda g: g.reshape(2, 4, 12)),
    "heads in front": (Axes(1, (0, 2)), lambda g: g.reshape(8, 3, 4).transpose(1, 0, 2)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_of_a_matrix_trains_as_the_matrix(name):
    numbers, view = VIEWS[name]
    grads = draws(8, 12, steps=4)
    plain, _ = run(RANK_3, grads)
    tx = om.scale_by_moma(3, min_dim_size_to_factor=8, weight_dimension_numbers=numbers)
    viewed, _ = run(tx, [view(g) for g in grads])
    for a, b in zip(viewed, plain, strict=True):
        assert_close(a, view(np.asarray(b)))


def test_small_matrices_get_the_moments_of_adam():
    g = draws(7, 200, steps=1)[0]
    state = om.scale_by_moma(4, min_dim_size_to_factor=8).init({"w": g})
    assert state.mu["w"].shape == state.nu["w"].shape == (7, 200)
    assert not jax.tree.leaves((state.U, state.R))


# Zero gradients


@pytest.mark.parametrize("settings", [{}, {"eps": 0.0}], ids=str)
def test_leaves_without_gradients_stay_and_can_learn_later(settings):
    grads = {"w": draws(6, 8)[0], "stack": draws(2, 6, 8)[0], "b": draws(5)[0]}
    zero = jax.tree.map(np.zeros_like, grads)
    tx = om.scale_by_moma(3, min_dim_size_to_factor=6, **settings)
    updates, state = run(tx, [zero, zero, zero, grads, zero])
    for early in updates[:3]:
        for x in jax.tree.leaves(early):
            np.testing.assert_array_equal(x, np.zeros(x.shape))
    for x in jax.tree.leaves((updates, state)):
        assert np.all(np.isfinite(x))
    for name, g in grads.items():
        assert np.vdot(updates[3][name], g) > 0.1 * np.linalg.norm(g)


def test_a_matrix_without_a_gradient_keeps_its_state():
    """Optax allows None for the gradient of a leaf."""
    grads = {"w": draws(8, 11)[0], "b": draws(5)[0]}
    _, state = run(RANK_3, [grads])
    (updates,), after = run(RANK_3, [grads | {"w": None}], state)
    assert updates["w"] is None
    for field in ("U", "s", "V", "R", "C", "saliency_row"):
        np.testing.assert_array_equal(getattr(after, field)["w"], getattr(state, field)["w"])
    assert np.any(after.mu["b"] != state.mu["b"])


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_rows_without_gradients_stay(eps):
    """Tokens that do not occur: their embeddings do not move, and nothing else notices."""
    grads = draws(9, 12)
    for g in grads:
        g[[1, 5]] = 0
    updates, _ = run(om.scale_by_moma(3, eps=eps, **SMALL), grads)
    for update in updates:
        assert np.all(np.isfinite(update)) and not np.any(np.asarray(update)[[1, 5]])
    assert np.all(np.abs(np.asarray(updates[-1])[[0, 2, 3]]).max(axis=1) > 0.1)


# Numbers that are too large


@pytest.mark.parametrize("shape", [(7,), (8, 11), (2, 8, 11)], ids=["vector", "matrix", "stack"])
def test_a_square_that_overflows_stops_nothing_but_what_it_is_counted_in(shape):
    """A finite gradient of 1e20: its row and column stand still, or its entry; the rest goes on."""
    tx = om.scale_by_moma(3, min_dim_size_to_factor=8, clip_rms=np.inf)
    grads = draws(*shape, steps=40)  # until the momentum of the time before is gone
    grads[4][(0,) * len(shape)] = 1e20
    updates, state = run(tx, grads)
    rest = (..., *[slice(1, None)] * min(len(shape), 2))
    for update in updates:
        assert np.all(np.isfinite(update))
        assert np.min(np.mean(np.abs(update[rest]), axis=(-1, -2)[: len(shape)])) > 0.1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state._replace(R=0, C=0, nu=0)))
    if len(shape) == 1:
        assert not np.any([update[0] for update in updates[4:]])
        without, _ = run(tx, [g[1:] for g in grads])
        for update, expected in zip(updates, without, strict=True):
            assert_close(update[1:], expected, 1e-4)


def test_a_gradient_that_is_not_finite_takes_its_leaf_along():
    """As scale_by_moma says; apply_if_finite is what helps."""
    grads = [{"w": w, "b": b} for w, b in zip(draws(8, 11), draws(5), strict=True)]
    grads[2]["w"][0, 0] = np.inf
    updates, _ = run(RANK_3, grads)
    assert np.all(np.isnan(updates[-1]["w"])) and np.all(np.isfinite(updates[-1]["b"]))
    guarded = optax.apply_if_finite(RANK_3, 1)
    updates, _ = run(guarded, grads)
    without, _ = run(RANK_3, grads[:2] + grads[3:])
    assert_close(updates[-1]["w"], without[-1]["w"])


# Types


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_state_in_float32(dtype):
    grads = [{"w": jnp.asarray(w, dtype), "b": jnp.asarray(w[0], dtype)} for w in draws(8, 11)]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in grads]
    updates, state = run(RANK_3, grads)
    exact, _ = run(RANK_3, wide)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state._replace(count=None))} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert_close(a, b, float(jnp.finfo(dtype).eps))


MATRIX = {"U", "s", "V"}, {"R", "C", "saliency_row", "saliency_col"}
DENSE = {"mu"}, {"nu", "saliency"}


def test_types_of_the_moments_can_be_chosen():
    grads = [{"w": w, "b": b} for w, b in zip(draws(8, 11), draws(5), strict=True)]
    tx = om.scale_by_moma(3, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float32, **SMALL)
    updates, state = run(tx, grads)
    for name, (first, second) in (("w", MATRIX), ("b", DENSE)):
        for fields, dtype in ((first, jnp.bfloat16), (second, jnp.float32)):
            for field in fields:
                assert getattr(state, field)[name].dtype == dtype, field
    exact, _ = run(RANK_3, grads)
    for name in grads[0]:
        assert updates[-1][name].dtype == jnp.float32
        assert_close(updates[-1][name], exact[-1][name], 0.05)


@pytest.mark.parametrize("nu_dtype", [jnp.bfloat16, jnp.float16, "int8"])
def test_second_moments_are_not_kept_in_half_a_type(nu_dtype):
    """With b2 = 0.999 an average in bfloat16 stands still: its steps are rounded away."""
    assert float(jnp.bfloat16(1) * jnp.bfloat16(0.999)) == 1.0
    with pytest.raises(ValueError, match="nu_dtype"):
        om.scale_by_moma(2, nu_dtype=nu_dtype)


def test_complex_leaves_are_dense_and_keep_their_phase():
    """Adam's rule: |g|^2 in the second moment; a gradient times i is an update times i."""
    g = jnp.asarray(draws(6, 8)[0] + 1j * draws(6, 8)[1], jnp.complex64)
    tx = om.scale_by_moma(2, **SMALL)
    (update,), state = run(tx, [g])
    assert state.nu.dtype == jnp.float32 and update.dtype == jnp.complex64
    np.testing.assert_allclose(update, g / np.abs(g), rtol=1e-4)
    (turned,), _ = run(tx, [1j * g])
    np.testing.assert_allclose(turned, 1j * update, rtol=1e-5)


def test_complex_leaves_keep_their_phase_under_a_narrow_mu_dtype():
    g = jnp.asarray(draws(6, 8)[0] + 1j * draws(6, 8)[1], jnp.complex64)
    (first, second), _ = run(om.scale_by_moma(2, mu_dtype=jnp.float32, **SMALL), [g, g])
    np.testing.assert_allclose(second, first, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_outside_of_jit_nothing_is_compiled_twice(rule):
    grads = {"w": draws(8, 11)[0], "v": draws(8, 11)[1], "b": draws(5)[0]}
    state, events = RULES[rule].init(grads), []
    listen = lambda name, *_, **__: events.append(name)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        seen = len(events)
        _, state = RULES[rule].update(grads, state)
    compiled = [name for name in events if name.endswith("backend_compile_duration")]
    jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled
    assert not [name for name in events[seen:] if name.endswith("backend_compile_duration")]


def test_no_buffer_appears_twice():
    """Donation forbids it."""
    params = {"w": jnp.ones((8, 11)), "b": jnp.ones(4)}
    state = om.moma(1e-3, 2, **SMALL).init(params)
    leaves = [x for x in jax.tree.leaves(state) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_starts_differ_between_leaves_and_seeds_only():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    V = lambda **kwargs: om.scale_by_moma(2, **SMALL, **kwargs).init(params).V
    assert np.any(V()["a"] != V()["b"]) and np.any(V()["a"] != V(seed=1)["a"])
    np.testing.assert_array_equal(V()["a"], V(seed=0)["a"])


# Bad input

BAD = [
    ({"rank": 0}, ValueError, "rank"),
    ({"rank": -3}, ValueError, "rank"),
    ({"rank": 2.5}, TypeError, "rank"),
    ({"rank": True}, TypeError, "rank"),
    ({"rank": None}, TypeError, "rank"),
    ({"rank": jnp.array(4)}, TypeError, "rank"),
    ({"min_dim_size_to_factor": 0}, ValueError, "min_dim_size_to_factor"),
    ({"min_dim_size_to_factor": 1.5}, TypeError, "min_dim_size_to_factor"),
    ({"orthogonal_block_size": 0}, ValueError, "orthogonal_block_size"),
    ({"orthogonal_block_size": jnp.array(4)}, TypeError, "orthogonal_block_size"),
    ({"b1": 1.0}, ValueError, "b1"),
    ({"b1": -0.1}, ValueError, "b1"),
    ({"b1": np.float32(1.5)}, ValueError, "b1"),
    ({"b2": 1}, ValueError, "b2"),
    ({"b2": float("nan")}, ValueError, "b2"),
    ({"b2": "0.999"}, TypeError, "b2"),
    ({"eps": -1e-8}, ValueError, "eps"),
    ({"residual": -1}, ValueError, "residual"),
    ({"clip_spectral": -1.0, "orthogonal_block_size": None}, ValueError, "clip_spectral"),
    ({"clip_spectral": 1.0}, ValueError, "clip_spectral"),
    ({"clip_rms": -1.0}, ValueError, "clip_rms"),
    ({"b1": jnp.bfloat16(0.9)}, TypeError, "b1"),
    ({"b2": jnp.float16(0.999)}, TypeError, "b2"),
    ({"b2": np.float16(0.999)}, TypeError, "b2"),
    ({"eps": jnp.float16(1e-8)}, TypeError, "eps"),
    ({"mu_dtype": jnp.int16}, ValueError, "mu_dtype"),
    ({"mu_dtype": jnp.float16}, ValueError, "mu_dtype"),
    ({"mu_dtype": "no type"}, ValueError, "mu_dtype"),
]


@pytest.mark.parametrize(("kwargs", "error", "name"), BAD, ids=str)
def test_bad_arguments_are_named(kwargs, error, name):
    for factory in (om.scale_by_moma, lambda **kwargs: om.moma(1e-3, **kwargs)):
        with pytest.raises(error, match=rf"\b{name}\b"):
            factory(**kwargs)


@pytest.mark.parametrize("alias", [om.moma, om.umtam])
def test_the_decay_of_weights_is_checked(alias):
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        alias(1e-3, weight_decay=-0.1)
    with pytest.raises(TypeError, match="weight_decay must be a number"):
        alias(1e-3, weight_decay="0.1")


@pytest.mark.parametrize("rank", [np.int64(2), 2])
def test_numpy_integers_are_integers(rank):
    assert om.scale_by_moma(rank, **SMALL).init(jnp.ones((4, 5))).U.shape == (4, 2)


@pytest.mark.parametrize("block_size", [128, None])
def test_a_matrix_may_have_more_entries_than_an_int32_counts(block_size):
    leaf = jax.ShapeDtypeStruct((2**18, 2**13), jnp.float32)
    tx = om.scale_by_moma(orthogonal_block_size=block_size)
    step, _ = jax.eval_shape(tx.update, leaf, jax.eval_shape(tx.init, leaf))
    assert (step.shape, step.dtype) == (leaf.shape, leaf.dtype)


def test_arrays_of_numpy_are_in_the_precision_of_jax():
    """In float64, which is NumPy's habit, without a warning."""
    wide, narrow = np.float64(draws(6, 8)[0]), draws(6, 8)[0]
    (step,), state = run(RANK_3, [wide])
    assert {x.dtype for x in (step, state.U, state.R)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(step, run(RANK_3, [narrow])[0][0])


def test_a_traced_rank_says_what_to_do():
    params = {"w": jnp.ones((8, 8))}
    tx = optax.inject_hyperparams(om.moma)(learning_rate=1e-3, rank=4)
    with pytest.raises(TypeError, match=r"rank .*static_args"):
        tx.init(params)
    with pytest.raises(TypeError, match=r"rank .*static_args"):
        jax.jit(lambda rank: om.scale_by_moma(rank).init(params).count)(4)


def test_traced_numbers_are_not_checked():
    g = draws(6, 8)[0]

    @jax.jit
    def step(b1, b2, eps):
        tx = om.scale_by_moma(2, b1, b2, eps=eps, **SMALL)
        return tx.update(g, tx.init(g))[0]

    (expected,), _ = run(om.scale_by_moma(2, **SMALL), [g])
    assert_close(step(0.9, 0.999, 1e-8), expected, 1e-5)
    assert step(1.5, -1.0, -1.0).shape == (6, 8)


@pytest.mark.parametrize(
    ("numbers", "error"),
    [(Axes(0, 2), ValueError), (Axes(1, 1), ValueError), ("rows", TypeError), ([None], ValueError)],
)
def test_unknown_dimension_numbers(numbers, error):
    params = {"w": jnp.ones((8, 8))}
    tx = om.moma(1e-3, weight_dimension_numbers={"w": numbers})
    with pytest.raises(error, match="dimension_numbers"):
        tx.init(params)
