"""The recipe of a merge: what is merged, by which method, with which rules. A strict schema."""

import difflib
import inspect
import math
import re
import types
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from .. import merging
from ..merging import MergeError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def unknown(what: str, name: str, known: list[str]) -> str:
    """Returns what to say of a name that is not known."""
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown {what} {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    )


def _as_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


def _as_curvature(value: Any) -> Any:
    if isinstance(value, str):
        return {"path" if value.endswith(".safetensors") else "tree": value}
    return value


def _local(path: str) -> str:
    if "://" in path:
        raise ValueError(f"{path} is not a local path; copy the checkpoint here first")
    return path


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"must be a finite number, got {value!r}")
    return value


def _gradient(value: Any) -> Any:
    if isinstance(value, list) and len(value) < 2:
        raise ValueError(f"a gradient has at least two numbers, got {value!r}")
    return [_number(x) for x in value] if isinstance(value, list) else value


def _step(value: Any) -> Any:
    if value == "latest" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError(f'must be a number of at least 0, or "latest", got {value!r}')


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is the name of an item in a checkpoint, not a path")
    return name


LocalPath = Annotated[
    str,
    BeforeValidator(lambda x: str(x) if isinstance(x, Path) else x),
    AfterValidator(_local),
]
Item = Annotated[str, AfterValidator(_plain)]
Step = Annotated[int | Literal["latest"], BeforeValidator(_step)]
Finite = Annotated[float, BeforeValidator(_number)]
Value = Annotated[Any, AfterValidator(_gradient)]
Weight = Annotated[
    float | list[float],
    BeforeValidator(lambda x: _gradient(x) if isinstance(x, list) else _number(x)),
]


def _buildable(spec: Any) -> Any:
    build_method(spec, {})
    return spec


class CurvatureSource(_Strict):
    """Where an expert's curvature is.

    Attributes:
      path: Another checkpoint, or a file that ``export_curvature`` wrote; by default the expert's
        own checkpoint.
      item: The item of that checkpoint.
      step: The step of that checkpoint.
      tree: The path of the optimizer's state in the checkpoint; by default it is searched for.
      b2: The decay of Adam's or umtam's second moments, to correct their bias.
      missing: The curvature of leaves that have none, or one that is zero throughout though the
        leaf was trained; frozen ones for example. By default an error.
    """

    path: LocalPath | None = None
    item: Item | None = None
    step: Step | None = None
    tree: str | None = None
    b2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    missing: Annotated[Finite, Field(ge=0)] | None = None


class Source(_Strict):
    """A model in a checkpoint.

    Attributes:
      path: The checkpoint, relative to the recipe.
      item: The name of the tree, in an Orbax checkpoint that has several.
      step: Which step of a folder of steps; a number or "latest".
      params: The path of the params in the tree, such as "state.params"; by default what is called
        "params", or the whole tree.
      rename: What this checkpoint's leaves are called in the merge, from globs to names:
        ``{"h/*/**": "layers_*/**"}``. What wildcards match comes back in the same order. Rules and
        messages know the new names.
    """

    path: LocalPath
    item: Item | None = None
    step: Step | None = None
    params: str | None = None
    rename: dict[str, str] = {}


class Expert(Source):
    """An expert in a checkpoint.

    Attributes:
      path: As in ``Source``.
      item: As in ``Source``.
      step: As in ``Source``.
      params: As in ``Source``.
      rename: As in ``Source``.
      curvature: The path of the optimizer's state in the checkpoint, or a ``CurvatureSource``; by
        default it is searched for, if the method needs one.
      weight: The expert's weight in the merge.
    """

    curvature: Annotated[CurvatureSource, BeforeValidator(_as_curvature)] | None = None
    weight: Finite = 1.0


class Rule(_Strict):
    """What is different for some leaves. The first rule that matches a leaf decides.

    Attributes:
      match: A glob, or several, on leaf paths: ``*`` within one part of the path, ``**`` across
        parts, ``?`` one character, ``{a,b}`` one of several, ``{0..3}`` a range of numbers.
      method: Another method.
      values: Other numbers for the method. A list is a gradient: it is interpolated over the layers
        that the rule matches, from the first to the last. A leaf's layer is the first number in its
        path that is not the same in all of them.
      weights: Other weights of the experts by name; lists are gradients.
      stacked: Whether the leaves are stacks of layers along their first axis, as scanned layers
        are. Each layer is then merged as a leaf of its own, and gradients run over them.
      keep: "base", or an expert's name: the leaves are copied from there, an expert's also if the
        base lacks them, as it may lack a head.
      otherwise: (``else`` in a recipe.) "base", or a method, for all that no rule matches; it comes
        last.
    """

    match: str | list[str] | None = None
    method: Any = None
    values: dict[str, Value] = {}
    weights: dict[str, Weight] = {}
    stacked: bool = False
    keep: str | None = None
    otherwise: Any = Field(None, alias="else")

    @classmethod
    def all(cls) -> "Rule":
        """Returns the rule that changes nothing, of the leaves that no rule matches."""
        return cls.model_construct()

    @property
    def globs(self) -> list[str]:
        """The globs."""
        return [self.match] if isinstance(self.match, str) else list(self.match or ["**"])

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        if (self.match is None) == (self.otherwise is None):
            raise ValueError("a rule has either match: or else:")
        changes = self.method is not None or self.values or self.weights or self.stacked
        if self.otherwise is not None and (changes or self.keep):
            raise ValueError("else: names the method, or 'base', and stands alone")
        if self.otherwise is None and bool(changes) == (self.keep is not None):
            raise ValueError(
                "a rule has either keep:, or at least one of method:, values:, weights:, stacked:"
            )
        for value in (self.method, self.otherwise):
            # With values: it is looked at together with them, where the recipe's method is known.
            if value is not None and value != "base" and not self.values:
                build_method(value, {})
        return self


class Output(_Strict):
    """What is written.

    Attributes:
      dtype: "like_base" (without a base: like the experts), or the dtype of all floating-point
        leaves. The merge is computed in float32 and rounded once.
    """

    dtype: Literal["like_base", "float64", "float32", "bfloat16", "float16"] = "like_base"


class Recipe(_Strict):
    """A merge, in full: the same object whether it is written in Python or in YAML.

    Paths are relative to the recipe's file, and in Python to the working directory.

    Attributes:
      experts: The fine-tuned models by name: a path, or an ``Expert``.
      method: The name of a method of ``optax_moma.merging``; or its name and its numbers; or a list
        of steps that are chained. Methods of matrices take them as (fan-in, fan-out), as Flax has
        them; of safetensors that say ``format: pt`` a recipe must say which are which, with
        ``axes: nm`` for PyTorch's linear layers and ``axes: mn`` for its embeddings.
      base: The model they were fine-tuned from, if the method needs it: a path, or a ``Source``.
      rules: What is different for some leaves.
      ignore: Globs of leaves that are neither read nor written, such as heads of their own.
      seed: For methods that draw: the random key is ``jax.random.key(seed)``.
      check_base: Whether to look if the experts were fine-tuned from this base.
      allow_nonfinite: Whether NaN and infinities in the models are merged as any number is; by
        default they are an error.
      output: What is written.

    Example:
      >>> recipe = Recipe(
      ...     base="base",
      ...     experts={"math": "runs/math", "code": Expert(path="runs/code", weight=2.0)},
      ...     method={"name": "ties", "density": 0.3},
      ...     rules=[Rule(match="**/embedding", method="average")],
      ... )
      >>> recipe.experts["math"].weight
      1.0
    """

    experts: dict[str, Annotated[Expert, BeforeValidator(_as_path)]] = Field(min_length=1)
    method: Annotated[Any, AfterValidator(_buildable)]
    base: Annotated[Source, BeforeValidator(_as_path)] | None = None
    rules: list[Rule] = []
    ignore: list[str] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    check_base: bool = True
    allow_nonfinite: bool = False
    output: Output = Output()
    _file: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._inconsistencies()):
            raise ValueError("\n".join(problems))
        return self

    def _inconsistencies(self) -> Iterator[str]:
        names = list(self.experts)
        if "base" in names:
            yield "experts.base: this is what the base is called; name it otherwise"
        if "" in names:
            yield "experts: one has no name"
        seen: dict[tuple[Any, ...], str] = {}
        for name, expert in self.experts.items():
            place = (Path(expert.path), expert.item, expert.step, expert.params)
            if seen.setdefault(place, name) != name:
                yield (
                    f"experts.{name}: the same checkpoint as {seen[place]!r}; leave one of them "
                    "out, or give it more weight:"
                )
        for i, rule in enumerate(self.rules):
            where = f"rules.{i}: "
            if rule.otherwise is not None and i < len(self.rules) - 1:
                yield where + "else: comes last"
            if rule.keep not in (None, "base", *names):
                yield where + unknown("model", rule.keep, ["base", *names])
            for name in rule.weights:
                if name not in names:
                    yield where + unknown("expert", name, names)
            if "base" in (rule.keep, rule.otherwise) and self.base is None:
                yield where + "it keeps the base, but the recipe has no base:"
            method = self.method if rule.method is None else rule.method
            try:
                for position in (0, 1) if rule.values else ():
                    build_method(method, valued(rule.values, position))
            except ValueError as error:
                yield where + str(error)

    def method_under(self, rule: Rule) -> Any:
        """Returns the method for what falls under a rule that keeps nothing, as it is written."""
        return next(x for x in (rule.method, rule.otherwise, self.method) if x is not None)

    def where(self, path: str) -> Path:
        """Returns a path of the recipe as one that can be opened."""
        return (Path() if self._file is None else self._file.parent).joinpath(path).absolute()

    @property
    def file(self) -> Path | None:
        """The file that it was read from, if it was."""
        return self._file

    @classmethod
    def load(cls, path: Path | str) -> "Recipe":
        """Reads a recipe from a YAML file.

        Raises:
          ValueError: if it is not as the schema says, with all that is wrong.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"Cannot read the recipe {path}: it is larger than a megabyte")
            data = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Cannot read the recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            hint = _QUOTES if "alias" in str(error) else ""
            raise ValueError(f"The recipe {path} is not valid YAML: {error}{hint}") from error
        except RecursionError:
            raise ValueError(f"The recipe {path} is not valid YAML: nested too deeply") from None
        if not isinstance(data, Mapping):
            raise ValueError(f"The recipe {path} must be a mapping with experts: and method:.")
        recipe = cls.of(data, name=str(path))
        recipe._file = path.absolute()
        return recipe

    @classmethod
    def of(cls, recipe: "Recipe | Mapping[str, Any] | Path | str", name: str = "") -> "Recipe":
        """Returns a recipe from a recipe, a dict, or the path of a YAML file.

        Raises:
          ValueError: if it is not as the schema says, with all that is wrong.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if not isinstance(recipe, Mapping):
            return cls.load(recipe)
        try:
            return cls.model_validate(recipe)
        except ValidationError as error:
            problems = [text for e in error.errors() for text in _problems(e)]
            raise MergeError(f"The recipe{' ' if name else ''}{name} has", problems) from None


# The schema of what stands under a key of the recipe.
_BELOW: dict[str, type[_Strict]] = {
    "base": Source,
    "experts": Expert,
    "rules": Rule,
    "output": Output,
}


def _problems(error: Any) -> list[str]:
    """Returns what to say of one of pydantic's errors."""
    *above, last = error["loc"] or ("",)
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        schema = _BELOW[above[0]] if above else Recipe
        schema = CurvatureSource if "curvature" in above[2:] else schema
        known = [field.alias or name for name, field in schema.model_fields.items()]
        inside = f"{'.'.join(map(str, above))}: " if above else ""
        return [inside + unknown("key", str(last), known)]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    said = error["msg"].removeprefix("Value error, ").split("\n")
    return [f"{where}: {text}" if where else text for text in said]


_MOST_BYTES = 1 << 20
_MOST_NODES = 100_000
_QUOTES = "; a glob that starts with * stands in quotes"


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Counts the parts of a document with each alias written out; one of itself has no end."""
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_NODES
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]


class _PlainLoader(yaml.SafeLoader):
    """Builds plain data only: no tags of Python's, no key twice, no aliases that explode."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_NODES:
            raise yaml.constructor.ConstructorError(
                None, None, "its aliases stand for too much", node.start_mark
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-6 for a text, as it lacks the point; everybody who writes it means the number.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def build_method(spec: Any, values: Mapping[str, Any]) -> merging.Step:
    """Returns the method that a recipe names.

    Args:
      spec: A name; a mapping of ``name`` and numbers; or a list of those, to be chained.
      values: Numbers that replace the method's own.

    Raises:
      ValueError: if there is no such method, or it has no such number.
    """
    if isinstance(spec, list):
        if values:
            raise ValueError("values: are for a method with a name, not for a chain of steps")
        if not spec:
            raise ValueError("a chain of steps has at least one step")
        return merging.chain(*(build_method(step, {}) for step in spec))
    options = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise ValueError(f"a method is a name, or a mapping with name:, got {spec!r}")
    options = {**options, **values}
    name = options.pop("name")
    known = inspect.signature(method_named(name)).parameters
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of {name}", str(option), list(known)))
    required = [o for o, p in known.items() if p.default is p.empty and o not in options]
    if required:
        raise ValueError(f"{name} needs {', '.join(required)}")
    # knots(*steps) merges in another space by the steps that it is given: a list in a recipe.
    steps = [o for o, p in known.items() if p.kind is p.VAR_POSITIONAL]
    inner = options.pop(steps[0]) if steps else []
    if not isinstance(inner, list):
        raise ValueError(f"{name}: {steps[0]} must be a list of steps, got {inner!r}")
    try:
        method = METHODS[name](*(build_method(step, {}) for step in inner), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if method.contract.gram:
        raise ValueError(
            f"{name} needs the Grams of the layers' inputs, which no checkpoint holds; merge in "
            "memory, by optax_moma.merge with what merging.input_grams collects"
        )
    return method


# Merging the transposes of matrices, these give the transpose of the merge.
_EITHER_WAY = {"iso_c", "tsv_m", "umtam"}


def one_sided(spec: Any, values: Mapping[str, Any]) -> dict[str, str]:
    """Returns which methods take a matrix as (fan-in, fan-out), and what else can be said to them.

    Args:
      spec: As for ``build_method``.
      values: As for ``build_method``.
    """
    if isinstance(spec, list):
        return {k: text for step in spec for k, text in one_sided(step, {}).items()}
    options = {**({"name": spec} if isinstance(spec, str) else spec), **values}
    name, inner = options["name"], options.get("steps")  # wudi_adam's are a number
    found = one_sided(inner, {}) if isinstance(inner, list) else {}
    known = inspect.signature(METHODS[name]).parameters
    if "axes" in known and "axes" not in options and name not in _EITHER_WAY:
        found[name] = "axes: nm, and by a rule axes: mn for embeddings and GPT-2's Conv1D"
    if options.get("scope") == "filter":
        found[name] = "scope: leaf"
    return found


def _factories(module: types.ModuleType, prefix: str = "") -> dict[str, Any]:
    """The functions of ``optax_moma.merging`` that return a step, and those of its public modules.

    The latter are named with the module: ``peft.ties``.
    """
    found: dict[str, Any] = {}
    for name, thing in vars(module).items():
        if name.startswith("_"):
            continue
        if inspect.ismodule(thing) and thing.__name__.startswith(module.__name__ + "."):
            found |= _factories(thing, f"{prefix}{name}.")
        elif inspect.isfunction(thing) and thing.__module__.startswith(merging.__name__ + "."):
            returned = inspect.signature(thing, eval_str=True).return_annotation
            # A chain is a list in a recipe.
            if hasattr(returned, "contract") and thing is not merging.chain:
                found[prefix + name] = thing
    return found


METHODS = _factories(merging)

# What mergekit calls otherwise, see ``merging.mergekit``.
_ELSEWHERE = {"linear": "'average'", "nuslerp": "'slerp'", "passthrough": "a rule with keep:"}


def method_named(name: str) -> Any:
    """Returns the function of a name in a recipe.

    Raises:
      ValueError: if there is none, with what was probably meant.
    """
    if name in METHODS:
        return METHODS[name]
    last = name.rsplit(".", 1)[-1]
    near = [known for known in METHODS if known.rsplit(".", 1)[-1] == last]
    meant = [repr(known) for known in near or difflib.get_close_matches(name, METHODS, 1)]
    meant = [_ELSEWHERE[last]] if last in _ELSEWHERE else meant
    hint = f"did you mean {' or '.join(meant)}? " if meant else ""
    raise ValueError(f"unknown method {name!r}; {hint}optax-moma methods lists all")


def valued(values: Mapping[str, Any], position: float) -> dict[str, Any]:
    """Returns numbers with gradients replaced by their values at a position from 0 to 1."""
    return {k: interpolated(v, position) if isinstance(v, list) else v for k, v in values.items()}


def interpolated(values: list[float], position: float) -> float:
    """Returns the value of a gradient at a position from 0 to 1."""
    return float(np.interp(position, np.linspace(0, 1, len(values)), values))


def key_of(recipe: Recipe) -> jax.Array:
    """Returns the random key of a recipe's seed."""
    return jax.random.key(recipe.seed)


def output_dtype(recipe: Recipe) -> Any:
    """Returns the dtype of the floating-point leaves, or None for the base's."""
    return None if recipe.output.dtype == "like_base" else jnp.dtype(recipe.output.dtype)
