"""What a compiled program moves between chips, and that the step compiles for TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.pretrain import scale

ROOT = Path(__file__).parents[2]

PROGRAM = """\
HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p.1: bf16[64,8]) -> bf16[16,8] {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %r = bf16[64,8]{1,0} all-reduce(%p.1), channel_id=5, replica_groups={{0,1}}, to_apply=%add
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%r), dynamic_slice_sizes={16,8}
}

%part.1 (p.2: f32[4,8]) -> f32[16,8] {
  %p.2 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %g.1 = f32[16,8]{1,0:T(8,128)} all-gather(%p.2), channel_id=7, dimensions={0}
}

%part.2 (p.3: f32[4,8]) -> f32[16,8] {
  %p.3 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %g.2 = f32[16,8]{1,0:T(8,128)} all-gather(%p.3), channel_id=7, dimensions={0}
}

%condition (c: (s32[], f32[4,8])) -> pred[] {
  %c = (s32[], f32[4,8]{1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  %bound = s32[]{:T(128)} constant(40)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%body (b: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %v = f32[4,8]{1,0} get-tuple-element(%b), index=1
  %start = f32[16,8]{1,0} fusion(%v), kind=kCustom, calls=%part.1
  %done = f32[16,8]{1,0} fusion(%v), kind=kCustom, calls=%part.2
  ROOT %both = (s32[], f32[4,8]{1,0}) tuple(%i, %v)
}

ENTRY %main (a: f32[4,8], d: bf16[64,8]) -> f32[] {
  %a = f32[4,8]{1,0} parameter(0)
  %d = bf16[64,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %carry = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%carry), condition=%condition, body=%body
  %f = bf16[16,8]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%a), channel_id=9, dimensions={0}
  %t = f32[8,8]{1,0} all-gather-done(%s)
  ROOT %last = f32[] constant(0)
}
"""


def test_counts_loops_by_length_and_pieces_once():
    assert sorted(scale.collectives(PROGRAM)) == [
        ("all-gather", 4 * 8 * 8, 1),
        ("all-gather", 4 * 16 * 8, 40),
        ("reduce-scatter", 2 * 64 * 8, 1),
    ]


SMALL = """
import json
from experiments.pretrain import model, scale
sizes = dict(vocabulary=1024, width=256, layers=4, length=128, dtype="bfloat16", scan=True)
plan = scale.Plan("small", model.Config(**sizes), "v5e:2x4", (1, 4, 2), 16)
print("ROWS", json.dumps([r for o in ("adamw", "moma:rank=4") for r in scale.measure(plan, o)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_compiles_for_tpus():
    """In a process of its own: its devices are chips that are not there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SMALL], env=environment, capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROWS"))
    rows = {(r["optimizer"], r["what"]): r for r in json.loads(line.removeprefix("ROWS "))}
    adamw, moma = (rows[name, "step"] for name in ("adamw", "moma:rank=4"))
    assert adamw["state_bytes"] == 2 * adamw["param_bytes"] + 8  # two counts of steps
    assert moma["state_bytes"] < 0.1 * adamw["state_bytes"]
    # One chip's step gathers each block's kernels, 12 width^2 halved by the tensor axis, in bf16.
    assert adamw["all-gather"] > 4 * 12 * 256**2 / 2 * 2
    # The update moves r (m + n) numbers a matrix, and never a whole matrix.
    assert rows["moma:rank=4", "update"]["largest_collective"] < 256 * 256 * 4
    assert moma["collective_bytes"] < 1.1 * adamw["collective_bytes"]
