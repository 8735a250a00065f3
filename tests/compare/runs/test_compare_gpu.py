"""A comparison on a GPU: what is measured there only."""

from __future__ import annotations

import pytest
import torch

from dit_accel.compare.api import compare
from dit_accel.compare.results import DENSE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_memory_compilation_and_events(pipe, call, sparse, tmp_path):
    results = compare(
        pipe.to("cuda"), ["a red circle moves left"], tmp_path, ["dense", "dense", sparse],
        metrics=["psnr", "ssim"], breakeven=False, repeats=2, **call,
    )  # fmt: skip
    clips = {clip.profile: clip for clip in results.clips}
    weights = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    for clip in clips.values():
        assert clip.peak_memory_bytes > weights
        assert all(0 < clip.attention_s < seconds for seconds in clip.denoise_s)
        assert clip.decode_s > 0 and clip.encode_s > 0 and clip.first_call_s > 0
    assert clips[sparse].compile_s > 0 == clips[DENSE].compile_s
    assert clips["dense again"].metrics_note == {"psnr": "identical"}
    # Tiles of 16 tokens are launched as blocks of 128: more than all pairs, and said so.
    assert clips[sparse].launched_density > clips[sparse].kept_density
    assert "GiB" in results.environment.device
