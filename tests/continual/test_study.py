"""Ways through small streams against plain loops and closed forms; every stage; the page."""

import csv
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.continual import cost, methods, report, run, stages, streams, worlds
from experiments.continual.methods import METHODS
from experiments.noise.forks import schedule
from optax_moma.continual import linearize

typer_testing = pytest.importorskip("typer.testing")

FEW = {
    "CMM": METHODS["CMM"]._replace(numbers=(None, 0.5)),
    "OPCM": METHODS["OPCM"]._replace(numbers=(0.5,)),
    "sequential": METHODS["sequential"],
    "EWC": METHODS["EWC"]._replace(numbers=(1.0,)),
    "CMM + to previous": METHODS["CMM + to previous"]._replace(numbers=(1e-3,)),
}


def plain(world, stream, start, task, linear, rate, seed=0):
    """One task, written out: the params after AdamW, and its second moments."""
    x, y = stream.tasks[task]["train"]
    rng = np.random.default_rng((seed, len(y)))
    rows = np.concatenate([rng.permutation(len(y)) for _ in range(2)]).reshape(-1, worlds.BATCH)
    apply = lambda body, x: streams.logits(body, stream.head, x)
    apply = linearize(apply, world.base) if linear else apply
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule("cosine", rate, len(rows), worlds.WARMUP), weight_decay=0.0),
    )
    params, state = start, tx.init(start)
    for i in rows:
        loss = lambda p, i=i: jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(apply(p, x[i]), y[i])
        )
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    nu = optax.tree.get(state, "nu")
    return params, jax.tree.map(lambda v: v / (1 - 0.999 ** len(rows)), nu)


def hits(world, stream, params, task, linear):
    x, y = stream.tasks[task]["test"]
    apply = lambda body, x: streams.logits(body, stream.head, x)
    apply = linearize(apply, world.base) if linear else apply
    return np.mean(np.argmax(apply(params, x), -1) == y)


@pytest.mark.parametrize("linear", [False, True])
def test_a_running_merge_is_the_loop_written_out(world, stream, linear):
    """CMM over two tasks: its accuracy after each, from plain training and the closed form."""
    order, method = world.orders[0], METHODS["CMM" if linear else "CMM, not linear"]
    found = stages.go_through(world, order, method, 1e-3, None, "test", 0)
    merged, experts, weights, want = world.base, [], [], np.full((2, 2), np.nan)
    for n, task in enumerate(order):
        expert, v = plain(world, stream, merged, task, linear, 1e-3)
        experts.append(expert)
        weights.append(v)
        total = jax.tree.map(lambda *v: sum(v), *weights)
        share = lambda v, t, w, w0, n=n: jnp.where(t > 0, v / t, 1 / (n + 1)) * (w - w0)
        terms = [jax.tree.map(share, v, total, w, world.base)
                 for v, w in zip(weights, experts, strict=True)]  # fmt: skip
        merged = jax.tree.map(lambda w0, *d: w0 + sum(d), world.base, *terms)
        want[n, : n + 1] = [hits(world, stream, merged, t, linear) for t in order[: n + 1]]
    np.testing.assert_allclose(found.accuracy, want, atol=0.051)  # one of 20 images
    assert found.bytes[0] == found.bytes[1]


def test_training_learns_a_task_and_forgets_the_other(world, stream):
    order = world.orders[0]
    found = stages.go_through(world, order, METHODS["sequential"], 3e-3, None, "test", 0)
    assert found.accuracy[0, 0] > 0.9 and found.accuracy[1, 1] > 0.9
    assert found.forgetting == pytest.approx(found.accuracy[0, 0] - found.accuracy[1, 0])
    assert found.forgetting > 0.3


def test_forgetting_is_the_fall_from_the_best():
    nan = np.nan
    accuracy = np.array([[0.9, nan, nan], [0.5, 0.8, nan], [0.6, 0.9, 0.7]])
    assert stages.forgetting(accuracy) == pytest.approx((0.3 + 0.0) / 2)


def test_a_strong_penalty_keeps_the_params(world, stream):
    """With a great strength EWC does not move from the first task; with none it is sequential."""
    order, ends = world.orders[0], []
    for strength in (0.0, 1e9):
        method = METHODS["EWC"]
        found = stages.go_through(world, order, method, 3e-3, strength, "test", 0)
        ends.append(found.accuracy)
    free = stages.go_through(world, order, METHODS["sequential"], 3e-3, None, "test", 0)
    np.testing.assert_array_equal(ends[0], free.accuracy)
    assert ends[1][1, 0] > ends[0][1, 0]


def test_elastic_adds_the_curvatures_and_keeps_the_newest():
    method, base = methods.elastic(), {"w": jnp.zeros(2)}
    state = method.init(base)
    for w, v in ((1.0, 2.0), (3.0, 5.0)):
        state = method.update(state, {"w": jnp.full(2, w)}, {"w": jnp.full(2, v)})
    np.testing.assert_array_equal(state.curvature["w"], [7, 7])
    np.testing.assert_allclose(method.params(state)["w"], [3, 3])


@pytest.mark.parametrize("kind", ["previous", "finetuned", "ridge"])
def test_corrections_bring_features_nearer(world, stream, kind):
    task = world.orders[0][0]
    name = "CMM, not linear + " + {"previous": "to previous", "finetuned": "to fine-tuned",
                                   "ridge": "ridge"}[kind]  # fmt: skip
    noise = iter(jax.random.split(jax.random.key(0), 8))
    near = lambda p: jax.tree.map(lambda w: w + 0.02 * jax.random.normal(next(noise), w.shape), p)
    merged, tuned = near(world.base), near(world.base)
    number = 1.0 if kind == "ridge" else 1e-3
    found = world.corrected(METHODS[name], number, merged, world.base, tuned, task)
    target = tuned if kind == "finetuned" else world.base
    x = stream.tasks[task]["train"].x
    gap = lambda p: float(jnp.mean(jnp.abs(streams.hidden(p, x) - streams.hidden(target, x))))
    assert gap(found) < gap(merged)
    np.testing.assert_array_equal(found["layer0"]["kernel"], merged["layer0"]["kernel"])


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_stage_and_the_page(world, tmp_path, monkeypatch):
    results, page = tmp_path / "results", tmp_path / "RESULTS.md"
    monkeypatch.setattr(world, "methods", FEW, raising=False)
    monkeypatch.setattr(run, "open_world", lambda stream: world)
    small = {"classifier": 4, "MiniLM": 2}
    config = cost.Config(vocabulary=150, width=32, layers=1, heads=2, ffn=32, positions=32)
    monkeypatch.setattr(run, "measure", lambda rounds: cost.measure(rounds, small, config))

    def invoke(*arguments):
        done = typer_testing.CliRunner().invoke(run.app, [*arguments, "--results", str(results)])
        assert done.exit_code == 0, (done.output, done.exception)

    invoke("tune", "classes")
    invoke("study", "classes")
    invoke("cost", "--rounds", "1")
    tried = rows_of(results / "tuning.csv")
    assert len(tried) == 2 * (2 + 1 + 1 + 1) + 1  # a correction has its method's learning rate
    assert len(rows_of(results / "accuracy.csv")) == 2 * (len(FEW) * 3 + 2 * 2)
    sizes = {(r["method"], r["bytes"]) for r in rows_of(results / "costs.csv")}
    assert len(sizes) == len(FEW)  # the same after every task
    assert [r["model"] for r in rows_of(results / "cost.csv")] == ["classifier", "MiniLM"]
    rate, number = stages.chosen(results, "classes", "CMM")
    best = max((r for r in tried if r["method"] == "CMM"), key=lambda r: float(r["dev"]))
    assert rate == float(best["rate"]) and str(number) == best["number"]

    before = {file.name: file.read_bytes() for file in results.glob("*.csv")}
    invoke("tune", "classes")
    invoke("study", "classes")
    assert before == {file.name: file.read_bytes() for file in results.glob("*.csv")}

    invoke("report", "--page", str(page))
    blocks = dict(
        re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end \1 -->", page.read_text(), re.DOTALL)
    )
    assert list(blocks) == list(report.BLOCKS)
    assert (results / "accuracy_classes.png").read_bytes().startswith(b"\x89PNG")
    ends = [
        np.mean([float(r["accuracy"]) for r in rows_of(results / "accuracy.csv")
                 if (r["method"], r["order"], r["stage"]) == ("CMM", order, "1")])
        for order in "01"
    ]  # fmt: skip
    line = next(x for x in blocks["accuracy"].splitlines() if x.startswith("| CMM |"))
    assert line.split("|")[3:5] == [f" {100 * end:.1f} " for end in ends]


def test_a_method_that_was_not_tuned(tmp_path):
    with pytest.raises(ValueError, match="OPCM was not tuned on classes yet: run the stage tune"):
        stages.chosen(tmp_path, "classes", "OPCM")


# Texts


@pytest.mark.parametrize("name", ["CMM", "sequential", "OPCM", "CMM, not linear + to previous"])
def test_ways_through_texts(texts, name):
    method = texts.methods[name]
    number, correction = (None, 1e-4) if method.of else (method.numbers[0], None)
    order = texts.orders[0]
    found = stages.go_through(texts, order, method, 3e-3, number, "test", 0, correction)
    assert np.isfinite(found.accuracy[np.tril_indices(2)]).all()
    assert found.accuracy[0, 0] >= 0.5 and found.bytes[0] == found.bytes[1]


def test_experts_from_the_base_are_trained_once(texts):
    method = texts.methods["OPCM"]
    task = texts.orders[0][0]
    first = texts.train(texts.base, task, method, 3e-3, None, 0)
    head = texts._heads[task]
    again = texts.train(texts.base, task, method, 3e-3, None, 1)
    assert first[0] is again[0] and texts._heads[task] is head
    other = texts.train(first[0], task, method, 3e-3, None, 0)
    assert other[0] is not first[0]
    found = list(texts.references(texts.orders[0], 0))
    assert [task for _, task, _ in found] == list(texts.orders[0])
