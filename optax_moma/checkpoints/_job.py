"""A recipe with all that it names opened, and everything that is wrong with it, before any work."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .. import _globs
from ..merging import MergeError, Step
from ..merging._inputs import checked_inputs, checked_weights, is_float
from ..merging._leaf import promoted
from ..merging._matrices import EachMatrix, layout_of
from ..merging._steps import Chain, Weigh
from . import _source
from ._recipe import Expert, Recipe, Rule, build_method, key_of, one_sided, output_dtype, valued
from ._source import Abstract, CurvatureOf, Model

CHUNK_BYTES = 128 << 20


class Layer(NamedTuple):
    """How one layer of a stack is merged: the method, and the experts' weights."""

    method: Step
    weights: dict[str, float]


class Part(NamedTuple):
    """Leaves that are merged alike.

    Attributes:
      rule: The index of the rule that they fall under, or None.
      method: How they are merged, or None.
      keep: The model that they are copied from, if they are not merged.
      weights: The experts' weights.
      names: Their paths.
      layers: If the leaves are stacks of layers, how each layer is merged; ``weights`` are then
        those of the first, and ``method`` is that of a layer that asks for no less than the others.
    """

    rule: int | None
    method: Step | None
    keep: str | None
    weights: dict[str, float]
    names: list[str]
    layers: tuple[Layer, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the method; none if there is no method."""
        if self.method is None:
            return ()
        return self.method.steps if isinstance(self.method, Chain) else (self.method,)

    @property
    def each_matrix(self) -> EachMatrix | None:
        """The step that merges matrices only and averages other leaves, if the method has one."""
        return next((step for step in self.steps if isinstance(step, EachMatrix)), None)


@dataclass
class Job:
    """A recipe with everything that it names opened, and all that is wrong with it.

    Attributes:
      recipe: The recipe.
      base: The base, or None.
      experts: The experts by name.
      grown: The base, or without one the first expert, with the leaves that it lacks but a rule
        keeps of another; None if there are none.
      curvature: What is known of the experts' curvature, by name, where a method needs it.
      parts: The leaves by how they are merged.
      ignored: The paths of leaves that are left out.
      problems: What makes the merge impossible.
      warnings: What makes it doubtful.
      kinship: For each expert its drift from the base and the cosine with it, of a matrix.
      steps: How far each model was trained, by name, where it says so.
      gradients: From how many gradients each expert's curvature was estimated, where it says so.
    """

    recipe: Recipe
    base: Model | None = None
    experts: dict[str, Model] = field(default_factory=dict)
    grown: Model | None = None
    curvature: dict[str, CurvatureOf] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kinship: dict[str, tuple[float, float]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Model]:
        """All models, the base among them."""
        return ({} if self.base is None else {"base": self.base}) | self.experts

    @property
    def reference(self) -> Model:
        """The model whose structure the merged one has."""
        return self.grown or self.base or next(iter(self.experts.values()))

    @property
    def paths(self) -> dict[str, Path]:
        """All that is read, by what messages call it."""
        found = {model.label: model.checkpoint.path for model in self.models.values()}
        found |= {f"the curvature of {n}": v.checkpoint.path for n, v in self.curvature.items()}
        recipe = self.recipe.file
        return found if recipe is None else {**found, "the recipe": recipe}

    def read_from(self, part: Part) -> dict[str, Model]:
        """Returns the models that a part's leaves are read from."""
        models = self.models
        return models if part.keep is None else {n: m for n, m in models.items() if n == part.keep}

    def needs_curvature(self, part: Part, name: str) -> bool:
        """Whether a leaf is merged by its curvature; of stacks any may be."""
        leaf = self.reference.leaves[name]
        if part.method is None or not part.method.contract.curvature or not is_float(leaf):
            return False
        axes = part.method.contract.axes
        return axes is None or bool(part.layers) or layout_of(axes, leaf.shape) is not None

    def by_matrices(self, part: Part) -> tuple[list[str], list[str]]:
        """Returns the leaves of a method of matrices that hold such, and those that it averages."""
        held, averaged, step = [], [], part.each_matrix
        if step is None or step.axes is None:
            return held, averaged
        for name in part.names:
            leaf = self.reference.leaves[name]
            if isinstance(leaf, Abstract) and is_float(leaf):
                shape = leaf.shape[1:] if part.layers else leaf.shape
                (averaged if layout_of(step.axes, shape) is None else held).append(name)
        return held, averaged

    def stored_bytes(self, part: Part, name: str) -> int:
        """Returns how many bytes are read for a leaf."""
        models = self.read_from(part).values()
        total = sum(leaf_bytes(model.leaves[name]) for model in models)
        if self.needs_curvature(part, name):
            for v in self.curvature.values():
                if name in v.needs:
                    total += sum(leaf_bytes(v.checkpoint.leaves[n]) for n in v.needs[name].names)
        return total

    def merged_leaf(self, part: Part, name: str) -> Abstract:
        """Returns the shape and dtype of a merged leaf."""
        models = self.read_from(part)
        first = models.get("base") or next(iter(models.values()))
        leaf = first.leaves[name]
        if not is_float(leaf):
            return leaf
        like = leaf.dtype
        if "base" not in models:
            dtypes = [model.leaves[name].dtype for model in models.values()]
            with jax.enable_x64(True):
                like = promoted(dtypes)
        return Abstract(leaf.shape, output_dtype(self.recipe) or like)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Returns what makes JAX compute in 64 bits, if a leaf has as many or is written with."""
        read = [(self.read_from(part).values(), part.names) for part in self.parts]
        dtypes = {
            model.leaves[n].dtype for models, names in read for model in models for n in names
        }
        wide = np.dtype(np.float64) in {*dtypes, output_dtype(self.recipe)}
        return jax.enable_x64(True) if wide else contextlib.nullcontext()

    def saved_sharding(self, part: Part, name: str) -> NamedSharding | None:
        """Returns how a leaf was sharded when it was saved, if it was and the devices are here."""
        models = self.read_from(part)
        first = models.get("base") or next(iter(models.values()))
        return first.leaves[name].sharding


def open_job(recipe: Recipe) -> Job:
    """Opens all that a recipe names, and collects what is wrong in ``problems``."""
    job = Job(recipe)
    if recipe.base is not None:
        job.base = _opened(job, "the base", recipe.base)
    for name, expert in recipe.experts.items():
        model = _opened(job, f"expert {name!r}", expert)
        if model is not None:
            job.experts[name] = model
    if not job.experts or (recipe.base is not None and job.base is None):
        return job  # There is nothing that the others could be compared with.
    everywhere = list(dict.fromkeys(n for m in job.models.values() for n in m.leaves))
    for glob in recipe.ignore:
        job.ignored |= set(_matches(job, "ignore", [glob], everywhere))
    names = [name for name in job.reference.leaves if name not in job.ignored]
    if not names:
        job.problems.append("nothing to merge: the model has no leaves")
    job.parts = _parts(job, names)
    _compare_structures(job)
    _check_sides(job)
    _check_axes(job)
    _check_factors(job)
    _open_curvature(job)
    problems = [p for part in job.parts for p in _part_problems(job, part)]
    job.problems += [p for p in dict.fromkeys(problems) if p not in job.problems]
    if not job.problems:
        _check_base(job)
        _check_copied(job)
        _check_rounding(job)
        _check_ages(job)
    return job


def passes(part: Part) -> int:
    """Returns how many passes a part needs before the merge."""
    return 0 if part.method is None else part.method.contract.passes


def problems_of(error: ValueError) -> list[str]:
    """Returns all that an error says is wrong."""
    return error.problems if isinstance(error, MergeError) else [str(error)]


def raise_problems(job: Job) -> None:
    """Raises if anything is wrong."""
    if job.problems:
        raise MergeError("Cannot merge,", job.problems)


def _opened(job: Job, label: str, source: Any) -> Model | None:
    try:
        checkpoint = _source.open_checkpoint(
            job.recipe.where(source.path), source.item, source.step
        )
        return _source.open_model(label, checkpoint, source.params, source.rename)
    except ValueError as error:
        job.problems.append(f"{label}: {error}")
        return None


def _matches(job: Job, what: str, globs: list[str], names: list[str]) -> list[str]:
    try:
        found = _globs.matches(globs, names)
    except ValueError as error:
        job.problems.append(f"{what}: {error}")
        return []
    if not found:
        job.problems.append(
            f"{what}: {', '.join(globs)} matches none of {len(names)} leaves; the closest path is "
            f"{_globs.closest(globs[0], names)}"
        )
    return found


def _parts(job: Job, names: list[str]) -> list[Part]:
    """Sorts the leaves by the first rule that matches them."""
    recipe = job.recipe
    plain = {name: expert.weight for name, expert in recipe.experts.items()}
    left, parts = list(names), []
    for i, rule in enumerate(recipe.rules):
        keep = "base" if rule.otherwise == "base" else rule.keep
        # An expert's own leaves, such as those of its head, are nowhere else.
        lacked = _lacked(job, job.experts[keep]) if keep in job.experts else []
        if rule.otherwise is not None:
            found = left
        else:
            all_matched = _matches(job, f"rule {i}", rule.globs, [*names, *lacked])
            remaining = {*left, *lacked}
            found = [name for name in all_matched if name in remaining]
            if all_matched and not found:
                job.problems.append(
                    f"rule {i}: every leaf that {', '.join(rule.globs)} matches falls under an "
                    "earlier rule; put the narrower rule first"
                )
        taken = set(found)
        left = [name for name in left if name not in taken]
        if not found:
            continue
        if keep is not None:
            added = [name for name in lacked if name in taken]
            try:
                if added:
                    job.grown = job.reference.with_leaves(job.experts[keep], added)
                parts.append(Part(i, None, keep, plain, found))
            except ValueError as error:
                job.problems.append(f"rule {i}: {error}")
            continue
        spec = recipe.method_under(rule)
        at = lambda x: Layer(  # noqa: E731
            build_method(spec, valued(rule.values, x)),  # noqa: B023
            plain | valued(rule.weights, x),  # noqa: B023
        )
        try:
            parts += _stacked(job, i, found, at) if rule.stacked else _by_layer(job, i, found, at)
        except ValueError as error:
            job.problems.append(f"rule {i}: {error}")
    if left:
        parts.append(Part(None, build_method(recipe.method, {}), None, plain, left))
    return parts


def _lacked(job: Job, model: Model) -> list[str]:
    """Returns a model's leaves that are neither ignored nor in the merged model."""
    return [n for n in model.leaves if n not in job.reference.leaves and n not in job.ignored]


def _by_layer(job: Job, i: int, names: list[str], at: Callable[[float], Layer]) -> Iterator[Part]:
    """Gives the leaves under a rule layer by layer, with the rule's values there."""
    rule = job.recipe.rules[i]
    if not any(isinstance(v, list) for v in (*rule.values.values(), *rule.weights.values())):
        method, weights = at(0.0)
        yield Part(i, method, None, weights, names)
        return
    _refuse_passes("a list of values", at)
    layers = _globs.layers(names)
    if layers is None:
        nameless = next(name for name in names if _globs.layers([name]) is None)
        raise ValueError(
            f"a list of values is a gradient over layers, but {nameless} has no number; is it a "
            "stack of layers? Then say stacked: true"
        )
    numbers = sorted(set(layers.values()))
    for position, number in enumerate(numbers):
        method, weights = at(position / max(len(numbers) - 1, 1))
        yield Part(i, method, None, weights, [n for n in names if layers[n] == number])


def _stacked(job: Job, i: int, names: list[str], at: Callable[[float], Layer]) -> Iterator[Part]:
    """Gives the leaves under a rule for stacks by how many layers they have."""
    shapes = {name: job.reference.leaves[name].shape for name in names}
    flat = [name for name, shape in shapes.items() if not shape or not shape[0]]
    if flat:
        raise ValueError(f"stacked: {_listed(flat)} has no layers along its first axis")
    _refuse_passes("stacked", at)
    for depth in sorted({shape[0] for shape in shapes.values()}):
        layers = tuple(at(position / max(depth - 1, 1)) for position in range(depth))
        alike = [name for name in names if shapes[name][0] == depth]
        # A method may need a curvature for some of its numbers only.
        method = max((x.method for x in layers), key=lambda method: method.contract.curvature)
        yield Part(i, method, None, layers[0].weights, alike, layers)


def _refuse_passes(what: str, at: Callable[[float], Layer]) -> None:
    if at(0.0).method.contract.passes:
        raise ValueError(
            f"{what}: a method that looks at all leaves first has no layers of its own; trim by "
            "leaf, or leave the rule out"
        )


def _compare_structures(job: Job) -> None:
    """Notes leaves that are missing, or left over, or not arrays."""
    reference = job.reference
    for part in job.parts:
        for model in job.read_from(part).values():
            missing = [name for name in part.names if name not in model.leaves]
            if missing:
                extra = [n for n in model.leaves if n not in reference.leaves]
                has = f"; it has {_listed(extra)}" if extra else ""
                job.problems.append(
                    f"{model.label} lacks leaves that {reference.label} has: {_listed(missing)}"
                    f"{has}; name them alike with rename:, copy them with a rule keep: base, or "
                    "leave them out with ignore:"
                )
            for name in part.names:
                leaf = model.leaves.get(name)
                if leaf is not None and not isinstance(leaf, Abstract):
                    job.problems.append(
                        f"{model.label}, {name}: a {type(leaf).__name__} is no array; leave it out "
                        "with ignore:"
                    )
    for model in job.models.values():
        if extra := _lacked(job, model):
            job.problems.append(
                f"{model.label} has leaves that {reference.label} lacks: {_listed(extra)}; leave "
                "them out with ignore:, or copy one expert's with a rule keep:"
            )


def _check_sides(job: Job) -> None:
    """Notes methods that would take what PyTorch has as outputs for inputs."""
    torch = [m.label for m in job.models.values() if m.checkpoint.notes.get("format") == "pt"]
    for part in job.parts if torch else ():
        leaves = [job.reference.leaves[name] for name in part.names]
        matrices = [x for x in leaves if isinstance(x, Abstract) and len(x.shape) >= 2]
        if part.method is None or not any(map(is_float, matrices)):
            continue
        rule = Rule.all() if part.rule is None else job.recipe.rules[part.rule]
        where = "method" if part.rule is None else f"rule {part.rule}"
        for method, instead in one_sided(job.recipe.method_under(rule), rule.values).items():
            _note(
                job,
                f"{where}: {method} takes matrices as (fan-in, fan-out), but {torch[0]} is a file "
                "of PyTorch (format: pt), whose linear layers are (fan-out, fan-in); say "
                f"{method} {instead}",
            )


def _check_axes(job: Job) -> None:
    """Notes leaves that a method of matrices passes by, though by their axes they may hold some."""
    passed_by: dict[tuple[int | None, bool], list[str]] = {}
    for part in job.parts:
        for name in job.by_matrices(part)[1]:
            shape = job.reference.leaves[name].shape
            # Of a class token, (1, 1, width), nothing else can be made.
            if len(shape) > 2 + bool(part.layers) and sum(n > 1 for n in shape) > 1:
                averaged = part.each_matrix is not None and part.each_matrix.average
                passed_by.setdefault((part.rule, averaged), []).append(name)
    for (rule, averaged), names in passed_by.items():
        globs = _globs.collapsed(names)
        shapes = {glob: job.reference.leaves[alike[0]].shape for glob, alike in globs.items()}
        listed = _listed([f"{glob} {shape}" for glob, shape in shapes.items()], 4)
        job.warnings.append(
            f"{'the method' if rule is None else f'rule {rule}'} "
            f"{'averages' if averaged else 'leaves as in the base'} {listed}: by its axes they are "
            f'no matrices; if they hold some, say so by a rule {{match: "{next(iter(globs))}", '
            "values: {axes: ...}}; in Flax bmn are stacked layers, mnn attention's queries, keys "
            "and values, mmn its outputs, mmmn convolutions"
        )


# One matrix in two leaves: what adapters add to it, or what numbers of eight bits stand for.
_ADAPTER = re.compile(r"lora_(embedding_)?(a|b|down|up)(?![a-z])", re.IGNORECASE)
_SCALES = ("_scale", "_scale_inv")


def _check_factors(job: Job) -> None:
    """Notes leaves that mean something only multiplied with each other, and are merged apart."""
    merged = [name for part in job.parts if part.method is not None for name in part.names]
    adapters: dict[str, list[str]] = {}
    for name in merged:
        if _ADAPTER.search(name):
            adapters.setdefault(_ADAPTER.sub("", name), []).append(name)
    pairs = [" and ".join(names) for names in adapters.values() if len(names) > 1]
    if pairs:
        _note(
            job,
            f"the factors of adapters, {_listed(pairs, 3)}: merged one by one, their product is "
            "not the merge of what the adapters add; merge each adapter into its base first "
            "(merge_and_unload in peft), leave them out with ignore:, or take one model's with "
            "a rule keep:",
        )
    known = set(merged)
    scaled = [
        f"{name} and {name}{scale}" for name in merged for scale in _SCALES if name + scale in known
    ]
    if scaled:
        _note(
            job,
            f"quantised weights, {_listed(scaled, 3)}: merged apart from their scales they are no "
            "weights; write the models with the weights multiplied out first, or leave them out "
            "with ignore:, or take one model's with a rule keep:",
        )


def _note(job: Job, problem: str) -> None:
    if problem not in job.problems:
        job.problems.append(problem)


def _open_curvature(job: Job) -> None:
    if not any(part.method and part.method.contract.curvature for part in job.parts):
        return
    for name, expert in job.recipe.experts.items():
        if name not in job.experts:
            continue
        model, source = job.experts[name], expert.curvature
        try:
            checkpoint = model.checkpoint
            if source and source.path:
                where = job.recipe.where(source.path)
                checkpoint = _source.open_checkpoint(where, source.item, source.step)
            elif checkpoint.tensors is not None:
                raise ValueError(
                    "a safetensors checkpoint holds no optimizer state; name a file that "
                    "export-curvature wrote with curvature: {path: ...}"
                )
            job.curvature[name] = (
                _source.open_curvature(model, checkpoint, source.tree, source.b2, source.missing)
                if source
                else _source.open_curvature(model, checkpoint, None, 0.999, None)
            )
        except ValueError as error:
            job.problems.append(f"the curvature of {model.label}: {error}")


def _part_problems(job: Job, part: Part) -> list[str]:
    """Lets the merge itself look at the shapes of a part."""
    if part.method is None:
        return []
    problems: list[str] = []
    contract = part.method.contract
    curvature = None
    if len(job.experts) < len(job.recipe.experts):
        checked_weights(contract, part.weights, part.weights, sorted(part.weights), problems)
        return problems
    # What is missing or no array was noted when the structures were compared.
    part = part._replace(
        names=[
            name
            for name in part.names
            if all(isinstance(m.leaves.get(name), Abstract) for m in job.models.values())
        ]
    )
    if not part.names:
        return []
    if contract.curvature and len(job.curvature) == len(job.experts):
        curvature = {}
        for expert, v in job.curvature.items():
            needing = [n for n in part.names if job.needs_curvature(part, n)]
            curvature[expert] = dict.fromkeys(part.names)
            uncovered = [n for n in needing if n not in v.needs and v.missing is None]
            if uncovered:
                problems.append(
                    f"expert {expert!r} has no curvature for {_listed(uncovered)}; if these leaves "
                    "were frozen, give them one with curvature: {missing: 0.0}"
                )
            for name in needing:
                leaf = job.experts[expert].leaves[name]
                if name in uncovered:
                    curvature[expert][name] = Abstract(leaf.shape, jnp.float32)
                    continue
                try:
                    curvature[expert][name] = v.abstract(name, leaf)
                except ValueError as error:
                    problems.append(f"the curvature of expert {expert!r}: {error}")
                    curvature[expert][name] = Abstract(leaf.shape, jnp.float32)
    elif contract.curvature:
        return []  # Noted when it was looked for.
    trees = {name: {n: model.leaves[n] for n in part.names} for name, model in job.experts.items()}
    base = None if job.base is None else {n: job.base.leaves[n] for n in part.names}
    for weights in [layer.weights for layer in part.layers] or [part.weights]:
        try:
            checked_inputs(contract, trees, base, curvature, weights, key_of(job.recipe))
        except ValueError as error:
            problems += problems_of(error)
    return problems


# Of a larger matrix the beginning is enough: so many entries.
_SAMPLE = 2_000_000


def _check_base(job: Job) -> None:
    """Reads a matrix, or its start, and sees whether the experts descend from the base.

    Weights of one origin have a cosine near one, of two origins near zero. If some models agree and
    others do not, a base was mistaken; if none agree they may be noise, which is only told.
    """
    if job.base is None or not job.recipe.check_base:
        return
    merged = [n for p in job.parts if p.method and p.method.contract.base for n in p.names]
    leaves = job.base.leaves
    sizes = {
        n: math.prod(leaves[n].shape)
        for n in merged
        if len(leaves[n].shape) >= 2 and is_float(leaves[n])
    }
    matrices = [n for n, size in sizes.items() if size >= 256]
    if not matrices:
        return
    # Orbax compresses an array as a whole: also a start of it takes reading all of it.
    small = [n for n in matrices if sizes[n] <= _SAMPLE]
    sample = max(small, key=sizes.__getitem__) if small else min(matrices, key=sizes.__getitem__)
    vectors = {}
    for name, model in job.models.items():
        try:
            start = model.checkpoint.read_start(model.stored[sample], _SAMPLE)
        except ValueError as error:
            job.problems.append(f"{model.label}: {error}")
            return
        vectors[name] = np.asarray(start, np.float32).ravel()
    base = vectors.pop("base")
    scale = float(np.linalg.norm(base)) or 1.0
    for name, x in vectors.items():
        job.kinship[name] = (float(np.linalg.norm(x - base)) / scale, _cosine(x, base))
    strangers = [name for name, x in vectors.items() if _cosine(x, base) < 0.5]
    if not strangers:
        return
    first = vectors[strangers[0]]
    kin = len(strangers) > 1 and all(_cosine(first, vectors[n]) > 0.9 for n in strangers[1:])
    what = (
        f"{', '.join(f'expert {n!r}' for n in strangers)}: not fine-tuned from this base, the "
        f"cosine of {sample} is {_cosine(first, base):.2f}"
    )
    if kin or len(strangers) < len(vectors):
        job.problems.append(what + "; name the right base:, or check_base: false if you are sure")
    elif np.isfinite(_cosine(first, base)):
        job.warnings.append(what)


# Buffers of more entries are compared when they are copied.
_FEW_ENTRIES = 10_000


def _check_copied(job: Job) -> None:
    """Reads small leaves that are copied, as they are not floating point: are they all alike?"""
    leaves = job.reference.leaves
    names = [
        name
        for part in job.parts
        for name in part.names
        if part.method is not None
        and not is_float(leaves[name])
        and math.prod(leaves[name].shape) <= _FEW_ENTRIES
    ]
    arrays = {}
    for label, model in job.models.items():
        try:
            read = model.checkpoint.read([model.stored[name] for name in names])
        except ValueError as error:
            job.problems.append(f"{model.label}: {error}")
            return
        arrays[label] = {name: read[model.stored[name]] for name in names}
    job.problems += unequal_copies(job, arrays)


def unequal_copies(job: Job, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Returns what to say of leaves that can only be copied, but are not the same in all models.

    Args:
      job: The job.
      arrays: The leaves by model and path; a base comes first.
    """
    (first, wanted), *others = arrays.items()
    # Buffers of one name are many in a model of many layers, and have one remedy.
    alike: dict[tuple[str, str], list[str]] = {}
    for label, found in others:
        for name, x in found.items():
            if not np.array_equal(x, wanted[name]):
                alike.setdefault((label, name.rsplit("/", 1)[-1]), []).append(name)
    return [
        f"{job.models[label].label}, {_listed(names, 3)}: other values than in "
        f"{job.models[first].label}; what is not floating point is copied, so name the model that "
        f'has the right ones with a rule {{match: "{f"**/{last}" if names[1:] else names[0]}", '
        f"keep: {first}}}, or leave it out with ignore:"
        for (label, last), names in alike.items()
    ]


def _check_rounding(job: Job) -> None:
    """Notes experts that are wider than the base, whose dtype the merge is rounded to.

    What fine-tuning changes is often less than the distance of two numbers of bfloat16.
    """
    if job.base is None or output_dtype(job.recipe) is not None:
        return
    wider: dict[tuple[np.dtype, np.dtype], list[str]] = {}
    for part in job.parts:
        for name in part.names if part.method is not None else ():
            own = job.base.leaves[name].dtype
            widest = max(
                (m.leaves[name].dtype for m in job.experts.values()), key=lambda x: x.itemsize
            )
            if is_float(job.base.leaves[name]) and widest.itemsize > own.itemsize:
                wider.setdefault((own, widest), []).append(name)
    for (own, widest), names in wider.items():
        job.warnings.append(
            f"{_listed(list(_globs.collapsed(names)), 3)}: the experts have {widest}, but the "
            f"merge is rounded to {own} as the base is; output: {{dtype: {widest}}} keeps what the "
            "experts learned"
        )


# Fewer gradients than these make a noisy estimate.
_FEW = 10


def _check_ages(job: Job) -> None:
    """Notes how far the models were trained, and curvature that is empty, noisy or old."""
    try:
        for name, model in job.models.items():
            if (step := model.step) is not None:
                job.steps[name] = step
        for name, v in job.curvature.items():
            if (gradients := v.gradients) is not None:
                job.gradients[name] = gradients
            _check_age(job, name, v)
        _check_decay(job)
    except ValueError as error:
        job.problems.append(str(error))


def _check_age(job: Job, name: str, v: CurvatureOf) -> None:
    label, gradients = f"the curvature of expert {name!r}", job.gradients.get(name)
    if gradients == 0 and v.missing is None:
        job.problems.append(
            f"{label} is zero: its optimizer state has seen no gradient; name the state at the end "
            "of training with curvature:"
        )
    elif gradients is not None and gradients < _FEW:
        job.warnings.append(f"{label} is noisy: it was estimated from {gradients} gradients")
    then, now = v.step(job.experts[name]), job.steps.get(name)
    if None not in (then, now) and then != now:
        job.warnings.append(f"{label} is of step {then}, but the expert is of step {now}")


def _check_decay(job: Job) -> None:
    """Notes experts whose curvatures are compared by a decay of second moments that was guessed.

    A state of Adam does not record it. It decides how much few gradients are worth beside many,
    unless the method normalises each expert's curvature.
    """
    steps = [step for part in job.parts for step in part.steps]
    if not any(isinstance(step, Weigh) and not step.normalize for step in steps):
        return
    counts = {
        name: job.gradients[name]
        for name, v in job.curvature.items()
        if v.counts_only and name in job.gradients and not _says_b2(job.recipe.experts[name])
    }
    shares = [1 - job.curvature[name].b2 ** count for name, count in counts.items()]
    if shares and max(shares) > 1.1 * min(shares):
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        job.warnings.append(
            f"the curvatures are of different numbers of gradients, {told}, and are compared as if "
            "the second moments had decayed by b2 = 0.999; name the optimizers' own with "
            "curvature: {b2: ...}"
        )


def _says_b2(expert: Expert) -> bool:
    return expert.curvature is not None and "b2" in expert.curvature.model_fields_set


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    scale = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    return float(np.vdot(x, y)) / scale if scale > 0 else 1.0


def _listed(names: list[str], most: int = 10) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def leaf_bytes(leaf: Abstract) -> int:
    """Returns the size of an array in bytes."""
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
