"""LTX-Video: text by cross-attention; the grid comes with the forward's arguments."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, video_grid
from dit_accel.pipelines.preset import Preset, Size

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


LTX_VIDEO = Adapter(
    branches=("cond_uncond",),
    family="ltx_video",
    transformers=("LTXVideoTransformer3DModel",),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    sites=(
        Sites("transformer_blocks", "attn1", "self"),
        Sites("transformer_blocks", "attn2", "cross"),
    ),
    place=_place,
    grid=video_grid,
    text_valid="the prompt's own tokens (stock masks the padding)",
    fps=24.0,
    presets=(
        Preset(
            "ltx", "LTX-Video 2B", "ltx_video", 32, 64, {"num_layers": 28}, 8192, True,
            Size(512, 704, 161), scales=(8, 32), latent=32, prompt=128, config={},
            source="Lightricks/LTX-Video", aliases=("ltx-video",),
        ),
    ),
)  # fmt: skip
