"""HunyuanVideo: joint attention, video then text, with a mask that cuts padded text."""

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
    mask = bound["encoder_attention_mask"]
    text = mask.shape[1]
    # Pipelines pass the same mask at every step: reading it from the device once is enough, but in
    # inference mode, where torch does not count what is written to it.
    held, version = cache.get("mask"), None if mask.is_inference() else mask._version
    if held is None or version is None or held[0] is not mask or held[1] != version:
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


HUNYUAN_VIDEO = Adapter(
    family="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    sites=(
        Sites("transformer_blocks", "attn", "self"),
        Sites("single_transformer_blocks", "attn", "self"),
    ),
    place=_place,
    grid=video_grid,
    masks="key_padding",
    text="joint, after video",
    text_tokens=(0, 256),
    text_valid="the prompt's own tokens (stock masks the padding)",
    fps=24.0,
    presets=(
        Preset(
            "hunyuan", "HunyuanVideo", "hunyuan_video", 24, 128,
            {"num_layers": 20, "num_single_layers": 40}, 12288, False, Size(720, 1280, 129),
            text=(0, 256), prompt=256, forwards=1, config={},
            source="hunyuanvideo-community/HunyuanVideo",
            aliases=("hunyuan-video", "hunyuan_video"),
        ),
    ),
)  # fmt: skip
