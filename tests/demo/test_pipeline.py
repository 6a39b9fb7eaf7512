"""The whole way on a small problem: train, save, merge, tune, test, write; again after a stop."""

import csv
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from rich.console import Console

from optax_moma.demo import pipeline, training
from optax_moma.demo.report import Comparison, Row, notes, table

PNG = b"\x89PNG\r\n\x1a\n"


def run(problem, settings, output):
    said = io.StringIO()
    comparison = pipeline.run(problem, settings, output, Console(file=said, width=120))
    return comparison, said.getvalue()


@pytest.fixture(scope="module")
def first(problem, settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, *run(problem, settings, output)


@pytest.fixture
def trained(monkeypatch):
    """The indices of the tasks for which an expert is trained from now on."""
    tasks = []
    batches = training.batches

    def counted(problem, settings, task):
        tasks.append(task)
        return batches(problem, settings, task)

    monkeypatch.setattr(training, "batches", counted)
    return tasks


def test_the_table_has_base_experts_and_every_merge(first):
    _, comparison, said = first
    models = [row.model for row in comparison.rows]
    assert models == ["base", "experts", "average", "task arithmetic", "TIES", "OTA", "moma"]
    for model in models:
        assert model in said
    assert list(comparison.tuning) == models[3:]


def test_every_scale_is_the_best_on_the_dev_split(first):
    _, comparison, _ = first
    for row in comparison.rows[3:]:
        curve = comparison.tuning[row.model]
        assert len(curve) == len(comparison.scales)
        assert max(curve) == curve[comparison.scales.index(row.scale)]
    assert all(row.scale is None for row in comparison.rows[:3])


def test_csv_holds_the_scores_and_shares(first):
    output, comparison, _ = first
    with (output / "table.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    experts = comparison.rows[1].scores
    assert [line["model"] for line in lines] == [row.model for row in comparison.rows]
    for line, row in zip(lines, comparison.rows, strict=True):
        shares = [row.scores[name] / experts[name] for name in experts]
        for name, share in zip(experts, shares, strict=True):
            assert float(line[name]) == pytest.approx(row.scores[name], abs=1e-6)
            assert float(line[f"{name}_share"]) == pytest.approx(share, abs=1e-6)
        assert float(line["mean_share"]) == pytest.approx(np.mean(shares), abs=1e-6)


def test_experts_learned_and_the_merged_checkpoint_scores_as_the_table_says(first, problem):
    output, comparison, _ = first
    assert (output / "figure.png").read_bytes().startswith(PNG)
    base = nnx.to_pure_dict(nnx.state(problem.encoder))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    head = {"kernel": jnp.zeros((128, 4)), "bias": jnp.zeros(4)}
    like = {"encoder": base, "heads": {task.name: head for task in problem.tasks}}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    merged = ocp.load(str(output / "merged"), like)
    embedder = training.make_embedder(problem)
    scores = training.evaluate(embedder, merged["encoder"], merged["heads"], problem.tasks, "test")
    assert scores == pytest.approx(dict(comparison.rows[-1].scores))
    assert comparison.rows[1].scores["length"] > 0.9
    saved = ocp.load(str(output / "base"), like["encoder"])
    jax.tree.map(np.testing.assert_array_equal, saved, base)


def test_goes_on_from_the_experts_already_trained(first, problem, settings, trained, tmp_path):
    before, _, _ = first
    output = tmp_path / "run"
    shutil.copytree(before, output)
    shutil.rmtree(output / "experts" / "value")
    (output / "table.csv").unlink()
    _, said = run(problem, settings, output)
    assert trained == [1]
    assert said.count("trained before") == 2
    assert (output / "table.csv").read_bytes() == (before / "table.csv").read_bytes()


def test_an_interrupted_expert_is_trained_anew(problem, settings, monkeypatch, tmp_path):
    console = Console(file=io.StringIO())
    batches = training.batches

    def stopped(problem, settings, task):
        for i, batch in enumerate(batches(problem, settings, task)):
            if task == 1 and i == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(training, "batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train_experts(problem, settings, tmp_path, console)
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_other_settings_train_other_experts(first, problem, settings, trained, tmp_path):
    before, _, _ = first
    shutil.copytree(before / "experts", tmp_path / "experts")
    other = settings._replace(seed=1)
    pipeline.train_experts(problem, other, tmp_path / "experts", Console(file=io.StringIO()))
    assert trained == [0, 1, 2]


def test_the_same_seed_gives_the_same_table(first, problem, settings, tmp_path):
    before, _, _ = first
    run(problem, settings, tmp_path / "again")
    again = tmp_path / "again" / "table.csv"
    assert again.read_bytes() == (before / "table.csv").read_bytes()


def test_along_moves_on_the_line_from_base_to_merge():
    base, merged = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 1.0])}
    np.testing.assert_allclose(pipeline.along(base, merged, 1.5)["w"], [4.0, 0.5])


def test_printed_table(problem):
    scores = {"half": 0.8, "value": 0.5, "length": 0.9}
    rows = [
        Row("base", None, {"half": 0.4, "value": -0.1, "length": 0.45}),
        Row("experts", None, scores),
        Row("average", None, {"half": 0.72, "value": 0.25, "length": 0.9}),
        Row("moma", 1.5, {"half": 0.76, "value": 0.5, "length": 0.45}),
    ]
    comparison = Comparison(problem.tasks, rows, (1.0, 1.5), {"moma": (0.5, 0.6)})
    said = io.StringIO()
    Console(file=said, width=100).print(table(comparison))
    lines = [line.split() for line in said.getvalue().splitlines()]
    assert ["average", "72.0", "90%", "25.0", "50%", "90.0", "100%", "80.0%"] in lines
    assert ["moma", "1.5", "76.0", "95%", "50.0", "100%", "45.0", "50%", "81.7%"] in lines
    # 40 test texts: sqrt(.8 * .2 / 40), (1 - .25) / sqrt(39), sqrt(.9 * .1 / 40)
    assert "40 test texts a task, standard errors 4.7 to 12.0 points" in notes(comparison)
