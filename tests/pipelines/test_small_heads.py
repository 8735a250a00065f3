"""Models with small and unusual head_dims, as diffusers' own tests build them, run sparse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.engine.profile import parse_profile

HEAD = "[profile]\nbreakeven = false\n[[rule]]\ncompute = "


def ltx(dim: int) -> tuple[Any, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=dim,
        cross_attention_dim=2 * dim,
        num_layers=1,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4 * 5 * 6, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.rand(2),
        "encoder_attention_mask": torch.ones(2, 7).bool(),
        "num_frames": 4,
        "height": 5,
        "width": 6,
    }
    return model, inputs


def cogvideox(dim: int) -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=dim,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 8, 8),
        "timestep": torch.tensor([1, 1]),
    }
    return model, inputs


@pytest.mark.parametrize("compute", ["'full'", "'block_topk'\ndensity = 1.0"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("make", "dim"), [(ltx, 8), (ltx, 18), (cogvideox, 8), (cogvideox, 16)])
def test_all_kept_is_dense(make: Any, dim: int, backend: str, compute: str) -> None:
    torch.manual_seed(0)
    model, inputs = make(dim)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        session = dit_accel.enable(
            model, profile=parse_profile(HEAD + compute), steps=1, strict=True, backend=backend
        )
        out = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert session.report().kinds["self"]["sparse"] == 1
