"""What training and merging can tell about themselves: gradient noise, barriers, likeness."""

from optax_moma.diagnostics._figures import draw_curve as draw_curve
from optax_moma.diagnostics._figures import draw_plane as draw_plane
from optax_moma.diagnostics._landscape import Curve as Curve
from optax_moma.diagnostics._landscape import Plane as Plane
from optax_moma.diagnostics._landscape import barrier as barrier
from optax_moma.diagnostics._landscape import interpolation_curve as interpolation_curve
from optax_moma.diagnostics._landscape import midpoint_gain as midpoint_gain
from optax_moma.diagnostics._landscape import task_arithmetic_plane as task_arithmetic_plane
from optax_moma.diagnostics._likeness import cka as cka
from optax_moma.diagnostics._likeness import curvature_overlap as curvature_overlap
from optax_moma.diagnostics._likeness import drift as drift
from optax_moma.diagnostics._likeness import sign_conflict as sign_conflict
from optax_moma.diagnostics._noise import LogNoiseScaleState as LogNoiseScaleState
from optax_moma.diagnostics._noise import NoiseScale as NoiseScale
from optax_moma.diagnostics._noise import TwoBatch as TwoBatch
from optax_moma.diagnostics._noise import log_noise_scale as log_noise_scale
from optax_moma.diagnostics._noise import noise_scale as noise_scale
from optax_moma.diagnostics._noise import two_batch_noise as two_batch_noise
