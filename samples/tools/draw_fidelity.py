"""The picture of `docs/linear_tail.md`: PSNR against cost, from samples/results/fidelity_demo.csv.

python samples/tools/draw_fidelity.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "samples" / "results" / "fidelity_demo.csv"
OUT = ROOT / "docs" / "linear_tail.png"
SIZE, LEFT, TOP, RIGHT, BOTTOM = (1300, 860), 100, 130, 390, 110
COSTS, DECIBELS = (0.05, 0.35), (16.0, 44.0)
LINES = (
    (("small", "probe_error", "16"), "linear, pool 16; blocks of 48", "#0b6e4f"),
    (("small", "probe_error", "block"), "linear; blocks of 48", "#1fa97a"),
    (("small", "block_topk", ""), "drop (block top-k); blocks of 48", "#b23a48"),
    (("hopper", "probe_error", "block"), "linear; blocks of 128", "#2b6cb0"),
    (("hopper", "block_topk", ""), "drop (block top-k); blocks of 128", "#8a8f98"),
)


def points(blocks: str, compute: str, pool: str) -> list[tuple[float, float]]:
    with ROWS.open(encoding="utf-8") as file:
        found = [
            (float(row["cost"]), float(row["psnr_mean"]))
            for row in csv.DictReader(file)
            if (row["blocks"], row["compute"]) == (blocks, compute)
            and (row["tail"] == "drop" if not pool else f"pool = {pool!r}" in quoted(row))
        ]
    return sorted(found)


def quoted(row: dict[str, str]) -> str:
    """The tail's parameters, numbers written like names."""
    return row["parameters"].replace("pool = 16", "pool = '16'")


def place(cost: float, value: float) -> tuple[float, float]:
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
    x = (cost - COSTS[0]) / (COSTS[1] - COSTS[0])
    y = (value - DECIBELS[0]) / (DECIBELS[1] - DECIBELS[0])
    return LEFT + x * width, SIZE[1] - BOTTOM - y * height


def main() -> None:
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    small, large = (ImageFont.load_default(size) for size in (24, 30))
    draw.text((40, 26), "Demo model, every layer and step sparse, 24 prompts", "black", large)
    for value in range(16, 45, 4):
        start, stop = place(COSTS[0], value), place(COSTS[1], value)
        draw.line((start, stop), "#e3e5e8", 2)
        draw.text((LEFT - 14, start[1]), str(value), "#444", small, anchor="rm")
    for cost in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35):
        x, y = place(cost, DECIBELS[0])
        draw.line(((x, y), (x, y + 8)), "#444", 2)
        draw.text((x, y + 14), f"{cost:g}", "#444", small, anchor="mt")
    middle = place(sum(COSTS) / 2, DECIBELS[0])
    draw.text((middle[0], SIZE[1] - 34), "cost: launched density", "#444", small, anchor="mm")
    draw.text((40, TOP - 36), "PSNR to dense, dB", "#444", small, anchor="lm")
    for (blocks, compute, pool), name, colour in LINES:
        line = [place(*each) for each in points(blocks, compute, pool)]
        draw.line(line, colour, 5)
        for x, y in line:
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), colour)
        draw.text((line[-1][0] + 20, line[-1][1] - 6), name, colour, small, anchor="lm")
    OUT.parent.mkdir(exist_ok=True)
    image.save(OUT, optimize=True)


if __name__ == "__main__":
    main()
