from __future__ import annotations

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.metrics import psnr


def test_psnr_of_a_known_error():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == pytest.approx(0.0)
    assert psnr(black, black + 1) == pytest.approx(48.1308, abs=1e-4)


def test_psnr_pools_the_error_over_frames():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    one_bad = black.copy()
    one_bad[0] = 255
    assert psnr(black, one_bad) == pytest.approx(10 * np.log10(2))


def test_psnr_needs_equal_shapes():
    with pytest.raises(DitAccelError, match="one shape"):
        psnr(np.zeros((2, 4, 4, 3)), np.zeros((3, 4, 4, 3)))
