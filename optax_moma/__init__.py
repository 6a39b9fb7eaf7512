"""Low-rank momentum for Optax whose state is also what a curvature-aware merge needs."""

import importlib
from typing import TYPE_CHECKING, Any

from . import continual, diagnostics, merging
from ._curvature import curvature_from, saliency
from ._moma import ScaleByMomaState, moma, scale_by_moma
from ._moments import Factored
from ._state import StateSize, state_partition_specs, state_size
from ._umtam import ScaleByUmtamState, scale_by_umtam, umtam
from .merging import merge

if TYPE_CHECKING:
    from . import checkpoints as checkpoints
    from . import moe as moe

__all__ = [
    "Factored",
    "ScaleByMomaState",
    "ScaleByUmtamState",
    "StateSize",
    "continual",
    "curvature_from",
    "diagnostics",
    "merge",
    "merging",
    "moma",
    "saliency",
    "scale_by_moma",
    "scale_by_umtam",
    "state_partition_specs",
    "state_size",
    "umtam",
]

_NEEDS = {"checkpoints": "checkpoint", "moe": "flax"}
"""Modules that need an extra: they are imported when they are first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _NEEDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: {__name__}.{name} needs pip install 'optax-moma[{_NEEDS[name]}]'",
            name=error.name,
        ) from error
