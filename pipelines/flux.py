"""Flux.1: joint attention, text then image, the grid from position ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites
from dit_accel.pipelines.preset import Preset, Size

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout | str:
    ids = bound["img_ids"]
    text = bound["encoder_hidden_states"].shape[1]
    held = cache.get("img_ids")
    # Pipelines pass the same ids at every step: reading them from the device once is enough.
    if held is None or held[0] is not ids or held[1] != text:
        held = cache["img_ids"] = (ids, text, _read(ids, text))
    return held[2]


def _read(ids: Any, text: int) -> TokenLayout | str:
    rows = (ids[0] if ids.ndim == 3 else ids).cpu()
    image = int((rows[:, 0] == 0).sum())
    # The ids of a large grid are rounded in half precision: they tell the width by where the second
    # row begins, and are compared with a raster that is rounded as they are.
    below = (rows[:image, 1] != 0).nonzero()
    width = int(below[0]) if len(below) else image
    height = image // max(width, 1)
    raster = height * width == image and all(
        bool((rows[:image].view(height, width, -1)[..., axis] == rows.new_tensor(numbers)).all())
        for axis, numbers in ((1, [[n] for n in range(height)]), (2, list(range(width))))
    )
    if not raster:
        return "the position ids are not one image grid in raster order"
    return TokenLayout((1, height, width), before=text, after=rows.shape[0] - image)


def _grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    scale = pipe.vae_scale_factor * 2
    return 1, height // scale, width // scale


FLUX = Adapter(
    family="flux",
    transformers=("FluxTransformer2DModel",),
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxKontextPipeline",
    ),
    sites=(
        Sites("transformer_blocks", "attn", "self"),
        Sites("single_transformer_blocks", "attn", "self"),
    ),
    place=_place,
    grid=_grid,
    text="joint, before image",
    text_tokens=(512, 0),
    presets=(
        Preset(
            "flux", "Flux.1", "flux", 24, 128, {"num_layers": 19, "num_single_layers": 38}, 12288,
            False, Size(1024, 1024), text=(512, 0), scales=(1, 16), forwards=1,
            config={"guidance_embeds": True}, source="black-forest-labs/FLUX.1-dev",
            aliases=("flux-dev",),
        ),
    ),
)  # fmt: skip
