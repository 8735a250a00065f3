"""HunyuanVideo: joint attention, video then text, with a mask that cuts padded text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, latent_frames, tokens

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout:
    *_, frames, height, width = bound["hidden_states"].shape
    config: Any = model.config
    mask = bound["encoder_attention_mask"]
    text = mask.shape[1]
    held, version = cache.get("mask"), 0 if mask.is_inference() else mask._version
    # Pipelines pass the same mask at every step: reading it from the device once is enough.
    if held is None or held[0] is not mask or held[1] != version:
        lengths = [int(n) for n in mask.sum(dim=1).tolist()]
        held = cache["mask"] = (mask, version, lengths)
    lengths = held[2]
    padded = any(n < text for n in lengths)
    return TokenLayout(
        (
            frames // config.patch_size_t,
            height // config.patch_size,
            width // config.patch_size,
        ),
        after=text,
        valid=tuple((0, n) for n in lengths) if padded else None,
    )


def _grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    config = pipe.transformer.config
    return (
        latent_frames(frames, pipe.vae_scale_factor_temporal) // config.patch_size_t,
        tokens(height, pipe.vae_scale_factor_spatial, config.patch_size),
        tokens(width, pipe.vae_scale_factor_spatial, config.patch_size),
    )


HUNYUAN_VIDEO = Adapter(
    family="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    sites=(
        Sites("transformer_blocks", "attn", "self"),
        Sites("single_transformer_blocks", "attn", "self"),
    ),
    place=_place,
    grid=_grid,
    masks="key_padding",
    text="joint, after video",
    text_tokens=(0, 256),
    text_valid="the prompt's own tokens (stock masks the padding)",
)
