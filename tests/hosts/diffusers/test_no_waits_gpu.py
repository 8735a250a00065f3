"""A denoising step never makes the host wait for the device, whatever its profile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEAD = "[profile]\nbreakeven = false\n[[rule]]\n"
PROFILES = {
    "static": HEAD + "compute = 'sliding_tile'\nwindow = {tiles = [1, 3, 3]}\n",
    "exact": HEAD + "compute = 'disc'\nexact = true\n",
    "block_topk": HEAD + "compute = 'block_topk'\ndensity = 0.4\n",
    "block_topp": HEAD + "compute = 'block_topp'\np = 0.8\n",
    "linear_tail": HEAD + "compute = 'probe_error'\ndensity = 0.4\ntail = 'linear'\n",
    "window_and_tail": HEAD
    + "compute = 'sliding_tile'\nwindow = {tiles = [1, 3, 3]}\n"
    + "tail = {kind = 'linear', slope = 8, weights = 'count'}\n",
    "reuse": HEAD + "reuse = {every = 2}\n[[rule]]\nattention = 'cross'\nreuse = {every = 2}\n",
    "dense": HEAD + "compute = 'dense'\n",
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx_video", "flux"])
def test_steps_wait_for_nothing(build: Any, family: str, profile: str) -> None:
    """From the second step of a second run on: before that plans are made and kernels compiled."""
    tiny = build(family).to("cuda", torch.bfloat16)
    tiny.pipe.enable_sparse_attention(parse_profile(PROFILES[profile]), strict=True)
    tiny.run()
    forwards = 0

    def before(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards > tiny.branches:
            torch.cuda.set_sync_debug_mode("error")

    model = tiny.pipe.transformer
    # Ours begins a forward in a hook of its own, which must not wait either: this one comes first.
    handle = model.register_forward_pre_hook(before, prepend=True)
    end = model.register_forward_hook(
        lambda *_: torch.cuda.set_sync_debug_mode("default"), always_call=True
    )
    try:
        tiny.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()
        end.remove()
    assert forwards == tiny.branches * tiny.steps
    own = tiny.pipe.sparse_attention_report().kinds["self"]
    expected = {"dense": "dense", "reuse": "reused"}.get(profile, "sparse")
    assert own[expected] > 0
