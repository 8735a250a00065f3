"""How far one video is from another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.video import to_uint8

if TYPE_CHECKING:
    from dit_accel.video import Frames


def psnr(frames_a: Frames, frames_b: Frames) -> float:
    """Peak signal-to-noise ratio in dB of two videos of one size and length.

    10 log10(255^2 / MSE), with the mean squared error taken over every frame, pixel and RGB
    channel together after rounding to 8 bits; `inf` when the videos are identical.
    Frames are anything that `dit_accel.video.to_uint8` takes; raises DitAccelError when the shapes
    differ.
    """
    a, b = np.stack(to_uint8(frames_a)), np.stack(to_uint8(frames_b))
    if a.shape != b.shape:
        raise DitAccelError(
            f"PSNR needs videos of one shape [T, H, W, C], not {list(a.shape)} and {list(b.shape)}"
        )
    error = float(np.mean((a.astype(np.int32) - b.astype(np.int32)) ** 2))
    return 10.0 * math.log10(255.0**2 / error) if error else math.inf
