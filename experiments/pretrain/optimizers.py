"""The optimizers compared, all under the same clipping, weight decay and learning-rate schedule.

An optimizer is written as its name and its own arguments, e.g. ``moma:rank=16,b1=0``:

    clip by global norm -> the optimizer's scaling -> decoupled weight decay -> learning rate
"""

import ast
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import optax_moma as om

from .variants import scale_by_variant

WEIGHT_DECAY = 0.1
CLIP = 1.0
WARMUP = 0.1
"""Share of the steps over which the learning rate rises; it then falls by a cosine to FINAL."""
FINAL = 0.1


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Linear warmup to ``peak``, then a cosine to a tenth of it at ``steps``."""
    warmup = max(1, round(WARMUP * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, FINAL * peak)


def named(params: Any, *names: str) -> Any:
    """A tree like params: whether a leaf's own name, its last key, is one of these."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key in names, params)


def adafactor(b1: float | None = None) -> optax.GradientTransformation:
    """Adafactor as used for language models: no scaling by the parameters, so that learning rates
    mean what they mean elsewhere; with ``b1``, momentum of its updates.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.identity() if b1 is None else optax.ema(b1, debias=False),
    )


def muon(beta: float = 0.95) -> optax.GradientTransformation:
    """Muon for the kernels, at the size of Adam's updates; Adam for embeddings and vectors."""
    matrices = lambda params: jax.tree.map(  # noqa: E731
        lambda is_kernel: MuonDimensionNumbers(-2, -1) if is_kernel else None,
        named(params, "kernel"),
    )
    return optax.chain(
        optax.contrib.muon(
            1.0,
            beta=beta,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
            adam_learning_rate=1.0,
        ),
        optax.scale(-1.0),  # it descends; the chain's last link does that here
    )


SCALINGS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "adafactor": adafactor,
    "muon": muon,
    "galore": optax.contrib.scale_by_galore,
    "umtam": om.scale_by_umtam,
    "moma": om.scale_by_moma,
    "moma_clipped": functools.partial(om.scale_by_moma, orthogonal_block_size=None),
    "moma_variant": scale_by_variant,
}


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """``"moma:rank=8,saliency=False"`` -> ``("moma", {"rank": 8, "saliency": False})``."""
    name, _, rest = spec.partition(":")
    if name not in SCALINGS:
        raise ValueError(f"{spec!r}: the optimizers are {', '.join(SCALINGS)}.")
    known = inspect.signature(SCALINGS[name]).parameters
    arguments = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ValueError(f"{spec!r}: {name} takes {', '.join(known)}, not {key!r}.")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value  # the name of a dtype
    return name, arguments


def make(spec: str, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The optimizer that ``spec`` writes out, as a whole chain."""
    name, arguments = parse(spec)
    if name.startswith("moma"):
        arguments = {"learning_rate": learning_rate} | arguments
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        SCALINGS[name](**arguments),
        optax.add_decayed_weights(WEIGHT_DECAY, lambda p: named(p, "kernel", "embedding")),
        optax.scale_by_learning_rate(learning_rate),
    )
