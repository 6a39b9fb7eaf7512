"""What a merge of checkpoints writes: resumable, locked, and at its place in one step.

Everything is written beside the output, in ``output + ".merging"``, with notes from which another
run goes on, and moved to its place when it is whole.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from .._tree import path_name
from . import _orbax, _safetensors
from ._job import Job
from ._leaf import Array
from ._manifest import differing, digest, write_manifest
from ._source import Abstract, manifest_path, open_checkpoint

_JOURNAL, _MANIFEST, _REPLACED = "journal.jsonl", "manifest.json", "replaced"


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
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


class OrbaxSink:
    """Parts of an Orbax checkpoint, each written as a whole, with the digests of its leaves."""

    def __init__(self, staging: Path, name: str, job: Job):
        self.path = staging / "checkpoint"
        self._tree = job.reference.tree

    @staticmethod
    def saved(staging: Path, name: str) -> list[dict[str, Any]] | None:
        return _orbax.saved_parts(staging / "checkpoint")

    def write(self, arrays: dict[str, Array], inputs: dict[str, dict[str, str]]) -> dict[str, str]:
        digests = {name: digest(array) for name, array in arrays.items()}
        first = not _orbax.is_partial(self.path)
        tree = _pruned(self._tree, arrays, empty=first)
        _orbax.save_part(self.path, tree, {"leaves": digests, "inputs": inputs})
        return digests

    def finish(self, digests: Mapping[str, str], resumed: list[str]) -> list[str]:
        _orbax.finalize(self.path)
        return differing(open_checkpoint(self.path), {name: digests[name] for name in resumed})

    def close(self) -> None:
        pass


class SafetensorsSink:
    """A safetensors file, and a journal of what is written in it, with the digests."""

    def __init__(self, staging: Path, name: str, job: Job):
        self.path, self._journal = staging / name, staging / _JOURNAL
        leaves = _merged_leaves(job)
        self._names = {name: _tensor_name(job, name) for name in leaves}
        tensors = {self._names[name]: leaf for name, leaf in leaves.items()}
        self._writer = _safetensors.Writer(self.path, tensors, _notes(job))

    @staticmethod
    def saved(staging: Path, name: str) -> list[dict[str, Any]]:
        journal = staging / _JOURNAL
        if not (staging / name).exists():
            journal.unlink(missing_ok=True)  # The file is at the output already.
        *lines, _ = journal.read_text().split("\n") if journal.exists() else [""]
        if lines:
            journal.write_text("".join(f"{line}\n" for line in lines))  # without one cut short
        return [json.loads(line) for line in lines]

    def write(self, arrays: dict[str, Array], inputs: dict[str, dict[str, str]]) -> dict[str, str]:
        self._writer.write({self._names[name]: x for name, x in arrays.items()})
        digests = {name: digest(array) for name, array in arrays.items()}
        self._writer.sync()  # The journal never tells of what is not there.
        with self._journal.open("a") as journal:
            journal.write(json.dumps({"leaves": digests, "inputs": inputs}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        return digests

    def finish(self, digests: Mapping[str, str], resumed: list[str]) -> list[str]:
        return differing(open_checkpoint(self.path), {name: digests[name] for name in resumed})

    def close(self) -> None:
        self._writer.close()


def unwritable(job: Job, output: Path) -> list[str]:
    """Returns what an output of this name could not hold."""
    if sink_for(output) is OrbaxSink:
        return []
    problems, first = [], {}
    for name, leaf in _merged_leaves(job).items():
        tensor = _tensor_name(job, name)
        other = first.setdefault(tensor, name)
        if other != name:
            problems.append(
                f"{other} and {name} would both be {tensor} in {output.name}; name an Orbax "
                "checkpoint as the output, or give one another name with rename:"
            )
        if not _safetensors.holds(leaf.dtype):
            problems.append(
                f"{name}: safetensors have no {leaf.dtype}; name an Orbax checkpoint as the output"
            )
    return problems


def _tensor_name(job: Job, name: str) -> str:
    """Returns what a leaf is called in a safetensors file: as in that of the first model."""
    model = next(model for model in job.models.values() if name in model.leaves)
    tensors, stored = model.checkpoint.tensors, model.stored[name]
    if tensors is None or not f"/{stored}".endswith(f"/{name}"):  # or it was renamed
        return name.replace("/", ".")
    return tensors[stored].name[len(stored) - len(name) :]


def _merged_leaves(job: Job) -> dict[str, Abstract]:
    return {name: job.merged_leaf(part, name) for part in job.parts for name in part.names}


def _notes(job: Job) -> dict[str, str]:
    """Returns what a safetensors file says of itself: what all models do that are merged."""
    models = [model.checkpoint for model in job.models.values()]
    orbax = [checkpoint.tensors is None for checkpoint in models]
    # Trees of JAX have kernels as Flax does. Where only some are such, nothing can be said.
    found = {"format": "flax"} if all(orbax) else _safetensors.agreed([x.notes for x in models])
    return found | {"merged_by": "optax_moma"}


Sink = OrbaxSink | SafetensorsSink


def sink_for(output: Path) -> type[Sink]:
    """Returns what writes an output of this name."""
    return SafetensorsSink if output.suffix == ".safetensors" else OrbaxSink


def staging_of(output: Path) -> Path:
    """Returns the folder in which an output is prepared."""
    return output.with_name(output.name + ".merging")


def settle(output: Path) -> None:
    """Ends a change of the output that a kill cut short: what is there is whole, old or new."""
    staging = staging_of(output)
    replaced, manifest = staging / _REPLACED, staging / _MANIFEST
    if manifest.exists() and not (staging / output.name).exists():
        os.replace(manifest, manifest_path(output))
    if not replaced.exists():
        return
    if not output.exists():
        os.replace(replaced, output)
    elif replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink()


def resumed(staging: Path, job: Job, output: Path) -> dict[str, Any]:
    """Returns what an interrupted run has safely written; clears away what is of no use."""
    note = staging / "identity"
    identity = _identity(job)
    done: dict[str, Any] = {"leaves": {}, "inputs": {}}
    notes = None
    if note.exists() and note.read_text() == identity:
        notes = sink_for(output).saved(staging, output.name)
    if notes is None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        note.write_text(identity)
    for saved in notes or ():
        done["leaves"] |= saved["leaves"]
        for label, digests in saved["inputs"].items():
            done["inputs"].setdefault(label, {}).update(digests)
    return done


def commit(
    job: Job,
    sink: Sink,
    staging: Path,
    output: Path,
    done: dict[str, Any],
    names: list[str],
) -> None:
    """Makes the checkpoint whole, and moves it to its place in one step."""
    damaged = sink.finish(done["leaves"], names)
    if damaged:
        shutil.rmtree(staging)
        raise ValueError(
            f"What an interrupted run had written is damaged ({damaged[0]}). It was cleared away: "
            "merge again."
        )
    is_file = output.suffix == ".safetensors"
    manifest = manifest_path(sink.path) if not is_file else staging / _MANIFEST
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
    write_manifest(sink.path, manifest, content)
    _sync(staging)
    if is_file:
        manifest_path(output).unlink(missing_ok=True)  # No file ever has another's.
    if output.exists() and not (is_file and output.is_file()):
        os.replace(output, staging / _REPLACED)  # Only a file can replace a file in one step.
    os.replace(sink.path, output)
    if is_file:
        os.replace(manifest, manifest_path(output))
    _sync_one(output.parent)
    shutil.rmtree(staging)


def _sync(folder: Path) -> None:
    """Has a folder with all that is in it on the disk, whatever becomes of the machine."""
    for path in (*folder.rglob("*"), folder):
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _output_names(job: Job) -> dict[str, str]:
    """Returns the names of the leaves in the written checkpoint by leaf path."""
    keys, _ = jax.tree_util.tree_flatten_with_path(job.reference.tree)
    return {name: path_name(path) for path, name in keys}


_NOTHING = object()


def _pruned(tree: Any, arrays: Mapping[str, Any], *, empty: bool) -> Any:
    """Returns the part of a tree of leaf paths for which there are arrays, as they are saved."""
    if isinstance(tree, dict):
        found = {key: _pruned(child, arrays, empty=empty) for key, child in tree.items()}
        found = {key: child for key, child in found.items() if child is not _NOTHING}
        return found if found or (empty and not tree) else _NOTHING
    if isinstance(tree, list):
        children = {i: _pruned(child, arrays, empty=empty) for i, child in enumerate(tree)}
        found = {i: child for i, child in children.items() if child is not _NOTHING}
        return _orbax.Elements(found) if found else [] if empty and not tree else _NOTHING
    if tree is None:
        return None if empty else _NOTHING
    return arrays.get(tree, _NOTHING)
