"""CogVideoX: joint attention, text then video, through F.scaled_dot_product_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, latent_frames, tokens

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout:
    _, frames, _, height, width = bound["hidden_states"].shape
    config: Any = model.config
    per_token = config.patch_size_t or 1
    return TokenLayout(
        (
            (frames + per_token - 1) // per_token,
            height // config.patch_size,
            width // config.patch_size,
        ),
        before=bound["encoder_hidden_states"].shape[1],
    )


def _grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    config = pipe.transformer.config
    per_token = config.patch_size_t or 1
    latents = latent_frames(frames, pipe.vae_scale_factor_temporal)
    return (
        (latents + per_token - 1) // per_token,
        tokens(height, pipe.vae_scale_factor_spatial, config.patch_size),
        tokens(width, pipe.vae_scale_factor_spatial, config.patch_size),
    )


COGVIDEOX = Adapter(
    family="cogvideox",
    transformers=("CogVideoXTransformer3DModel",),
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    sites=(Sites("transformer_blocks", "attn1", "self"),),
    place=_place,
    grid=_grid,
    text="joint, before video",
    text_tokens=(226, 0),
)
