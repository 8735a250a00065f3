"""Where a sparse call beats a dense one on this machine: what costs/breakeven.py rests on.

    python samples/tools/measure_breakeven.py --out samples/results/breakeven_<machine>.csv

Every result is proven against an oracle before it is timed. Times include the host's part of a
call, which is most of a small one. The dense time is that of the fastest of torch's own kernels,
which is what stock diffusers runs.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from dit_accel.bench import dense
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.machine import machine
from dit_accel.bench.proof import expected_rows, poisoned, prove
from dit_accel.bench.timing import Inputs, measure_wall
from dit_accel.kernels.backends import choose
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.layout import TokenLayout

GPU_GRIDS = ((9, 24, 24), (21, 30, 52), (5, 16, 16), (9, 32, 32), (13, 30, 45), (21, 45, 80))
CPU_GRIDS = ((3, 12, 12), (5, 16, 16), (9, 24, 24))
FRACTIONS = (0.3, 0.4, 0.5, 0.65, 0.8)
HEADS = 8
STOCK = ("cudnn", "fa2", "sdpa")
"""Dense kernels that come with torch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    here = machine(device)
    common = {k: getattr(here, k) for k in ("machine", "threads", "torch", "triton", "commit")}
    grids = GPU_GRIDS if device.type == "cuda" else CPU_GRIDS
    with options.out.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for grid, dim in itertools.product(grids, (128, 64)):
            for row in measured(grid, dim, device):
                if writer is None:
                    writer = csv.DictWriter(file, [*row, *common])
                    writer.writeheader()
                writer.writerow(row | common)
                file.flush()
                print(row, flush=True)


def measured(
    grid: tuple[int, int, int], dim: int, device: torch.device
) -> Iterator[dict[str, object]]:
    """One row for each window width; batch 1."""
    layout = TokenLayout(grid)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = make_inputs(Case("", "", layout, HEADS, dim), dtype, device)
    dense_ms, kernel = best_dense(inputs, device)
    for fraction in FRACTIONS:
        sliding = pattern("sliding_tile", window={"fraction": [1.0, fraction, fraction]})
        plan = plan_for(layout, sliding, device)
        backend = choose(*inputs, plan)

        def sparse(plan=plan, backend=backend) -> torch.Tensor:
            return block_sparse_attention(*inputs, plan, backend=backend)

        proof = prove(poisoned(sparse, inputs[0]), expected_rows(*inputs, plan))
        if not proof.ok:
            raise SystemExit(f"{backend} is wrong on {grid}: {proof.why}")
        sparse_ms = measure_wall(sparse, device).median_ms
        yield {
            "tokens": layout.length,
            "head_dim": dim,
            "backend": backend,
            "launched_density": round(plan.launched_density(backend), 4),
            "kept_density": round(plan.kept_density(), 4),
            "dense_kernel": kernel,
            "dense_ms": round(dense_ms, 4),
            "sparse_ms": round(sparse_ms, 4),
            "speedup": round(dense_ms / sparse_ms, 3),
        }


def best_dense(inputs: Inputs, device: torch.device) -> tuple[float, str]:
    """Milliseconds and name of the fastest of torch's dense kernels."""
    kernels = [kernel for kernel in dense.present(device)[0] if kernel.name in STOCK]
    return min(
        (measure_wall(lambda kernel=kernel: kernel.run(*inputs), device).median_ms, kernel.name)
        for kernel in kernels
    )


if __name__ == "__main__":
    main()
