"""Merges small random trees with mergekit, peft and fusion_bench, and stores what they return.

    pip install -r requirements.txt        # in an environment of its own; see that file
    python make_golden.py                  # writes mergekit.npz, peft.npz, fusion_bench.npz

Every file has the inputs beside the outputs: ``base/LEAF``, ``experts/LEAF`` (stacked), and
``METHOD/LEAF``. Matrices are as in PyTorch, (fan-out, fan-in). For a method that draws, the masks
it drew are in ``METHOD.mask/LEAF``: found by giving its own pruning function the same seed.
"""

import contextlib
import importlib.metadata
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
VERSIONS = {
    "torch": "2.13.0",
    "mergekit": "0.1.5",
    "peft": "0.21.2",
    "fusion-bench": "0.2.33",
}
SHAPES = {"kernel": (12, 10), "square": (8, 8), "bias": (17,), "stack": (2, 5, 3)}
K = 3
WEIGHTS = [0.5, 1.0, 1.7]
SEED = 20

Tree = dict[str, torch.Tensor]


def inputs() -> tuple[Tree, list[Tree]]:
    """A base and experts: random leaves, and two where magnitudes and votes tie."""
    rng = np.random.default_rng(SEED)
    base = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    # A part that all experts share: without one, task vectors are nearly orthogonal, or opposed.
    shared = {name: 0.05 * rng.normal(size=shape) for name, shape in SHAPES.items()}
    experts = [
        {name: x + shared[name] + 0.1 * rng.normal(size=x.shape) for name, x in base.items()}
        for _ in range(K)
    ]
    # Exact in float32. Votes that cancel, without and with the weights 0.5 and 1; nothing at all;
    # and votes that are won by one large entry or by two small ones.
    base["vote"] = np.array([1.0, -2.0, 0.5, -1.0, 0.0, 3.0, 0.5, -1.0])
    votes = [[1, -2, 2, -2, 0, 1, 3, -4], [-1, 2, -1, 1, 0, 1, -1, 1], [0, 0, 0, 0, 0, -1, -1, 1]]
    # A trim to one half cuts through the entries of magnitude 1.
    base["tied"] = np.zeros(8)
    tied = [[1, 1, -1, 2, 0, 0, 1, -1], [2, -1, 1, 1, 0, 1, 0, 1], [-1, -1, -1, 0, 0, 2, 1, 1]]
    for expert, vote, tie in zip(experts, votes, tied, strict=True):
        expert["vote"], expert["tied"] = base["vote"] + np.array(vote), np.array(tie)

    def tensors(tree: dict[str, np.ndarray]) -> Tree:
        return {name: torch.tensor(x, dtype=torch.float32) for name, x in tree.items()}

    return tensors(base), [tensors(expert) for expert in experts]


class Golden:
    """The arrays of one file."""

    def __init__(self, base: Tree, experts: list[Tree]):
        self.arrays: dict[str, np.ndarray] = {}
        self.add("base", base)
        self.add("experts", {n: torch.stack([e[n] for e in experts]) for n in base})

    def add(self, method: str, tree: Tree) -> None:
        """Adds what a method returned, or a mask."""
        for name, x in tree.items():
            x = x.detach()
            # NumPy has no bfloat16: its bits.
            array = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
            self.arrays[f"{method}/{name}"] = array.copy()

    def save(self, peer: str) -> None:
        """Writes the file, with the version of who made it."""
        version = np.array(f"{peer} {VERSIONS[peer]}")
        path = HERE / f"{peer.replace('-', '_')}.npz"
        np.savez_compressed(path, version=version, weights=np.array(WEIGHTS), **self.arrays)
        print(f"{path.name}: {len(self.arrays)} arrays, {path.stat().st_size} bytes")


def mergekit_golden(base: Tree, experts: list[Tree]) -> None:
    """mergekit: every method, leaf by leaf."""
    from mergekit.merge_methods import merge_tensors
    from mergekit.sparsify import bernoulli, della_magprune

    golden = Golden(base, experts)

    def merged(method: str, leaf: str, own: dict, inputs=None, base_index=0, **dtypes):
        tensors = [base[leaf], *(e[leaf] for e in experts)] if inputs is None else inputs
        weights = dict(zip(range(len(tensors)), [0.0, *WEIGHTS], strict=False))
        if own.pop("weighted", True):
            own["weight"] = weights
        torch.manual_seed(SEED)
        return merge_tensors(tensors, method, parameters=own, base_index=base_index, **dtypes)

    def every(method: str, own: dict, name: str = "", leaves=(*base,)) -> None:
        golden.add(name or method, {leaf: merged(method, leaf, dict(own)) for leaf in leaves})

    half = {"density": 0.5}
    every("task_arithmetic", {"lambda": 0.4})
    every("ties", {**half, "lambda": 0.8})
    every("ties", {"density": 1.0}, "ties density 1")
    every("ties", {**half, "normalize": False}, "ties total")
    every("ties", {**half, "rescale": True}, "ties rescale")
    every("breadcrumbs", {**half, "gamma": 0.12, "lambda": 0.4})
    every("breadcrumbs_ties", {**half, "gamma": 0.12, "lambda": 0.4})
    for topk in (1.0, 0.4):
        every("sce", {"select_topk": topk, "weighted": False}, f"sce {topk}")
    every("model_stock", {"weighted": False})

    # Without a base.
    def without_base(method: str, own: dict, count: int = K, dtype=torch.float32) -> None:
        result = {}
        for leaf in SHAPES:
            tensors = [e[leaf].to(dtype) for e in experts[:count]]
            weights = dict(enumerate(WEIGHTS)) if own.get("weighted", True) else {}
            own_values = {k: v for k, v in own.items() if k != "weighted"}
            if weights:
                own_values["weight"] = dict(list(weights.items())[:count])
            result[leaf] = merge_tensors(tensors, method, parameters=own_values)
        golden.add(method, result)

    without_base("linear", {})
    without_base("multislerp", {})
    without_base("nuslerp", {}, count=2)
    # Its inverse cosine needs float64 to be exact to 1e-6; a tolerance of zero takes all its steps.
    without_base("karcher", {"weighted": False, "tol": 1e-12, "max_iter": 30}, dtype=torch.float64)
    slerp = {}
    for leaf in SHAPES:
        pair = [e[leaf] for e in experts[:2]]
        slerp[leaf] = merge_tensors(pair, "slerp", parameters={"t": 0.3}, base_index=0)
    golden.add("slerp", slerp)
    every("multislerp", {}, "multislerp with base", leaves=SHAPES)
    nuslerp = {}
    for leaf in SHAPES:
        own = {"weight": {0: 0.0, 1: WEIGHTS[0], 2: WEIGHTS[1]}}
        tensors = [base[leaf], experts[0][leaf], experts[1][leaf]]
        nuslerp[leaf] = merge_tensors(tensors, "nuslerp", parameters=own, base_index=0)
    golden.add("nuslerp with base", nuslerp)

    # Methods that draw.
    options = {"dare_linear": half, "dare_ties": half}
    options |= {name: {**half, "epsilon": 0.2} for name in ("della", "della_linear")}
    for method, own in options.items():
        every(method, own, leaves=SHAPES)
        masks = {}
        for leaf in SHAPES:
            torch.manual_seed(SEED)
            deltas = [e[leaf] - base[leaf] for e in experts]
            if "epsilon" in own:
                kept = [della_magprune(d, own["density"], own["epsilon"]) for d in deltas]
            else:
                kept = [bernoulli(d, own["density"]) for d in deltas]
            masks[leaf] = torch.stack([x != 0 for x in kept])
        golden.add(f"{method}.mask", masks)
    # How often DELLA keeps an entry of a row, by its rank.
    rows = torch.arange(1.0, 12.0).repeat(4000, 1)
    torch.manual_seed(SEED)
    kept = (della_magprune(rows, 0.5, 0.2) != 0).float().mean(0)
    golden.add("della.kept", {"by rank of 11, 4000 rows": kept})

    # bfloat16: computed in float32 and rounded once, and, mergekit's default, all in bfloat16.
    low = [base["kernel"], *(e["kernel"] for e in experts)]
    low = [x.to(torch.bfloat16) for x in low]
    golden.add("bfloat16", {"inputs": torch.stack(low)})
    for name, dtypes in {
        "float32": {"dtype": torch.float32, "out_dtype": torch.bfloat16},
        "default": {},
    }.items():
        found = merged("ties", "kernel", {"density": 1.0}, inputs=low, **dtypes)
        golden.add("bfloat16", {f"ties {name}": found})
    golden.save("mergekit")


def peft_golden(base: Tree, experts: list[Tree]) -> None:
    """peft: the functions that merge task vectors."""
    from peft.utils import merge_utils

    golden = Golden(base, experts)
    weights = torch.tensor(WEIGHTS)

    def every(name: str, leaves=(*base,), **own) -> None:
        method, result = getattr(merge_utils, name), {}
        for leaf in leaves:
            torch.manual_seed(SEED)
            deltas = [e[leaf] - base[leaf] for e in experts]
            result[leaf] = method(deltas, weights, **own)
        whole = "density 1" if own.get("density") == 1 else ""
        label = [name, own.get("majority_sign_method", ""), whole]
        golden.add(" ".join(filter(None, label)), result)

    every("task_arithmetic")
    every("magnitude_prune", density=0.5)
    for vote in ("total", "frequency"):
        for density in (0.5, 1.0):
            every("ties", density=density, majority_sign_method=vote)
        every("dare_ties", leaves=SHAPES, density=0.5, majority_sign_method=vote)
    every("dare_linear", leaves=SHAPES, density=0.5)
    masks = {}
    for leaf in SHAPES:
        torch.manual_seed(SEED)
        ones = torch.ones_like(base[leaf])
        kept = [merge_utils.random_pruning(ones, 0.5, rescale=False) for _ in experts]
        masks[leaf] = torch.stack(kept) != 0
    golden.add("dare.mask", masks)
    golden.save("peft")


class Encoder(torch.nn.Module):
    """Two linear layers and a norm, named so that DOGE takes them."""

    def __init__(self, seed: int, base: "Encoder | None" = None):
        super().__init__()
        self.encoder = torch.nn.ModuleDict(
            {
                "up": torch.nn.Linear(10, 14),
                "down": torch.nn.Linear(14, 12),
                "layer_norm": torch.nn.LayerNorm(12),
            }
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, x in self.named_parameters():
                noise = torch.randn(x.shape, generator=generator)
                x.copy_(noise if base is None else base.get_parameter(name) + 0.1 * noise)


def fusion_bench_golden(base: Tree, experts: list[Tree]) -> None:
    """fusion_bench: its functions on tensors and, where it has none, its algorithms on a model.

    Not its task arithmetic, which refuses all models in this version: it adds tensors to parameters
    and allows one type only.
    """
    from fusion_bench.method.dare.utils import param_random_drop_
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.opcm.opcm_general import OPCM
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.slerp.slerp_utils import slerp
    from fusion_bench.method.tall_mask.task_arithmetic import generate_task_masks
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
        compute_and_sum_svd_mem_reduction,
    )
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )
    from fusion_bench.method.wudi.wudi import wudi_merging
    from fusion_bench.modelpool import BaseModelPool

    golden = Golden(base, experts)
    random = {name: base[name] for name in SHAPES}
    deltas = [{n: e[n] - base[n] for n in base} for e in experts]
    smooth = [{n: d[n].clone() for n in SHAPES} for d in deltas]
    # Singular vectors in float64, so that only one side's rounding is in the comparison.
    matrices = [{n: d[n].double() for n in ("kernel", "square", "bias")} for d in deltas]

    golden.add("simple_average", simple_average([{n: e[n] for n in random} for e in experts]))
    for name, leaves in {"ties": random, "ties vote": {n: base[n] for n in base}}.items():
        flat = torch.vstack([state_dict_to_vector({n: d[n] for n in leaves}) for d in deltas])
        for combine in ("mean", "sum"):
            density = 0.3 if name == "ties" else 0.99
            vector = ties_merging(flat, reset_thresh=density, merge_func=combine)
            golden.add(f"{name} {combine}", vector_to_state_dict(vector, leaves))
    golden.add("slerp", {n: slerp(0.3, experts[0][n], experts[1][n]) for n in random})

    torch.manual_seed(SEED)
    dropped = [torch.nn.Parameter(d["kernel"].clone()) for d in deltas]
    for x in dropped:
        param_random_drop_(x, sparsity_level=0.5, rescale=True)
    golden.add("dare", {"kernel": torch.stack([x.data for x in dropped])})

    rng = np.random.default_rng(SEED)

    def positive(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(rng.lognormal(sigma=1.5, size=shape), dtype=torch.float32)

    fisher = [{n: positive(s) for n, s in SHAPES.items()} for _ in experts]
    golden.add("fisher.curvature", {n: torch.stack([f[n] for f in fisher]) for n in SHAPES})
    params = {n: [e[n] for e in experts] for n in SHAPES}
    for normalize in (False, True):
        found = merging_with_fisher_weights(
            params,
            fisher,
            torch.tensor(WEIGHTS),
            normalize_fisher_weight=normalize,
            minimal_fisher_weight=0.0,
        )
        golden.add("fisher normalized" if normalize else "fisher", found)

    rows = torch.tensor(rng.normal(size=(K, 40, 10)), dtype=torch.float32)
    grams = rows.transpose(1, 2) @ rows / 40
    golden.add("regmean.gram", {"kernel": grams})
    named = {"kernel.weight": params["kernel"], "bias": params["bias"]}
    found = merging_with_regmean_weights(
        named, [{"kernel": g} for g in grams], reduce_non_diagonal_ratio=0.9
    )
    golden.add("regmean", {"kernel": found["kernel.weight"], "bias": found["bias"]})

    golden.add("tsv_m", compute_and_sum_svd_mem_reduction(matrices, accelerator="cpu"))
    golden.add("iso_c", iso_c(matrices, accelerator="cpu"))
    for share in (0.5, 0.6):
        found = iso_cts(matrices, common_space_fraction=share, accelerator="cpu")
        golden.add(f"iso_cts {share}", found)
    golden.add("wudi", wudi_merging(matrices, accelerator="cpu", iter_num=50))

    unified, masks, rescalers = emr_merge(smooth)
    golden.add("emr", unified)
    golden.add("emr.mask", {n: torch.stack(m) for n, m in masks.items()})
    golden.add("emr.rescaler", {"model": rescalers})
    golden.add("emr.rescaler", {"kernel": emr_merge([{"kernel": d["kernel"]} for d in deltas])[2]})
    total = {n: sum(d[n] for d in deltas) for n in random}
    zero = {n: torch.zeros_like(x) for n, x in total.items()}
    tall = [generate_task_masks(total, d, zero, tall_mask_lambda=0.4) for d in smooth]
    golden.add("tall.mask", {n: torch.stack([m[n] for m in tall]).bool() for n in random})

    # Whole algorithms: they change the models that they are given, so each gets its own.
    def models() -> dict[str, Encoder]:
        start = Encoder(0)
        return {"_pretrained_": start, **{f"expert{t}": Encoder(t + 1, start) for t in range(K)}}

    for name, model in models().items():
        golden.add(f"model/{name}", dict(model.state_dict()))
    opcm = OPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    golden.add("model/opcm", opcm.run(BaseModelPool(models())).state_dict())
    # Of more than 99.99 per cent of a small model nothing is dropped.
    doge = DOGE_TA_Algorithm(subspace=6, K=99.99, lamda=0.07)
    golden.add("model/doge", doge.run(BaseModelPool(models())).state_dict())
    golden.save("fusion-bench")


def main() -> None:
    found = {name: importlib.metadata.version(name).split("+")[0] for name in VERSIONS}
    if found != VERSIONS:
        sys.exit(f"The outputs depend on the versions: wanted {VERSIONS}, found {found}.")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    base, experts = inputs()
    for make in (mergekit_golden, peft_golden, fusion_bench_golden):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # fusion_bench tells all that it does
            make(base, experts)
        print(printed.getvalue().splitlines()[-1])


if __name__ == "__main__":
    main()
