"""Made-up images on which ten classes can be told apart, and a classifier with few weights."""

import numpy as np
import pytest

for extra in ("flax", "grain", "matplotlib", "rich", "scipy", "tokenizers", "typer"):
    pytest.importorskip(extra)


def blobs(count, seed):
    """Class c is bright at row c, under noise."""
    from experiments.noise.images import SIDE, Images

    rng = np.random.default_rng(seed)
    y = rng.integers(0, 10, count).astype(np.int32)
    x = rng.random((count, SIDE, SIDE)).astype(np.float32)
    x[np.arange(count), y] += 0.7
    return Images(x, y)


@pytest.fixture(scope="session")
def problem():
    from functools import partial

    from experiments.noise.images import Split
    from experiments.noise.problems import image_problem, init_classifier

    made = image_problem(Split(blobs(320, 0), blobs(100, 1), blobs(200, 2)))
    return made._replace(init=partial(init_classifier, widths=(64, 16)))
