"""The update lowered for accelerators that are not here."""

import jax
import jax.numpy as jnp
import optax

import optax_moma as om

PARAMS = {
    "kernel": jax.ShapeDtypeStruct((256, 512), jnp.float32),
    "stack": jax.ShapeDtypeStruct((3, 128, 256), jnp.bfloat16),
    "bias": jax.ShapeDtypeStruct((512,), jnp.float32),
}


def test_update_lowers_for_tpu_and_cuda():
    tx = om.moma(1e-3, rank=8, weight_decay=0.1)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, PARAMS)
    exported = jax.export.export(step, platforms=["tpu", "cuda"])(PARAMS, state, PARAMS)
    assert exported.platforms == ("tpu", "cuda")
    # What it returns may be its next arguments.
    of = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert of(exported.out_avals) == of((PARAMS, state))
