"""Experts are trained once, kept whole, and evaluated with their own heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_moma as om
from experiments.glue import experts, stages
from experiments.glue.experts import Evaluator, Recipe
from experiments.glue.tasks import Examples, scores
from optax_moma.demo.encoder import embed


def test_segments_begin_after_the_first_separator():
    tokens = np.array([[101, 7, 102, 8, 102, 0], [101, 7, 102, 0, 0, 0]])
    np.testing.assert_array_equal(experts.segments(tokens)[0], [0, 0, 0, 1, 1, 1])
    # Behind the only separator there is nothing but padding.
    np.testing.assert_array_equal(experts.segments(tokens)[1], [0, 0, 0, 1, 1, 1])


def test_an_epoch_of_batches_holds_every_example_once(small, monkeypatch):
    monkeypatch.setattr(experts, "BUCKET", 16)
    task = small.tasks["sts"]
    recipe = Recipe("sts", "moma", epochs=1)
    examples = experts.training_examples(task, recipe)
    assert np.mean(examples.targets) == pytest.approx(0, abs=1e-6)
    assert np.std(examples.targets) == pytest.approx(1, rel=1e-5)
    got = list(experts.batches(examples, recipe))
    assert len(got) == 128 // 16
    assert {tokens.shape for tokens, _ in got} == {(16, 16), (16, 32)}
    texts = [tuple(np.pad(row, (0, 32 - len(row)))) for tokens, _ in got for row in tokens]
    assert sorted(texts) == sorted(map(tuple, examples.tokens))
    target = dict(zip(map(tuple, examples.tokens), examples.targets, strict=True))
    np.testing.assert_array_equal(np.concatenate([t for _, t in got]), [target[t] for t in texts])
    first, second = list(experts.batches(examples, recipe._replace(epochs=2)))[:: len(got)][:2]
    assert not np.array_equal(first[0], second[0])


def test_the_rate_rises_and_falls():
    rate = experts.schedule(2.0, 4.0, 12.0)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.5, 1, 1.5, 2])
    np.testing.assert_allclose([rate(i) for i in (4, 8, 12)], [2, 1, 0], atol=1e-6)


@pytest.mark.parametrize("optimizer", ["moma", "adamw"])
def test_an_expert_learns_and_is_found_again(small, optimizer, monkeypatch):
    recipe = Recipe("cola", optimizer, learning_rate=3e-3, epochs=4)
    trained = experts.expert(small, recipe)
    # Half the labels are positive: a constant answer has a cross entropy of 0.69.
    assert experts.about_expert(small, recipe)["loss"] < 0.5
    monkeypatch.setattr(experts, "train", None)
    jax.tree.map(np.testing.assert_array_equal, experts.expert(small, recipe), trained)
    assert experts.about_expert(small, recipe._replace(rank=5)) is None
    kernel = trained.statistics.curvature["layers"][0]["up"]["kernel"]
    assert isinstance(kernel, om.Factored) == (optimizer != "adamw")
    if optimizer == "moma":
        rows = trained.statistics.saliency["saliency_row"]["layers/0/up/kernel"]
        assert rows.shape == (128,) and float(np.sum(rows)) > 0
        assert len(trained.statistics.history) == experts.SNAPSHOTS - 1
        early = trained.statistics.history[0]["layers"][0]["up"]["kernel"]
        assert not np.allclose(early.col, kernel.col)


def test_an_expert_of_umtam_keeps_the_dense_saliency_of_matrices(small):
    statistics = experts.template(small, Recipe("cola", "umtam")).statistics
    saved = statistics.saliency["saliency"]
    assert saved["layers/0/up/kernel"].shape == (128, 128)
    assert "layers/0/up/bias" not in saved
    assert isinstance(statistics.curvature["layers"][0]["up"]["kernel"], om.Factored)


def test_evaluation_in_batches_is_evaluation_at_once(small, monkeypatch):
    monkeypatch.setattr(experts, "EVALUATION_BATCH", 16)
    params = small.base
    heads = {}
    for i, name in enumerate(["sick", "cola"]):
        kernel = jax.random.normal(jax.random.key(i), (128, 6))
        heads[name] = {"kernel": kernel, "bias": np.zeros(6, np.float32)}
    found = Evaluator(small).primary(params, heads, "test")
    model = nnx.merge(nnx.graphdef(small.encoder), params)
    for name, head in heads.items():
        task = small.tasks[name]
        tokens, targets = task.splits["test"]
        states = embed(model, tokens, experts.segments(tokens))
        want = scores(task.kind, np.asarray(states @ head["kernel"]), targets)
        assert found[name] == pytest.approx(next(iter(want.values())))


def test_learning_rates_are_chosen_on_dev_and_experts_recorded(small):
    stages.learning_rates(small, "moma")
    rows = stages.rate_records(small).rows
    assert [(r["task"], float(r["learning_rate"])) for r in rows] == [
        (task, rate) for task in stages.RATE_TASKS for rate in stages.RATES
    ]
    means = {
        rate: np.mean([float(r["dev"]) for r in rows if float(r["learning_rate"]) == rate])
        for rate in stages.RATES
    }
    assert stages.learning_rate(small, "moma") == max(means, key=means.get)
    stages.train(small, ["cola", "sts"], "moma", 0)
    before = stages.expert_records(small).path.read_text()
    stages.train(small, ["cola", "sts"], "moma", 0)
    assert stages.expert_records(small).path.read_text() == before
    assert [row["metric"] for row in stages.expert_records(small).rows] == [
        "accuracy",
        "matthews",
        "pearson",
        "spearman",
    ]


def test_too_few_examples(small):
    tokens, targets = small.tasks["cola"].splits["train"]
    few = small.tasks["cola"]._replace(splits={"train": Examples(tokens[:10], targets[:10])})
    with pytest.raises(ValueError, match="cola has 10 examples to train on"):
        experts.train(small._replace(tasks={"cola": few}), Recipe("cola", "moma"))


def test_one_model_of_all_tasks_is_an_expert_where_there_is_one_task(small):
    """The same start; the same batches, in another order; so nearly the same model."""
    from experiments.glue import multitask

    recipe = multitask.recipe_of(["sick"], "adamw", 0, 1e-3)
    encoder, heads = multitask.multitask(small, recipe)
    assert list(heads) == ["sick"]
    base = small.base
    one = experts.train(small, recipe)[0]
    drift, other = (
        np.asarray(jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, model, base))[0])
        for model in (encoder, one.encoder)
    )
    cosine = drift @ other / np.linalg.norm(drift) / np.linalg.norm(other)
    assert 0.5 < cosine < 1 - 1e-6


def test_one_model_of_two_tasks_learns_both(small):
    from experiments.glue import multitask

    recipe = multitask.recipe_of(["cola", "sick"], "adamw", 0, 3e-3)
    encoder, heads = multitask.multitask(small, recipe)
    evaluate = experts.Evaluator(small)
    found = evaluate.primary(encoder, heads, "test")
    at_first = evaluate.primary(small.base, heads, "test")
    assert found["cola"] > 0.6 and found["sick"] > 0.6, (found, at_first)
