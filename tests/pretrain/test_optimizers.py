"""Every optimizer of the study: the same chain around each, and specs that say what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_moma as om
from experiments.pretrain import model, optimizers, variants
from optax_moma._orthogonal import orthogonal_factor

SPECS = [
    "adamw:b2=0.95",
    "adafactor",
    "adafactor:b1=0.9",
    "muon",
    "galore:rank=4",
    "umtam:rank=4",
    "moma:rank=4",
    "moma:rank=4,b1=0.0,saliency=False",
    "moma_clipped:rank=4",
    "moma_variant:rank=4,residual=1.0,nesterov=True",
    "moma_variant:rank=4,precondition='after',refresh=2",
    "moma_variant:rank=4,error_dtype=int8,power_iterations=2",
]
PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (128, 256)), "bias": jnp.ones(256)},
    "tokens": {"embedding": jax.random.normal(jax.random.key(1), (256, 128))},
}
GRADS = jax.tree.map(lambda x: jnp.cos(5 * x) + 0.1, PARAMS)


def one_update(tx):
    """The second, of two equal gradients."""
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(GRADS, state, PARAMS)
    return updates


def test_adamw_is_optax_adamw():
    decayed = {"up": {"kernel": True, "bias": False}, "tokens": {"embedding": True}}
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=decayed)
    )
    found, expected = one_update(optimizers.make("adamw:b2=0.95", 0.01)), one_update(reference)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_moma_is_moma():
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        om.moma(
            0.01,
            rank=4,
            weight_decay=0.1,
            mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
        ),
    )
    found, expected = one_update(optimizers.make("moma:rank=4", 0.01)), one_update(reference)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_descends_at_the_learning_rate(spec):
    """Twice the rate, twice the step; bounded, and against the gradient."""
    state = optimizers.make(spec, 0.0).init(PARAMS)
    update = jax.jit(lambda rate: optimizers.make(spec, rate).update(GRADS, state, PARAMS)[0])
    updates, twice = update(1e-3), update(2e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(2 * x, y, rtol=1e-4), updates, twice)
    kernel = updates["up"]["kernel"]
    assert 1e-5 < float(jnp.sqrt(jnp.mean(kernel**2))) < 5e-3
    assert float(jnp.vdot(kernel, GRADS["up"]["kernel"])) < 0


def test_muon_leaves_embeddings_to_nadam():
    muon, adam = (
        one_update(optimizers.make(spec, 0.01)) for spec in ("muon", "adamw:nesterov=True")
    )
    np.testing.assert_allclose(
        muon["tokens"]["embedding"], adam["tokens"]["embedding"], rtol=1e-5, atol=1e-9
    )
    singular = jnp.linalg.svd(muon["up"]["kernel"] + 0.001 * PARAMS["up"]["kernel"])[1]
    assert float(singular.max() / singular.min()) < 3  # nearly orthogonal, but for the decay


def test_clipped_moma_is_moma_without_blocks():
    clipped, plain, moma = (
        one_update(optimizers.make(spec, 0.01))["up"]["kernel"]
        for spec in ("moma_clipped:rank=4", "moma:rank=4,orthogonal_block_size=None", "moma:rank=4")
    )
    np.testing.assert_array_equal(clipped, plain)
    step = -moma / 0.01 - 0.1 * PARAMS["up"]["kernel"]
    singular = np.linalg.svd(step / 256**0.5)[1]
    assert singular.max() < 1.3 and np.median(singular) > 0.7


def some_updates(spec):
    """After six gradients, all of them different: the last update, and the state."""
    tx = optimizers.make(spec, 0.01)
    params = {"kernel": PARAMS["up"]["kernel"]}
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(6):
        noise = jax.random.normal(jax.random.key(i), (128, 256))
        updates, state = update({"kernel": GRADS["up"]["kernel"] + noise}, state, params)
    return updates["kernel"], state


def test_a_variant_with_momas_choices_is_moma():
    """At full rank, where nothing depends on where the subspace starts."""
    moma = some_updates("moma:rank=128")[0]
    same = some_updates("moma_variant:rank=128")[0]
    np.testing.assert_allclose(same, moma, rtol=1e-3, atol=1e-5)
    for other in ("nesterov=True", "precondition='after'"):
        changed = some_updates(f"moma_variant:rank=128,{other}")[0]
        assert float(jnp.abs(changed - moma).max()) > 1e-3


def test_without_the_residual_an_update_has_the_rank_of_the_momentum():
    """But for the weight decay."""
    for residual, rank in ((0.0, 4), (0.5, 128)):
        update, _ = some_updates(f"moma_variant:rank=4,residual={residual}")
        step = update + 0.01 * 0.1 * PARAMS["up"]["kernel"]
        values = np.linalg.svd(step)[1]
        assert np.sum(values > 1e-3 * values[0]) == rank


def test_with_what_was_lost_fed_back_the_momentum_is_dense():
    """Whatever the rank: what is not in the factors is in the error."""
    updates, dense = [], np.zeros((128, 256))
    R, C = np.zeros(128), np.zeros(256)
    tx = variants.scale_by_variant(rank=2, residual=1.0, error_dtype="float32")
    params = {"kernel": PARAMS["up"]["kernel"]}
    state = tx.init(params)
    for t in range(1, 5):
        G = np.cos(5.0 * t + np.arange(128 * 256, dtype=np.float64) ** 1.1).reshape(128, 256)
        R, C = 0.999 * R + 0.001 * (G**2).sum(1), 0.999 * C + 0.001 * (G**2).sum(0)
        scaled = G / np.sqrt(np.outer(R, C) / R.sum() / (1 - 0.999**t))
        dense = 0.9 * dense + 0.1 * scaled
        updates, state = tx.update({"kernel": jnp.asarray(G, jnp.float32)}, state, params)
        step = jnp.asarray(dense / (1 - 0.9**t), jnp.float32)
        expected = orthogonal_factor(step, 128, 16.0)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-3, atol=1e-3)


def test_what_was_lost_may_be_kept_in_fewer_bits():
    exact, halves, bytes_, none = (
        some_updates(f"moma_variant:rank=4{error}")
        for error in (
            ",error_dtype=float32", ",error_dtype=bfloat16", ",error_dtype=int8", "",
        )
    )  # fmt: skip
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for _, state in (halves, bytes_, none)]
    assert np.diff(sizes).tolist() == [-128 * 256 + 4 * 128, -128 * 256 - 4 * 128]
    away = lambda run: float(jnp.linalg.norm(run[0] - exact[0]) / jnp.linalg.norm(exact[0]))
    assert 1e-5 < away(halves) < 0.02
    assert 1e-5 < away(bytes_) < 0.05
    assert away(none) > 0.2


def test_power_iterations_find_what_the_momentum_is():
    """The share of the momentum that is lost is never more by another iteration."""
    lost = []
    for iterations in (1, 2, 8):
        _, state = some_updates(
            f"moma_variant:rank=4,error_dtype=float32,power_iterations={iterations}"
        )
        lost.append(float(jnp.linalg.norm(optax.tree.get(state, "matrices")["kernel"].error)))
    assert lost[0] > lost[1] > lost[2]


def test_a_subspace_kept_for_some_steps():
    """From the fifth gradient on: that of one renewed at each step differs by the sixth."""
    states = {k: some_updates(f"moma_variant:rank=4,refresh={k}")[1] for k in (1, 5, 6)}
    bases = {k: optax.tree.get(x, "matrices")["kernel"].factors.U for k, x in states.items()}
    np.testing.assert_allclose(bases[5].T @ bases[5], jnp.eye(4), atol=1e-5)
    assert float(jnp.abs(bases[5] - bases[6]).max()) > 1e-2
    assert float(jnp.abs(bases[5] - bases[1]).max()) > 1e-2


def test_muon_takes_scanned_layers_as_matrices():
    shapes = jax.eval_shape(model.functional(model.Config(scan=True))[0], jax.random.key(0))
    unrolled = jax.eval_shape(model.functional(model.Config())[0], jax.random.key(0))
    sizes = [om.state_size(optimizers.make("muon", 1.0), x).total_bytes for x in (shapes, unrolled)]
    assert sizes[0] == sizes[1]


def test_schedule_rises_and_falls_to_a_tenth():
    rate = optimizers.schedule(0.02, 200)
    values = np.array([rate(i) for i in range(201)])
    assert values[0] == 0 and values.argmax() == 20
    np.testing.assert_allclose(values[[20, 200]], [0.02, 0.002], rtol=1e-6)
    assert np.all(np.diff(values[20:]) <= 0)


def test_parse():
    assert optimizers.parse("moma:rank=8,mu_dtype=bfloat16,saliency=False") == (
        "moma",
        {"rank": 8, "mu_dtype": "bfloat16", "saliency": False},
    )
    with pytest.raises(ValueError, match="adamw, adafactor"):
        optimizers.parse("sgd")
    with pytest.raises(ValueError, match="not 'ranks'"):
        optimizers.parse("moma:ranks=8")
