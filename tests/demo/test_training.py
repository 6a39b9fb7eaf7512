"""Loss, batches and evaluation against NumPy; experts are saved whole and found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from optax_moma.demo import training
from optax_moma.demo.encoder import embed
from optax_moma.demo.pipeline import gradients
from optax_moma.demo.tasks import Examples, Task


def outputs_of(problem, params, tokens):
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    graph = nnx.graphdef(problem.encoder)
    x = np.asarray(embed(nnx.merge(graph, params["encoder"]), jnp.asarray(tokens)), np.float64)
    return x @ head["kernel"] + head["bias"]


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_loss(problem, settings, classes):
    params = training.initial_params(problem, 0, seed=1)
    tokens = problem.tokens[:8]
    out = outputs_of(problem, params, tokens)
    if classes == 1:
        targets = np.linspace(-2, 2, 8, dtype=np.float32)
        want = np.mean((out[:, 0] - targets) ** 2)
    else:
        targets = (np.arange(8) % classes).astype(np.float32)
        p = np.exp(out[:, :classes])
        want = -np.mean(np.log(p[np.arange(8), targets.astype(int)] / p.sum(1)))
    graph = nnx.graphdef(problem.encoder)
    got, grads = jax.value_and_grad(training.loss, argnums=1)(
        graph, params, jnp.asarray(tokens), targets, jnp.int32(classes)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    unused = np.asarray(grads["head"]["kernel"])[:, classes:]
    np.testing.assert_array_equal(unused, 0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_batches_are_one_epoch_of_shuffled_and_standardised_examples(problem, settings):
    got = list(training.batches(problem, settings, 1))
    assert len(got) == 96 // 8 == training.steps(problem, settings)
    rows, targets = problem.tasks[1].splits["train"]
    tokens = np.concatenate([b[0] for b in got])
    want = (targets - targets.mean()) / targets.std()
    by_text = dict(zip(map(tuple, problem.tokens[rows]), want, strict=True))
    assert sorted(map(tuple, tokens)) == sorted(by_text)
    np.testing.assert_allclose(
        np.concatenate([b[1] for b in got]), [by_text[tuple(t)] for t in tokens]
    )
    assert not np.array_equal(tokens, problem.tokens[rows])
    assert all(int(b[2]) == 1 for b in got)


def test_too_few_examples_for_a_batch(problem, settings):
    with pytest.raises(ValueError, match="'half' has 96 examples to train on, less than one batch"):
        training.steps(problem, settings._replace(batch=97))


def test_evaluation_uses_each_tasks_own_head_and_rows():
    encoder = {"rows": np.array([[1.0, 0], [0, 1], [1, 1], [-1, 0]])}
    sign = Task("sign", "", 2, {"dev": Examples(np.array([3, 0]), np.array([1.0, 1]))})
    line = Task("line", "", 1, {"dev": Examples(np.array([0, 1, 2]), np.array([1.0, 2, 3]))})
    heads = {
        "sign": {"kernel": np.array([[0.0, 1, 0, 0], [0, 0, 0, 0]]), "bias": np.zeros(4)},
        "line": {"kernel": np.array([[1.0, 0, 0, 0], [2, 0, 0, 0]]), "bias": np.ones(4)},
    }
    seen = []

    def embed_rows(params, rows):
        seen.append(rows.tolist())
        return params["rows"][rows]

    got = training.evaluate(embed_rows, encoder, heads, [sign, line], "dev")
    assert got["sign"] == 0.5
    assert got["line"] == pytest.approx(1.0)
    assert seen == [[0, 1, 2, 3]]


def test_embedding_in_batches_equals_embedding_at_once(problem, monkeypatch):
    monkeypatch.setattr(training, "EVALUATION_BATCH", 16)
    params = nnx.to_pure_dict(nnx.state(problem.encoder))
    rows = np.arange(5, 42)
    got = training.make_embedder(problem)(params, rows)
    want = embed(problem.encoder, jnp.asarray(problem.tokens[rows]))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_an_expert_is_found_again_bit_for_bit_and_only_with_its_settings(
    problem, settings, tmp_path
):
    step = training.make_step(problem, settings)
    expert = training.new_expert(problem, settings, 2, step)
    before = float(training.loss(nnx.graphdef(problem.encoder), expert.params, *all_of(problem)))
    for batch in training.batches(problem, settings, 2):
        expert, _ = step.update(expert, *batch)
    after = float(training.loss(nnx.graphdef(problem.encoder), expert.params, *all_of(problem)))
    assert after < 0.5 * before
    path = tmp_path / "expert"
    assert training.find_expert(path, problem, settings, step) is None
    training.save(path, expert, settings._asdict())
    found = training.find_expert(path, problem, settings, step)
    assert jax.tree.structure(found) == jax.tree.structure(expert)
    jax.tree.map(np.testing.assert_array_equal, found, expert)
    other = settings._replace(learning_rate=1e-3)
    assert training.find_expert(path, problem, other, step) is None


def all_of(problem):
    rows, targets = problem.tasks[2].splits["train"]
    return jnp.asarray(problem.tokens[rows]), targets, jnp.int32(4)


def test_recorded_gradients_are_those_of_the_first_steps(problem, settings):
    recorded = gradients(problem, settings, 0, 2)
    assert len(recorded) == 2
    params = training.initial_params(problem, 0, settings.seed)
    batch = next(training.batches(problem, settings, 0))
    want = jax.grad(training.loss, argnums=1)(nnx.graphdef(problem.encoder), params, *batch)
    for got, expected in zip(
        jax.tree.leaves(recorded[0]), jax.tree.leaves(want["encoder"]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    first, second = (np.asarray(g["layers"][0]["up"]["kernel"]) for g in recorded)
    assert not np.allclose(first, second) and np.abs(second).max() > 0
