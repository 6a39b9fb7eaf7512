"""Looks at the inputs of a merge before any work, and reports all that is wrong at once."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_moma._moments import Factored
from optax_moma.merging._contract import Contract
from optax_moma.merging._matrices import gram_layout, layout_of

Path = tuple[str, ...]
Leaves = dict[Path, Any]


class MergeError(ValueError):
    """All that is wrong with the inputs of a merge, said at once.

    Attributes:
      start: How the message starts: "Cannot merge,".
      problems: What is wrong, one text each.

    Example:
      >>> from optax_moma import merging
      >>> try:
      ...     merging.merge(merging.ties(), [{"w": jnp.ones(2)}, {"w": jnp.ones(3)}])
      ... except merging.MergeError as error:
      ...     print(len(error.problems), error.problems[1])
      2 expert 1, w: shape (3,), but expert 0 has (2,); merge models of one architecture and one
      vocabulary
    """

    def __init__(self, start: str, problems: Sequence[str]):
        """Keeps the problems, and lists them in the message."""
        self.start, self.problems = start, list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{start} {count}:" + "".join(f"\n- {p}" for p in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets the error travel between processes."""
        return type(self), (self.start, self.problems)


class Checked(NamedTuple):
    """The inputs of a merge, matched by path.

    Attributes:
      names: The experts' names; ``"0"``, ``"1"``, ... for a list.
      treedef: The structure of the merged tree: the base's, else the first expert's.
      paths: The leaves' paths, in the order of ``treedef``.
      experts: The leaves of each expert, by path.
      base: The leaves of the base, by path, or None.
      curvature: The curvature of each expert, by path, or None if the method needs none.
      weights: One number per expert.
    """

    names: list[str]
    treedef: Any
    paths: list[Path]
    experts: list[Leaves]
    base: Leaves | None
    curvature: list[Leaves] | None
    weights: jax.Array | np.ndarray


def path_text(path: Path) -> str:
    """Returns a path as text, for messages and for random keys: ``layers/0/kernel``."""
    return "/".join(path) or "<root>"


def checked_inputs(
    contract: Contract,
    experts: Any,
    base: Any,
    curvature: Any,
    weights: Any,
    key: Any,
    only: Collection[Path] | None = None,
) -> Checked:
    """Matches the inputs of a merge leaf by leaf, of all leaves or of these only.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: for everything else that is wrong, in one message.
    """
    names, trees = _by_name("experts", experts)
    labels = [
        f"expert {name!r}" if isinstance(experts, Mapping) else f"expert {name}" for name in names
    ]
    problems = _unmet(contract, len(names), base, curvature, key)
    if not trees:
        raise MergeError("Cannot merge,", problems)

    leaves = [_leaves(tree, only) for tree in trees]
    base_leaves = None if base is None else _leaves(base, only)
    wanted, owner = (leaves[0], labels[0]) if base_leaves is None else (base_leaves, "the base")
    models = list(zip(labels, leaves, strict=True))
    models += [] if base_leaves is None else [("the base", base_leaves)]
    for label, found in models:
        problems += _mismatches(label, found, wanted, owner)

    curvatures: list[tuple[str, Leaves]] = []
    aligned = (
        None if curvature is None else _aligned("curvature", curvature, experts, names, problems)
    )
    if aligned is not None:
        labels = [f"the curvature of {label}" for label in labels]
        found = [_leaves(tree, only, curvature=True) for tree in aligned]
        curvatures = list(zip(labels, found, strict=True))
    for label, found in curvatures:
        if contract.gram:
            problems += _gram_mismatches(label, found, wanted)
        else:
            problems += _curvature_mismatches(label, found, wanted, contract.axes)
    if contract.gram:
        problems += _unequal_grams([found for _, found in curvatures])
    if not contract.curvature:
        # A method that does not look at the curvature must not fail for what is in it.
        curvatures = []

    say = checked_weights(contract, weights, experts, names, problems)
    problems += _faulty_values(models, curvatures, wanted, gram=contract.gram)
    if problems:
        raise MergeError("Cannot merge,", problems)
    return Checked(
        names=names,
        treedef=jax.tree_util.tree_structure(trees[0] if base is None else base),
        paths=list(wanted),
        experts=leaves,
        base=base_leaves,
        curvature=[v for _, v in curvatures] if contract.curvature else None,
        weights=say,
    )


def is_float(x: Any) -> bool:
    """Whether a leaf is one that merges average: real floating point."""
    return _kind(x) == "float"


def _by_name(argument: str, trees: Any) -> tuple[list[str], list[Any]]:
    """Returns names and trees of a list, or of a dict in the order of its names."""
    if isinstance(trees, Mapping):
        if wrong := [name for name in trees if not isinstance(name, str)]:
            raise TypeError(
                f"{argument} must be a list of trees, or a dict of trees by name, and names are "
                f"strings; got the keys {wrong}. Is it a single tree? Then put it into a list."
            )
        names = sorted(trees)
        return names, [trees[name] for name in names]
    # A named tuple is most likely a tree itself.
    if isinstance(trees, (list, tuple)) and not hasattr(trees, "_fields"):
        return [str(i) for i in range(len(trees))], list(trees)
    raise TypeError(
        f"{argument} must be a list of trees, or a dict of trees by name, "
        f"got {type(trees).__name__}."
    )


def _unmet(contract: Contract, k: int, base: Any, curvature: Any, key: Any) -> list[str]:
    problems = []
    if not contract.combines:
        problems.append("method: it never combines the experts; add mean() or total() to the chain")
    if contract.base and base is None:
        problems.append(
            "base: the method works on task vectors; pass base=, the params that the "
            "experts were fine-tuned from"
        )
    if contract.curvature and curvature is None:
        problems.append(
            "curvature: the method needs one tree per expert; pass curvature=, for "
            "example [optax_moma.curvature_from(opt_state, params), ...]"
        )
    if contract.key and key is None:
        problems.append("key: the method is random; pass key=jax.random.key(seed)")
    if key is not None and not isinstance(key, (jax.Array, np.ndarray)):
        problems.append(f"key: got {key!r}; pass jax.random.key(seed)")
    if k < contract.min_experts:
        problems.append(f"experts: the method needs at least {contract.min_experts}, got {k}")
    if contract.max_experts is not None and k > contract.max_experts:
        problems.append(f"experts: the method takes at most {contract.max_experts}, got {k}")
    return problems


def _leaves(tree: Any, only: Collection[Path] | None, *, curvature: bool = False) -> Leaves:
    def is_leaf(x: Any) -> bool:
        return curvature and (x is None or isinstance(x, Factored))

    def parts(path: Any) -> Path:
        # Flax NNX variables hold their array in an attribute; the same params as a plain dict, or
        # restored from a checkpoint, have the same paths without it.
        if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
            path = path[:-1]
        return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    found = {parts(path): leaf for path, leaf in flat}
    return {p: leaf for p, leaf in found.items() if only is None or p in only}


def _kind(x: Any) -> str:
    """Returns "float", "complex", "other", or "no array"."""
    if not isinstance(
        x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float, complex)
    ):
        return "no array"
    dtype = _dtype(x)
    if jnp.issubdtype(dtype, jnp.floating):
        return "float"
    return "complex" if jnp.issubdtype(dtype, jnp.complexfloating) else "other"


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _paths(paths: Sequence[Path]) -> str:
    return ", ".join(map(path_text, paths))


def _mismatches(label: str, found: Leaves, wanted: Leaves, owner: str) -> list[str]:
    problems = _missing_and_extra(label, found, wanted, owner)
    for path, leaf in found.items():
        where = f"{label}, {path_text(path)}"
        kind = _kind(leaf)
        if kind == "no array":
            problems.append(
                f"{where}: a {type(leaf).__name__} is not an array; take it out of the tree"
            )
        if kind == "complex":
            problems.append(
                f"{where}: complex numbers are not merged; pass real and imaginary "
                "parts as two leaves"
            )
        if path not in wanted or kind == "no array":
            continue
        other = wanted[path]
        if np.shape(leaf) != np.shape(other):
            problems.append(
                f"{where}: shape {np.shape(leaf)}, but {owner} has {np.shape(other)}; "
                "merge models of one architecture and one vocabulary"
            )
        if kind != _kind(other):
            problems.append(
                f"{where}: dtype {_dtype(leaf)}, but {owner} has {_dtype(other)}; cast one of them"
            )
    return problems


def _missing_and_extra(label: str, found: Leaves, wanted: Leaves, owner: str) -> list[str]:
    problems = []
    missing = [path for path in wanted if path not in found]
    extra = [path for path in found if path not in wanted]
    if missing:
        problems.append(
            f"{label} lacks leaves that {owner} has: {_paths(missing)}; add or rename "
            "them" + (f" (it has {_paths(extra)})" if extra else "")
        )
    elif extra:
        problems.append(
            f"{label} has leaves that {owner} lacks: {_paths(extra)}; take them out, "
            "heads for example, and put them back after the merge"
        )
    return problems


def _curvature_mismatches(label: str, found: Leaves, wanted: Leaves, axes: str | None) -> list[str]:
    # None stands for "no curvature", which is right wherever nothing is averaged.
    found = {path: v for path, v in found.items() if v is not None}
    averaged = {path: leaf for path, leaf in wanted.items() if is_float(leaf)}
    ignored = {path: leaf for path, leaf in wanted.items() if path not in averaged}
    found = {path: v for path, v in found.items() if path not in ignored}
    needed = {
        path: leaf
        for path, leaf in averaged.items()
        if path in found or axes is None or layout_of(axes, np.shape(leaf)) is not None
    }
    problems = _missing_and_extra(label, found, needed, "the model")
    for path, v in found.items():
        where = f"{label}, {path_text(path)}"
        parts = v if isinstance(v, Factored) else (v,)
        if any(_kind(part) != "float" for part in parts):
            problems.append(
                f"{where}: not a floating-point array or Factored(row, col); pass what "
                "optax_moma.curvature_from returns"
            )
        elif path in averaged and not _fits(parts, np.shape(averaged[path])):
            shapes = " x ".join(str(np.shape(part)) for part in parts)
            problems.append(
                f"{where}: shape {shapes}, but the params have "
                f"{np.shape(averaged[path])}; was it read from another model's state?"
            )
    return problems


def _gram_mismatches(label: str, found: Leaves, wanted: Leaves) -> list[str]:
    problems = []
    for path, gram in found.items():
        where = f"{label}, {path_text(path)}"
        if gram is None:
            continue
        if path not in wanted:
            problems += _missing_and_extra(label, {path: gram}, {}, "the model")
            continue
        shape = np.shape(wanted[path])
        if len(shape) < 2:
            problems.append(f"{where}: a Gram for a leaf that is no matrix; make it None")
        elif isinstance(gram, Factored) or _kind(gram) != "float":
            problems.append(f"{where}: not a floating-point array; pass x.T @ x of the inputs x")
        elif gram_layout(np.shape(gram), shape) is None:
            fitting = f"({shape[0]}, {shape[0]})"
            if len(shape) > 2:
                fitting += ", or of its first axes as one, or of each matrix of a stack"
            problems.append(
                f"{where}: shape {np.shape(gram)}, but a kernel of shape {shape} has inputs with "
                f"a Gram of shape {fitting}; pass x.T @ x of the inputs x"
            )
    return problems


def _unequal_grams(curvatures: list[Leaves]) -> list[str]:
    problems = []
    for path in dict.fromkeys(path for found in curvatures for path in found):
        grams = [found.get(path) for found in curvatures]
        arrays = [g for g in grams if g is not None and not isinstance(g, Factored)]
        shapes = dict.fromkeys(str(np.shape(g)) for g in arrays)
        if len(shapes) > 1:
            problems.append(
                f"the curvature, {path_text(path)}: Grams of shapes {', '.join(shapes)}; give all "
                "experts' of one shape"
            )
    return problems


def _fits(parts: Sequence[Any], shape: tuple[int, ...]) -> bool:
    shapes = [np.shape(part) for part in parts]
    if any(len(s) != len(shape) for s in shapes):
        return False
    # Each axis must be whole in one part and whole or of size one in the others.
    return all(
        max(sizes) == n and set(sizes) <= {1, n} for *sizes, n in zip(*shapes, shape, strict=True)
    )


def _aligned(
    argument: str, values: Any, experts: Any, names: list[str], problems: list[str]
) -> list[Any] | None:
    """Returns one value per expert, in the order of names, or None after noting a problem."""
    if not hasattr(values, "__len__"):
        raise TypeError(
            f"{argument} must be a list, or a dict by name, as experts is, "
            f"got {type(values).__name__}."
        )
    if isinstance(values, Mapping):
        if not isinstance(experts, Mapping):
            problems.append(
                f"{argument}: a dict by name, but experts is a list; pass both as "
                "dicts or both as lists"
            )
            return None
        unknown = [name for name in values if name not in experts]
        missing = [name for name in names if name not in values]
        for name in unknown:
            near = difflib.get_close_matches(str(name), names, 1)
            problems.append(
                f"{argument}: there is no expert {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"there are {names}")
            )
        if missing:
            problems.append(f"{argument}: none for the experts {missing}; give every expert one")
        return None if unknown or missing else [values[name] for name in names]
    if len(values) != len(names):
        problems.append(
            f"{argument}: {len(values)} of them for {len(names)} experts; give every expert one"
        )
        return None
    if isinstance(experts, Mapping) and list(experts) != names:
        problems.append(
            f"{argument}: a list, but experts is a dict that is not in alphabetical "
            f"order; pass a dict with the names {names}"
        )
        return None
    return list(values)


def checked_weights(
    contract: Contract, weights: Any, experts: Any, names: list[str], problems: list[str]
) -> jax.Array | np.ndarray:
    """Returns one number per expert, in the order of names; notes what is wrong in problems."""
    if weights is None:
        return np.ones(len(names), np.float32)
    sequence = isinstance(weights, (Mapping, list, tuple))
    if not sequence and not (isinstance(weights, (jax.Array, np.ndarray)) and weights.ndim == 1):
        raise TypeError(
            "weights must be a list, a dict by name, or an array with one number per expert, "
            f"got {weights!r}."
        )
    values = _aligned("weights", weights, experts, names, problems)
    if values is None:
        return np.ones(len(names), np.float32)
    if not all(_kind(w) in ("float", "other") and jnp.shape(w) == () for w in values):
        raise TypeError(f"weights must be numbers, one per expert, got {weights!r}.")
    if any(isinstance(w, Tracer) for w in values):
        return jnp.stack([jnp.asarray(w) for w in values])
    array = np.asarray([float(w) for w in values])
    for name, w in zip(names, array, strict=True):
        if not np.isfinite(w):
            problems.append(f"weights: {w} for expert {name!r}; pass a finite number")
        elif w < 0 and contract.nonnegative_weights:
            problems.append(
                f"weights: {w} for expert {name!r}; the method takes a mean, so pass "
                "a number that is not negative"
            )
    if contract.nonnegative_weights and not np.any(array):
        problems.append("weights: all are zero; give at least one expert a positive weight")
    return array


def _faulty_values(
    models: list[tuple[str, Leaves]],
    curvatures: list[tuple[str, Leaves]],
    wanted: Leaves,
    *,
    gram: bool,
) -> list[str]:
    """Reports NaN, infinities, negative curvature, and leaves that cannot be averaged but differ.

    Only arrays with values are looked at: tracers and shapes have none.
    """
    faults: list[tuple[str, str, Any]] = []
    with jax.ensure_compile_time_eval():
        for label, leaves in models:
            for path, leaf in leaves.items():
                where, other = f"{label}, {path_text(path)}", wanted.get(path)
                if not _has_values(leaf):
                    continue
                if _kind(leaf) == "float":
                    what = (
                        "values that are not finite; retrain, leave this model out, or let them "
                        "through with a recipe's allow_nonfinite"
                    )
                    faults.append((where, what, count_not_finite(leaf)))
                elif leaf is not other and _has_values(other) and _kind(other) == "other":
                    what = (
                        f"values of dtype {_dtype(leaf)} that differ between the models; what is "
                        "not floating point is copied: give all models the same, or take it out "
                        "and put one model's back after the merge, as a recipe's rule keep does"
                    )
                    faults.append((where, what, _count_unequal(leaf, other)))
        what = "values that are not finite; leave the batches out that caused them"
        if not gram:
            what = "values that are negative or not finite; a second moment is neither"
        count_faults = count_not_finite if gram else _count_not_curvature
        for label, leaves in curvatures:
            for path, v in leaves.items():
                parts = [p for p in jax.tree.leaves(v) if _has_values(p) and _kind(p) == "float"]
                where = f"{label}, {path_text(path)}"
                faults += [(where, what, count_faults(part)) for part in parts]
                if gram and parts:
                    skew = "entries of a Gram that is not symmetric; pass x.T @ x of the inputs x"
                    faults.append((where, skew, _count_asymmetric(parts[0])))
    counts = jax.device_get([count for _, _, count in faults])
    return [
        f"{where}: {count} {what}"
        for (where, what, _), count in zip(faults, counts, strict=True)
        if count
    ]


def _has_values(x: Any) -> bool:
    return _kind(x) != "no array" and not isinstance(x, (Tracer, jax.ShapeDtypeStruct))


@jax.jit
def count_not_finite(x: jax.Array) -> jax.Array:
    """Returns how many entries are NaN or infinite."""
    return jnp.sum(~jnp.isfinite(x))


@jax.jit
def _count_asymmetric(gram: jax.Array) -> jax.Array:
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        return jnp.zeros((), jnp.int32)  # Reported as a mismatch of shapes.
    # Rounded products may differ across the diagonal, in bfloat16 by a hundredth.
    largest = jnp.max(jnp.abs(gram), axis=(-2, -1), keepdims=True)
    return jnp.sum(jnp.abs(gram - gram.mT) > 0.02 * largest)


@jax.jit
def _count_not_curvature(x: jax.Array) -> jax.Array:
    return jnp.sum(~(jnp.isfinite(x) & (x >= 0)))


def _count_unequal(x: Any, y: Any) -> int:
    if np.shape(x) != np.shape(y):
        return 0  # Reported as a mismatch of shapes.
    x, y = (
        jax.random.key_data(a) if jnp.issubdtype(_dtype(a), jax.dtypes.prng_key) else a
        for a in (x, y)
    )
    return int(jnp.sum(jnp.asarray(x) != jnp.asarray(y)))
