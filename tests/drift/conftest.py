"""Makes the studies importable."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments is no installed package

for extra in ("flax", "matplotlib", "typer"):
    pytest.importorskip(extra)
