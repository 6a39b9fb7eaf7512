"""Optax's own contract tests, as its wheel ships them, on our optimizers.

Each suite is imported with `absl.testing.parameterized` patched: its table of optimizers is
replaced by ours, and its tests of other things are dropped.
"""

import importlib.util
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import optax
import optax.contrib
import pytest
from absl.testing import parameterized
from optax._src import alias

import optax_moma as om

# The suites wrap each factory in inject_hyperparams, which traces every number of its signature.
# So the factories bind the numbers that decide shapes, and take only those that may be traced.


def moma_default(learning_rate: optax.ScalarOrSchedule, b1=0.9, b2=0.999, weight_decay=0.0):
    return om.moma(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)


def moma_matrix(learning_rate: optax.ScalarOrSchedule, b1=0.9, b2=0.999, weight_decay=0.0):
    return om.moma(learning_rate, 2, b1, b2, min_dim_size_to_factor=1, weight_decay=weight_decay)


def umtam_default(learning_rate: optax.ScalarOrSchedule, b1=0.9, b2=0.999, gamma=0.9, alpha=0.99):
    return om.umtam(learning_rate, b1=b1, b2=b2, gamma=gamma, alpha=alpha)


def umtam_matrix(learning_rate: optax.ScalarOrSchedule, b1=0.9, b2=0.999, gamma=0.9, alpha=0.99):
    return om.umtam(learning_rate, 2, b1, b2, gamma=gamma, alpha=alpha)


LEARNING_RATES = {
    moma_default: 1e-1,
    moma_matrix: 1e-2,  # its updates keep their size to the end
    umtam_default: 1e-2,
    umtam_matrix: 1e-2,
}
ROWS = [
    {"opt_name": factory.__name__, "opt_kwargs": {"learning_rate": learning_rate}}
    for factory, learning_rate in LEARNING_RATES.items()
]
NAMED_PARAMETERS = parameterized.named_parameters


def drop_test(_: Callable) -> None:
    """A decorator for a test that is not about the optimizers of a table."""


def product_over_ours(*sequences: Iterable[Mapping[str, Any]], **grid: Iterable) -> Callable:
    """`parameterized.product` over our rows, with names that say what is tested."""
    if not sequences or "opt_name" not in (theirs := next(iter(sequences[0]))):
        return drop_test
    absent = dict.fromkeys(theirs.keys() - ROWS[0].keys())  # wrappers: none around ours
    cases = []
    for row, *values in itertools.product(ROWS, *grid.values()):
        words = [row["opt_name"], *(getattr(value, "__name__", str(value)) for value in values)]
        name = "_" + "_".join(word.strip("_") for word in words)
        grid_values = dict(zip(grid, values, strict=True))
        cases.append({"testcase_name": name, **row, **absent, **grid_values})
    return NAMED_PARAMETERS(*cases)


def named_over_ours(*cases: Any) -> Callable:
    """`parameterized.named_parameters` over our optimizers, where theirs is a table of some."""
    if len(cases) != 1 or "adamw" not in dict(cases[0]):
        return drop_test
    return NAMED_PARAMETERS(
        *((f"_{factory.__name__}", factory(rate)) for factory, rate in LEARNING_RATES.items())
    )


def load_suite(name: str, **patches: Callable) -> ModuleType:
    """Import one of Optax's test modules under patches of `parameterized`."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None, f"this Optax ships no {name}"
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.multiple(parameterized, **patches),
        mock.patch.dict(os.environ),  # the sharding suite sets XLA_FLAGS
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the sharding suite builds deprecated optimizers
        spec.loader.exec_module(module)
    return module


# The suites look a factory up by its name.
for factory in LEARNING_RATES:
    setattr(optax.contrib, factory.__name__, factory)
    setattr(alias, factory.__name__, factory)

ContribTest = load_suite("optax.contrib._common_test", product=product_over_ours).ContribTest
AliasTest = load_suite("optax._src.alias_test", product=product_over_ours).AliasTest
sharding_suite = load_suite("optax._src.sharding_test", named_parameters=named_over_ours)
# It skips its tests where the text of JAX's version sorts before "0.7.2", as "0.10.2" does.
sharding_suite.jax = ModuleType("jax")
vars(sharding_suite.jax).update(vars(jax), __version__="99")
ShardingTest = sharding_suite.ShardingTest


@pytest.mark.parametrize("alias_of_ours", [om.moma, om.umtam])
def test_learning_rate_is_annotated_as_a_schedule(alias_of_ours: Callable):
    """What the suites read from a signature, read from the aliases behind the factories."""
    annotation = inspect.signature(alias_of_ours).parameters["learning_rate"].annotation
    assert annotation == optax.ScalarOrSchedule


def test_every_suite_runs_every_optimizer():
    """The patches meet the tables that they replace; Optax may move them."""
    for suite, least in ((ContribTest, 6), (AliasTest, 6), (ShardingTest, 3)):
        tests = [name for name in dir(suite) if name.startswith("test_") and getattr(suite, name)]
        for factory in LEARNING_RATES:
            ours = [name for name in tests if f"_{factory.__name__}" in name]
            assert len(ours) >= least, (suite, factory.__name__, tests)
        assert all(any(f"_{f.__name__}" in name for f in LEARNING_RATES) for name in tests)
    assert len(jax.devices()) == 8
