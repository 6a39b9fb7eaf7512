"""Digests: what tells a whole checkpoint from a damaged one. Orbax keeps none.

They are XXH3 of 128 bits, which finds any damage and is many times as fast as a cryptographic hash.
Whoever means to deceive could write a new manifest as well, so nothing is lost by that; to publish
a model signed, sign its files.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ._source import MANIFEST_FORMAT, Checkpoint, manifest_path, open_checkpoint


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found.

    Attributes:
      problems: What is wrong; empty if every bit is as it was written.
      leaves: How many leaves were compared.
      bytes: How many bytes they have.
    """

    problems: list[str]
    leaves: int
    bytes: int


def digest(array: Any) -> str:
    """Returns the digest of an array's dtype, shape and bytes."""
    array = np.asarray(array)
    found = xxhash.xxh3_128(f"{array.dtype}{list(array.shape)}".encode())
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def write_manifest(checkpoint: Path, manifest: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest with the digest of every file of a checkpoint, and its own.

    Args:
      checkpoint: The checkpoint, a folder or a file.
      manifest: Where the manifest is written.
      content: What else it says.
    """
    files = {name: _file_digest(file) for name, file in _files(checkpoint)}
    content = {**MANIFEST_FORMAT, **content, "files": files}
    manifest.write_text(
        json.dumps({**content, "digest": _own_digest(content)}, indent=1, sort_keys=True) + "\n"
    )


def verify(path: Path | str) -> Verified:
    """Compares every file and every leaf of a merged checkpoint with its manifest.

    Args:
      path: What ``merge`` wrote.

    Returns:
      A ``Verified``; its ``problems`` are empty if all is as it was written.

    Raises:
      ValueError: if there is no checkpoint, or it has no manifest.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> from optax_moma.checkpoints import merge
      >>> folder = tempfile.mkdtemp()
      >>> ocp.save(f"{folder}/a", {"w": jnp.ones((2, 3))})
      >>> recipe = {"method": "average", "experts": {"a": f"{folder}/a"}}
      >>> _ = merge(recipe, f"{folder}/merged")
      >>> verify(f"{folder}/merged")
      Verified(problems=[], leaves=1, bytes=24)
    """
    path = Path(path)
    file = manifest_path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not file.exists():
        raise ValueError(f"{path} has no manifest {file.name}: only merged checkpoints have one")
    try:
        manifest = json.loads(file.read_bytes())
        content = {key: value for key, value in manifest.items() if key != "digest"}
        intact = manifest["digest"] == _own_digest(content)
        leaves, files = content["leaves"], content["files"]
    except (ValueError, KeyError, AttributeError) as error:
        return Verified([f"{file.name} is damaged: {error}"], 0, 0)
    problems = [] if intact else [f"{file.name} is damaged: its digest is wrong"]
    found = dict(_files(path))
    problems += [f"the file {name} is missing" for name in files if name not in found]
    problems += [f"the file {name} is not in the manifest" for name in found if name not in files]
    problems += [
        f"the file {name} differs from the manifest"
        for name in files
        if name in found and _file_digest(found[name]) != files[name]
    ]
    if problems:
        return Verified(problems, 0, 0)  # What is damaged may not even open.
    checkpoint = open_checkpoint(path)
    problems += [f"the leaf {name} is missing" for name in leaves if name not in checkpoint.leaves]
    problems += [f"the leaf {name} is new" for name in checkpoint.leaves if name not in leaves]
    total = 0
    present = [name for name in leaves if name in checkpoint.leaves]
    for name in present:
        leaf = checkpoint.leaves[name]
        total += int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
    problems += differing(checkpoint, {name: leaves[name] for name in present})
    return Verified(problems, len(present), total)


def differing(checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[str]:
    """Reads leaves, and tells those whose digests are not as they should be."""
    problems = []
    for names in _grouped(checkpoint, list(digests)):
        try:
            arrays = checkpoint.read(names)
        except ValueError:
            arrays = {}
            for name in names:
                try:
                    arrays |= checkpoint.read([name])
                except ValueError as error:
                    problems.append(f"the leaf {name}: {error}")
        problems += [
            f"the leaf {name} differs from the manifest"
            for name, array in arrays.items()
            if digest(array) != digests[name]
        ]
    return problems


def _grouped(
    checkpoint: Checkpoint, names: list[str], limit: int = 64 << 20
) -> Iterator[list[str]]:
    group, size = [], 0
    for name in names:
        leaf = checkpoint.leaves[name]
        n = int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
        if group and size + n > limit:
            yield group
            group, size = [], 0
        group.append(name)
        size += n
    if group:
        yield group


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != manifest_path(path):
            yield file.relative_to(path).as_posix(), file


def _file_digest(path: Path) -> str:
    found, block = xxhash.xxh3_128(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(block):
            found.update(memoryview(block)[:size])
    return found.hexdigest()


def _own_digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
