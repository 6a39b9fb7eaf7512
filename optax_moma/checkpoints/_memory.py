"""How much memory a merge will need at most."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..merging._inputs import is_float
from ..merging._leaf import LeafInputs, compute_dtype
from ..merging._merge import merge_leaf
from ._job import Job, Part, passes
from ._source import Abstract

# Fitted to measurements. The largest group is in memory as it is read and, in part, as it is
# written; and in the buffers of Orbax, which also keeps a cache, but not in any of safetensors.
# Beside it are the groups before and after, which are of the usual size when a single leaf makes
# the largest.
_LARGEST, _LARGEST_OF_SAFETENSORS, _OTHERS = 2.0, 1.25, 1.5
_BUFFERS = 180 << 20
# The largest leaf is rarely at work while both groups are whole.
_WORK = 0.8


def peak_bytes(job: Job, chunk_bytes: int) -> int:
    """Predicts the peak memory of this process: itself, the groups, and the largest leaf's work."""
    sizes = {n: (job.stored_bytes(part, n), part) for part in job.parts for n in part.names}
    largest = max(size for size, _ in sizes.values())
    total = sum(size for size, _ in sizes.values())
    orbax = any(model.checkpoint.tensors is None for model in job.models.values())
    held = _LARGEST if orbax else _LARGEST_OF_SAFETENSORS
    groups = held * min(max(chunk_bytes, largest), total) + _OTHERS * min(chunk_bytes, total)
    heaviest: dict[Any, tuple[int, str, Part]] = {}
    for name, (size, part) in sizes.items():
        if part.method is not None and is_float(job.reference.leaves[name]):
            # A method that sees matrices whole works hardest where they are widest, not largest.
            whole = part.method.contract.whole
            shape = job.reference.leaves[name].shape if whole else None
            kind = jax.tree.structure(part.method), shape
            heaviest[kind] = max(heaviest.get(kind, (0, "", part)), (size, name, part), key=_size)
    work = max((_work_bytes(job, part, name) for _, name, part in heaviest.values()), default=0)
    return _resident_bytes() + _BUFFERS + int(groups + _WORK * work)


def _size(entry: tuple[int, str, Part]) -> int:
    return entry[0]


def _work_bytes(job: Job, part: Part, name: str) -> int:
    """Asks the compiler how much memory the merge of a leaf takes beside what goes in and out."""
    assert part.method is not None
    k = len(job.experts)
    curvature = None
    if job.needs_curvature(part, name):
        leaf = job.reference.leaves[name]
        curvature = tuple(v.abstract(name, leaf) for v in job.curvature.values())
    whole = lambda leaf: Abstract(leaf.shape, leaf.dtype)  # noqa: E731
    shapes: dict[str, Any] = {
        "experts": tuple(whole(model.leaves[name]) for model in job.experts.values()),
        "base": None if job.base is None else whole(job.base.leaves[name]),
        "curvature": curvature,
        "weights": Abstract((k,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
        "path_id": Abstract((), jnp.uint32),
        "expert_ids": Abstract((k,), jnp.uint32),
    }
    inputs = LeafInputs(**shapes)
    # A method that still asks for passes cannot be compiled; its largest arrays are the same.
    if passes(part):
        size = np.dtype(compute_dtype(inputs.experts)).itemsize
        return 4 * k * size * int(np.prod(job.reference.leaves[name].shape))
    analysis = merge_leaf.lower(part.method, inputs).compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis is not None else 0


def _resident_bytes() -> int:
    """Returns how much memory this process has now; a usual value where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 280 << 20
    return pages * os.sysconf("SC_PAGE_SIZE")
