"""The study in small: random encoder, made-up texts, learnable tasks, its own cache and results."""

import numpy as np
import pytest

pytest.importorskip("tokenizers")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Three tasks, on the share of high words in random texts and on their length."""
    from flax import nnx

    from experiments.glue import experts, stages, tasks
    from experiments.glue.experts import Recipe, Study
    from optax_moma.demo.encoder import Config, Encoder

    rng = np.random.default_rng(0)
    config = Config(vocabulary=150, width=128, layers=1, heads=4, ffn=128, positions=32)

    def task(name, target):
        share, short = rng.uniform(size=200), np.arange(200) % 2
        tokens = (
            103 + rng.integers(0, 20, (200, 32)) + 20 * (rng.random((200, 32)) < share[:, None])
        )
        tokens[short == 1, 14:] = 0
        tokens, targets = tokens.astype(np.int32), target(share, short).astype(np.float32)
        parts = zip(("train", "dev", "test"), np.split(np.arange(200), [128, 160]), strict=True)
        splits = {split: tasks.Examples(tokens[i], targets[i]) for split, i in parts}
        return tasks.Task(name, tasks.KINDS[name], splits)

    made = [
        task("cola", lambda share, short: share > 0.5),
        task("sick", lambda share, short: short + (share > 0.5)),
        task("sts", lambda share, short: 5 * share),
    ]
    folder = tmp_path_factory.mktemp("glue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "RATES", (1e-3, 3e-3))
        patch.setattr(stages, "RATE_TASKS", ("cola", "sick"))
        # One length, so that everything is compiled once.
        patch.setattr(experts, "BUCKET", 32)
        patch.setattr(Recipe, "__new__", _with_defaults(Recipe.__new__, batch=16, epochs=2, rank=4))
        yield Study(
            Encoder(config, rngs=nnx.Rngs(0)),
            {t.name: t for t in made},
            folder / "cache",
            folder / "results",
        )


def _with_defaults(new, **defaults):
    return lambda cls, *args, **given: new(cls, *args, **(defaults | given))
