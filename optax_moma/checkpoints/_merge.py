"""The merge of checkpoints: leaf groups are read, merged and written, each while others are.

The arithmetic is that of ``optax_moma.merge``, one leaf at a time: so the bits are those of a merge
in memory, however the leaves are grouped.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import merging
from .._tree import path_name
from ..merging._inputs import MergeError, is_float
from ..merging._leaf import LeafInputs, stable_id
from ..merging._merge import merge_leaf, merge_sharded, prepared
from . import _orbax, _safetensors
from ._job import (
    CHUNK_BYTES,
    Job,
    Layer,
    Part,
    leaf_bytes,
    open_job,
    passes,
    problems_of,
    raise_problems,
)
from ._manifest import differing, digest, write_manifest
from ._recipe import Recipe, key_of, output_dtype
from ._source import Abstract, Checkpoint, manifest_path, open_checkpoint, open_model

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

    One process reads through the memory of its host. A leaf that the base (without one, the first
    expert) was saved with as sharded over devices that exist here is merged and written sharded so,
    with the same bits; and any leaf can be restored with any sharding.

    Args:
      recipe: A ``Recipe``, the same as a dict, or the path of its YAML file.
      output: Where the merged params are written: an Orbax checkpoint, or a safetensors file if the
        name ends with ``.safetensors``. Beside the arrays there is a manifest: the recipe, the
        versions, and the digest of every leaf, of the output and of the inputs.
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
    _refuse_to_replace(output, force)
    job = open_job(recipe)
    for label, source in job.paths.items():
        if output == source or output in source.parents or source in output.parents:
            job.problems.append(f"the output {output} would be in the place of {label}")
    raise_problems(job)

    with _only_writer(output):
        _refuse_to_replace(output, force)
        return _streamed(job, output, chunk_bytes, progress, start)


def load(path: Path | str, *, item: str | None = None, params: str | None = None) -> Any:
    """Loads the params of a checkpoint as a merge sees them, into memory.

    Args:
      path: An Orbax checkpoint, a safetensors file, or a folder of those.
      item: The name of the tree, in an Orbax checkpoint that has several.
      params: The path of the params in the tree; by default they are searched for.

    Returns:
      A tree of dicts and lists. The names of safetensors are split at their dots.

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
    checkpoint = open_checkpoint(Path(path), item)
    model = open_model(str(path), checkpoint, params)
    arrays = checkpoint.read(list(model.stored.values()))
    return jax.tree.map(lambda name: jnp.asarray(arrays[model.stored[name]]), model.tree)


def _refuse_to_replace(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; name another output, or replace it with force")


@contextlib.contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    """Holds a lock that the system takes back when a process ends, in whatever way."""
    path = output.with_name(output.name + ".merging.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file is deleted by whoever had the lock last.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise FileExistsError(
                f"Another merge is writing {output}; wait for it to end, or name another output."
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _streamed(
    job: Job, output: Path, chunk_bytes: int, progress: Progress | None, start: float
) -> Merged:
    staging = output.with_name(output.name + ".merging")
    kind = _SafetensorsSink if output.suffix == ".safetensors" else _OrbaxSink
    done = _resumed(staging, _identity(job), output, kind)
    total = sum(
        job.stored_bytes(part, name) * (1 + passes(part)) + leaf_bytes(job.merged_leaf(part, name))
        for part in job.parts
        for name in part.names
    )
    meter = _Meter(total, progress)
    tasks = {
        name: _Task(name, part, job.stored_bytes(part, name))
        for part in job.parts
        for name in part.names
    }
    units = [unit for unit in _units(job.reference.tree, set(tasks))]
    left = [unit for unit in units if not all(name in done["leaves"] for name in unit)]
    for unit in units:
        for name in unit if unit not in left else ():
            task = tasks[name]
            meter.add(task.bytes + leaf_bytes(job.merged_leaf(task.part, name)))
    faults: list[str] = []
    with (
        contextlib.closing(kind(staging, output.name, job)) as sink,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
    ):
        if left:
            methods = {
                id(part): _prepared(job, part, chunk_bytes, reader, meter) for part in job.parts
            }
            groups = _groups([[tasks[name] for name in unit] for unit in left], chunk_bytes)
            written: Future[dict[str, str]] | None = None
            reading = _ahead(reader, lambda group: _read(job, group, meter), groups)
            for group, arrays in reading:
                found = [fault for task in group for fault in arrays.faults.get(task.name, [])]
                merged = {} if found else _merged(job, group, arrays, methods, found)
                faults += found
                if written is not None:
                    done["leaves"] |= written.result()
                    written = None
                _note_inputs(done, arrays)
                if not faults:
                    # After a fault the rest is read for more faults only.
                    written = writer.submit(sink.write, merged, arrays.digests, meter)
            if written is not None:
                done["leaves"] |= written.result()
    if faults:
        shutil.rmtree(staging)
        raise MergeError("Cannot merge,", list(dict.fromkeys(faults)))
    resumed = [name for unit in units if unit not in left for name in unit]
    _commit(job, sink, staging, output, done, resumed)
    written_bytes = sum(leaf_bytes(job.merged_leaf(t.part, t.name)) for t in tasks.values())
    return Merged(
        output,
        len(tasks),
        len(resumed),
        meter.done - written_bytes,
        written_bytes,
        time.monotonic() - start,
        job.warnings,
    )


class _Meter:
    """Counts bytes for whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None):
        self.done, self.total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)


_JOURNAL = "journal.jsonl"


class _OrbaxSink:
    """Parts of an Orbax checkpoint, each written as a whole, with the digests of its leaves."""

    def __init__(self, staging: Path, name: str, job: Job):
        self.path = staging / "checkpoint"
        self._tree = job.reference.tree

    @staticmethod
    def saved(staging: Path, name: str) -> list[dict[str, Any]] | None:
        return _orbax.saved_parts(staging / "checkpoint")

    def write(
        self, arrays: dict[str, jax.Array], inputs: dict[str, dict[str, str]], meter: _Meter
    ) -> dict[str, str]:
        digests = {name: digest(array) for name, array in arrays.items()}
        first = not _orbax.is_partial(self.path)
        tree = _pruned(self._tree, arrays, empty=first)
        _orbax.save_part(self.path, tree, {"leaves": digests, "inputs": inputs})
        meter.add(sum(x.nbytes for x in arrays.values()))
        return digests

    def finish(self, digests: Mapping[str, str], resumed: list[str]) -> list[str]:
        if not self.path.exists():
            _orbax.finalize(self.path)
        return differing(open_checkpoint(self.path), {name: digests[name] for name in resumed})

    def close(self) -> None:
        pass


class _SafetensorsSink:
    """A safetensors file, and a journal of what is written in it, with the digests."""

    def __init__(self, staging: Path, name: str, job: Job):
        self.path, self._journal = staging / name, staging / _JOURNAL
        leaves = {
            name.replace("/", "."): job.merged_leaf(part, name)
            for part in job.parts
            for name in part.names
        }
        about = {"format": "flax", "merged_by": "optax_moma"}
        self._writer = _safetensors.Writer(self.path, leaves, about)

    @staticmethod
    def saved(staging: Path, name: str) -> list[dict[str, Any]]:
        journal = staging / _JOURNAL
        if not (staging / name).exists():
            journal.unlink(missing_ok=True)  # The file is at the output already.
        *lines, _ = journal.read_text().split("\n") if journal.exists() else [""]
        if lines:
            journal.write_text("".join(f"{line}\n" for line in lines))  # without one cut short
        return [json.loads(line) for line in lines]

    def write(
        self, arrays: dict[str, jax.Array], inputs: dict[str, dict[str, str]], meter: _Meter
    ) -> dict[str, str]:
        self._writer.write({name.replace("/", "."): x for name, x in arrays.items()})
        digests = {name: digest(array) for name, array in arrays.items()}
        with self._journal.open("a") as journal:
            journal.write(json.dumps({"leaves": digests, "inputs": inputs}) + "\n")
        meter.add(sum(x.nbytes for x in arrays.values()))
        return digests

    def finish(self, digests: Mapping[str, str], resumed: list[str]) -> list[str]:
        return differing(open_checkpoint(self.path), {name: digests[name] for name in resumed})

    def close(self) -> None:
        self._writer.close()


def _resumed(
    staging: Path, identity: str, output: Path, kind: type[_OrbaxSink] | type[_SafetensorsSink]
) -> dict[str, Any]:
    """Returns what an interrupted run has safely written; clears away what is of no use."""
    note, replaced = staging / "identity", staging / "replaced"
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    done: dict[str, Any] = {"leaves": {}, "inputs": {}}
    notes = None
    if note.exists() and note.read_text() == identity:
        notes = kind.saved(staging, output.name)
    if notes is None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        note.write_text(identity)
    for saved in notes or ():
        done["leaves"] |= saved["leaves"]
        for label, digests in saved["inputs"].items():
            done["inputs"].setdefault(label, {}).update(digests)
    return done


def _identity(job: Job) -> str:
    """Returns what must not change between the runs of one merge: recipe, inputs, versions."""
    inputs = {}
    checkpoints = [model.checkpoint for model in job.models.values()]
    for checkpoint in (*checkpoints, *(v.checkpoint for v in job.curvature.values())):
        files = [checkpoint.path] if checkpoint.path.is_file() else checkpoint.path.rglob("*")
        stats = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        inputs[str(checkpoint.path)] = stats
    text = json.dumps([job.recipe.model_dump(mode="json"), inputs, _versions()])
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "numpy", "orbax-checkpoint", "optax-moma")
    installed = {
        d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()
    }
    return {name: importlib.metadata.version(name) for name in names if name in installed}


def _commit(
    job: Job,
    sink: _OrbaxSink | _SafetensorsSink,
    staging: Path,
    output: Path,
    done: dict[str, Any],
    resumed: list[str],
) -> None:
    """Makes the checkpoint whole, and moves it to its place in one step."""
    damaged = sink.finish(done["leaves"], resumed)
    if damaged:
        shutil.rmtree(staging)
        raise ValueError(
            f"What an interrupted run had written is damaged ({damaged[0]}). It was cleared away: "
            "merge again."
        )
    is_file = output.suffix == ".safetensors"
    manifest = manifest_path(sink.path) if not is_file else staging / "manifest.json"
    relabelled = {
        stored: done["leaves"][name]
        for name, stored in _output_names(job).items()
        if name in done["leaves"]
    }
    content = {
        "recipe": job.recipe.model_dump(mode="json", by_alias=True),
        "versions": _versions(),
        "leaves": relabelled,
        "inputs": done["inputs"],
    }
    if is_file:
        write_manifest(sink.path, manifest, content)
        os.replace(manifest, manifest_path(output))
        os.replace(sink.path, output)
    else:
        write_manifest(sink.path, manifest, content)
        if output.exists():
            output.rename(staging / "replaced")
        sink.path.rename(output)
    shutil.rmtree(staging)


def _output_names(job: Job) -> dict[str, str]:
    """Returns the names of the leaves in the written checkpoint by leaf path."""
    keys, _ = jax.tree_util.tree_flatten_with_path(job.reference.tree)
    return {name: path_name(path) for path, name in keys}


def _note_inputs(done: dict[str, Any], arrays: _Read) -> None:
    for label, digests in arrays.digests.items():
        done["inputs"].setdefault(label, {}).update(digests)


def _units(tree: Any, names: set[str]) -> Iterator[list[str]]:
    """Gives the leaves that must be written together: Orbax cannot add to a list, so all of it."""
    if isinstance(tree, dict):
        for child in tree.values():
            yield from _units(child, names)
    else:
        unit = [name for name in jax.tree.leaves(tree) if name in names]
        if unit:
            yield unit


def _groups(units: list[list[_Task]], chunk_bytes: int) -> Iterator[list[_Task]]:
    group: list[_Task] = []
    for unit in units:
        size = sum(task.bytes for task in group)
        if group and size + sum(task.bytes for task in unit) > chunk_bytes:
            yield group
            group = []
        group = [*group, *unit]
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
) -> dict[str, jax.Array]:
    """Merges the leaves of a group one by one; notes what is wrong with them."""
    faults += arrays.faults.get("", [])
    if faults:
        return {}
    merged = {}
    for name, part, _ in group:
        models = {label: leaves[name] for label, leaves in arrays.models.items() if name in leaves}
        like = job.merged_leaf(part, name)
        try:
            if part.keep is not None:
                leaf = _kept(job, part.keep, name, models[part.keep])
            else:
                leaf = _merge_leaf(job, part, methods[id(part)], name, models, arrays, like)
        except ValueError as error:
            faults += problems_of(error)
            continue
        # One leaf at a time: the memory of a merge is a multiple of its largest leaf.
        leaf = jax.device_put(leaf.astype(like.dtype), job.saved_sharding(part, name))
        merged[name] = jax.block_until_ready(leaf)
    return merged


def _merge_leaf(
    job: Job,
    part: Part,
    method: Any,
    name: str,
    models: dict[str, np.ndarray],
    arrays: _Read,
    like: Abstract,
) -> jax.Array:
    assert part.method is not None
    curvature, sharding = _curvature_of(job, part, name, arrays), job.saved_sharding(part, name)
    estimates = jax.tree.leaves(curvature)
    if not part.method.contract.gram:
        # A negative second moment is as wrong as an infinite one.
        estimates = [x if np.min(x, initial=0) >= 0 else np.float32(np.nan) for x in estimates]
    checked = [] if job.recipe.allow_nonfinite else models.values()
    if is_float(like) and _clean([*checked, *estimates]):
        inputs = _leaf_inputs(job, part, name, models, curvature, like)
        if not part.layers:
            return merge_sharded(method, _spread(inputs, sharding))
        layers = enumerate(part.layers)
        return jnp.stack([merge_leaf(x.method, _layer(inputs, i, x, name)) for i, x in layers])
    # Not floating point, or something is wrong: the merge in memory knows what to do or to say.
    return merging.merge(
        method,
        {expert: {name: models[expert]} for expert in job.experts},
        base={name: models["base"]} if "base" in models else None,
        curvature=None if curvature is None else {e: {name: v} for e, v in curvature.items()},
        weights=part.weights,
        key=key_of(job.recipe),
    )[name]


def _spread(inputs: LeafInputs, sharding: NamedSharding | None) -> LeafInputs:
    """Returns the inputs of a leaf on the devices that it was saved from."""
    if sharding is None:
        return inputs
    # The same mesh, but its axes are not in the types.
    mesh = Mesh(np.asarray(sharding.mesh.devices), sharding.mesh.axis_names)
    shape = inputs.experts[0].shape

    def put(x: Any) -> Any:
        # The factors of a curvature are small.
        spec = sharding.spec if x.shape == shape else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    spread = jax.tree.map(put, (inputs.experts, inputs.base, inputs.curvature))
    return inputs._replace(experts=spread[0], base=spread[1], curvature=spread[2])


def _clean(arrays: list[Any]) -> bool:
    """Whether all numbers are finite: by their bits, several times as fast as by arithmetic.

    Read as integers, no finite number reaches the infinity of its sign.
    """
    for x in map(np.asarray, arrays):
        bits = f"{8 * x.itemsize}"
        signed, unsigned = x.view(f"int{bits}"), x.view(f"uint{bits}")
        infinity, minus = np.array([np.inf, -np.inf], x.dtype).view(unsigned.dtype)
        if np.max(signed, initial=0) >= infinity or np.max(unsigned, initial=0) >= minus:
            return False
    return True


def _layer(inputs: LeafInputs, i: int, layer: Layer, name: str) -> LeafInputs:
    """Returns one layer of a stack as a leaf of its own."""
    # Of a factored curvature one factor may be the same for all layers.
    stacked = (inputs.experts, inputs.base, inputs.curvature)
    experts, base, curvature = jax.tree.map(lambda x: x[i if len(x) > 1 else 0], stacked)
    return inputs._replace(
        experts=experts,
        base=base,
        curvature=curvature,
        weights=np.array([layer.weights[expert] for expert in sorted(layer.weights)]),
        path_id=stable_id(f"{name}/{i}"),
    )


def _curvature_of(job: Job, part: Part, name: str, arrays: _Read) -> dict[str, Any] | None:
    """Returns the curvature of a leaf by expert.

    Raises:
      MergeError: if it is zero for experts that were trained there, and the recipe does not say
        what else it is.
    """
    if part.method is None or not part.method.contract.curvature:
        return None
    found = {expert: arrays.curvature.get(expert, {}).get(name) for expert in job.experts}
    if part.method.contract.gram:
        return found
    problems = []
    for expert, v in found.items():
        zero = v is not None and not all(np.any(x) for x in jax.tree.leaves(v))
        models = {label: leaves[name] for label, leaves in arrays.models.items() if zero}
        if not zero or not _was_trained(job, expert, models):
            continue
        missing, leaf = job.curvature[expert].missing, job.reference.leaves[name]
        found[expert] = np.full(leaf.shape, missing or 0, np.float32)
        if missing is None:
            problems.append(
                f"the curvature of expert {expert!r}, {name}: all zero, though the leaf was "
                "trained; if by weight decay alone, give it one with curvature: {missing: 0.0}"
            )
    if problems:
        raise MergeError("Cannot merge,", problems)
    return found


def _was_trained(job: Job, expert: str, models: dict[str, np.ndarray]) -> bool:
    """Whether a leaf differs from the base, or without one from another expert's."""
    others = ["base"] if "base" in models else [e for e in job.experts if e != expert]
    return any(not np.array_equal(models[expert], models[other]) for other in others)


def _leaf_inputs(
    job: Job,
    part: Part,
    name: str,
    models: dict[str, np.ndarray],
    curvature: dict[str, Any] | None,
    like: Abstract,
) -> LeafInputs:
    """Returns a leaf as the merge takes it, wide enough for the dtype that the recipe asks for."""
    names = sorted(job.experts)
    experts: list[Any] = [models[expert] for expert in names]
    base: Any = models.get("base")
    if output_dtype(job.recipe) is not None:
        # The merge is rounded to the base's dtype, or to that of all experts together.
        wide = lambda x: jnp.asarray(x).astype(  # noqa: E731
            jnp.promote_types(jnp.promote_types(like.dtype, jnp.float32), x.dtype)
        )
        if base is None:
            experts[0] = wide(experts[0])
        else:
            base = wide(base)
    return LeafInputs(
        experts=tuple(experts),
        base=base,
        curvature=None if curvature is None else tuple(curvature[expert] for expert in names),
        weights=np.array([part.weights[expert] for expert in names]),
        key=key_of(job.recipe),
        path_id=stable_id(name),
        expert_ids=np.array([stable_id(expert) for expert in names]),
    )


def _kept(job: Job, keep: str, name: str, leaf: np.ndarray) -> jax.Array:
    x = jnp.asarray(leaf)
    if is_float(x) and not job.recipe.allow_nonfinite and not bool(jnp.all(jnp.isfinite(x))):
        count = int(jnp.sum(~jnp.isfinite(x)))
        raise ValueError(
            f"{job.models[keep].label}, {name}: {count} values that are not finite; leave the "
            "model out, or let them through with allow_nonfinite: true"
        )
    return x


def _prepared(
    job: Job, part: Part, chunk_bytes: int, reader: ThreadPoolExecutor, meter: _Meter
) -> Any:
    """Returns a part's method after the passes over the leaves that it asks for."""
    if part.method is None or not passes(part):
        return part.method
    averaged = [n for n in part.names if is_float(job.reference.leaves[n])]
    tasks = [[_Task(n, part, job.stored_bytes(part, n))] for n in averaged]

    def leaves() -> Iterator[LeafInputs]:
        groups = _groups(tasks, chunk_bytes)
        for group, arrays in _ahead(reader, lambda group: _read(job, group, meter), groups):
            if any(arrays.faults.values()):
                raise MergeError("Cannot merge,", [f for v in arrays.faults.values() for f in v])
            for name, _, _ in group:
                models = {label: found[name] for label, found in arrays.models.items()}
                curvature = _curvature_of(job, part, name, arrays)
                like = job.merged_leaf(part, name)
                yield _leaf_inputs(job, part, name, models, curvature, like)

    return prepared(part.method, leaves)


_NOTHING = object()


def _pruned(tree: Any, arrays: Mapping[str, Any], *, empty: bool) -> Any:
    """Returns the part of a tree of leaf paths for which there are arrays, as they are saved."""
    if isinstance(tree, dict):
        found = {key: _pruned(child, arrays, empty=empty) for key, child in tree.items()}
        found = {key: child for key, child in found.items() if child is not _NOTHING}
        return found if found or (empty and not tree) else _NOTHING
    if isinstance(tree, list):
        children = [_pruned(child, arrays, empty=True) for child in tree]
        if not any(name in arrays for name in jax.tree.leaves(tree)):
            return children if empty and not jax.tree.leaves(tree) else _NOTHING
        return [None if child is _NOTHING else child for child in children]
    if tree is None:
        return None if empty else _NOTHING
    return arrays.get(tree, _NOTHING)
