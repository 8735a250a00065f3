"""Prompt adherence of a trained pipeline: plain WanPipeline samples, judged by the checker."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from captions import caption
from checker import ATTRIBUTES, observe_all, score, summary
from diffusers import WanPipeline
from scenes import Scene, sample_simple

GUIDANCES = (2.5, 4.0, 6.0)
PROMPTS = 128
SWEEP_PROMPTS = 64


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled."""

    frames: int = 33
    height: int = 192
    width: int = 192
    steps: int = 20
    guidance: float = 4.0
    batch: int = 32


@dataclass
class Judged:
    """Sampled clips with the checker's verdicts."""

    scenes: list[Scene]
    clips: list[np.ndarray]
    scores: dict[str, list[bool]] = field(default_factory=dict)
    seconds: float = 0.0


def load(folder: Path, device: torch.device) -> WanPipeline:
    """The pipeline in bf16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unseen_scenes(count: int, seed: int) -> list[Scene]:
    """Single-object scenes with distinct prompts, all of held-out combinations."""
    rng = random.Random(seed)
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = sample_simple(rng, unseen=True)
        found.setdefault(caption(scene), scene)
    return list(found.values())


@torch.no_grad()
def sample(
    pipe: WanPipeline, prompts: Sequence[str], sampling: Sampling, seed: int
) -> list[np.ndarray]:
    """One clip [T, H, W, 3] uint8 per prompt; clip i starts from noise of seed + i."""
    clips: list[np.ndarray] = []
    for first in range(0, len(prompts), sampling.batch):
        part = list(prompts[first : first + sampling.batch])
        seeds = range(seed + first, seed + first + len(part))
        frames = pipe(
            part,
            height=sampling.height,
            width=sampling.width,
            num_frames=sampling.frames,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator("cpu").manual_seed(s) for s in seeds],
            output_type="pt",
        ).frames
        pixels = (frames.float() * 255).round().clamp(0, 255).to(torch.uint8)
        clips += list(pixels.permute(0, 1, 3, 4, 2).cpu().numpy())
    return clips


def measure(
    pipe: WanPipeline, sampling: Sampling, count: int, seed: int, scenes: list[Scene] | None = None
) -> Judged:
    """Sample and judge `count` unseen prompts (or the given scenes)."""
    start = time.time()
    scenes = scenes or unseen_scenes(count, seed)
    clips = sample(pipe, [caption(s) for s in scenes], sampling, seed)
    out = Judged(scenes, clips, score(observe_all(clips), scenes))
    out.seconds = round(time.time() - start, 1)
    return out


def _row(judged: Judged, sampling: Sampling) -> dict:
    return {
        "frames": sampling.frames,
        "height": sampling.height,
        "width": sampling.width,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "prompts": len(judged.scenes),
        "scores": summary(judged.scores),
        "seconds": judged.seconds,
    }


def evaluate(
    folder: Path,
    device: torch.device,
    log: Callable[[str], None] = print,
    deadline: float = float("inf"),
    prompts: int = PROMPTS,
    base: Sampling | None = None,
) -> tuple[dict, dict[str, Judged]]:
    """Choose the guidance on one set of unseen prompts, then measure on another.

    The main result comes first; further sizes are measured while time lasts until `deadline`.
    """
    base = base or Sampling()
    pipe = load(folder, device)
    sweep = []
    for guidance in GUIDANCES:
        sampling = Sampling(**{**vars(base), "guidance": guidance, "steps": 12})
        judged = measure(pipe, sampling, min(SWEEP_PROMPTS, prompts), seed=9000)
        sweep.append(_row(judged, sampling))
        log(f"sweep {guidance}: { {a: v['percent'] for a, v in sweep[-1]['scores'].items()} }")
    best = max(sweep, key=lambda r: sum(r["scores"][a]["percent"] for a in ATTRIBUTES))
    guidance = best["guidance_scale"]
    results: dict = {"guidance_sweep": sweep, "guidance_scale": guidance}
    kept: dict[str, Judged] = {}
    runs = {
        "unseen_20_steps": ({"steps": 20}, prompts),
        "unseen_12_steps": ({"steps": 12}, prompts),
        "unseen_256": ({"steps": 20, "height": 256, "width": 256, "batch": 16}, prompts // 2),
        "unseen_wide": ({"steps": 20, "height": 144, "width": 256}, prompts // 2),
    }
    if base.height != Sampling.height:
        runs = {k: runs[k] for k in ("unseen_20_steps", "unseen_12_steps")}
    for name, (changes, count) in runs.items():
        if name not in ("unseen_20_steps",) and time.time() > deadline - 15:
            log(f"no time for {name}")
            continue
        sampling = Sampling(**{**vars(base), "guidance": guidance, **changes})
        judged = measure(pipe, sampling, count, seed=10_000)
        kept[name], results[name] = judged, _row(judged, sampling)
        log(f"{name}: { {a: v['percent'] for a, v in results[name]['scores'].items()} }")
    main = kept["unseen_20_steps"]
    wrong = main.scenes[1:] + main.scenes[:1]
    results["chance_wrong_prompts"] = summary(score(observe_all(main.clips), wrong))
    return results, kept
