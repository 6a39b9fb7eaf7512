"""All that this package asks of Orbax: the one module that knows its interface, version 1.

A checkpoint is opened by its metadata alone. Its arrays are read one group at a time, with ``...``
in the place of what is not wanted; and written one group at a time into a folder that becomes a
checkpoint only when it is finalized.
"""

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from .._tree import path_name


def metadata(path: Path, item: str | None) -> Any:
    """Returns a checkpoint's tree of dicts and lists, with ``jax.ShapeDtypeStruct`` for arrays.

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
        tree = items[item or ("state" if "state" in items else next(iter(items)))]
    if tree is None:
        raise ValueError("its arrays cannot be opened; it is damaged, or not a tree of arrays")
    # Files hold 64-bit integers whatever JAX computes in.
    with jax.enable_x64(True):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_array(x) else x, tree
        )


def read(path: Path, item: str | None, tree: Any, names: Collection[str]) -> dict[str, np.ndarray]:
    """Reads arrays by name into the host's memory.

    Args:
      path: The checkpoint.
      item: Its item, or None.
      tree: What ``metadata`` returned.
      names: The wanted leaves.

    Raises:
      ValueError: if an array cannot be read.
    """
    wanted = set(names)

    def place(keys: Any, x: Any) -> Any:
        return np.empty(x.shape, x.dtype) if path_name(keys) in wanted else ...

    template = jax.tree_util.tree_map_with_path(place, tree)
    named = {} if item is None else {"checkpointable_name": item}
    loaded = ocp.load(str(path), template, **named)
    flat, _ = jax.tree_util.tree_flatten_with_path(loaded)
    return {path_name(keys): np.asarray(x) for keys, x in flat if path_name(keys) in wanted}


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


def save_part(path: Path, tree: Any, custom: dict[str, Any]) -> None:
    """Adds arrays to a checkpoint that is being written, all or none, with notes on them."""
    ocp.partial.save(str(path), tree, custom_metadata=custom)


def saved_parts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the notes on all parts that are safely on disk, after clearing away what is not.

    None if the process ended while the parts were being put together: they are of no use then.
    """
    if path.exists():
        return [_custom(path)]
    folder = Path(f"{path}.partial_save")
    notes = []
    for part in folder.iterdir() if folder.exists() else ():
        if ".pending_" not in part.name:
            return None
        if "tmp" in part.name or not (part / "commit_success.txt").exists():
            shutil.rmtree(part)
        else:
            notes.append(_custom(part))
    return notes


def finalize(path: Path) -> None:
    """Puts the saved parts together into one checkpoint."""
    ocp.partial.finalize(str(path))


def is_partial(path: Path) -> bool:
    """Whether parts of a checkpoint were saved."""
    return Path(f"{path}.partial_save").exists()


def _custom(checkpoint: Path) -> dict[str, Any]:
    # A part cannot be opened as a checkpoint before it is finalized, but this file is complete.
    return json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
