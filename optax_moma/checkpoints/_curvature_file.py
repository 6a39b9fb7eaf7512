"""Curvature alone in a small file, that can be published beside a model."""

import os
from pathlib import Path

import jax

from . import _safetensors
from ._recipe import CurvatureSource
from ._source import (
    CURVATURE_FORMAT,
    Abstract,
    curvature_entries,
    open_checkpoint,
    open_curvature,
    open_model,
)


def export_curvature(
    checkpoint: Path | str,
    output: Path | str,
    *,
    item: str | None = None,
    step: int | None = None,
    params: str | None = None,
    source: CurvatureSource | None = None,
    force: bool = False,
) -> int:
    """Writes the curvature that an optimizer's state in a checkpoint holds to a small file.

    What the state keeps factored stays factored: m + n numbers for a matrix of m x n. The file is
    safetensors; a recipe reads it with ``curvature: {path: ...}``.

    Args:
      checkpoint: A checkpoint with params and optimizer state.
      output: The file, ``.safetensors``.
      item: The name of the tree, in an Orbax checkpoint that has several.
      step: Which step of a folder of steps.
      params: The path of the params in the tree; by default they are searched for.
      source: Where the state is and how it is read, if not found by itself.
      force: Whether to replace what is there.

    Returns:
      The size of the file in bytes.

    Raises:
      FileExistsError: if there is something at ``output``.
      ValueError: if no curvature is found, or not for every floating-point leaf.

    Example:
      >>> import jax.numpy as jnp, optax, tempfile
      >>> from orbax.checkpoint import v1 as ocp
      >>> folder, params = tempfile.mkdtemp(), {"w": jnp.ones((200, 300))}
      >>> state = optax.adafactor(1e-3).init(params)
      >>> ocp.save(f"{folder}/expert", {"params": params, "opt_state": state})
      >>> export_curvature(f"{folder}/expert", f"{folder}/expert.safetensors") < 3000
      True
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: a file of curvature is named *.safetensors")
    if output.exists() and not force:
        raise FileExistsError(f"{output} exists; name another output, or replace it with force")
    opened = open_checkpoint(Path(checkpoint), item, step)
    model = open_model(str(checkpoint), opened, params)
    source = source or CurvatureSource()
    curvature = open_curvature(model, opened, source.tree, source.b2, source.missing)
    uncovered = [n for n in model.floats if n not in curvature.needs and source.missing is None]
    if uncovered:
        raise ValueError(
            f"{checkpoint}: no curvature for {', '.join(uncovered[:10])}"
            + (" and more" if len(uncovered) > 10 else "")
            + "; if these leaves were frozen, give them one with missing"
        )
    shapes = curvature_entries({n: curvature.abstract(n, model.leaves[n]) for n in model.floats})
    partial = output.with_name(output.name + ".partial")
    leaves = {name: Abstract(x.shape, x.dtype) for name, x in shapes.items()}
    told = {"gradients": curvature.gradients, "step": curvature.step(model)}
    about = CURVATURE_FORMAT | {k: str(n) for k, n in told.items() if n is not None}
    writer = _safetensors.Writer(partial, leaves, about)
    for name in model.floats:
        needed = curvature.needs[name].names if name in curvature.needs else []
        arrays = opened.read(needed)
        v = curvature.assembled(name, model.leaves[name], arrays)
        writer.write(curvature_entries({name: jax.device_get(v)}))
    writer.close()
    os.replace(partial, output)
    return output.stat().st_size
