"""Model merging: methods as chains of small steps, and one pure function that applies them."""

from optax_moma.merging import fusion_bench, mergekit, peft
from optax_moma.merging._adamerging import AdaMerged, adamerging, entropy
from optax_moma.merging._contract import Contract, Step, merge_step
from optax_moma.merging._data_fisher import diagonal_fisher
from optax_moma.merging._diagonal import (
    average,
    curvature_ties,
    dare,
    fisher,
    ota,
    task_arithmetic,
    ties,
    umtam,
)
from optax_moma.merging._geometric import karcher, model_stock, multislerp, slerp
from optax_moma.merging._gram import ace, doge, regmean, wudi, wudi_adam
from optax_moma.merging._input_grams import input_grams
from optax_moma.merging._inputs import MergeError
from optax_moma.merging._leaf import TaskVectors
from optax_moma.merging._masked import MaskedExperts, emr, masked_expert, tall_masks
from optax_moma.merging._masks import (
    band,
    breadcrumbs,
    compete,
    consensus,
    della,
    drop_by_magnitude,
    energy,
    largest,
    magmax,
    match_norm,
    pcb,
    sce,
    select,
)
from optax_moma.merging._merge import merge
from optax_moma.merging._moma import moma
from optax_moma.merging._norm_aware import norm_aware
from optax_moma.merging._search import Search, df_merge, search
from optax_moma.merging._sequential import (
    Sequential,
    opcm,
    perturb_and_merge,
    running_mean,
    running_moma,
)
from optax_moma.merging._spectral import iso_c, iso_cts, knots, tsv_m
from optax_moma.merging._steps import chain, drop, elect, mean, scale, total, trim, weigh

__all__ = [
    "AdaMerged",
    "Contract",
    "MaskedExperts",
    "MergeError",
    "Search",
    "Sequential",
    "Step",
    "TaskVectors",
    "ace",
    "adamerging",
    "average",
    "band",
    "breadcrumbs",
    "chain",
    "compete",
    "consensus",
    "curvature_ties",
    "dare",
    "della",
    "df_merge",
    "diagonal_fisher",
    "doge",
    "drop",
    "drop_by_magnitude",
    "elect",
    "emr",
    "energy",
    "entropy",
    "fisher",
    "fusion_bench",
    "input_grams",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "largest",
    "magmax",
    "masked_expert",
    "match_norm",
    "mean",
    "merge",
    "merge_step",
    "mergekit",
    "model_stock",
    "moma",
    "multislerp",
    "norm_aware",
    "opcm",
    "ota",
    "pcb",
    "peft",
    "perturb_and_merge",
    "regmean",
    "running_mean",
    "running_moma",
    "scale",
    "sce",
    "search",
    "select",
    "slerp",
    "tall_masks",
    "task_arithmetic",
    "ties",
    "total",
    "trim",
    "tsv_m",
    "umtam",
    "weigh",
    "wudi",
    "wudi_adam",
]
