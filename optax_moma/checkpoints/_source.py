"""Where a merge reads from: checkpoints of either kind, the params in them, and their curvature."""

import difflib
import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from .. import _curvature, _globs
from .._moments import Factored
from .._tree import named_leaves
from ..merging._inputs import is_float
from . import _orbax, _safetensors

Abstract = jax.ShapeDtypeStruct
Step = int | Literal["latest"] | None

# What a file of curvature says of itself in its header.
CURVATURE_FORMAT = {"format": "optax_moma.curvature", "version": "1"}
# And a manifest of itself. Other tools have files of that name too.
MANIFEST_FORMAT = {"format": "optax_moma.manifest", "version": 2}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: nothing but its metadata was read.

    Attributes:
      path: Where it lies.
      item: The name of its tree, if Orbax needs one.
      tree: Dicts and lists, with an abstract array at each leaf.
      tensors: The places of its tensors if it is safetensors, else None.
      notes: What safetensors say of themselves beside their tensors.
      step: Which step it is, if it lies in a folder of steps.
    """

    path: Path
    item: str | None
    tree: Any
    tensors: Mapping[str, _safetensors.Tensor] | None
    notes: Mapping[str, str]
    step: int | None = None

    def read(self, names: Collection[str]) -> dict[str, np.ndarray]:
        """Reads leaves by their names into the host's memory.

        Raises:
          ValueError: if the checkpoint is damaged.
        """
        return self._read(names, {})

    def read_start(self, name: str, most: int) -> np.ndarray:
        """Reads the first entries of a leaf that is not empty, rows of them, at most so many.

        Raises:
          ValueError: if the checkpoint is damaged.
        """
        shape, below = [], math.prod(self.leaves[name].shape)
        for n in self.leaves[name].shape:
            below //= n
            shape.append(min(n, max(1, most // below)))
        return self._read([name], {name: tuple(shape)})[name]

    def _read(
        self, names: Collection[str], starts: Mapping[str, tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Reads leaves; of some only the entries at the start, of the given shape."""
        if not names:
            return {}
        if self.tensors is not None:
            cut = {n: self.tensors[n]._replace(shape=shape) for n, shape in starts.items()}
            return _safetensors.read({**self.tensors, **cut}, names)
        try:
            return _orbax.read(self.path, self.item, self.tree, names, starts)
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(f"{self.path} cannot be read: {_first_line(error)}") from error

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """Abstract arrays by name."""
        return dict(zip(*named_leaves(self.tree), strict=True))

    def holds(self, path: str) -> bool:
        """Whether there are leaves at a path in the tree, or below it."""
        start = _slashed(path).strip("/")
        return any(name == start or name.startswith(start + "/") for name in self.leaves)

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each leaf in the checkpoint's manifest, if it has one of ours."""
        try:
            manifest = json.loads(manifest_path(self.path).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        ours = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT["format"]
        return manifest.get("leaves", {}) if ours else {}


def manifest_path(path: Path) -> Path:
    """Returns where the manifest of a merged checkpoint lies: inside, or beside a file."""
    if path.suffix == ".safetensors":
        return path.with_name(path.name + ".manifest.json")
    return path / "manifest.json"


def open_checkpoint(path: Path, item: str | None = None, step: Step = None) -> Checkpoint:
    """Opens an Orbax checkpoint of any version, or safetensors, by metadata alone.

    Args:
      path: A checkpoint; a folder of steps, as a CheckpointManager writes it; a safetensors file,
        or a folder of them.
      item: The name of the tree in an Orbax checkpoint that has several.
      step: Which step of a folder of steps; "latest" for the last.

    Raises:
      ValueError: if there is nothing that can be read.
    """
    path = path.absolute()
    if not path.exists():
        near = _siblings_like(path)
        raise ValueError(f"{path} does not exist" + (f"; there is {near}" if near else ""))
    found, number = _orbax.steps(path), None
    if found or step is not None:
        listed = ", ".join(map(str, sorted(found))) or "none"
        if step is None:
            raise ValueError(f"{path} has the steps {listed}; name one with step:")
        number = max(found, default=None) if step == "latest" else step
        if number not in found:
            raise ValueError(f"{path} has no step {step}, it has {listed}")
        path = found[number]
    try:
        # What lies in a folder that Orbax wrote, a file of curvature perhaps, does not change it.
        if _safetensors.found(path) and not _orbax.is_checkpoint(path):
            tensors, notes = _safetensors.opened(path, beside=CURVATURE_FORMAT["format"])
            places: dict[str, _safetensors.Tensor] = {}
            for name, tensor in tensors.items():
                if places.setdefault(_slashed(name), tensor) is not tensor:
                    raise ValueError(f"two tensors have the path {_slashed(name)}, one is {name}")
            tree = _nested({n: Abstract(x.shape, x.dtype) for n, x in places.items()})
            return Checkpoint(path, None, tree, places, notes, number)
        tree = _orbax.metadata(path, item)
    except (ValueError, OSError, RuntimeError) as error:
        said = _no_checkpoint(path) or f"cannot be read: {_first_line(error)}"
        raise ValueError(f"{path} {said}") from error
    names, _ = named_leaves(tree)
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has two leaves with one path, as a key contains a slash")
    return Checkpoint(path, item, tree, None, {}, number)


def inspect(
    path: Path | str, *, item: str | None = None, step: Step = None
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Lists the leaves of a checkpoint, from its metadata alone.

    Args:
      path: An Orbax checkpoint or a folder of steps; a safetensors file, or a folder of them.
      item: The name of the tree, in an Orbax checkpoint that has several.
      step: Which step of a folder of steps; "latest" for the last.

    Returns:
      Shape and dtype by leaf path.

    Raises:
      ValueError: if there is nothing that can be read.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder = tempfile.mkdtemp()
      >>> ocp.save(f"{folder}/a", {"params": {"w": jnp.ones((2, 3))}})
      >>> inspect(f"{folder}/a")
      {'params/w': ((2, 3), 'float32')}
    """
    leaves = open_checkpoint(Path(path), item, step).leaves
    return {
        name: (tuple(leaf.shape), str(leaf.dtype))
        for name, leaf in leaves.items()
        if isinstance(leaf, Abstract)
    }


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds.

    Attributes:
      path: Where it lies; in a folder of steps, the step's own folder.
      step: How far it was trained, if it says so.
      leaves: Shape and dtype by leaf path.
      params: The path of the params, "" if they are all of it; None if they cannot be told.
      curvature: Whose moments its curvature is read from, and in which parts; None if it has none.
      covered: How many floating-point leaves of the params have a curvature.
      wanted: How many there are.
      gradients: From how many gradients the curvature was estimated, if that is noted.
    """

    path: Path
    step: int | None
    leaves: dict[str, tuple[tuple[int, ...], str]]
    params: str | None
    curvature: str | None
    covered: int
    wanted: int
    gradients: int | None


def describe(
    path: Path | str, *, item: str | None = None, step: Step = None, params: str | None = None
) -> Description:
    """Finds out what a checkpoint holds: its leaves, and where a merge finds what it needs.

    Reads metadata, and two numbers: how far it was trained and by how many gradients.

    Args:
      path: An Orbax checkpoint or a folder of steps; a safetensors file, or a folder of them.
      item: The name of the tree, in an Orbax checkpoint that has several.
      step: Which step of a folder of steps; "latest" for the last.
      params: The path of the params in the tree; by default they are searched for.

    Returns:
      A ``Description``.

    Raises:
      ValueError: if there is nothing that can be read.

    Example:
      >>> import jax.numpy as jnp, optax, tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder, params = tempfile.mkdtemp(), {"w": jnp.ones((2, 3))}
      >>> state = {"params": params, "opt_state": optax.adam(1e-3).init(params)}
      >>> ocp.save(f"{folder}/a", state)
      >>> found = describe(f"{folder}/a")
      >>> found.params, found.curvature, found.covered, found.wanted
      ('params', 'adam (opt_state/0)', 1, 1)
    """
    checkpoint = open_checkpoint(Path(path), item, step)
    leaves = {
        name: (tuple(leaf.shape), str(leaf.dtype))
        for name, leaf in checkpoint.leaves.items()
        if isinstance(leaf, Abstract)
    }
    try:
        model = open_model(str(path), checkpoint, params)
    except ValueError:
        if params is not None:
            raise
        return Description(checkpoint.path, checkpoint.step, leaves, None, None, 0, 0, None)
    kind, covered, gradients = None, 0, None
    try:
        curvature = open_curvature(model, checkpoint, None, 0.999, None)
    except ValueError:
        pass  # It holds none.
    else:
        kind, gradients = curvature.kind, curvature.gradients
        covered = sum(name in curvature.needs for name in model.floats)
    where = "/".join(model.prefix)
    return Description(
        checkpoint.path, model.step, leaves, where, kind, covered, len(model.floats), gradients
    )


class Model(NamedTuple):
    """The params in a checkpoint.

    Attributes:
      label: How messages call it: "the base", "expert 'math'".
      checkpoint: Where it lies.
      tree: The params' part of the checkpoint's tree, with the leaf's path at each leaf.
      leaves: Abstract arrays by leaf path, and what else is there: texts, Python's numbers.
      stored: The leaves' names in the checkpoint by leaf path.
      prefix: The path of the params in the checkpoint.
    """

    label: str
    checkpoint: Checkpoint
    tree: Any
    leaves: dict[str, Abstract]
    stored: dict[str, str]
    prefix: tuple[str, ...]

    @property
    def arrays(self) -> dict[str, Abstract]:
        """The leaves that are arrays, by leaf path."""
        return {name: x for name, x in self.leaves.items() if isinstance(x, Abstract)}

    @property
    def floats(self) -> list[str]:
        """The paths of the leaves of floating point: what is merged, and may have a curvature."""
        return [name for name, x in self.arrays.items() if is_float(x)]

    @property
    def step(self) -> int | None:
        """How far it was trained: what is called "step" beside its params, or the folder's step."""
        for depth in range(len(self.prefix), -1, -1):
            name = "/".join((*self.prefix[:depth], "step"))
            leaf = self.checkpoint.leaves.get(name)
            if name not in self.stored.values() and isinstance(leaf, Abstract) and leaf.shape == ():
                return int(self.checkpoint.read([name])[name])
        return self.checkpoint.step

    def with_leaves(self, other: "Model", names: Collection[str]) -> "Model":
        """Returns the model with leaves that it lacks, in the places that they have in another.

        Raises:
          ValueError: if one lies in a list, or below a leaf.
        """
        tree = jax.tree.map(lambda name: name, self.tree)  # its dicts are other ones
        for name in names:
            node, theirs = tree, other.tree
            *folders, last = name.split("/")
            for key in folders:
                theirs = theirs[key] if isinstance(theirs, dict) else None
                node = node.setdefault(key, {}) if isinstance(node, dict) else None
            if not (isinstance(theirs, dict) and isinstance(node, dict)):
                raise ValueError(
                    f"{name} of {other.label} cannot be added to {self.label}: it lies in a list, "
                    "or below a leaf"
                )
            node[last] = name
        return self._replace(
            tree=tree, leaves=self.leaves | {name: other.leaves[name] for name in names}
        )


def open_model(
    label: str, checkpoint: Checkpoint, params: str | None, rename: Mapping[str, str] | None = None
) -> Model:
    """Finds the params in a checkpoint.

    Args:
      label: How messages call the model.
      checkpoint: The checkpoint.
      params: Their path in the checkpoint, with slashes or dots. None: what is called "params",
        or all of a checkpoint that has nothing of an optimizer.
      rename: Globs of leaf paths, and what the leaves are called in the merge.

    Raises:
      ValueError: if they are not found, or cannot be renamed.
    """
    prefix = _found_params(checkpoint) if params is None else _split(checkpoint, params)
    tree = checkpoint.tree
    for key in prefix:
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    names, leaves = named_leaves(tree)
    plain = without_value(names)
    stored = ["/".join((*prefix, name)) if name else "/".join(prefix) for name in names]
    tree = jax.tree.structure(tree).unflatten(plain)
    if rename:
        plain = _globs.renamed(rename, plain)
        tree = _nested(dict(zip(plain, plain, strict=True)))
    return Model(
        label,
        checkpoint,
        tree,
        dict(zip(plain, leaves, strict=True)),
        dict(zip(plain, stored, strict=True)),
        prefix,
    )


def without_value(names: list[str]) -> list[str]:
    """Returns paths without the last part ``value`` that every leaf of an NNX state has."""
    if names and all(name.endswith("/value") for name in names):
        return [name.removesuffix("/value") for name in names]
    return names


class Need(NamedTuple):
    """What must be read for the curvature of one leaf.

    Attributes:
      kind: The optimizer's kind, or "file" for a file of curvature.
      fields: The names in the checkpoint of the arrays of this leaf, by field.
      scalars: The names in the checkpoint of the numbers that all leaves share, by field.
    """

    kind: str
    fields: dict[str, str]
    scalars: dict[str, str]

    @property
    def names(self) -> list[str]:
        """All that must be read."""
        return [*self.fields.values(), *self.scalars.values()]


class CurvatureOf(NamedTuple):
    """The curvature of one expert.

    Attributes:
      checkpoint: Where it is read from.
      needs: What it takes, by leaf path.
      b2: The decay of second moments that do not record their own.
      missing: The curvature of leaves that have none, or None.
    """

    checkpoint: Checkpoint
    needs: dict[str, Need]
    b2: float
    missing: float | None

    @property
    def kind(self) -> str:
        """Whose moments it is read from, and where they lie in the checkpoint."""
        if self.checkpoint.tensors is not None:
            return self.checkpoint.path.name
        # The numbers that all leaves share, or else a field of one leaf, tell the state's place.
        places: dict[str, list[str]] = {}
        for need in self.needs.values():
            shared, field = next(iter(need.scalars.items()), (None, ""))
            if shared is None:
                shared, field = next(iter(need.fields.items()))
            place = field.split(f"/{shared}")[0]
            if place not in places.setdefault(need.kind, []):
                places[need.kind].append(place)
        return ", ".join(f"{kind} ({', '.join(found)})" for kind, found in places.items())

    @property
    def gradients(self) -> int | None:
        """How many gradients it was estimated from; None if nothing tells."""
        if self.checkpoint.tensors is not None:
            return self._noted("gradients")
        names = {s["count"] for s in (n.scalars for n in self.needs.values()) if "count" in s}
        arrays = self.checkpoint.read(sorted(names)) if names else {}
        return min((int(np.min(x)) for x in arrays.values()), default=None)

    @property
    def counts_only(self) -> bool:
        """Whether the weight of its gradients follows from their number only if b2 is known."""
        return any(
            need.kind != "adafactor" and "count" in need.scalars and "nu_weight" not in need.scalars
            for need in self.needs.values()
        )

    def step(self, model: Model) -> int | None:
        """Returns of which step of training it is; None if nothing tells."""
        if self.checkpoint.tensors is not None:
            return self._noted("step")
        if self.checkpoint.path == model.checkpoint.path:
            return model.step
        return model._replace(checkpoint=self.checkpoint).step

    def _noted(self, what: str) -> int | None:
        said = self.checkpoint.notes.get(what, "")
        return int(said) if said.isdecimal() else None

    def assembled(self, name: str, leaf: Abstract, arrays: Mapping[str, Any]) -> Any:
        """Returns a leaf's curvature from the arrays that it needs; None if it has none."""
        need = self.needs.get(name)
        if need is None:
            if self.missing is None:
                return None
            return np.full(leaf.shape, self.missing, np.float32)
        fields = {field: arrays[stored] for field, stored in need.fields.items()}
        if need.kind == "file":
            return fields["dense"] if "dense" in fields else Factored(**fields)
        scalars = {field: arrays[stored] for field, stored in need.scalars.items()}
        try:
            return _from_state(fields, scalars, need.kind, self.b2, leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def abstract(self, name: str, leaf: Abstract) -> Any:
        """Returns the shapes and dtypes of ``assembled``."""
        need = self.needs.get(name)
        # A file's 64-bit step count is one of 32 bits wherever JAX does not compute in 64.
        arrays = {
            n: Abstract(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))
            for n, x in ((n, self.checkpoint.leaves[n]) for n in (need.names if need else ()))
        }
        return jax.eval_shape(lambda arrays: self.assembled(name, leaf, arrays), arrays)


def open_curvature(
    model: Model, checkpoint: Checkpoint, tree: str | None, b2: float, missing: float | None
) -> CurvatureOf:
    """Finds what knows the curvature of each leaf: a file of curvature, or an optimizer's state.

    The optimizer may have trained more than the model, an encoder and its head for example: then
    its state knows a leaf by a longer part of the leaf's path in the checkpoint.

    Args:
      model: The params that the curvature is of.
      checkpoint: Where to look.
      tree: The path of the optimizer's state in it; None to look everywhere.
      b2: The decay of Adam's and umtam's second moments.
      missing: The curvature of leaves without, or None.

    Raises:
      ValueError: if there is none.
    """
    if checkpoint.tensors is not None:
        return CurvatureOf(checkpoint, _of_model(model, _needs_of_file(checkpoint)), b2, missing)
    names, _ = named_leaves(checkpoint.tree)
    # Each leaf stands for itself by its name, so the places of fields come back as names.
    node = jax.tree.structure(checkpoint.tree).unflatten([_Name(name) for name in names])
    for key in () if tree is None else _split(checkpoint, tree):
        node = node[int(key)] if isinstance(node, list) else node[key]
    needs: dict[str, Need] = {}
    for kind, tables, scalars in _curvature.sources(node):
        # An NNX state has its numbers one level deeper, below "value".
        numbers = {
            field: jax.tree.leaves(scalars[field])[0].text
            for field in ("count", "nu_weight")
            if field in scalars
        }
        for field in ("nu", "R", "C", "v_row", "v_col", "v"):
            table = tables.get(field, {})
            for name, (_, place) in zip(without_value(list(table)), table.items(), strict=True):
                need = needs.setdefault(name, Need(kind, {}, numbers))
                if need.kind == kind and need.scalars == numbers:
                    need.fields[field] = place.text
    if not needs:
        raise ValueError(
            f"{checkpoint.path} holds no optimizer state with second moments"
            + (f" at {tree}" if tree else "")
            + "; name the state with curvature:, or a file that export-curvature wrote"
        )
    return CurvatureOf(checkpoint, _of_model(model, needs), b2, missing)


def _of_model(model: Model, needs: dict[str, Need]) -> dict[str, Need]:
    """The needs by the model's own leaf paths: the longest path that is known is the leaf's."""
    found = {}
    for name, stored in model.stored.items():
        # The optimizer knows a leaf by its own name, not by the one that the recipe gives it.
        parts = stored.removesuffix("/value").split("/")
        paths = ["/".join(parts[i:]) for i in range(len(model.prefix) + 1)]
        known = next((path for path in paths if path in needs), None)
        if known is not None:
            found[name] = needs[known]
    return found


@functools.partial(jax.jit, static_argnames=("kind", "b2", "leaf"))
def _from_state(
    fields: dict[str, Any], scalars: dict[str, Any], kind: str, b2: float, leaf: Abstract
) -> Any:
    """Returns a leaf's curvature from the part of an optimizer's state that holds this leaf.

    Compiled once for all leaves of a shape, whatever their names.
    """
    # Its state has the field names that the kind is known by.
    known_by = {field: {} for field in _curvature.KNOWN_BY[kind]}
    state = known_by | {field: {"leaf": x} for field, x in fields.items()} | scalars
    return _curvature.curvature_from(state, {"leaf": leaf}, b2=b2)["leaf"]


@dataclass(frozen=True)
class _Name:
    text: str


def _needs_of_file(checkpoint: Checkpoint) -> dict[str, Need]:
    if not _is_curvature(checkpoint):
        raise ValueError(f"{checkpoint.path} is no file that export-curvature wrote")
    needs: dict[str, Need] = {}
    for stored in checkpoint.tensors or ():
        name, _, part = stored.partition("#")
        needs.setdefault(name, Need("file", {}, {})).fields[part or "dense"] = stored
    return needs


def _is_curvature(checkpoint: Checkpoint) -> bool:
    return checkpoint.notes.get("format") == CURVATURE_FORMAT["format"]


def curvature_entries(curvature: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a file of curvature: ``path``, or ``path#row`` and ``path#col``."""
    entries = {}
    for name, v in curvature.items():
        if isinstance(v, Factored):
            entries |= {f"{name}#row": v.row, f"{name}#col": v.col}
        elif v is not None:
            entries[name] = v
    return entries


def _found_params(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.tensors is not None:
        if _is_curvature(checkpoint):
            raise ValueError(f"{checkpoint.path} holds curvature, not a model")
        return ()
    found = list(_called_params(checkpoint.tree, ()))
    shallowest = [prefix for prefix in found if len(prefix) == min(map(len, found))]
    if len(shallowest) == 1:
        return shallowest[0]
    top = list(checkpoint.tree) if isinstance(checkpoint.tree, dict) else []
    if not found and not {"opt_state", "optimizer", "step"} & {str(key) for key in top}:
        return ()
    raise ValueError(
        f"{checkpoint.path}: which part are the params? Name it with params:, for example one of "
        + ", ".join(map("/".join, shallowest) if shallowest else map(str, top))
    )


def _called_params(tree: Any, prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for key, node in _children(tree):
        if key == "params":
            yield (*prefix, key)
        elif key not in ("opt_state", "optimizer"):
            yield from _called_params(node, (*prefix, key))


def _children(tree: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict):
        return tree.items()
    return ((str(i), x) for i, x in enumerate(tree)) if isinstance(tree, list) else ()


def _split(checkpoint: Checkpoint, path: str) -> tuple[str, ...]:
    keys = tuple(key for key in _slashed(path).split("/") if key)
    node = checkpoint.tree
    for i, key in enumerate(keys):
        children = dict(_children(node))
        if key not in children:
            near = difflib.get_close_matches(key, children, 1)
            at = "/".join(keys[:i]) or "the top"
            raise ValueError(
                f"{checkpoint.path}: there is no {key!r} at {at}; "
                + (f"did you mean {near[0]!r}?" if near else f"there is {', '.join(children)}")
            )
        node = children[key]
    return keys


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} lies below another leaf")
        if last in node:
            raise ValueError(f"{name} is the name of a leaf and of a group of leaves")
        node[last] = leaf
    return tree


def _slashed(name: str) -> str:
    return name.replace(".", "/")


def _no_checkpoint(path: Path) -> str | None:
    """Returns what to say of a path with no mark of a checkpoint; None if it has one."""
    children = sorted(path.iterdir()) if path.is_dir() else [path]
    # Orbax opens the items of a checkpoint also where it left no mark above them.
    if _is_one(path) or any((child / "_METADATA").exists() for child in children):
        return None
    torch = [child.name for child in children if child.suffix in (".bin", ".pt", ".pth")]
    convert = "convert it with save_pretrained(safe_serialization=True)"
    if path.is_file():
        return "is no Orbax checkpoint and no safetensors" + (f"; {convert}" if torch else "")
    inside = [child.name for child in children if _is_one(child)]
    holds = "it is empty"
    if torch:
        holds = f"it holds {', '.join(torch)}: {convert}"
    elif inside:
        holds = f"it holds the folders {', '.join(inside)}: name one"
    elif children:
        holds = f"it holds {', '.join(child.name for child in children[:10])}"
    return f"is no Orbax checkpoint and has no *.safetensors; {holds}"


def _is_one(path: Path) -> bool:
    """Whether a path has the marks of a checkpoint."""
    return _orbax.is_checkpoint(path) or _safetensors.found(path)


def _siblings_like(path: Path) -> Path | None:
    names = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return path.with_name(near[0]) if near else None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
