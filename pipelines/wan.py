"""Wan 2.1 and 2.2: text by cross-attention, one or two transformers (experts)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, video_grid
from dit_accel.pipelines.preset import Preset, Size

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout:
    *_, frames, height, width = bound["hidden_states"].shape
    config: Any = model.config
    patch = config.patch_size
    return TokenLayout((frames // patch[0], height // patch[1], width // patch[2]))


_NORMS = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
WAN = Adapter(
    family="wan",
    transformers=("WanTransformer3DModel",),
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    sites=(Sites("blocks", "attn1", "self"), Sites("blocks", "attn2", "cross")),
    place=_place,
    grid=video_grid,
    presets=(
        Preset(
            "wan-1.3b", "Wan 1.3B", "wan", 12, 128, {"num_layers": 30}, 8960, True,
            Size(480, 832, 81), source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            config={**_NORMS, "num_attention_heads": 12, "ffn_dim": 8960},
        ),
        # 2.1, and 2.2 as A14B with two such transformers.
        Preset(
            "wan-14b", "Wan 14B", "wan", 40, 128, {"num_layers": 40}, 13824, True,
            Size(720, 1280, 81), source="Wan-AI/Wan2.1-T2V-14B-Diffusers", config=_NORMS,
            aliases=("wan",),
        ),
        Preset(
            "wan-5b", "Wan 5B", "wan", 24, 128, {"num_layers": 30}, 14336, True,
            Size(704, 1280, 121), scales=(4, 32), latent=16,
            source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            config={**_NORMS, "num_attention_heads": 24, "ffn_dim": 14336,
                    "in_channels": 48, "out_channels": 48},
        ),
    ),
)  # fmt: skip
