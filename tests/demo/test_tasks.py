"""Reading, deduplication, splits and scores, against values worked out by hand."""

import numpy as np
import pytest

from optax_moma.demo.files import TEXTS, default_cache
from optax_moma.demo.tasks import (
    SOURCES,
    Task,
    Text,
    deduplicate,
    make_tasks,
    parse,
    read_texts,
    score,
    split_groups,
    standard_error,
)

CLASSES = Task("a", "A", 2, {})
REGRESSION = Task("b", "B", 1, {})
SIZES = {"train": 40, "dev": 8, "test": 12}


def text(words, source="tweets", group="tweets 1", rating=0.0):
    return Text(words, source, group, rating, abs(rating))


def corpus():
    """For each source 30 groups of four texts, rated from -4 to 4."""
    ratings = np.linspace(-4, 4, 4 * 30)
    return [
        Text(f"{source} text {i}", source, f"{source} {i // 4}", float(r), float(r) ** 2)
        for source in SOURCES
        for i, r in enumerate(ratings)
    ]


def test_parse_joins_texts_with_the_mean_and_spread_of_their_ratings():
    truth = "1_1\t9.9\tfish &amp; chips\r\n1_2\t0\tplain\r\n7_1\t0\tother\n"
    votes = "1_1\t0\t0\t[1, 3]\r\n7_1\t0\t0\t[-1, -1, 2]\r\n1_2\t0\t0\t[0]\r\n"
    first, second, third = parse("products", truth, votes)
    assert first == Text("fish & chips", "products", "products 1", 2.0, 1.0)
    assert second == Text("plain", "products", "products 1", 0.0, 0.0)
    assert (third.group, third.rating) == ("products 7", 0.0)
    assert third.spread == pytest.approx(np.sqrt(2))


def test_duplicates_are_found_across_sources_and_the_first_stays():
    found = deduplicate([text("Wow!"), text("?!"), text("wow", "movies"), text("Wow wow")])
    assert [(t.text, t.source) for t in found] == [("Wow!", "tweets"), ("Wow wow", "tweets")]


def test_groups_stay_together_in_the_right_proportions_and_seeds_decide():
    groups = [f"g{i // 7}" for i in range(700)]
    splits = split_groups(groups, np.random.default_rng(0))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(700))
    members = {name: {groups[i] for i in rows} for name, rows in splits.items()}
    assert {name: len(names) for name, names in members.items()} == {
        "train": 70,
        "dev": 10,
        "test": 20,
    }
    assert not members["train"] & members["dev"]
    assert not (members["train"] | members["dev"]) & members["test"]
    again = split_groups(groups, np.random.default_rng(0))
    other = split_groups(groups, np.random.default_rng(1))
    assert all(np.array_equal(splits[name], again[name]) for name in splits)
    assert not np.array_equal(splits["test"], other["test"])


def test_no_text_or_group_is_trained_on_by_one_task_and_tested_by_another():
    texts = corpus()
    tasks = make_tasks(texts, SIZES, seed=3)
    groups = {
        split: {texts[i].group for task in tasks for i in task.splits[split].rows}
        for split in SIZES
    }
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["dev"]
    assert not groups["dev"] & groups["test"]


def test_targets_are_what_the_tasks_say():
    texts = corpus()
    polarity, rating, source, dissent = make_tasks(texts, SIZES, seed=0)
    for split, size in SIZES.items():
        rows, targets = polarity.splits[split]
        assert all(texts[i].source == "movies" and abs(texts[i].rating) > 0.5 for i in rows)
        assert [texts[i].rating > 0 for i in rows] == list(targets == 1)
        rows, targets = rating.splits[split]
        assert len(rows) == size and all(texts[i].source == "tweets" for i in rows)
        np.testing.assert_allclose(targets, [texts[i].rating for i in rows], rtol=1e-6)
        rows, targets = source.splits[split]
        assert np.bincount(targets.astype(int)).tolist() == [size // 4] * 4
        assert [list(SOURCES).index(texts[i].source) for i in rows] == targets.tolist()
        rows, targets = dissent.splits[split]
        np.testing.assert_allclose(targets, [texts[i].spread for i in rows], rtol=1e-6)
    assert [t.classes for t in (polarity, rating, source, dissent)] == [2, 1, 4, 1]


def test_the_same_seed_gives_the_same_tasks():
    first, again, other = (make_tasks(corpus(), SIZES, seed) for seed in (5, 5, 6))
    for a, b in zip(first, again, strict=True):
        assert all(np.array_equal(a.splits[s].rows, b.splits[s].rows) for s in SIZES)
    assert not np.array_equal(first[1].splits["train"].rows, other[1].splits["train"].rows)


def test_accuracy_looks_at_the_first_outputs_only():
    outputs = np.array([[2, 1, 9, 9], [0, 3, 9, 9], [5, 4, 9, 9], [1, 2, 9, 9]], np.float32)
    assert score(CLASSES, outputs, np.array([0, 1, 1, 1])) == 0.75
    assert CLASSES.metric == "accuracy"


def test_pearson_looks_at_the_first_output():
    outputs = np.array([[1, 9], [2, -9], [4, 0]], np.float32)
    # deviations -4/3, -1/3, 5/3 and -1, 1, 0: covariance 1, variances 14/3 and 2
    assert score(REGRESSION, outputs, np.array([0, 2, 1])) == pytest.approx(1 / np.sqrt(28 / 3))
    assert score(REGRESSION, np.ones((3, 4)), np.arange(3)) == 0.0
    assert REGRESSION.metric == "Pearson r"


def test_standard_errors():
    assert standard_error(CLASSES, 0.8, 400) == pytest.approx(0.02)
    assert standard_error(REGRESSION, 0.6, 65) == pytest.approx(0.08)


@pytest.mark.skipif(
    not (default_cache() / TEXTS.filename).exists(), reason="the rated texts are not cached"
)
def test_the_real_archive():
    texts = read_texts(default_cache())
    assert texts[0].text.startswith("Somehow I was blessed with some really amazing friends")
    assert texts[0].rating == pytest.approx(2.726315789)
    assert len({t.text for t in texts}) == len(texts) == 23_447
    assert {t.source for t in texts} == set(SOURCES)
