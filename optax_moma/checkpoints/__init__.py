"""Merges of checkpoints of any size, streamed: the same bits as merges in memory."""

from ..merging import MergeError as MergeError
from ._compare import LeafComparison as LeafComparison
from ._compare import compare as compare
from ._curvature_file import export_curvature as export_curvature
from ._manifest import Verified as Verified
from ._manifest import verify as verify
from ._merge import Merged as Merged
from ._merge import load as load
from ._merge import merge as merge
from ._pages import keep_pages as keep_pages
from ._plan import Plan as Plan
from ._plan import PlannedModel as PlannedModel
from ._plan import PlannedRule as PlannedRule
from ._plan import plan as plan
from ._recipe import CurvatureSource as CurvatureSource
from ._recipe import Expert as Expert
from ._recipe import Output as Output
from ._recipe import Recipe as Recipe
from ._recipe import Rule as Rule
from ._recipe import Source as Source
from ._source import Description as Description
from ._source import describe as describe
from ._source import inspect as inspect
