"""The recipe of a merge: what is merged, by which method, with which rules. A strict schema."""

import difflib
import inspect
import re
from collections.abc import Hashable, Mapping
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

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known and key not in cls.model_fields:
                    raise ValueError(unknown("key", str(key), known))
        return data


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
Step = Annotated[int, Field(ge=0)] | Literal["latest"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Values = dict[str, Any]


class CurvatureSource(_Strict):
    """Where an expert's curvature is.

    Attributes:
      path: Another checkpoint, or a file that ``export_curvature`` wrote; by default the expert's
        own checkpoint.
      item: The item of that checkpoint.
      step: The step of that checkpoint.
      tree: The path of the optimizer's state in the checkpoint; by default it is searched for.
      b2: The decay of Adam's or umtam's second moments, to correct their bias.
      missing: The curvature of leaves that have none, frozen ones for example; by default an error.
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
    """

    path: LocalPath
    item: Item | None = None
    step: Step | None = None
    params: str | None = None


class Expert(Source):
    """An expert in a checkpoint.

    Attributes:
      path: As in ``Source``.
      item: As in ``Source``.
      step: As in ``Source``.
      params: As in ``Source``.
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
        that the rule matches, by the first number in their paths.
      weights: Other weights of the experts by name; lists are gradients.
      keep: "base", or an expert's name: the leaves are copied from there.
      otherwise: (``else`` in a recipe.) "base", or a method, for all that no rule matches; it comes
        last.
    """

    match: str | list[str] | None = None
    method: Any = None
    values: Values = {}
    weights: dict[str, Finite | list[Finite]] = {}
    keep: str | None = None
    otherwise: Any = Field(None, alias="else")

    @property
    def globs(self) -> list[str]:
        """The globs."""
        return [self.match] if isinstance(self.match, str) else list(self.match or ["**"])

    @model_validator(mode="after")
    def _one_purpose(self) -> Self:
        if (self.match is None) == (self.otherwise is None):
            raise ValueError("a rule has either match: or else:")
        changes = self.method is not None or self.values or self.weights
        if self.otherwise is not None and (changes or self.keep):
            raise ValueError("else: names the method, or 'base', and stands alone")
        if self.otherwise is None and bool(changes) == (self.keep is not None):
            raise ValueError(
                "a rule has either keep:, or at least one of method:, values:, weights:"
            )
        for value in (self.method, self.otherwise):
            if value is not None and value != "base":
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
        of steps that are chained.
      base: The model they were fine-tuned from, if the method needs it: a path, or a ``Source``.
      rules: What is different for some leaves.
      ignore: Globs of leaves that are neither read nor written, such as heads of their own.
      seed: For methods that draw: the random key is ``jax.random.key(seed)``.
      check_base: Whether to look if the experts were fine-tuned from this base.
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
    method: Any
    base: Annotated[Source, BeforeValidator(_as_path)] | None = None
    rules: list[Rule] = []
    ignore: list[str] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    check_base: bool = True
    output: Output = Output()
    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        build_method(self.method, {})
        for i, rule in enumerate(self.rules):
            where = f"rules.{i}: "
            if rule.otherwise is not None and i < len(self.rules) - 1:
                raise ValueError(where + "else: comes last")
            if rule.keep not in (None, "base", *self.experts):
                raise ValueError(where + unknown("model", rule.keep, ["base", *self.experts]))
            for name in rule.weights:
                if name not in self.experts:
                    raise ValueError(where + unknown("expert", name, list(self.experts)))
            if "base" in (rule.keep, rule.otherwise) and self.base is None:
                raise ValueError(where + "it keeps the base, but the recipe has no base:")
            if rule.values:
                first = {
                    k: v[0] if isinstance(v, list) and v else v for k, v in rule.values.items()
                }
                build_method(self.method if rule.method is None else rule.method, first)
        return self

    def where(self, path: str) -> Path:
        """Returns a path of the recipe as one that can be opened."""
        return (self._folder / path).absolute()

    @classmethod
    def load(cls, path: Path | str) -> "Recipe":
        """Reads a recipe from a YAML file.

        Raises:
          ValueError: if it is not as the schema says, with all that is wrong.
        """
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Cannot read the recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"The recipe {path} is not valid YAML: {error}") from error
        if not isinstance(data, Mapping):
            raise ValueError(f"The recipe {path} must be a mapping with experts: and method:.")
        recipe = cls.of(data, name=str(path))
        recipe._folder = path.absolute().parent
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
            problems = [
                ".".join(map(str, e["loc"]))
                + (": " if e["loc"] else "")
                + e["msg"].removeprefix("Value error, ")
                for e in error.errors()
            ]
            raise MergeError(f"The recipe{' ' if name else ''}{name} has", problems) from None


class _UniqueKeys(yaml.SafeLoader):
    """Builds plain data only, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


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
    if name not in METHODS:
        raise ValueError(unknown("method", name, list(METHODS)))
    known = inspect.signature(METHODS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of {name}", option, list(known)))
    required = [o for o, p in known.items() if p.default is p.empty and o not in options]
    if required:
        raise ValueError(f"{name} needs {', '.join(required)}")
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _factories() -> dict[str, Any]:
    """The functions of ``optax_moma.merging`` that make a step of numbers and switches."""
    found = {}
    for name, thing in vars(merging).items():
        if name.startswith("_") or not inspect.isfunction(thing):
            continue
        signature = inspect.signature(thing)
        positional = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
        if hasattr(signature.return_annotation, "contract") and not positional:
            found[name] = thing
    return found


METHODS = _factories()


def glob_matches(globs: list[str], names: list[str]) -> list[str]:
    """Returns the names that one of the globs matches."""
    patterns = [re.compile(_regex(glob)) for glob in globs]
    return [name for name in names if any(p.fullmatch(name) for p in patterns)]


def _regex(glob: str) -> str:
    result, i, depth = "", 0, 0
    while i < len(glob):
        numbers = re.compile(r"\{(\d+)\.\.(\d+)\}").match(glob, i)
        if numbers:
            low, high = int(numbers[1]), int(numbers[2])
            result += "(?:" + "|".join(map(str, range(low, high + 1))) + ")"
            i = numbers.end()
            continue
        if glob.startswith("**/", i):
            token, step = "(?:.*/)?", 3
        elif glob.startswith("/**", i) and i + 3 == len(glob):
            token, step = "(?:/.*)?", 3
        elif glob.startswith("**", i):
            token, step = ".*", 2
        else:
            char, step = glob[i], 1
            depth += (char == "{") - (char == "}" and depth > 0)
            inside = depth > 0 or char == "}"
            special = {"*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")" if "(?:" in result else None}
            token = special.get(char) or ("|" if char == "," and inside else re.escape(char))
        result += token
        i += step
    if depth:
        raise ValueError(f"{glob!r} has an opening brace without a closing one")
    return result


def interpolated(values: list[float], position: float) -> float:
    """Returns the value of a gradient at a position from 0 to 1."""
    return float(np.interp(position, np.linspace(0, 1, len(values)), values))


def key_of(recipe: Recipe) -> jax.Array:
    """Returns the random key of a recipe's seed."""
    return jax.random.key(recipe.seed)


def output_dtype(recipe: Recipe) -> Any:
    """Returns the dtype of the floating-point leaves, or None for the base's."""
    return None if recipe.output.dtype == "like_base" else jnp.dtype(recipe.output.dtype)
