"""CogVideoX: joint attention, text then video, through F.scaled_dot_product_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, video_grid
from dit_accel.pipelines.preset import Preset, Size

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


COGVIDEOX = Adapter(
    branches=("cond_uncond",),
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
    grid=video_grid,
    text="joint, before video",
    text_tokens=(226, 0),
    fps=8.0,
    presets=(
        Preset(
            "cogvideox-2b", "CogVideoX-2B", "cogvideox", 30, 64, {"num_layers": 30}, 7680, False,
            Size(480, 720, 49), text=(226, 0), prompt=226,
        ),
        Preset(
            "cogvideox-5b", "CogVideoX-5B", "cogvideox", 48, 64, {"num_layers": 42}, 12288, False,
            Size(480, 720, 49), text=(226, 0), prompt=226, source="THUDM/CogVideoX-5b",
            config={"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
            aliases=("cogvideox",),
        ),
    ),
)  # fmt: skip
