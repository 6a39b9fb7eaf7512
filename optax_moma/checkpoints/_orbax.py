"""All that this package asks of Orbax: the one module that knows its interface, version 1.

A checkpoint is opened by its metadata alone. Its arrays are read one group at a time, with ``...``
in the place of what is not wanted; and written one group at a time into a folder that becomes a
checkpoint only when it is finalized.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from .._tree import path_name


def metadata(path: Path, item: str | None) -> Any:
    """Returns a checkpoint's tree of dicts and lists, with ``jax.ShapeDtypeStruct`` for arrays.

    They say how an array was sharded when it was saved, if it was and its devices exist here.

    Raises:
      ValueError: if there is no readable checkpoint, or not the item.
    """
    try:
        items = dict(ocp.checkpointables_metadata(str(path)).metadata)
    except ocp.errors.InvalidLayoutError:
        # A tree that an older version of Orbax saved without the name of an item.
        items = (
            {}
            if item is None
            else {item: ocp.metadata(str(path), checkpointable_name=item).metadata}
        )
        tree = ocp.metadata(str(path)).metadata if item is None else items[item]
    else:
        if item is None and len(items) > 1 and "state" not in items:
            raise ValueError(f"it holds several items, {', '.join(items)}; name one with item:")
        if item is not None and item not in items:
            raise ValueError(f"it has no item {item!r}, only {', '.join(items)}")
        tree = items.get(item or ("state" if "state" in items else next(iter(items), "")))
    if tree is None:
        raise ValueError("its arrays cannot be opened; it is damaged, or not a tree of arrays")
    # Files hold 64-bit integers whatever JAX computes in.
    with jax.enable_x64(True):
        return jax.tree.map(_abstract, tree)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the marks of a checkpoint, of this or an earlier version of Orbax."""
    marks = ("_CHECKPOINT_METADATA", "_METADATA", "orbax.checkpoint")
    return any((path / mark).exists() for mark in marks)


def read(
    path: Path,
    item: str | None,
    tree: Any,
    names: Collection[str],
    starts: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Reads arrays by name into the host's memory.

    Args:
      path: The checkpoint.
      item: Its item, or None.
      tree: What ``metadata`` returned.
      names: The wanted leaves.
      starts: The shape of the entries that are wanted at the start of some of them.

    Raises:
      ValueError: if an array cannot be read.
    """
    wanted = set(names)
    store = _store_of(path, item)
    if store is not None and wanted <= store.keys.keys():
        return store.read(names, starts)

    def place(keys: Any, x: Any) -> Any:
        return np.empty(x.shape, x.dtype) if path_name(keys) in wanted else ...

    template = jax.tree_util.tree_map_with_path(place, tree)
    named = {} if item is None else {"checkpointable_name": item}
    loaded = ocp.load(str(path), template, **named)
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded)
    found = {path_name(keys): np.asarray(x) for keys, x in flat if path_name(keys) in wanted}
    return {name: _start(x, starts.get(name)) for name, x in found.items()}


def _start(x: Any, shape: tuple[int, ...] | None) -> Any:
    return x if shape is None else x[tuple(slice(n) for n in shape)]


class _Store(NamedTuple):
    """Where and how Orbax keeps the arrays of a tree, in the format of zarr.

    For every call Orbax looks at all leaves of a checkpoint again, the optimizer's too, which for a
    thousand of them takes as long as to read 0.1 GB. A merge calls many times.

    Attributes:
      folder: The folder with the arrays.
      driver: TensorStore's name of the format.
      one_file: Whether the arrays lie in one key-value store, OCDBT, and not in a folder each.
      keys: What each array is called in the store, by its path in the tree.
    """

    folder: Path
    driver: str
    one_file: bool
    keys: dict[str, str]

    def read(
        self, names: Collection[str], starts: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Reads arrays, or the starts of some, all at once, by their paths in the tree."""
        specs = {name: self._spec(self.keys[name]) for name in names}
        opened = {name: ts.open(spec, open=True, read=True) for name, spec in specs.items()}
        pending = {
            name: _start(future.result(), starts.get(name)).read()
            for name, future in opened.items()
        }
        return {name: future.result() for name, future in pending.items()}

    def _spec(self, key: str) -> dict[str, Any]:
        place: dict[str, Any] = {"driver": "file", "path": f"{self.folder}/{key}/"}
        if self.one_file:
            folder = {"driver": "file", "path": f"{self.folder}/"}
            place = {"driver": "ocdbt", "base": folder, "path": f"{key}/"}
        return {"driver": self.driver, "kvstore": place}


def _store_of(path: Path, item: str | None) -> _Store | None:
    """Returns the store of a tree; None for a layout that only Orbax knows how to read."""
    folders = [path] if item is None else []
    folders += [path / name for name in ([item] if item else ["state", "default"])]
    found = [folder for folder in folders if (folder / "_METADATA").is_file()]
    if len(found) != 1:
        return None
    return _opened_store(found[0], (found[0] / "_METADATA").stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _opened_store(folder: Path, modified: int) -> _Store | None:
    del modified  # Another checkpoint may come to lie in the place of this one.
    about = json.loads((folder / "_METADATA").read_text())
    if "tree_metadata" not in about:
        return None
    keys = [
        [str(key["key"]) for key in leaf["key_metadata"]]
        for leaf in about["tree_metadata"].values()
    ]
    names = {"/".join(key): ".".join(key) for key in keys}
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    return _Store(folder, driver, (folder / "manifest.ocdbt").is_file(), names)


def steps(path: Path) -> dict[int, Path]:
    """Returns the checkpoints of a ``CheckpointManager``'s folder by their step; often none."""
    if not path.is_dir():
        return {}
    found = ((re.fullmatch(r"(?:.*_)?(\d+)", child.name), child) for child in path.iterdir())
    return {
        int(match[1]): child
        for match, child in found
        if match and (child / "_CHECKPOINT_METADATA").exists()
    }


class Elements(dict[int, Any]):
    """Some elements of a list by their places, in a tree that is saved in parts.

    Orbax takes a list itself for whole. It keeps each array under the kinds and names of the keys
    above it, and makes a list of those whose keys are places.
    """


def _keyed(elements: Elements) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
    return [(jax.tree_util.SequenceKey(i), x) for i, x in elements.items()], tuple(elements)


jax.tree_util.register_pytree_with_keys(
    Elements, _keyed, lambda places, children: Elements(zip(places, children, strict=True))
)


def save_part(path: Path, tree: Any, custom: dict[str, Any]) -> None:
    """Adds arrays to a checkpoint that is being written, all or none, with notes on them.

    Args:
      path: Where the checkpoint will lie.
      tree: A tree in which what is saved by other calls is missing, from lists as ``Elements``.
      custom: The notes.
    """
    ocp.partial.save(str(path), tree, custom_metadata=custom)


def saved_parts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the notes on all parts that are safely on disk, after clearing away what is not.

    None if the process ended while the parts were being put together: they are of no use then.
    """
    if path.exists():
        return [_custom(path)]
    folder = Path(f"{path}.partial_save")
    parts = list(folder.iterdir()) if folder.exists() else []
    # First of all: what is put together already is missing in the parts, their notes among it.
    if any(".pending_" not in part.name for part in parts):
        return None
    notes = []
    for part in parts:
        if "tmp" in part.name or not (part / "commit_success.txt").exists():
            shutil.rmtree(part)
        else:
            notes.append(_custom(part))
    return notes


def finalize(path: Path) -> None:
    """Puts the saved parts together into one checkpoint; again, changes nothing."""
    if not path.exists():
        ocp.partial.finalize(str(path))
    # The parts come in any order, and Orbax before 0.12 opens lists only if they are in theirs.
    file = path / "state/_METADATA"
    about = json.loads(file.read_text())
    leaves = sorted(about["tree_metadata"].items(), key=lambda item: _keys(item[1]))
    about["tree_metadata"] = dict(leaves)
    partial = file.with_name("_METADATA.partial")
    partial.write_text(json.dumps(about))
    os.replace(partial, file)


# What Orbax calls the kind of a key that is a place in a list.
_PLACE = 1


def _keys(leaf: dict[str, Any]) -> list[int | str]:
    keys = leaf["key_metadata"]
    return [int(key["key"]) if key["key_type"] == _PLACE else key["key"] for key in keys]


def is_partial(path: Path) -> bool:
    """Whether parts of a checkpoint were saved."""
    return Path(f"{path}.partial_save").exists()


def _custom(checkpoint: Path) -> dict[str, Any]:
    # A part cannot be opened as a checkpoint before it is finalized, but this file is complete.
    return json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def _abstract(x: Any) -> Any:
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return x
    try:
        sharding = getattr(x, "sharding", None)
    except ValueError:
        sharding = None  # The devices it was saved from are not here.
    if not isinstance(sharding, NamedSharding) or len(sharding.device_set) == 1:
        sharding = None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
