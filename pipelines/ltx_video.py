"""LTX-Video: text by cross-attention; the grid comes with the forward's arguments."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, latent_frames, tokens

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout | str:
    grid = (bound.get("num_frames"), bound.get("height"), bound.get("width"))
    if None in grid:
        return "the call gives coordinates instead of a grid"
    shape = tuple(int(n) for n in grid if n is not None)
    extra = bound["hidden_states"].shape[1] - prod(shape)
    if extra < 0:
        return "fewer tokens than the grid has"
    # Tokens beyond the grid are conditions, which pipelines put first.
    return TokenLayout((shape[0], shape[1], shape[2]), before=extra)


def _grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    config = pipe.transformer.config
    return (
        latent_frames(frames, pipe.vae_temporal_compression_ratio) // config.patch_size_t,
        tokens(height, pipe.vae_spatial_compression_ratio, config.patch_size),
        tokens(width, pipe.vae_spatial_compression_ratio, config.patch_size),
    )


LTX_VIDEO = Adapter(
    family="ltx_video",
    transformers=("LTXVideoTransformer3DModel",),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    sites=(
        Sites("transformer_blocks", "attn1", "self"),
        Sites("transformer_blocks", "attn2", "cross"),
    ),
    place=_place,
    grid=_grid,
    text_valid="the prompt's own tokens (stock masks the padding)",
)
