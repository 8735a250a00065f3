"""Compare profiles from Python: the demo model, three prompts, one page to look at.

Run it from the repository's root. `dit-accel compare` does the same for any model.

    python samples/compare.py --out out/compare
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import WanPipeline

from dit_accel.compare.api import compare
from dit_accel.compare.prompts import read_prompts
from dit_accel.compare.results import summarise

ROOT = Path(__file__).parent

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--out", type=Path, default=Path("out") / "compare")
options = parser.parse_args()

pipe = WanPipeline.from_pretrained(ROOT / "demo-model")
pipe.set_progress_bar_config(disable=True)

results = compare(
    pipe,
    prompts=read_prompts(str(ROOT / "prompts" / "demo.txt"))[:3],
    out=options.out,
    profiles=["dense", "balanced", "sliding_tile:window=1.0,0.4,0.4,steps=0.1,1.0"],
    against=["diffusers-first-block:threshold=0.2"],
    breakeven=False,  # clips this small would run dense otherwise
    model="demo",
    height=96,
    width=96,
    num_frames=33,
    num_inference_steps=12,
    guidance_scale=2.5,
)

for row in summarise(results):
    if row.speedup and row.metrics["psnr"]:
        faster, psnr = row.speedup.median, row.metrics["psnr"].median
        print(f"{row.profile:50} {faster:5.2f}x  PSNR {psnr:5.1f} dB")
print(f"Look at {options.out / 'index.html'}")
