"""The merge of checkpoints: leaf groups are read, merged and written, each while others are.

The arithmetic is that of ``optax_moma.merge``, one leaf at a time: so the bits are those of a merge
in memory, however the leaves are grouped.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..merging._inputs import MergeError, is_float
from ..merging._leaf import LeafInputs
from ..merging._merge import prepared
from ._job import CHUNK_BYTES, Job, Part, leaf_bytes, open_job, passes, problems_of, raise_problems
from ._leaf import Array, leaf_inputs, merged_leaf
from ._manifest import digest
from ._output import Sink, commit, only_writer, resumed, settle, sink_for, staging_of, unwritable
from ._recipe import Recipe
from ._source import Checkpoint, Step, open_checkpoint, open_model

Progress = Callable[[int, int], None]


class Merged(NamedTuple):
    """What a merge did.

    Attributes:
      path: What was written.
      leaves: How many leaves it has.
      resumed: How many of them an earlier, interrupted run had already written.
      bytes_read: How much was read.
      bytes_written: How much was written, before compression.
      seconds: How long it took.
      warnings: What makes the merge doubtful.
    """

    path: Path
    leaves: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: list[str]


class _Task(NamedTuple):
    """One leaf of the work."""

    name: str
    part: Part
    bytes: int


class _Read(NamedTuple):
    """The arrays of a group, by model and leaf path; the curvature; digests; what was wrong."""

    models: dict[str, dict[str, np.ndarray]]
    curvature: dict[str, dict[str, Any]]
    digests: dict[str, dict[str, str]]
    faults: dict[str, list[str]]


def merge(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    output: Path | str,
    *,
    force: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> Merged:
    """Merges checkpoints of any size into one, with the bits of ``optax_moma.merge``.

    Leaves are read, merged and written in groups. Nothing is at ``output`` before all is done; a
    merge that was killed goes on where it was when it is called again, with what lies in
    ``output + ".merging"``.

    Methods of matrices take them as (fan-in, fan-out), as Flax has them, unless the recipe says
    ``axes``. It must say them for files that say ``format: pt``: PyTorch's linear layers are
    (fan-out, fan-in), ``axes: nm``, its embeddings ``axes: mn``. Methods that treat both sides
    alike, as ``tsv_m`` does, or single entries, need nothing.

    One process reads through the memory of its host. A leaf that the base (without one, the first
    expert) was saved with as sharded over devices that exist here is merged and written sharded so,
    with the same bits; and any leaf can be restored with any sharding.

    Args:
      recipe: A ``Recipe``, the same as a dict, or the path of its YAML file.
      output: Where the merged params are written: an Orbax checkpoint, or a safetensors file if the
        name ends with ``.safetensors``. Such a file says of itself (``format: pt``) what all inputs
        do, and ``format: flax`` if those are Orbax checkpoints. Beside the arrays there is a
        manifest: the recipe, the versions, and the digest of every leaf, of the output and of the
        inputs.
      force: Whether to replace what is there.
      chunk_bytes: How many bytes a group of leaves reads. A few groups are in memory at a time; a
        leaf is never split.
      progress: Called with the bytes done and the bytes to do.

    Returns:
      A ``Merged``.

    Raises:
      FileExistsError: if there is something at ``output``, or another merge is writing it.
      ValueError: if anything is wrong with the recipe or the inputs, with all that is wrong.
        Nothing is written then.

    Example:
      >>> import tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder = tempfile.mkdtemp()
      >>> for name, value in (("a", 1.0), ("b", 3.0)):
      ...     ocp.save(f"{folder}/{name}", {"w": jnp.full(2, value)})
      >>> experts = {name: f"{folder}/{name}" for name in ("a", "b")}
      >>> merge({"method": "average", "experts": experts}, f"{folder}/merged").leaves
      1
      >>> load(f"{folder}/merged")
      {'w': Array([2., 2.], dtype=float32)}
    """
    start = time.monotonic()
    recipe, output = Recipe.of(recipe), Path(output).absolute()
    if staging_of(output).exists():
        with only_writer(output):
            settle(output)
    _refuse_to_replace(output, force)
    job = open_job(recipe)
    for label, source in job.paths.items():
        if output == source or output in source.parents or source in output.parents:
            job.problems.append(f"the output {output} would be in the place of {label}")
    if not job.problems:
        job.problems += unwritable(job, output)
    raise_problems(job)

    with only_writer(output), job.precision():
        _refuse_to_replace(output, force)
        return _streamed(job, output, chunk_bytes, progress, start)


def load(
    path: Path | str, *, item: str | None = None, step: Step = None, params: str | None = None
) -> Any:
    """Loads the params of a checkpoint as a merge sees them, into memory.

    Args:
      path: An Orbax checkpoint or a folder of steps; a safetensors file, or a folder of them.
      item: The name of the tree, in an Orbax checkpoint that has several.
      step: Which step of a folder of steps; "latest" for the last.
      params: The path of the params in the tree; by default they are searched for.

    Returns:
      A tree of dicts and lists, with None for a leaf that is no array. The names of safetensors are
      split at their dots.

    Raises:
      ValueError: if there is nothing that can be read.

    Example:
      >>> import tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder = tempfile.mkdtemp()
      >>> ocp.save(f"{folder}/state", {"params": {"w": jnp.ones(2)}, "step": jnp.array(3)})
      >>> load(f"{folder}/state")
      {'w': Array([1., 1.], dtype=float32)}
    """
    checkpoint = open_checkpoint(Path(path), item, step)
    model = open_model(str(path), checkpoint, params)
    arrays = checkpoint.read([model.stored[name] for name in model.arrays])
    loaded = {name: jnp.asarray(arrays[model.stored[name]]) for name in model.arrays}
    return jax.tree.map(loaded.get, model.tree)


def _refuse_to_replace(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; name another output, or replace it with force")


def _streamed(
    job: Job, output: Path, chunk_bytes: int, progress: Progress | None, start: float
) -> Merged:
    staging = staging_of(output)
    done = resumed(staging, job, output)
    total = sum(
        job.stored_bytes(part, name) * (1 + passes(part)) + leaf_bytes(job.merged_leaf(part, name))
        for part in job.parts
        for name in part.names
    )
    meter = _Meter(total, progress)
    parts = {name: part for part in job.parts for name in part.names}
    # In the order in which the leaves are stored, whatever the rules.
    tasks = [
        _Task(name, parts[name], job.stored_bytes(parts[name], name))
        for name in job.reference.leaves
        if name in parts
    ]
    left = [task for task in tasks if task.name not in done["leaves"]]
    earlier = [task for task in tasks if task.name in done["leaves"]]
    for task in earlier:
        meter.add(task.bytes + leaf_bytes(job.merged_leaf(task.part, task.name)))
    faults: list[str] = []
    with (
        contextlib.closing(sink_for(output)(staging, output.name, job)) as sink,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        if left:
            methods = {
                id(part): _prepared(job, part, chunk_bytes, reader, meter) for part in job.parts
            }
            groups = _groups(left, chunk_bytes)
            written: Future[dict[str, str]] | None = None
            reading = _ahead(reader, lambda group: _read(job, group, meter), groups)
            for group, arrays in reading:
                found = [fault for task in group for fault in arrays.faults.get(task.name, [])]
                merged = {} if found else _merged(job, group, arrays, methods, found)
                faults += found
                if written is not None:
                    done["leaves"] |= written.result()
                    written = None
                for label, digests in arrays.digests.items():
                    done["inputs"].setdefault(label, {}).update(digests)
                if not faults:
                    # After a fault the rest is read for more faults only.
                    written = writer.submit(_write, sink, merged, arrays, meter)
            if written is not None:
                done["leaves"] |= written.result()
    if faults:
        shutil.rmtree(staging)
        raise MergeError("Cannot merge,", list(dict.fromkeys(faults)))
    commit(job, sink, staging, output, done, [task.name for task in earlier])
    written_bytes = sum(leaf_bytes(job.merged_leaf(t.part, t.name)) for t in tasks)
    return Merged(
        output,
        len(tasks),
        len(earlier),
        meter.done - written_bytes,
        written_bytes,
        time.monotonic() - start,
        job.warnings,
    )


def _write(sink: Sink, merged: dict[str, Array], arrays: _Read, meter: "_Meter") -> dict[str, str]:
    digests = sink.write(merged, arrays.digests)
    meter.add(sum(x.nbytes for x in merged.values()))
    return digests


class _Meter:
    """Counts bytes for whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)


def _groups(tasks: list[_Task], chunk_bytes: int) -> Iterator[list[_Task]]:
    group: list[_Task] = []
    for task in tasks:
        if group and sum(t.bytes for t in group) + task.bytes > chunk_bytes:
            yield group
            group = []
        group = [*group, task]
    if group:
        yield group


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterator[Any]
) -> Iterator[tuple[Any, Any]]:
    """Gives items with the results of work that is done one item ahead."""
    pending: tuple[Any, Future[Any]] | None = None
    for item in items:
        following = item, pool.submit(work, item)
        if pending is not None:
            yield pending[0], pending[1].result()
        pending = following
    if pending is not None:
        yield pending[0], pending[1].result()


def _read(job: Job, group: list[_Task], meter: _Meter) -> _Read:
    """Reads a group's leaves from every model, and compares them with the models' manifests."""
    result = _Read({}, {}, {}, {})
    for label, model in job.models.items():
        names = [task.name for task in group if label in job.read_from(task.part)]
        arrays = _leaves_of(model.checkpoint, [model.stored[n] for n in names], model.label, result)
        result.models[label] = {
            n: arrays[model.stored[n]] for n in names if model.stored[n] in arrays
        }
        result.digests[label] = {n: digest(x) for n, x in result.models[label].items()}
        for name, found in result.digests[label].items():
            if model.checkpoint.digests.get(model.stored[name], found) != found:
                result.faults.setdefault(name, []).append(
                    f"{model.label}, {name}: the bytes differ from the manifest of "
                    f"{model.checkpoint.path}; the checkpoint is damaged"
                )
    for expert, v in job.curvature.items():
        names = [t.name for t in group if job.needs_curvature(t.part, t.name)]
        needs = dict.fromkeys(s for n in names if n in v.needs for s in v.needs[n].names)
        label = f"the curvature of expert {expert!r}"
        arrays = _leaves_of(v.checkpoint, list(needs), label, result)
        result.digests[f"{expert} (curvature)"] = {n: digest(x) for n, x in arrays.items()}
        if len(arrays) < len(needs):
            continue
        result.curvature[expert] = {
            name: v.assembled(name, job.experts[expert].leaves[name], arrays) for name in names
        }
    meter.add(sum(task.bytes for task in group))
    return result


def _leaves_of(
    checkpoint: Checkpoint, names: list[str], label: str, result: _Read
) -> dict[str, np.ndarray]:
    try:
        return checkpoint.read(names)
    except ValueError as error:
        result.faults.setdefault("", []).append(f"{label}: {error}")
        return {}


def _merged(
    job: Job, group: list[_Task], arrays: _Read, methods: dict[int, Any], faults: list[str]
) -> dict[str, Array]:
    """Merges the leaves of a group one by one; notes what is wrong with them."""
    faults += arrays.faults.get("", [])
    if faults:
        return {}
    merged = {}
    for name, part, _ in group:
        models = {label: leaves[name] for label, leaves in arrays.models.items() if name in leaves}
        curvature = {expert: found.get(name) for expert, found in arrays.curvature.items()}
        try:
            leaf = merged_leaf(job, part, methods[id(part)], name, models, curvature)
        except ValueError as error:
            faults += problems_of(error)
            continue
        # One leaf at a time: the memory of a merge is a multiple of its largest leaf.
        merged[name] = jax.block_until_ready(leaf)
    return merged


def _prepared(
    job: Job, part: Part, chunk_bytes: int, reader: ThreadPoolExecutor, meter: _Meter
) -> Any:
    """Returns a part's method after the passes over the leaves that it asks for."""
    if part.method is None or not passes(part):
        return part.method
    averaged = [n for n in part.names if is_float(job.reference.leaves[n])]
    tasks = [_Task(n, part, job.stored_bytes(part, n)) for n in averaged]

    def leaves() -> Iterator[LeafInputs]:
        groups = _groups(tasks, chunk_bytes)
        for group, arrays in _ahead(reader, lambda group: _read(job, group, meter), groups):
            if any(arrays.faults.values()):
                raise MergeError("Cannot merge,", [f for v in arrays.faults.values() for f in v])
            for name, _, _ in group:
                models = {label: found[name] for label, found in arrays.models.items()}
                curvature = {expert: own.get(name) for expert, own in arrays.curvature.items()}
                yield leaf_inputs(job, part, name, models, curvature)

    return prepared(part.method, leaves)
