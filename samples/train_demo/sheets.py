"""Contact sheets: clips as rows of frames, to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def contact_sheet(clips: np.ndarray, columns: int = 6, gap: int = 4) -> Image.Image:
    """Clips [N, T, H, W, 3] uint8 to one picture: a row per clip, frames evenly spaced."""
    n, t, h, w, _ = clips.shape
    picks = np.linspace(0, t - 1, columns).round().astype(int)
    sheet = np.full((n * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for row in range(n):
        for column, frame in enumerate(picks):
            y, x = row * (h + gap), column * (w + gap)
            sheet[y : y + h, x : x + w] = clips[row, frame]
    return Image.fromarray(sheet)


def save_gif(frames: np.ndarray, path: Path, fps: int = 16) -> None:
    """Write frames [T, H, W, 3] uint8 as a looping GIF."""
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
