"""Real transformer configurations with random weights, and the inputs of one denoising forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError, unknown
from dit_accel.pipelines.adapter import Adapter
from dit_accel.pipelines.preset import Preset, Size
from dit_accel.pipelines.registry import PRESETS, adapter_of


def pick_model(name: str) -> Preset:
    """The model of that name; DitAccelError for an unknown one."""
    if name not in STEP_MODELS:
        raise unknown("model", name, STEP_MODELS)
    return STEP_MODELS[name]


def family_of(model: Preset) -> Adapter:
    """The adapter of its family."""
    adapter = adapter_of(model.family)
    assert adapter is not None, "models that are built belong to a supported family"
    return adapter


def fit(model: Preset, height: int | None, width: int | None, frames: int | None) -> Size:
    """The size asked for, the model's own where nothing is; DitAccelError for a wrong one."""
    usual, (step, multiple) = model.size, model.scales
    size = Size(height or usual.height, width or usual.width, frames or usual.frames)
    for name, pixels in (("height", size.height), ("width", size.width)):
        if pixels % multiple:
            near = max(1, round(pixels / multiple)) * multiple
            raise DitAccelError(
                f"--{name} {pixels}: {model.name} takes multiples of {multiple}; "
                f"the nearest is {near}."
            )
    if usual.frames == 1 and size.frames != 1:
        raise DitAccelError(f"--frames {size.frames}: {model.name} makes single images.")
    if (size.frames - 1) % step:
        near = round((size.frames - 1) / step) * step + 1
        raise DitAccelError(
            f"--frames {size.frames}: {model.name} takes {step}n+1 frames; the nearest is {near}."
        )
    return size


def build(
    model: Preset, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> nn.Module:
    """The transformer with random weights, made on the device in the type it runs in.

    Parameters that diffusers keeps in float32 when it loads a checkpoint are float32 here too.
    """
    import diffusers

    cls = getattr(diffusers, family_of(model).transformers[0])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: nn.Module = cls(**{**(model.config or {}), **model.cut(layers)})
    finally:
        torch.set_default_dtype(before)
    kept = cls._keep_in_fp32_modules or ()
    for name, parameter in made.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    return made.eval().requires_grad_(False)


@dataclass(frozen=True)
class _Forward:
    """A forward that arguments are made for: random ones, of batch 1."""

    model: Preset
    made: Any
    size: Size
    device: torch.device
    dtype: torch.dtype

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def full(self, value: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((1,), value, device=self.device, dtype=dtype or self.dtype)

    def mask(self) -> Tensor:
        return torch.ones(1, self.model.prompt, device=self.device, dtype=torch.int64)


def inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of a forward of a built model: random, of batch 1."""
    forward = _Forward(model, made, size, device, dtype)
    text, own = _INPUTS[model.family]
    return {
        "timestep": forward.full(500, torch.int64),
        "encoder_hidden_states": forward.draw(1, model.prompt, getattr(made.config, text)),
        "return_dict": False,
        **own(forward),
    }


def _wan_inputs(forward: _Forward) -> dict[str, Any]:
    latents = forward.model.latents(forward.size)
    return {"hidden_states": forward.draw(1, forward.made.config.in_channels, *latents)}


def _hunyuan_inputs(forward: _Forward) -> dict[str, Any]:
    return {
        **_wan_inputs(forward),
        "encoder_attention_mask": forward.mask(),
        "pooled_projections": forward.draw(1, forward.made.config.pooled_projection_dim),
        "guidance": forward.full(6000.0),
    }


def _cogvideox_inputs(forward: _Forward) -> dict[str, Any]:
    from diffusers import CogVideoXPipeline

    made, size = forward.made, forward.size
    frames, height, width = forward.model.latents(size)
    pipe: Any = SimpleNamespace(transformer=made, vae_scale_factor_spatial=forward.model.latent)
    return {
        "hidden_states": forward.draw(1, frames, made.config.in_channels, height, width),
        "image_rotary_emb": CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipe, size.height, size.width, frames, forward.device
        ),
    }


def _flux_inputs(forward: _Forward) -> dict[str, Any]:
    from diffusers import FluxPipeline

    config, here = forward.made.config, (forward.device, forward.dtype)
    _, height, width = forward.model.grid(forward.size)
    return {
        "hidden_states": forward.draw(1, height * width, config.in_channels),
        "timestep": forward.full(0.5),
        "pooled_projections": forward.draw(1, config.pooled_projection_dim),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, *here),
        "txt_ids": torch.zeros(forward.model.prompt, 3, device=here[0], dtype=here[1]),
        "guidance": forward.full(3.5),
    }


def _ltx_inputs(forward: _Forward) -> dict[str, Any]:
    frames, height, width = forward.model.latents(forward.size)
    return {
        "hidden_states": forward.draw(1, frames * height * width, forward.made.config.in_channels),
        "encoder_attention_mask": forward.mask(),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


_INPUTS: dict[str, tuple[str, Callable[[_Forward], dict[str, Any]]]] = {
    "wan": ("text_dim", _wan_inputs),
    "hunyuan_video": ("text_embed_dim", _hunyuan_inputs),
    "cogvideox": ("text_embed_dim", _cogvideox_inputs),
    "flux": ("joint_attention_dim", _flux_inputs),
    "ltx_video": ("caption_channels", _ltx_inputs),
}
"""By family: the configuration's name for channels of text, and what else a forward takes."""
TINY = replace(
    PRESETS["wan-1.3b"],
    name="tiny-wan",
    title="a tiny Wan",
    heads=2,
    head_dim=32,
    layers={"num_layers": 3},
    size=Size(160, 224, 17),
    prompt=24,
    config={
        **(PRESETS["wan-1.3b"].config or {}), "num_attention_heads": 2, "attention_head_dim": 32,
        "text_dim": 16, "freq_dim": 32, "ffn_dim": 64,
    },
    source="no checkpoint: to try the command without a GPU",
)  # fmt: skip
STEP_MODELS: dict[str, Preset] = {
    model.name: model for model in (*PRESETS.values(), TINY) if model.config is not None
}
