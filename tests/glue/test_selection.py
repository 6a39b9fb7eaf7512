"""Exact Fisher, saliency scores and what is kept by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_moma as om
from experiments.glue import experts, fisher, saliency
from experiments.glue.experts import Expert, Recipe, Statistics


@pytest.mark.parametrize("name", ["sick", "sts"])
def test_fisher_is_the_expected_squared_score(small, name):
    task = small.tasks[name]
    classes = task.kind.classes
    head = {"kernel": 0.3 * jax.random.normal(jax.random.key(3), (128, 6)), "bias": jnp.arange(6.0)}
    model = Expert(small.base, head, Statistics({}, {}, []))
    graph = nnx.graphdef(small.encoder)
    tokens = task.splits["dev"].tokens[:2]
    got = fisher.exact_fisher(graph, model, tokens, classes)

    def out(encoder, text):
        return experts.outputs(graph, {"encoder": encoder, "head": head}, text[None])[0, :classes]

    jacobian_of = jax.jit(jax.jacrev(out))
    want = 0.0
    for text in tokens:
        # F = J^T A J with A the Fisher of the outputs: its diagonal from the whole Jacobian.
        jacobian = jacobian_of(small.base, text)["layers"][0]["up"]["kernel"]
        p = np.asarray(jax.nn.softmax(out(small.base, text)), np.float64)
        A = np.eye(1) if classes == 1 else np.diag(p) - np.outer(p, p)
        J = np.asarray(jacobian, np.float64).reshape(classes, -1)
        want = want + np.einsum("ci,cd,di->i", J, A, J).reshape(128, 128) / len(tokens)
    np.testing.assert_allclose(got["layers"][0]["up"]["kernel"], want, rtol=1e-3, atol=1e-9)


def test_keeps_exactly_the_best_of_what_changed():
    rng = np.random.default_rng(0)
    base = {"a": jnp.asarray(rng.normal(size=(10, 8)), jnp.float32), "b": jnp.zeros(20)}
    delta = {"a": rng.normal(size=(10, 8)), "b": rng.normal(size=20)}
    delta["a"][6:] = 0
    params = {k: base[k] + jnp.asarray(d, jnp.float32) for k, d in delta.items()}
    # Scores that tie, and that are best where nothing changed.
    scores = {"a": np.where(delta["a"] == 0, 9.0, np.round(np.abs(delta["a"]))), "b": np.ones(20)}
    for scope in ("tensor", "global"):
        for density, model in zip(
            (0.1, 0.5, 1.0),
            saliency.kept(params, base, scores, (0.1, 0.5, 1.0), scope),
            strict=True,
        ):
            moved = {k: np.asarray(model[k]) != np.asarray(base[k]) for k in base}
            for k in base:
                np.testing.assert_array_equal(model[k][moved[k]], params[k][moved[k]])
            counts = [int(moved[k].sum()) for k in ("a", "b")]
            if scope == "tensor":
                assert counts == [int(density * 48), int(density * 20)]
                if density < 1:
                    lowest = scores["a"][moved["a"]].min()
                    left_out = scores["a"][~moved["a"] & (delta["a"] != 0)]
                    assert left_out.max() <= lowest
            else:
                assert sum(counts) == int(density * 68)


def test_factored_is_the_sums_of_a_dense_curvature():
    v = jnp.asarray(np.random.default_rng(1).random((4, 3)), jnp.float32)
    got = saliency.factored({"w": v, "b": v[0], "f": om.Factored(v[:, :1], v[:1])})
    np.testing.assert_allclose(
        got["w"].row * got["w"].col, np.outer(v.sum(1), v.sum(0)) / v.sum(), rtol=1e-6
    )
    assert got["b"] is not None and got["f"].row.shape == (4, 1)
    assert not np.any(saliency.factored({"w": jnp.zeros((2, 2))})["w"].row)


def test_scores_by_what_an_optimizer_kept(small):
    base = small.base
    truth = jax.tree.map(jnp.ones_like, base)
    available = {}
    for optimizer in ("moma", "adamw", "umtam"):
        recipe = Recipe("cola", optimizer, learning_rate=3e-3, epochs=4)
        if optimizer == "umtam":  # its steps take long to compile
            shapes = experts.template(small, recipe)
            trained = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
        else:
            trained = experts.expert(small, recipe)
        made = {name: make(trained, base, truth) for name, make in saliency.SCORES.items()}
        available[optimizer] = {name for name, scores in made.items() if scores is not None}
        for name in available[optimizer]:
            assert jax.tree.structure(made[name]) == jax.tree.structure(base)
            for s, w in zip(jax.tree.leaves(made[name]), jax.tree.leaves(base), strict=True):
                assert s.shape == w.shape and np.all(np.asarray(s) >= 0)
        np.testing.assert_allclose(
            made["exact Fisher"]["norm"]["scale"], made["magnitude"]["norm"]["scale"]
        )
        if optimizer == "moma":
            sums = trained.statistics.saliency
            estimate = made["path integral"]["layers"][0]["up"]["kernel"]
            rows = np.maximum(sums["saliency_row"]["layers/0/up/kernel"], 0)
            np.testing.assert_allclose(
                estimate.sum(1) / estimate.sum(), rows / rows.sum(), rtol=1e-4, atol=1e-6
            )
    everywhere = {"random", "magnitude", "exact Fisher", "curvature R, C"}
    everywhere |= {"curvature R, C, power 1/2"}
    assert available["moma"] == everywhere | {"path integral", "path curvature"}
    assert available["adamw"] == everywhere | {"Adam's v"}
    assert available["umtam"] == everywhere | {"dense S of the paper"}
