"""Tables of merges and of selection, from rows whose means are known."""

import math
from itertools import product

import numpy as np
import pytest

from experiments.glue import report
from experiments.pages import number

MERGED = {
    ("moma", "True", "0"): (0.9, 0.7),
    ("moma", "True", "1"): (0.9, 0.9),
    ("rival", "True", "0"): (0.8, 0.6),
    ("rival", "True", "1"): (0.5, 0.5),
    ("once", "True", "1"): (0.7, 0.7),
    ("untuned", "False", "0"): (0.5, 0.5),
}


def merge_rows(found):
    return [
        {
            "split": "test", "optimizer": "moma", "experts": "sst2+cola", "task": task,
            "method": method, "tuned": tuned, "seed": seed, "share": str(share),
            "score": str(share),
        }
        for (method, tuned, seed), shares in found.items()
        for task, share in zip(("sst2", "cola"), shares, strict=True)
    ]  # fmt: skip


def cells(text, start):
    line = next(x for x in text.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_leads_are_paired_seed_by_seed(tmp_path):
    text = report.merging(merge_rows(MERGED), tmp_path)
    # Means over tasks: moma 0.8, 0.9; rival 0.7, 0.5; once (seed 1) 0.7; untuned (seed 0) 0.5.
    # On SST-2 alone: moma 0.9, 0.9; rival 0.8, 0.5; once 0.7; untuned 0.5.
    assert cells(text, "moma") == ["85.0 ± 5.0", "", "", "", "2"]
    assert cells(text, "rival") == ["60.0 ± 10.0", "", "25.0 ± 15.0", "25.0 ± 15.0", "2"]
    assert cells(text, "once") == ["70.0", "", "20.0", "20.0", "1"]
    assert cells(text, "untuned") == ["", "50.0", "30.0", "40.0", "1"]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows[2:6] == ["moma", "once", "rival", "untuned"]  # by lead, whatever the seeds


def test_every_size_has_its_table_and_spread_is_over_sets(tmp_path):
    rows = merge_rows(MERGED)
    fours = merge_rows({key: own for key, own in MERGED.items() if key[0] != "once"})
    for row in fours:
        row["experts"] = "+".join("ab"[int(row["seed"])] * 4)
        row["seed"] = "0"
    text = report.merging(fours + rows, tmp_path)
    fours, pairs = text.split("2 experts: mean share")
    assert "4 experts, 2 sets: mean share" in fours
    assert cells(fours, "rival") == ["60.0 ± 10.0", "", "25.0 ± 15.0", "25.0 ± 15.0", "1"]
    assert "| once |" not in fours
    assert cells(pairs, "rival") == ["60.0 ± 10.0", "", "25.0 ± 15.0", "25.0 ± 15.0", "2"]


def test_without_the_reference_there_is_a_table_all_the_same(tmp_path):
    rows = merge_rows({key: own for key, own in MERGED.items() if key[0] == "rival"})
    assert cells(report.merging(rows, tmp_path), "rival") == ["60.0 ± 10.0", "", "", "", "2"]


@pytest.fixture
def selected():
    """Two tasks, two seeds of magnitude and curvature, one of random; expert_value is 0.5."""
    rng = np.random.default_rng(0)
    return [
        {
            "split": "test", "optimizer": "moma", "scope": scope, "task": task, "seed": seed,
            "score": score, "density": density, "value": f"{rng.uniform(0.1, 0.5):.4f}",
            "expert_value": "0.5",
        }
        for score, scope, task, seed, density in product(
            ("magnitude", "curvature R, C", "random"), ("tensor", "global"), ("sst2", "cola"),
            ("0", "1"), ("0.1", "0.4"),
        )
        if score != "random" or seed == "0"
    ]  # fmt: skip


def test_gaps_are_of_the_same_seeds_and_their_error_is_over_tasks(selected, tmp_path):
    text = report.selection(selected, tmp_path)

    def shares(score, seeds):
        return np.array(
            [
                [
                    float(row["value"]) / 0.5
                    for row in selected
                    if (row["scope"], row["density"], row["score"]) == ("tensor", "0.1", score)
                    and (row["task"], row["seed"]) == (task, seed)
                ]
                for task in ("sst2", "cola")
                for seed in seeds
            ]
        ).reshape(2, len(seeds))

    for score, seeds in (("curvature R, C", "01"), ("random", "0")):
        own, plain = shares(score, seeds), shares("magnitude", seeds)
        gaps = (own - plain).mean(axis=1)
        error = abs(gaps[0] - gaps[1]) / 2  # of two values: std / sqrt(2)
        assert math.isclose(error, gaps.std(ddof=1) / np.sqrt(2))
        sign = "" if gaps.mean() < 0 else "+"
        first, *_, count = cells(text, score)
        assert (
            first == f"{number([own.mean()])} ({sign}{100 * gaps.mean():.1f} ± {100 * error:.1f})"
        )
        assert count == str(len(seeds))
    # And task by task, over seeds, with the mean of those that gain less than the most.
    gaps = shares("curvature R, C", "01") - shares("magnitude", "01")
    by_task = text.split("minus magnitude, by task")[1]
    signed = lambda values: ("" if np.mean(values) < 0 else "+") + number(values)
    for title, own in zip(("SST-2", "CoLA"), gaps, strict=True):
        assert cells(by_task, title)[0] == signed(own)
    rest = next(x for x in by_task.splitlines() if x.startswith("| mean without"))
    assert rest.split("|")[2].strip() in (signed([own.mean()]) for own in gaps)
