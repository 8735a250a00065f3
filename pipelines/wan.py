"""Wan 2.1 and 2.2: text by cross-attention, one or two transformers (experts)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, latent_frames, tokens

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout:
    *_, frames, height, width = bound["hidden_states"].shape
    config: Any = model.config
    patch = config.patch_size
    return TokenLayout((frames // patch[0], height // patch[1], width // patch[2]))


def _grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    patch = (pipe.transformer or pipe.transformer_2).config.patch_size
    return (
        latent_frames(frames, pipe.vae_scale_factor_temporal) // patch[0],
        tokens(height, pipe.vae_scale_factor_spatial, patch[1]),
        tokens(width, pipe.vae_scale_factor_spatial, patch[2]),
    )


WAN = Adapter(
    family="wan",
    transformers=("WanTransformer3DModel",),
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    sites=(Sites("blocks", "attn1", "self"), Sites("blocks", "attn2", "cross")),
    place=_place,
    grid=_grid,
)
