"""The study of merged experts in small: a made-up corpus, a random encoder, seconds of training."""

import csv
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
for extra in ("grain", "matplotlib", "tokenizers", "typer"):
    pytest.importorskip(extra)

from matplotlib.figure import Figure  # noqa: E402

from experiments.glue import tasks  # noqa: E402
from experiments.moe import cost, language, report, text, training  # noqa: E402
from experiments.moe.variants import VARIANTS, Sizes, Stack, make_identities  # noqa: E402
from experiments.pages import write_report  # noqa: E402
from experiments.pretrain import model  # noqa: E402
from experiments.records import Records  # noqa: E402
from optax_moma.demo.encoder import Config, Encoder, embed  # noqa: E402
from optax_moma.moe import Dense, ExpertWeights  # noqa: E402


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# The plan


class Losses:
    """A problem whose dev losses are a function of the rate alone."""

    def __init__(self, monkeypatch, best):
        self.runs = []
        self.problem = training.Problem("toy", min, min, min, {}, {}, (1.0, 2.0, 4.0), "loss")
        monkeypatch.setattr(training, "build", lambda *_: None)
        monkeypatch.setattr(training, "train", partial(self.train, best))

    def train(self, best, problem, program, variant, rate, seed):
        self.runs.append((rate, seed))
        return {"dev_loss": float(abs(np.log2(rate / best))), "seconds": 0.0}


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2.0, [1, 2, 4]),
        (4.0, [1, 2, 4, 8]),
        (1.0, [1, 2, 4, 0.5]),
        (8.0, [1, 2, 4, 8, 16]),
    ],
)
def test_the_best_rate_lies_within_the_grid(tmp_path, monkeypatch, best, tried):
    toy = Losses(monkeypatch, best)
    training.study(toy.problem, Records(tmp_path / "toy.csv", training.KEY), ["dense"])
    assert toy.runs == [*((rate, 0) for rate in tried), (best, 1), (best, 2)]


def test_a_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    toy = Losses(monkeypatch, 4.0)
    path = tmp_path / "toy.csv"
    training.study(toy.problem, Records(path, training.KEY), ["dense"])
    whole, runs = path.read_text(), list(toy.runs)
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    toy.runs.clear()
    training.study(toy.problem, Records(path, training.KEY), ["dense"])
    assert toy.runs == runs[3:] and path.read_text() == whole


# Variants


def test_r_identities_multiply_the_merge_by_r():
    weights = ExpertWeights(6, 8, 3, rank=3, rngs=nnx.Rngs(0))
    make_identities(weights)
    gates = jnp.array([[0.2, 0.3, 0.5]])
    W0, W = np.float64(weights.base[...]), np.float64(weights.kernels[...])
    want = W0 + 3 * sum(s * (w - W0) for s, w in zip((0.2, 0.3, 0.5), W, strict=True))
    np.testing.assert_allclose(weights.merged(gates).kernel[0], want, atol=1e-5)


def test_the_published_metric_is_a_scale_at_its_start():
    """The same outputs and the same gradients of base and experts, r times the Euclidean."""
    sizes, gradients = Sizes(4, 6, 3), {}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)

    def loss(stack):
        return jnp.mean((stack(0, x, None).y - 1) ** 2)

    for name in ("domain, r identities", "domain, scale r", "domain"):
        stack = Stack(VARIANTS[name], sizes, 1, rngs=nnx.Rngs(0))
        shared = Stack(VARIANTS["domain"], sizes, 1, rngs=nnx.Rngs(0)).layers[0]
        stack.layers[0].router = shared.router
        for ours, theirs in ((stack.layers[0].up, shared.up), (stack.layers[0].down, shared.down)):
            ours.kernels[...], ours.base[...] = theirs.kernels[...], theirs.base[...]
        value, found = nnx.jit(nnx.value_and_grad(loss))(stack)
        gradients[name] = value, found["layers"][0]["up"]["kernels"][...]
    identities, scaled, plain = (gradients[n] for n in gradients)
    np.testing.assert_allclose(identities[0], scaled[0], rtol=1e-5)
    np.testing.assert_allclose(identities[1], scaled[1], rtol=1e-3, atol=1e-6)
    ratio = jnp.linalg.norm(scaled[1]) / jnp.linalg.norm(plain[1])
    assert 2.5 < float(ratio) < 3.5


@pytest.mark.parametrize("name", VARIANTS)
def test_an_upcycled_stack_starts_as_the_dense_network(name):
    """Where gates are even; the second layer's base, in the dynamic variant, is the first's."""
    rng = np.random.default_rng(0)
    pairs = [
        tuple(
            Dense(jnp.asarray(rng.normal(size=s), jnp.float32), jnp.ones(s[1]))
            for s in ((4, 6), (6, 4))
        )
        for _ in range(2)
    ]
    stack = Stack(VARIANTS[name], Sizes(4, 6, 2), 2, rngs=nnx.Rngs(0), upcycled=pairs)
    for _, module in nnx.iter_modules(stack):
        if hasattr(module, "gate"):
            module.gate[...] = jnp.zeros_like(module.gate[...])
    x, base = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32), stack.start()
    for i, (up, down) in enumerate(pairs):
        routed = stack(i, x, base)
        want = nnx.gelu(x @ up.kernel + up.bias) @ down.kernel + down.bias
        # Signs of experts decide ties' masks, and two of four experts are not their mean.
        loose = VARIANTS[name].kind == "sparse" or VARIANTS[name].method == "ties"
        error = float(jnp.abs(routed.y - want).max() / jnp.abs(want).max())
        assert error < (0.5 if loose else 1e-4)
        np.testing.assert_allclose(routed.evenness, 0.5 if name.startswith("sparse") else 1, 1e-5)
        base = routed.base
    assert (base is not None) == VARIANTS[name].shared


# Language


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(30)]
    for source in ("one", "two"):
        documents = [" ".join(rng.choice(words, 60)) for _ in range(40)]
        (folder / f"{source}.txt").write_text("\n\x1e\n".join(documents))
    return folder


SMALL = model.Config(vocabulary=300, width=16, layers=2, heads=2, length=16)


@pytest.fixture(scope="module")
def problem(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return language.language(cache, str(corpus), SMALL, segment=4, batch=4, steps=12)


def test_language_study_and_its_report(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SEEDS", (0, 1))
    names = ["soft", "dynamic, metric"]
    training.study(
        problem._replace(rates=(1e-2, 2e-2)),
        Records(tmp_path / "language.csv", training.KEY),
        names,
    )
    rows = read(tmp_path / "language.csv")
    assert {row["variant"] for row in rows} == set(names)
    # A constant guess among 300 tokens costs 5.7; bytes of eight letters are soon known better.
    assert all(float(row["test_loss"]) < 5.3 for row in rows)
    assert all(0 < float(row["dev_evenness"]) <= 1.0001 for row in rows)
    page = tmp_path / "RESULTS.md"
    write_report(tmp_path, page, report.BLOCKS)
    text = page.read_text()
    soft, other = (report.best(rows, name) for name in names)
    more = np.mean([float(other[s]["test_loss"]) - float(soft[s]["test_loss"]) for s in soft])
    assert f"{more:.3f} ±" in text and (tmp_path / "language.png").exists()


def test_a_loss_far_off_is_drawn_at_the_edge():
    rows = [
        {"variant": "soft", "seed": "0", "learning_rate": rate, "dev_loss": loss}
        for rate, loss in (("0.001", "0.4"), ("0.002", "1.6"))
    ]
    axes = Figure().subplots()
    report._rates(rows, axes)
    assert axes.get_ylim()[1] < 1 and [text.get_text() for text in axes.texts] == ["1.60"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["soft"]


def test_the_same_data_for_all_variants_and_other_data_for_other_seeds(problem):
    first, again, other = (problem.batches(seed)[0]["tokens"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(
        np.unique(np.concatenate([problem.dev["tokens"], problem.test["tokens"]]), axis=0)
    ) == len(problem.dev["tokens"]) + len(problem.test["tokens"])


@pytest.mark.parametrize("name", ["dynamic, metric", "ties, metric"])
def test_a_decoder_sees_no_later_segment(name):
    decoder = language.Decoder(VARIANTS[name], SMALL, 4, nnx.Rngs(0))
    graph, params = nnx.split(decoder)
    run = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])
    tokens = jnp.arange(16)[None] + 5
    np.testing.assert_array_equal(
        run(params, tokens)[:, :8], run(params, tokens.at[:, 8:].add(3))[:, :8]
    )


# Text


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)

    def examples(count):
        labels = rng.integers(0, 2, count)
        tokens = 103 + rng.integers(0, 20, (count, 40)) + 20 * labels[:, None]
        return tasks.Examples(tokens.astype(np.int32), labels.astype(np.float32))

    splits = {"train": examples(96), "dev": examples(40), "test": examples(40)}
    return tasks.Task("sst2", tasks.KINDS["sst2"], splits)


ENCODER = Config(vocabulary=150, width=16, layers=2, heads=2, ffn=32, positions=40)


def test_a_classifier_is_the_encoder_with_its_last_layer_taken_apart(task):
    encoder = Encoder(ENCODER, rngs=nnx.Rngs(0))
    opened = text.text(task, encoder, rank=2)
    tokens = task.splits["dev"].tokens[:, : text.LENGTH]
    classifier = opened.make(VARIANTS["dense"], 0)
    found, _, _ = classifier(opened.dev["states"], tokens)
    want = classifier.head(embed(encoder, tokens))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_text_study_learns(task, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SEEDS", (0,))
    monkeypatch.setattr(training, "FURTHEST", 0)
    opened = text.text(task, Encoder(ENCODER, rngs=nnx.Rngs(0)), rank=2, epochs=6)
    records = Records(tmp_path / "sst2.csv", training.KEY)
    training.study(opened._replace(rates=(1e-2,)), records, ["domain, metric"])
    (row,) = read(tmp_path / "sst2.csv")
    assert float(row["test_accuracy"]) > 0.9 and int(row["steps"]) == 18
    write_report(tmp_path, tmp_path / "RESULTS.md", {})


# Cost


def test_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cost, "LAYERS", {n: cost.LAYERS[n] for n in ("soft", "domain, metric of rank 4")}
    )
    small = partial(cost.layer, width=8, hidden=12, batch=2, length=4)
    monkeypatch.setitem(cost.SETUPS, "layer", small)
    cost.run("layer", tmp_path, 1)
    soft, metric = read(tmp_path / "cost_layer.csv")
    assert float(soft["of_soft"]) == 1 and float(metric["milliseconds"]) > 0
    # The base, and the metrics of 4 experts in two layers: 8 = 2 x 4, 12 = 3 x 4.
    more = 2 * 8 * 12 + 8 + 12 + 2 * 4 * 4 * (4 + 16 + 9 + 16)
    assert int(metric["parameters"]) - int(soft["parameters"]) == more
    page = tmp_path / "RESULTS.md"
    write_report(tmp_path, page, report.BLOCKS)
    assert "domain, metric of rank 4" in page.read_text()
