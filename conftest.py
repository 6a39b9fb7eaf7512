"""Settings of the test run: eight CPU devices, compiled programs kept, slow tests, Hypothesis's
profiles, extras.

This file lies in the root because the doctests of the package need it as much as `tests/` does.
"""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # experiments is no installed package
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before the first backend starts
# XLA's decompositions run in SciPy's OpenBLAS, whose idle threads spin and take the cores from the
# other processes of the run.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of a run's time is XLA's: what it compiles is there for the other processes and for the next
# run, which takes a third of the time, until `pytest --cache-clear`.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache/d/compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from hypothesis import settings

# Every process of the run has eight CPU devices: the sharding tests need no process of their own.
jax.config.update("jax_num_cpu_devices", 8)

MAPS = Path("/proc/self/maps")
"""One line for each stretch of memory that this process has mapped, on Linux."""


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Every compiled program maps memory, and Linux gives a process no more than 65,530 maps.

    The compilation that goes beyond ends the process with a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


# No deadline: the first example of a test pays for its compilation.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Doctests import every module of the package; these need an extra that may not be installed.
MODULES_OF_EXTRAS = {
    "orbax": ["optax_moma/checkpoints", "optax_moma/continual.py"],
    "pydantic": ["optax_moma/checkpoints"],
    "flax": ["optax_moma/demo", "optax_moma/moe"],
    "bayes_opt": ["optax_moma/merging/_search.py"],
    "typer": ["optax_moma/cli"],
    "matplotlib": ["optax_moma/diagnostics/_figures.py"],
}
collect_ignore = [
    module
    for extra, modules in MODULES_OF_EXTRAS.items()
    if importlib.util.find_spec(extra) is None
    for module in modules
]
# Imports the libraries whose outputs it stores; only its outputs are needed here.
collect_ignore.append("tests/golden/make_golden.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
