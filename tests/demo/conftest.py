"""A problem as the demo's, in small: random encoder, made-up texts, learnable tasks."""

import numpy as np
import pytest
from flax import nnx

from optax_moma.demo import training
from optax_moma.demo.encoder import Config, Encoder
from optax_moma.demo.tasks import Examples, Task
from optax_moma.demo.training import Problem, Settings

# Wide enough that the optimizer treats the matrices as such.
CONFIG = Config(vocabulary=150, width=128, layers=1, heads=4, ffn=128, positions=6)


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """The training step of a problem, which all runs of the session share, whatever their seed."""
    made, make_step = {}, training.make_step

    def shared(problem, settings):
        steps = training.steps(problem, settings)
        key = id(problem.encoder), steps, settings._replace(seed=0)
        if key not in made:
            made[key] = problem, make_step(problem, settings)  # the problem keeps its identity
        return made[key][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_step", shared)
        yield


@pytest.fixture(scope="session")
def settings():
    return Settings(seed=0, length=6, batch=8, learning_rate=1e-2, rank=4)


@pytest.fixture(scope="session")
def problem():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 150, (160, 6)).astype(np.int32)
    tokens[::3, 4:] = 0
    first = tokens[:, 0].astype(np.float32)
    train, dev, test = np.split(rng.permutation(160), [96, 120])

    def task(name, classes, targets):
        rows = {"train": train, "dev": dev, "test": test}
        return Task(
            name, f"Task {name}", classes, {s: Examples(r, targets[r]) for s, r in rows.items()}
        )

    tasks = [
        task("half", 2, (first > 75).astype(np.float32)),
        task("value", 1, first),
        task("length", 4, (tokens[:, 4] == 0).astype(np.float32)),
    ]
    return Problem(Encoder(CONFIG, rngs=nnx.Rngs(0)), tokens, tasks)
