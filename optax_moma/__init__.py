"""Low-rank momentum for Optax whose state is also what a curvature-aware merge needs."""

from . import continual as continual
from . import diagnostics as diagnostics
from . import merging as merging
from ._curvature import curvature_from as curvature_from
from ._curvature import saliency as saliency
from ._moma import ScaleByMomaState as ScaleByMomaState
from ._moma import moma as moma
from ._moma import scale_by_moma as scale_by_moma
from ._moments import Factored as Factored
from ._state import StateSize as StateSize
from ._state import state_partition_specs as state_partition_specs
from ._state import state_size as state_size
from ._umtam import ScaleByUmtamState as ScaleByUmtamState
from ._umtam import scale_by_umtam as scale_by_umtam
from ._umtam import umtam as umtam
from .merging import merge as merge
