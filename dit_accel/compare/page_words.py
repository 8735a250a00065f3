"""Words and numbers that several parts of the page share: names of metrics, pairs of clips."""

from __future__ import annotations

import math

from dit_accel.compare.numbers import decimals, number
from dit_accel.compare.results import Clip, Metric, Results, Spread, ratios

TITLES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "flicker": "Flicker",
    "adherence": "Adherence",
    "vbench": "VBench",
}
EXPLAINED = {
    "psnr": "peak signal-to-noise ratio to the dense clip; ∞ means the same pixels",
    "ssim": "structural similarity to the dense clip; 1 means the same",
    "lpips": "perceptual distance to the dense clip; 0 means the same",
    "flicker": "how far a frame is from the mean of its two neighbours, of 255 levels",
    "adherence": "share of the prompt’s attributes that the clip shows",
    "vbench": "mean of some of VBench’s dimensions",
}
AGAINST_DENSE = ("psnr", "ssim", "lpips")
"""Metrics whose value for the dense clip itself says nothing."""
Dense = dict[tuple[int, int], Clip]
"""The finished dense clips by prompt and seed."""


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " ").capitalize())


def with_unit(value: float | None, digits: int, unit: str) -> str:
    """The number and its unit; infinity and a gap have none."""
    text = number(value, digits)
    if value is None or not unit or math.isinf(value):
        return text
    return f"{text}{unit}" if unit in ("×", "%") else f"{text} {unit}"


def measured(results: Results) -> list[tuple[str, Metric]]:
    """The metrics that were not skipped."""
    return [(name, metric) for name, metric in results.metrics.items() if metric.skipped is None]


def metric_digits(results: Results, name: str) -> int:
    """The digits after the point that every value of a metric is shown with."""
    return decimals(clip.metrics.get(name) for clip in results.clips)


def anchor(prompt_id: int, seed: int) -> str:
    """The id of a group of clips on the page."""
    return f"clip-{prompt_id}-{seed}"


def speedup(dense: Dense, clip: Clip) -> Spread | None:
    """Dense denoising time over this clip's, over the repeats that ran side by side."""
    pair = dense.get((clip.prompt_id, clip.seed))
    return None if pair is None else Spread.of(ratios(pair, clip))
