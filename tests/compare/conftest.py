"""A comparison as it comes out of a run: real clips, a failure, gaps; nothing was measured."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from dit_accel.compare.results import (
    IDENTICAL,
    Clip,
    Environment,
    Metric,
    ProfileInfo,
    Results,
)
from dit_accel.compare.store import heat_map
from dit_accel.metrics import psnr
from dit_accel.video import write_video

sys.path.insert(0, str(Path(__file__).parents[2] / "samples" / "train_demo"))

from captions import caption  # noqa: E402
from render import render, to_uint8  # noqa: E402
from scenes import Scene, sample_simple  # noqa: E402

FRAMES, HEIGHT, WIDTH, STEPS, LAYERS, FPS = 17, 96, 96, 12, 8, 8.0
CODE = 12
"""Side in pixels of one bit of the frame number, in the picture's lower left corner."""

BALANCED = """[profile]
name = "balanced"
family = "wan"

[[rule]]
attention = "self"
steps = [0.2, 1.0]
compute = "sliding_tile"
window = {fraction = [1.0, 0.5, 0.5]}
"""
# Name, kind, time over dense, attention time over dense, strength of the artefacts, density.
PROFILES = (
    ("dense", "dense", 1.0, 1.0, 0.0, 1.0),
    ("quality", "profile", 0.78, 0.66, 0.02, 0.62),
    ("balanced", "profile", 0.62, 0.46, 0.07, 0.34),
    ("fast", "profile", 0.47, 0.26, 0.2, 0.17),
    ("diffusers-pab", "external", 0.66, 0.6, 0.16, None),
)


def _with_code(frames: np.ndarray) -> np.ndarray:
    """Each frame's number in black and white squares, the lowest bit first."""
    coded = frames.copy()
    for number, frame in enumerate(coded):
        for bit in range(5):
            value = 255 if number >> bit & 1 else 0
            frame[-CODE:, bit * CODE : (bit + 1) * CODE] = value
    return coded


def _worse(clip: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """Drift and blocks, as too few attended tokens make them."""
    noise = np.random.default_rng(seed).normal(0, 90 * strength, (len(clip), 12, 12, 1))
    blocks = noise.cumsum(0).repeat(8, 1).repeat(8, 2) / np.sqrt(len(clip))
    shifted = np.roll(clip, round(14 * strength), axis=2)
    mixed = clip * (1 - strength) + shifted * strength + blocks * 0.5
    return mixed.clip(0, 255).astype(np.uint8)


def _density_map(density: float) -> list[list[float | None]]:
    if density == 1:
        return [[1.0] * STEPS for _ in range(LAYERS)]
    rows: list[list[float | None]] = [
        [1.0 if step < 2 or layer == 0 else density + 0.02 * (layer % 3) for step in range(STEPS)]
        for layer in range(LAYERS)
    ]
    rows[4] = [0.0 if step % 2 and step > 3 else value for step, value in enumerate(rows[4])]
    rows[-1] = [None if step == 11 else value for step, value in enumerate(rows[-1])]
    return rows


def _error_map(strength: float, rng: random.Random) -> list[list[float | None]]:
    return [
        [
            None if step < 2 else strength * (0.3 + 0.06 * layer) * rng.uniform(0.7, 1.3)
            for step in range(STEPS)
        ]
        for layer in range(LAYERS)
    ]


def _clip(folder: Path, scene: Scene, prompt_id: int, index: int, dense: np.ndarray) -> Clip:
    name, kind, slow, attention, strength, density = PROFILES[index]
    rng = random.Random(f"{prompt_id} {name}")
    base = Clip(prompt=caption(scene), prompt_id=prompt_id, seed=0, profile=name)
    if (name, prompt_id) == ("fast", 2):
        message = "OutOfMemoryError: tried to allocate 2.00 GiB <b>on the device</b>"
        return replace(base, status="failed", error=message)
    same = name == "dense" or (name, prompt_id) == ("quality", 1)
    frames = dense if same else _worse(dense, strength * rng.uniform(0.6, 1.4), prompt_id)
    frames = _with_code(frames)
    stem = f"clips/{prompt_id:02}-{name}"
    write_video(frames, folder / f"{stem}.mp4", FPS)
    if name != "dense":
        difference = heat_map(frames, _with_code(dense))
        write_video(difference, folder / f"{stem}-difference.mp4", FPS)
    metrics: dict[str, float | None] = {
        "psnr": None if same else psnr(list(frames), list(_with_code(dense))),
        "ssim": 1.0 if same else 1 - strength * rng.uniform(0.6, 1.4),
        "flicker": 2.1 + strength * rng.uniform(1, 4),
        "adherence": 1.0 if rng.random() > strength else 0.75,
    }
    ours = kind != "external"
    cells = [cell for row in _density_map(density or 1.0) for cell in row if cell is not None]
    launched = fmean(cells) if density else None
    return replace(
        base,
        video=f"{stem}.mp4",
        difference=None if name == "dense" else f"{stem}-difference.mp4",
        denoise_s=[slow * 4.6 * rng.uniform(0.97, 1.03) for _ in range(3)],
        first_call_s=slow * 1.1,
        compile_s=0.21 if ours and name != "dense" else 0.0,
        encode_s=0.012,
        decode_s=0.64,
        attention_s=attention * 3.1 * rng.uniform(0.98, 1.02) if ours else None,
        launched_density=launched,
        kept_density=launched * 0.9 if launched and launched < 1 else launched,
        metrics=metrics,
        metrics_note={"psnr": IDENTICAL} if same else {},
        density_map=_density_map(density) if density else [],
        error_map=_error_map(strength, rng) if ours and strength else [],
        layer_names=[f"blocks.{layer}.attn1" for layer in range(LAYERS)] if ours else [],
        calls=_calls(name) if ours else {},
    )


def _calls(name: str) -> dict[str, int]:
    if name == "dense":
        return {"dense: profile": 192}
    return {"sparse": 132, "reused": 18, "dense: profile": 36, "dense: below break-even": 6}


def build_results(folder: Path) -> Results:
    """Three prompts by five profiles, with their videos under `folder`."""
    rng = random.Random(11)
    scenes = [sample_simple(rng) for _ in range(3)]
    videos = to_uint8(render(scenes, FRAMES, HEIGHT, WIDTH)).numpy()
    clips = [
        _clip(folder, scene, prompt_id, index, video)
        for prompt_id, (scene, video) in enumerate(zip(scenes, videos, strict=True))
        for index in range(len(PROFILES))
    ]
    texts = {"balanced": BALANCED, "diffusers-pab": "PyramidAttentionBroadcastConfig, range 2"}
    infos = [ProfileInfo(name, kind, texts.get(name, "")) for name, kind, *_ in PROFILES]
    missing = "not installed (pip install cache-dit)"
    return Results(
        model="demo",
        frames=FRAMES,
        height=HEIGHT,
        width=WIDTH,
        steps=STEPS,
        fps=FPS,
        environment=Environment(
            command="dit-accel compare --model demo --profiles dense,quality,balanced,fast "
            "--against diffusers-pab,cache-dit --prompts prompts.txt --out report",
            commit="0123abc",
            device="CPU",
            cpu="a processor of two cores",
            threads="2",
            torch="2.13.0",
            triton="3.9.0",
            diffusers="0.42.1",
            dit_accel="0.1.0",
            dense_kernel="scaled_dot_product_attention",
            date="2025-11-22 12:00 UTC",
        ),
        profiles=[*infos, ProfileInfo("cache-dit", "external", "", missing)],
        metrics={
            "psnr": Metric("dB", "higher"),
            "ssim": Metric("", "higher"),
            "lpips": Metric("", "lower", "the weights of AlexNet could not be downloaded"),
            "flicker": Metric("levels", "lower"),
            "adherence": Metric("", "higher"),
        },
        clips=clips,
        warmup_steps=2,
    )


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """A comparison and the folder with its videos."""
    folder = tmp_path_factory.mktemp("report")
    return build_results(folder), folder


@pytest.fixture(scope="session")
def page_path(compared: tuple[Results, Path]) -> Path:
    """The page of `compared`."""
    from dit_accel.compare.page import write_page

    results, folder = compared
    return write_page(results, folder)
