"""How close selectors and tails stay to dense on the demo model, every layer and step sparse.

    python samples/tools/measure_fidelity.py --out samples/results/fidelity_demo.csv

Every prompt is generated dense, then with each selector and tail at each density, once with blocks
of 48 tokens (`small`) and once with the blocks that the Hopper kernel launches (`hopper`, 128).
PSNR is of the pair with the same prompt and seed. `cost` is launched density: query and key slots
of visits, pooled keys, probes at half (a score without a value); of small blocks, which no GPU
kernel fits, their own tokens in place of slots. Rows are written one by one.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from measure_patterns import PROMPTS, Judge

from dit_accel import api
from dit_accel.bench.machine import machine
from dit_accel.cli import runtime
from dit_accel.compare.prompts import read_prompts
from dit_accel.engine.profile import Profile, Rule
from dit_accel.kernels.computes import compute
from dit_accel.kernels.tails import tail
from dit_accel.models.find import find_model

BLOCKS: dict[str, dict[str, Any]] = {"small": {"tile": [3, 4, 4]}, "hopper": {}}
BACKENDS = {"small": "triton", "hopper": "hopper"}
PLAIN: dict[str, Any] = {}
FINE: dict[str, Any] = {"pool": 16}
Policy = tuple[str, str, float, str, dict[str, Any]]
"""Blocks, selector, density, tail and its parameters."""
# Densities at which costs come to 0.15, 0.25 and 0.30.
POLICIES: tuple[Policy, ...] = (
    *(("small", "probe_error", d, "linear", PLAIN) for d in (0.215, 0.115, 0.265)),
    *(("small", "probe_error", d, "linear", FINE) for d in (0.225, 0.175, 0.075)),
    *(("small", "block_topk", d, "drop", PLAIN) for d in (0.25, 0.15, 0.3)),
    *(("hopper", "probe_error", d, "linear", PLAIN) for d in (0.2, 0.1, 0.25)),
    *(("hopper", "block_topk", d, "drop", PLAIN) for d in (0.2, 0.1, 0.25)),
    ("hopper", "probe_error", 0.2, "linear", FINE),
    ("small", "block_topk", 0.215, "linear", PLAIN),
    ("hopper", "block_topk", 0.2, "linear", PLAIN),
    ("small", "probe_error", 0.215, "pooled", PLAIN),
    ("hopper", "probe_error", 0.2, "pooled", PLAIN),
    ("small", "probe", 0.215, "linear", PLAIN),
    ("small", "probe_error", 0.25, "drop", PLAIN),
    ("small", "probe_error", 0.215, "linear", {"slope": "head"}),
)
BATCH = 8
COLUMNS = (
    "blocks", "compute", "density", "tail", "parameters", "cost", "kept_density", "psnr_mean",
    "psnr_p10", "psnr_min", "ssim_median", "adherence", "clips", "steps", "guidance", "frames",
    "size", "tokens", "backend", "sparse_calls", "dense_calls",
)  # fmt: skip


class Bench:
    """The demo model and what it is asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = runtime.pick_device(options.device)
        dtype = runtime.pick_dtype(None, self.device)
        self.pipe: Any = runtime.load(find_model("demo"), WanPipeline, dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = read_prompts(str(PROMPTS))[: options.prompts]

    def clips(self) -> list[np.ndarray]:
        """One clip a prompt, [T, H, W, 3] uint8; prompt number i has seed i."""
        made: list[np.ndarray] = []
        for first in range(0, len(self.prompts), BATCH):
            some = self.prompts[first : first + BATCH]
            out = self.pipe(
                prompt=some,
                height=self.options.size,
                width=self.options.size,
                num_frames=self.options.frames,
                num_inference_steps=self.options.steps,
                guidance_scale=self.options.guidance,
                generator=[torch.Generator("cpu").manual_seed(first + i) for i in range(len(some))],
                output_type="np",
            )
            made += [(clip.clip(0, 1) * 255).round().astype(np.uint8) for clip in out.frames]
        return made

    def run(self, blocks: str, name: str, density: float, kind: str, own: dict[str, Any]) -> Any:
        """(columns, clips) of a policy in every layer and step."""
        rule: Any = compute(name, density=density, **BLOCKS[blocks])
        made = tail(kind, **own)
        backend = "torch" if self.device.type == "cpu" else BACKENDS[blocks]
        profile = Profile("measured", rules=(Rule(compute=rule, tail=made),), breakeven=False)
        self.pipe.enable_sparse_attention(profile, strict=True, backend=backend)
        clips = self.clips()
        found = self.pipe.sparse_attention_report().to_dict()["self"]
        if found["dense"] or not found["sparse"]:
            raise SystemExit(f"{name}: calls ran dense: {found}")
        (route,) = {r.blocks: r for r in api.session_of(self.pipe).routes.routes}.values()
        cost = found["launched_density"]
        if blocks == "small":
            cost = found["kept_density"] + made.density(route.blocks, False, rule.probes)
        tokens = route.blocks.q_length
        self.pipe.disable_sparse_attention()
        return {
            "blocks": blocks, "compute": name, "density": density, "tail": kind,
            "parameters": made.describe(), "cost": round(cost, 4),
            "kept_density": round(found["kept_density"], 4), "tokens": tokens,
            "backend": " ".join(found["backends"]), "sparse_calls": found["sparse"],
            "dense_calls": found["dense"],
        }, clips  # fmt: skip


def judged(judge: Judge, clips: list[np.ndarray]) -> dict[str, Any]:
    """Mean, tenth percentile and worst PSNR, and what `Judge` says of the rest."""
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(judge._one, clips, judge.dense, judge.prompts))
    values = sorted(row["psnr"] or 0.0 for row in rows)
    adherence = [row["adherence"] for row in rows if row["adherence"] is not None]
    return {
        "psnr_mean": round(statistics.mean(values), 3),
        "psnr_p10": round(float(np.percentile(values, 10)), 3),
        "psnr_min": round(values[0], 3),
        "ssim_median": round(statistics.median(row["ssim"] or 0.0 for row in rows), 4),
        "adherence": round(statistics.mean(adherence), 4) if adherence else "",
        "clips": len(clips),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24, help="how many of prompts/demo.txt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--device")
    parser.add_argument("--first", type=int, default=len(POLICIES), help="how many policies")
    options = parser.parse_args()
    runtime.quiet()
    bench = Bench(options)
    here = machine(bench.device).columns()
    begin = time.perf_counter()
    judge = Judge(bench.prompts, bench.clips())
    fixed = {key: getattr(options, key) for key in ("steps", "guidance", "frames", "size")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *here])
        writer.writeheader()
        dense = {"blocks": "", "compute": "dense", "cost": 1.0}
        writer.writerow({**dense, **judged(judge, judge.dense), **fixed, **here})
        for policy in POLICIES[: options.first]:
            row, clips = bench.run(*policy)
            row |= judged(judge, clips)
            writer.writerow({**row, **fixed, **here})
            file.flush()
            shown = [row[k] for k in COLUMNS[:8]] + [row["psnr_p10"], row["adherence"]]
            print(f"{time.perf_counter() - begin:5.0f} s ", *shown, flush=True)


if __name__ == "__main__":
    main()
