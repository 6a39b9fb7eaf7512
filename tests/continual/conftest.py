"""The studies in small: made-up images in place of the data sets, a random encoder, short texts."""

import numpy as np
import pytest

for extra in ("flax", "matplotlib", "rich", "scipy", "tokenizers", "typer"):
    pytest.importorskip(extra)


def blobs(count, seed):
    """Class c is bright at row c, under noise."""
    from experiments.noise.images import SIDE, Images

    rng = np.random.default_rng(seed)
    y = (np.arange(count) % 10).astype(np.int32)
    x = 0.5 * rng.random((count, SIDE, SIDE)).astype(np.float32)
    x[np.arange(count), y] += 0.5
    return Images(x, y)


@pytest.fixture(scope="session")
def stream():
    """Two classes at a time, 100 images each, from a base that has seen 20."""
    from experiments.continual import streams

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "SIZES", {"classes": (100, 20, 20)})
        patch.setattr(streams, "BASE_IMAGES", {"classes": 20})
        yield streams.class_stream(blobs(620, 0), blobs(150, 1), blobs(150, 2))


@pytest.fixture(scope="session")
def world(stream):
    """Two tasks of it, two orders and two learning rates."""
    from experiments.continual.worlds import Pictures

    made = Pictures(stream, 2)
    made.orders = [order[:2] for order in stream.orders[:2]]
    made.rates = (1e-3, 3e-3)
    return made


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Three tasks on the share of high words in random texts."""
    from flax import nnx

    from experiments.continual.texts import Texts
    from experiments.glue.experts import Study
    from experiments.glue.tasks import KINDS, Examples, Task
    from optax_moma.demo.encoder import Config, Encoder

    config = Config(vocabulary=150, width=32, layers=1, heads=2, ffn=32, positions=32)
    rng = np.random.default_rng(0)

    def task(name, limit):
        share = rng.uniform(size=96)
        tokens = 104 + rng.integers(0, 20, (96, 32)) + 20 * (rng.random((96, 32)) < share[:, None])
        parts = zip(("train", "dev", "test"), np.split(np.arange(96), [64, 80]), strict=True)
        y = (share > limit).astype(np.float32)
        made = {split: Examples(tokens[i].astype(np.int32), y[i]) for split, i in parts}
        return Task(name, KINDS[name], made)

    tasks = {name: task(name, limit) for name, limit in (("trec", 0.3), ("sst2", 0.7))}
    folder = tmp_path_factory.mktemp("texts")
    made = Texts(Study(Encoder(config, rngs=nnx.Rngs(0)), tasks, folder, folder))
    made.rates = (3e-3,)
    made.orders = made.orders[:1]
    return made
