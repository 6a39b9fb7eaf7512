"""What a merge would do and what would go wrong, found out before any work."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._job import CHUNK_BYTES, Job, Part, leaf_bytes, open_job, passes
from ._memory import peak_bytes
from ._recipe import Recipe, Rule
from ._source import CurvatureOf, Model


class PlannedModel(NamedTuple):
    """One input of a merge.

    Attributes:
      name: "base", or the expert's name.
      path: Where it lies.
      params: The path of the params in it; empty if they are all of it.
      dtypes: The dtypes of its leaves.
      bytes: How many bytes the params have.
      step: How far it was trained, if it says so.
      drift: ||w - w0|| / ||w0|| of one matrix, w0 the base's; None if it was not looked at.
      cosine: The cosine of that matrix with the base's.
      curvature: Where its curvature is from, if the method needs one.
      gradients: From how many gradients the curvature was estimated, if it says so.
    """

    name: str
    path: str
    params: str
    dtypes: list[str]
    bytes: int
    step: int | None
    drift: float | None
    cosine: float | None
    curvature: str | None
    gradients: int | None


class PlannedRule(NamedTuple):
    """What is done with the leaves that fall under a rule.

    Attributes:
      match: Its globs; "else", or "(no rule)" for the leaves that no rule matches.
      action: What is done with them: the method and its numbers, or what they are copied from; of a
        method of matrices how many of them hold such, and how many it averages.
      names: The leaves' paths.
    """

    match: str
    action: str
    names: list[str]


@dataclass(frozen=True)
class Plan:
    """What a merge would do.

    Attributes:
      problems: What makes it impossible; empty if it can start.
      warnings: What makes it doubtful.
      leaves: How many leaves the merged model has.
      parameters: How many numbers.
      read_bytes: How much is read.
      write_bytes: How much is written, before compression.
      passes: How often the inputs are read.
      peak_bytes: The memory of this process that the merge is predicted to need at most.
      rules: For each rule what it does with which leaves; last, under "(no rule)", the leaves that
        no rule matches.
      models: The inputs: the base, then the experts.
      coverage: For each expert, how many of the leaves that need a curvature have one, and how many
        need one.
    """

    problems: list[str]
    warnings: list[str]
    leaves: int
    parameters: int
    read_bytes: int
    write_bytes: int
    passes: int
    peak_bytes: int
    rules: list[PlannedRule]
    models: list[PlannedModel]
    coverage: dict[str, tuple[int, int]]


def plan(
    recipe: Recipe | Mapping[str, Any] | Path | str, *, chunk_bytes: int = CHUNK_BYTES
) -> Plan:
    """Finds out what a merge would do, and everything that is wrong, from metadata.

    Of the arrays themselves it keeps a few megabytes at most: of a base and the experts a matrix,
    or the start of one, to see whether the experts were fine-tuned from that base; and of small
    leaves of integers, to see whether they are the same in all.

    Args:
      recipe: A ``Recipe``, the same as a dict, or the path of its YAML file.
      chunk_bytes: As for ``merge``; the predicted memory depends on it.

    Returns:
      A ``Plan``. If its ``problems`` are empty, the merge can start.

    Raises:
      ValueError: if the recipe is not as its schema says.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder = tempfile.mkdtemp()
      >>> for name in ("a", "b"):
      ...     ocp.save(f"{folder}/{name}", {"w": jnp.ones((2, 3))})
      >>> experts = {name: f"{folder}/{name}" for name in ("a", "b")}
      >>> found = plan({"method": "average", "experts": experts})
      >>> found.problems, found.leaves, found.read_bytes, found.write_bytes
      ([], 1, 48, 24)
    """
    job = open_job(Recipe.of(recipe))
    if not job.experts or (not job.parts and job.problems):
        return Plan(job.problems, job.warnings, 0, 0, 0, 0, 0, 0, [], _planned_models(job), {})
    read = write = parameters = leaves = 0
    fits = not job.problems
    for part in job.parts:
        for name in part.names:
            leaves += 1
            parameters += int(np.prod(job.reference.leaves[name].shape, dtype=np.int64))
            if fits:
                write += leaf_bytes(job.merged_leaf(part, name))
                read += job.stored_bytes(part, name) * (1 + passes(part))
    peak = 0
    if fits:
        with job.precision():
            peak = peak_bytes(job, chunk_bytes)
    return Plan(
        problems=job.problems,
        warnings=job.warnings,
        leaves=leaves,
        parameters=parameters,
        read_bytes=read,
        write_bytes=write,
        passes=1 + max(map(passes, job.parts), default=0),
        peak_bytes=peak,
        rules=_planned_rules(job),
        models=_planned_models(job),
        coverage=_coverage(job),
    )


def _planned_models(job: Job) -> list[PlannedModel]:
    found = []
    for name, model in job.models.items():
        v = job.curvature.get(name)
        drift, cosine = job.kinship.get(name, (None, None))
        arrays = model.arrays.values()
        found.append(
            PlannedModel(
                name,
                str(model.checkpoint.path),
                "/".join(model.prefix),
                sorted({str(leaf.dtype) for leaf in arrays}),
                sum(map(leaf_bytes, arrays)),
                job.steps.get(name),
                drift,
                cosine,
                None if v is None else _kind(model, v),
                job.gradients.get(name),
            )
        )
    return found


def _kind(model: Model, v: CurvatureOf) -> str:
    where = v.checkpoint.path
    elsewhere = v.checkpoint.tensors is None and where != model.checkpoint.path
    return v.kind + (f" in {where}" if elsewhere else "")


def _planned_rules(job: Job) -> list[PlannedRule]:
    parts: dict[int | None, list[Part]] = {}
    for part in job.parts:
        parts.setdefault(part.rule, []).append(part)

    def planned(match: str, rule: Rule, index: int | None) -> PlannedRule:
        found = parts.get(index, [])
        names = [name for part in found for name in part.names]
        return PlannedRule(match, _action(job.recipe, rule) + _matrices_text(job, found), names)

    rules = [
        planned("else" if rule.otherwise is not None else ", ".join(rule.globs), rule, i)
        for i, rule in enumerate(job.recipe.rules)
    ]
    return [*rules, planned("(no rule)", Rule.all(), None)]


def _matrices_text(job: Job, parts: list[Part]) -> str:
    """Says what a method of matrices makes of the leaves; of other methods nothing."""
    step = next((part.each_matrix for part in parts if part.each_matrix), None)
    if step is None:
        return ""
    held, others = (sum(len(job.by_matrices(part)[i]) for part in parts) for i in (0, 1))
    said = f": {held} {'matrix' if held == 1 else 'matrices'}"
    return said + (
        f", {others} {'averaged' if step.average else 'as in the base'}" if others else ""
    )


def _action(recipe: Recipe, rule: Rule) -> str:
    """Says in words what a rule does."""
    if "base" in (rule.keep, rule.otherwise) or rule.keep is not None:
        return f"copied from {rule.keep or rule.otherwise}"
    spec = recipe.method_under(rule)

    def shown(x: Any) -> str:
        if isinstance(x, list):
            return " to ".join(map(shown, x))
        return f"{x:g}" if isinstance(x, float) else f"{x}"

    if isinstance(spec, list):
        said = " + ".join(_method_text(step) for step in spec)
    else:
        options = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
        options |= {k: shown(v) for k, v in rule.values.items()}
        said = _method_text({"name": spec if isinstance(spec, str) else spec["name"], **options})
    weights = {n: e.weight for n, e in recipe.experts.items()} | rule.weights
    if any(w != 1.0 for w in weights.values()):
        said += ", weights " + ", ".join(f"{n} {shown(w)}" for n, w in weights.items())
    return said + (", each layer of the stacks" if rule.stacked else "")


def _method_text(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{k} {v}" for k, v in spec.items() if k != "name")
    return spec["name"] + (f" ({options})" if options else "")


def _coverage(job: Job) -> dict[str, tuple[int, int]]:
    wanted = [n for p in job.parts for n in p.names if job.needs_curvature(p, n)]
    return {
        name: (sum(n in v.needs for n in wanted), len(wanted)) for name, v in job.curvature.items()
    }
