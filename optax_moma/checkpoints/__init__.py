"""Merges of checkpoints of any size, streamed: the same bits as merges in memory."""

from ..merging import MergeError
from ._compare import LeafComparison, compare
from ._curvature_file import export_curvature
from ._manifest import Verified, verify
from ._merge import Merged, load, merge
from ._pages import keep_pages
from ._plan import Plan, PlannedModel, PlannedRule, plan
from ._recipe import CurvatureSource, Expert, Output, Recipe, Rule, Source
from ._source import Description, describe, inspect

__all__ = [
    "CurvatureSource",
    "Description",
    "Expert",
    "LeafComparison",
    "MergeError",
    "Merged",
    "Output",
    "Plan",
    "PlannedModel",
    "PlannedRule",
    "Recipe",
    "Rule",
    "Source",
    "Verified",
    "compare",
    "describe",
    "export_curvature",
    "inspect",
    "keep_pages",
    "load",
    "merge",
    "plan",
    "verify",
]
