"""A few calls of one kernel, for a profiler.

ncu --metrics \
    gpc__cycles_elapsed.max,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed \
    -k 'regex:^forward|flash' python samples/tools/one_call.py --backend hopper --head-dim 128

Random blocks of 128 keys; the sizes are those of the bench (32,768 tokens of 12 heads of 128, or
17,664 of 16 heads of 64). The kernel's self-test launches small ones first: look at the last.
"""

from __future__ import annotations

import argparse

import torch

from dit_accel.bench.cases import CASES
from dit_accel.bench.plans import random_plan
from dit_accel.kernels.block_sparse import block_sparse_attention

CALLS = {case.head_dim: case for case in (CASES["l32768"], CASES["l17664"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="hopper")
    parser.add_argument("--head-dim", type=int, choices=CALLS, default=128)
    parser.add_argument("--density", type=float, default=0.5)
    options = parser.parse_args()
    device = torch.device("cuda")
    case = CALLS[options.head_dim]
    shape = (1, case.layout.length, case.heads, case.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    plan = random_plan(case.layout.length, options.density, device)
    for _ in range(3):
        block_sparse_attention(q, k, v, plan, backend=options.backend)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
