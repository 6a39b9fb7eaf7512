"""What training and merging can tell about themselves: gradient noise, barriers, likeness."""

from optax_moma.diagnostics._figures import draw_curve, draw_plane
from optax_moma.diagnostics._landscape import (
    Curve,
    Plane,
    barrier,
    interpolation_curve,
    midpoint_gain,
    task_arithmetic_plane,
)
from optax_moma.diagnostics._likeness import cka, curvature_overlap, drift, sign_conflict
from optax_moma.diagnostics._noise import (
    LogNoiseScaleState,
    NoiseScale,
    TwoBatch,
    log_noise_scale,
    noise_scale,
    two_batch_noise,
)

__all__ = [
    "Curve",
    "LogNoiseScaleState",
    "NoiseScale",
    "Plane",
    "TwoBatch",
    "barrier",
    "cka",
    "curvature_overlap",
    "draw_curve",
    "draw_plane",
    "drift",
    "interpolation_curve",
    "log_noise_scale",
    "midpoint_gain",
    "noise_scale",
    "sign_conflict",
    "task_arithmetic_plane",
    "two_batch_noise",
]
