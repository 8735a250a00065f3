"""Plain image analysis of a single-object clip: what moves where, over what.

No learning: the background's colour is the clip's median; whatever is no lighter or darker
version of it is foreground; the foreground's colour is compared with the palette, its aligned
silhouette with the four shapes, and a line through its centres gives the direction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from render import shape_distance
from scenes import BACKGROUND_COLOURS, OBJECT_COLOURS, SHAPES, Scene

ATTRIBUTES = ("colour", "background", "shape", "direction")
FOREGROUND = 42.0  # distance in RGB from the line of lightness of the background
WIDE = (0.6, 1.6)  # lightness of a texture relative to one of its own pixels ...
NARROW = (0.74, 1.32)  # ... and relative to its mean
CROP = 48


@dataclass(frozen=True)
class Observation:
    """What was seen; None where nothing could be said. `travel` is in shorter sides per clip."""

    colour: str | None
    background: str | None
    shape: str | None
    direction: str | None
    travel: float = 0.0
    radius: float = 0.0

    def agrees(self, scene: Scene) -> dict[str, bool]:
        """Attribute by attribute, whether the observation is what `scene` asks for."""
        item = scene.item
        wanted = (item.colour, scene.background, item.shape, item.direction)
        return {a: getattr(self, a) == w for a, w in zip(ATTRIBUTES, wanted, strict=True)}


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    names = list(palette)
    table = np.array([palette[n] for n in names], float)
    return names[int(((table - colour) ** 2).sum(1).argmin())]


def _off_line(
    pixels: np.ndarray, colour: np.ndarray, lightness: tuple[float, float] = NARROW
) -> np.ndarray:
    """Distance of pixels [..., 3] from the segment {k * colour, k in lightness}."""
    base = np.maximum(colour, 8.0)
    k = np.clip((pixels @ base) / (base @ base), *lightness)[..., None]
    return np.sqrt(((pixels - k * base) ** 2).sum(-1))


def _largest(mask: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Keep what lies near the mask's median point; repeated, this drops stray pixels."""
    for _ in range(rounds):
        ys, xs = np.nonzero(mask)
        if len(ys) < 12:
            return np.zeros_like(mask)
        my, mx = np.median(ys), np.median(xs)
        reach = 2.3 * math.sqrt(len(ys) / math.pi)
        yy, xx = np.ogrid[: mask.shape[0], : mask.shape[1]]
        mask = mask & ((yy - my) ** 2 + (xx - mx) ** 2 <= reach**2)
    return mask


def _templates() -> np.ndarray:
    """Silhouettes [4, CROP, CROP] of equal area about their centroids, radius CROP / 4."""
    axis = torch.arange(CROP, dtype=torch.float32) - (CROP - 1) / 2
    out = []
    for i in range(len(SHAPES)):
        d = shape_distance(axis[None, :], axis[:, None], torch.tensor(CROP / 4), torch.tensor(i))
        out.append((0.5 - d).clamp(0, 1).expand(CROP, CROP).numpy())
    return np.stack(out)


TEMPLATES = _templates()


def _silhouette(masks: list[np.ndarray]) -> np.ndarray:
    """Average the masks, each moved to its centroid and scaled to the templates' area."""
    total = np.zeros((CROP, CROP))
    axis = np.arange(CROP) - (CROP - 1) / 2
    for mask in masks:
        ys, xs = np.nonzero(mask)
        scale = math.sqrt(len(ys) / math.pi) / (CROP / 4)
        rows = np.rint(ys.mean() + axis * scale).astype(int)
        columns = np.rint(xs.mean() + axis * scale).astype(int)
        inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None]
        inside = inside & ((columns >= 0) & (columns < mask.shape[1]))[None, :]
        rows, columns = rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)
        total += mask[np.ix_(rows, columns)] & inside
    return total / len(masks)


def _shape(masks: list[np.ndarray]) -> str:
    seen = _silhouette(masks)
    overlap = np.minimum(seen, TEMPLATES).sum((1, 2)) / np.maximum(seen, TEMPLATES).sum((1, 2))
    return SHAPES[int(overlap.argmax())]


def _direction(centres: np.ndarray, short: int) -> tuple[str | None, float]:
    """Direction and length of the travel; centres are rows of (frame, x, y) in pixels."""
    t = centres[:, 0] - centres[:, 0].mean()
    vx, vy = (t @ centres[:, 1:]) / (t @ t)
    span = float(centres[-1, 0] - centres[0, 0])
    travel = math.hypot(vx, vy) * span / short
    if travel < 0.06:
        return None, travel
    if abs(vx) >= abs(vy):
        return ("right" if vx > 0 else "left"), travel
    return ("down" if vy > 0 else "up"), travel


def observe(frames: np.ndarray) -> Observation:
    """Analyse one clip, frames [T, H, W, 3] uint8 (static camera, one object)."""
    clip = frames[:: 1 + len(frames) // 25].astype(np.float32)  # 17 of 33 frames are enough
    short = min(clip.shape[1:3])
    ground = np.median(clip[::2, ::2, ::2].reshape(-1, 3), axis=0)
    ground = clip[_off_line(clip, ground, WIDE) <= FOREGROUND].mean(0)
    background = _nearest(ground, BACKGROUND_COLOURS)
    away = _off_line(clip, ground)
    loose = away > FOREGROUND
    if loose.sum() < 12 * len(clip):
        return Observation(None, background, None, None)
    tone = np.median(clip[loose], axis=0)
    colour = _nearest(tone, OBJECT_COLOURS)
    close = _off_line(clip, tone) < away
    masks, centres = [], []
    for i, mask in enumerate(loose & close):
        kept = _largest(mask)
        if kept.sum() >= 12:
            ys, xs = np.nonzero(kept)
            masks.append(kept)
            centres.append((i, xs.mean(), ys.mean()))
    if len(masks) < max(3, len(clip) // 2):
        return Observation(colour, background, None, None)
    direction, travel = _direction(np.array(centres), short)
    area = float(np.median([m.sum() for m in masks]))
    return Observation(
        colour, background, _shape(masks), direction, travel, math.sqrt(area / math.pi) / short
    )


def observe_all(clips: Sequence[np.ndarray], threads: int = 12) -> list[Observation]:
    """`observe` over many clips, in threads (numpy lets go of the lock)."""
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        return list(pool.map(observe, clips))


def score(seen: Sequence[Observation], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """Compare every observation with its scene; per attribute a list of booleans."""
    rows = [o.agrees(s) for o, s in zip(seen, scenes, strict=True)]
    return {a: [row[a] for row in rows] for a in ATTRIBUTES}


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    p, zz = hits / total, z * z / total
    middle = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / total + zz / (4 * total)) / (1 + zz)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def summary(scores: dict[str, list[bool]]) -> dict[str, dict[str, float | int | list[float]]]:
    """Rates with intervals, in percent to one digit; `all` is every attribute at once."""
    columns = dict(scores)
    columns["all"] = [all(row) for row in zip(*scores.values(), strict=True)]
    out: dict[str, dict[str, float | int | list[float]]] = {}
    for name, values in columns.items():
        low, high = wilson(sum(values), len(values))
        out[name] = {
            "percent": round(100 * sum(values) / max(len(values), 1), 1),
            "interval": [round(100 * low, 1), round(100 * high, 1)],
            "hits": sum(values),
            "clips": len(values),
        }
    return out
