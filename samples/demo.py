"""The demo: one prompt and one seed, generated dense and sparse, beside each other.

Loads the small text-to-video model of samples/demo-model with plain diffusers, runs it twice and
writes dense.mp4, sparse.mp4, side_by_side.mp4 and report.json. On a CPU it takes minutes.

    python samples/demo.py --prompt "a small red star moves left over a striped blue background"
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont

import dit_accel
from dit_accel.cli.progress import denoising_bar
from dit_accel.cli.runtime import quiet
from dit_accel.metrics import psnr
from dit_accel.models.find import demo_folder
from dit_accel.video import check_output, to_uint8, write_video

PROMPT = "a large red circle moves right slowly over a striped blue background"
FPS = 16
STRIP, GAP = 28, 8
"""Pixels above the clips of side_by_side.mp4, for their labels, and between them."""


@dataclass(frozen=True)
class Run:
    """One generated clip and the receipt of its attention."""

    frames: list[Any]
    report: dit_accel.Report

    @property
    def denoising(self) -> float:
        """Seconds in the denoising loop: without text encoder and autoencoder."""
        return float(self.report.time["denoising_s"] or 0.0)

    @property
    def attention(self) -> float:
        """Seconds of it in attention calls."""
        return float(self.report.time["attention_s"] or 0.0)


def generate(pipe: Any, profile: str, options: argparse.Namespace) -> Run:
    """Generate the clip with a profile ("dense" is the stock model, timed in the same way)."""
    pipe.enable_sparse_attention(profile)
    pipe.sparse_attention_warmup(options.height, options.width, options.frames)
    title = "dense " if profile == "dense" else "sparse"
    with denoising_bar(options.steps, title) as on_step:
        result = pipe(
            **call(options),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(options.seed),
            callback_on_step_end=on_step,
        )
    return Run(result.frames[0], pipe.sparse_attention_report())


def call(options: argparse.Namespace) -> dict[str, Any]:
    size = {"height": options.height, "width": options.width, "num_frames": options.frames}
    return {"prompt": options.prompt, **size}


def main() -> int:
    options = arguments()
    begin = time.perf_counter()
    check_output(options.out / "side_by_side.mp4")
    size = f"{options.frames} frames of {options.width}x{options.height}"
    print(f'"{options.prompt}", {size}, {options.steps} steps, on {options.device}')

    quiet()
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = WanPipeline.from_pretrained(options.model or demo_folder(), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(options.device)
    # The first pass takes memory and starts threads; it belongs to neither of the two.
    pipe(**call(options), num_inference_steps=1, guidance_scale=1.0, output_type="latent")

    dense = generate(pipe, "dense", options)
    sparse = generate(pipe, options.profile, options)

    print(comparison(dense, sparse))
    print(sparse.report)
    write(dense, sparse, options)
    seconds = time.perf_counter() - begin
    print(f"\nWrote {options.out}/ in {seconds:.0f} s: look at side_by_side.mp4 there.")

    if not sparse.report.to_dict()["self"]["sparse"]:
        print("Nothing ran sparse: the report above gives the reasons.", file=sys.stderr)
        return 1
    return 0


def comparison(dense: Run, sparse: Run) -> str:
    """A table of both runs' times and how far apart the videos are."""
    rows = [("denoising", dense.denoising, sparse.denoising)]
    rows += [("attention", dense.attention, sparse.attention)]
    lines = [f"\n{'':<12}{'dense':>10}{'sparse':>10}{'faster':>10}"]
    lines += [f"{name:<12}{a:>8.1f} s{b:>8.1f} s{a / b:>9.2f}x" for name, a, b in rows]
    lines += [f"PSNR of sparse to dense: {psnr(dense.frames, sparse.frames):.1f} dB\n"]
    return "\n".join(lines)


def write(dense: Run, sparse: Run, options: argparse.Namespace) -> None:
    write_video(dense.frames, options.out / "dense.mp4", FPS)
    write_video(sparse.frames, options.out / "sparse.mp4", FPS)
    labels = (
        f"dense {dense.denoising:.1f} s",
        f"sparse {sparse.denoising:.1f} s ({dense.denoising / sparse.denoising:.2f}x)",
    )
    both = side_by_side(dense.frames, sparse.frames, labels)
    write_video(both, options.out / "side_by_side.mp4", FPS)
    similarity = psnr(dense.frames, sparse.frames)
    data = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "psnr_db": None if math.isinf(similarity) else similarity,
        "speedup": {
            "denoising": dense.denoising / sparse.denoising,
            "attention": dense.attention / sparse.attention,
        },
        "dense": dense.report.to_dict(),
        "sparse": sparse.report.to_dict(),
    }
    (options.out / "report.json").write_text(json.dumps(data, indent=2) + "\n")


def side_by_side(dense: list[Any], sparse: list[Any], labels: tuple[str, str]) -> list[np.ndarray]:
    """Both videos at twice their size, each under its label."""
    found = []
    for pair in zip(to_uint8(dense), to_uint8(sparse), strict=True):
        height, width = (2 * size for size in pair[0].shape[:2])
        page = Image.new("RGB", (2 * width + GAP, STRIP + height), "black")
        pen = ImageDraw.Draw(page)
        for left, picture, label in zip((0, width + GAP), pair, labels, strict=True):
            large = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (left, STRIP))
            middle = left + width / 2, STRIP / 2
            pen.text(middle, label, "white", ImageFont.load_default(15), anchor="mm")
        found.append(np.asarray(page))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--guidance-scale", type=float, default=2.5)
    parser.add_argument("--profile", default="balanced", help="a name or a TOML file")
    parser.add_argument("--model", type=Path, help="default: samples/demo-model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out") / "demo")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except dit_accel.DitAccelError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
