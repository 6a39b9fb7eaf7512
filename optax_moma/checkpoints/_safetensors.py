"""Safetensors files: how models reach and leave the world of PyTorch.

A file is the length of its header (8 bytes), the header (JSON: dtype, shape and place of every
tensor) and the tensors' bytes, little-endian, row by row. Names such as ``layers.0.kernel`` are
paths ``layers/0/kernel`` here. Kernels are left as they are: PyTorch's linear layers keep the
transpose of Flax's.

Source: the format's description, https://huggingface.co/docs/safetensors.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# In bytes, of XLA's buffers on a CPU.
_ALIGNMENT = 64
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


# A model in one file, and what lists the files of one in several, as the Hub's libraries name them.
_WHOLE = "model.safetensors"
_INDEX = _WHOLE + ".index.json"


class Tensor(NamedTuple):
    """Where a tensor lies: its file and its name there, dtype, shape, and first byte."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class Opened(NamedTuple):
    """What the header of a file says, or those of a folder's files together.

    Attributes:
      tensors: The places of the tensors by name.
      notes: The texts beside the tensors on which all files agree.
    """

    tensors: dict[str, Tensor]
    notes: dict[str, str]


def found(path: Path) -> bool:
    """Whether there is a file, or a folder with such files."""
    return bool(_files(path))


def opened(path: Path, beside: str) -> Opened:
    """Reads the header of a file, or of all the files in a folder that make a model.

    They are the ones that ``model.safetensors.index.json`` lists; if there is none, all of them.

    Args:
      path: The file or the folder.
      beside: The format, in a file's notes, of what may lie in a folder beside a model, and is read
        only if nothing else is there.

    Raises:
      ValueError: if a file is truncated or no safetensors file, or it cannot be told which files
        make the model.
    """
    listed = _listed(path / _INDEX) if (path / _INDEX).exists() else {}
    headers = {file: _opened(file) for file in _files(path, listed)}
    models = {file: x for file, x in headers.items() if x.notes.get("format") != beside}
    headers = models or headers
    names = [file.name for file in headers]
    if not listed and _WHOLE in names and len(names) > 1:
        raise ValueError(f"it holds {', '.join(names)}; name the file that is meant")
    tensors: dict[str, Tensor] = {}
    for file, x in headers.items():
        if twice := [name for name in x.tensors if name in tensors]:
            raise ValueError(f"{file.name} has a second tensor named {twice[0]}")
        tensors |= x.tensors
    for name, file in listed.items():
        if name not in tensors:
            raise ValueError(f"{file} has no {name}, which {_INDEX} tells of")
    return Opened(tensors, agreed([x.notes for x in headers.values()]))


def agreed(notes: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Returns the texts that are the same in all notes."""
    first, *others = notes
    return {k: text for k, text in first.items() if all(x.get(k) == text for x in others)}


def _files(path: Path, listed: Mapping[str, str] | None = None) -> list[Path]:
    if listed:
        return [path / name for name in sorted(set(listed.values()))]
    if path.is_dir():
        return sorted(path.glob("*.safetensors"))
    return [path] if path.suffix == ".safetensors" and path.exists() else []


def _listed(index: Path) -> dict[str, str]:
    """Returns the file of every tensor that an index lists."""
    listed = json.loads(index.read_text()).get("weight_map")
    if not listed:
        raise ValueError(f"{index.name} lists no files under weight_map")
    for name in sorted(set(listed.values())):
        if Path(name).name != name or not index.with_name(name).is_file():
            raise ValueError(f"{name} is not there, which {index.name} lists")
    return listed


def _opened(file: Path) -> Opened:
    with file.open("rb") as stream:
        header, start = _header(stream)
    notes, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{file.name}: {name} has the unknown dtype {entry['dtype']}")
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file.name}: the size of {name} is not that of its shape")
        if start + last > file.stat().st_size:
            raise ValueError(f"{file.name} is truncated: it ends before {name} does")
        tensors[name] = Tensor(name, file, dtype, shape, start + first)
    return Opened(tensors, notes)


def holds(dtype: Any) -> bool:
    """Whether a file can have tensors of a dtype."""
    return np.dtype(dtype) in _CODES


def read(places: Mapping[str, Tensor], names: Collection[str]) -> dict[str, np.ndarray]:
    """Reads tensors by name."""
    result = {}
    for name in names:
        _, file, dtype, shape, start = places[name]
        flat = _aligned(math.prod(shape) * dtype.itemsize)
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            filled = 0
            while filled < flat.size:  # one call reads at most 2 GiB
                count = stream.readinto(flat.data[filled:])
                if not count:
                    raise ValueError(f"{file.name} is truncated: it ends before {name} does")
                filled += count
        result[name] = flat.view(dtype).reshape(shape)
    return result


def _aligned(size: int) -> np.ndarray:
    """Returns bytes that begin where JAX takes an array as it is, and need not copy it."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]


class Writer:
    """Writes a file whose tensors come one at a time, in any order; or goes on with such a file."""

    def __init__(
        self, path: Path, leaves: Mapping[str, jax.ShapeDtypeStruct], about: Mapping[str, str]
    ):
        """Writes the header, or finds that it is there.

        Args:
          path: The file. One that exists with the same header keeps its tensors.
          leaves: Shape and dtype of every tensor by name.
          about: Texts for the header.
        """
        header: dict[str, Any] = {"__metadata__": dict(about)}
        self._places, end = {}, 0
        for name, leaf in leaves.items():
            first, end = end, end + math.prod(leaf.shape) * leaf.dtype.itemsize
            header[name] = {
                "dtype": _CODES[np.dtype(leaf.dtype)],
                "shape": list(leaf.shape),
                "data_offsets": [first, end],
            }
            self._places[name] = first
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self._start = len(text)
        if path.exists() and path.stat().st_size == len(text) + end:
            self._file = path.open("r+b")
            if self._file.read(len(text)) == text:
                return
            self._file.close()
        self._file = path.open("wb")
        self._file.write(text)
        self._file.truncate(self._start + end)

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Writes tensors by name."""
        for name, array in arrays.items():
            self._file.seek(self._start + self._places[name])
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def sync(self) -> None:
        """Has what was written on the disk, whatever becomes of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file."""
        self.sync()
        self._file.close()


def _header(stream: IO[bytes]) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= 100_000_000:
        raise ValueError(f"{stream.name} is no safetensors file")
    text = stream.read(length)
    if len(text) < length:
        raise ValueError(f"{stream.name} is truncated")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"{stream.name} is no safetensors file")
    return header, 8 + length
