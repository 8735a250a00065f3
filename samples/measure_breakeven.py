"""Where a sparse call beats a dense one on this machine: the table behind dit_accel/breakeven.py.

    python samples/measure_breakeven.py --out samples/results/breakeven_<machine>.csv

Results of up to 20,000 tokens are proven against another backend before they are timed. The dense
time is the best of the machine's scaled_dot_product_attention kernels.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.kernels.backends import choose
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.layout import TokenLayout

GPU_GRIDS = ((9, 24, 24), (21, 30, 52), (5, 16, 16), (9, 32, 32), (13, 30, 45), (21, 45, 80))
CPU_GRIDS = ((3, 12, 12), (5, 16, 16), (9, 24, 24))
FRACTIONS = (0.3, 0.4, 0.5, 0.65, 0.8)
DENSE = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    grids = GPU_GRIDS if device.type == "cuda" else CPU_GRIDS
    with options.out.open("w", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for grid, dim in itertools.product(grids, (128, 64)):
            rows = measure(grid, dim, device)
            if writer is None:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
            writer.writerows(rows)
            file.flush()


def measure(grid: tuple[int, int, int], dim: int, device: torch.device) -> list[dict[str, object]]:
    """One row for each window width; 8 heads, batch 1."""
    layout = TokenLayout(grid)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, layout.length, 8, dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    dense_ms, kernel = best_dense(q, k, v)
    rows = []
    for fraction in FRACTIONS:
        sliding = pattern("sliding_tile", window={"fraction": [1.0, fraction, fraction]})
        plan = plan_for(layout, sliding, device)
        backend = choose(q, k, v, plan)

        def sparse(plan=plan, backend=backend) -> torch.Tensor:
            return block_sparse_attention(q, k, v, plan, backend=backend)

        proof = "reference" if backend == "torch" else "torch"
        if layout.length < 20_000:
            wanted = block_sparse_attention(q, k, v, plan, backend=proof).double()
            error = float((sparse().double() - wanted).norm() / wanted.norm())
            if error > 1e-2:
                raise SystemExit(f"{backend} is wrong on {grid}: relative error {error:.2e}")
        sparse_ms = milliseconds(sparse, device)
        rows.append(
            {
                "tokens": layout.length,
                "head_dim": dim,
                "backend": backend,
                "launched_density": round(plan.launched_density(backend), 4),
                "kept_density": round(plan.kept_density(), 4),
                "dense_kernel": kernel,
                "dense_ms": round(dense_ms, 4),
                "sparse_ms": round(sparse_ms, 4),
                "speedup": round(dense_ms / sparse_ms, 3),
                **machine(device),
            }
        )
        print({key: rows[-1][key] for key in list(rows[-1])[:9]}, flush=True)
    return rows


def best_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, str]:
    """Milliseconds and name of the fastest dense kernel."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    if q.device.type == "cpu":
        return milliseconds(lambda: F.scaled_dot_product_attention(*heads_first), q.device), "sdpa"
    times = {}
    for kernel in DENSE:
        with sdpa_kernel(kernel):
            name = kernel.name.lower()
            times[name] = milliseconds(
                lambda: F.scaled_dot_product_attention(*heads_first), q.device
            )
    name = min(times, key=lambda key: times[key])
    return times[name], name


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of a call after two that do not count."""
    times = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end)
        else:
            started = time.perf_counter()
            call()
            took = (time.perf_counter() - started) * 1e3
        if number > 1:
            times.append(took)
    return statistics.median(times)


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    )
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "machine": name,
        "threads": "" if cuda else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
