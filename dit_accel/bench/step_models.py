"""Real transformer configurations with random weights, and the inputs of one denoising forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


def inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments of a forward of a built model: random, of batch 1."""
    return _INPUTS[model.family](model, made, size, device, dtype)


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device, dtype=dtype)


def _wan_inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    return {
        "hidden_states": draw(1, made.config.in_channels, *model.latents(size)),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.prompt, made.config.text_dim),
        "return_dict": False,
    }


def _hunyuan_inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    return {
        "hidden_states": draw(1, made.config.in_channels, *model.latents(size)),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.prompt, made.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, model.prompt, device=device, dtype=torch.int64),
        "pooled_projections": draw(1, made.config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        "return_dict": False,
    }


def _cogvideox_inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import CogVideoXPipeline

    draw = _random(device, dtype)
    frames, height, width = model.latents(size)
    pipe: Any = SimpleNamespace(transformer=made, vae_scale_factor_spatial=model.latent)
    return {
        "hidden_states": draw(1, frames, made.config.in_channels, height, width),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.prompt, made.config.text_embed_dim),
        "image_rotary_emb": CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipe, size.height, size.width, frames, device
        ),
        "return_dict": False,
    }


def _flux_inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import FluxPipeline

    draw = _random(device, dtype)
    _, height, width = model.grid(size)
    return {
        "hidden_states": draw(1, height * width, made.config.in_channels),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": draw(1, model.prompt, made.config.joint_attention_dim),
        "pooled_projections": draw(1, made.config.pooled_projection_dim),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, device, dtype),
        "txt_ids": torch.zeros(model.prompt, 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "return_dict": False,
    }


def _ltx_inputs(
    model: Preset, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    frames, height, width = model.latents(size)
    return {
        "hidden_states": draw(1, frames * height * width, made.config.in_channels),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.prompt, made.config.caption_channels),
        "encoder_attention_mask": torch.ones(1, model.prompt, device=device, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


_INPUTS = {
    "wan": _wan_inputs,
    "hunyuan_video": _hunyuan_inputs,
    "cogvideox": _cogvideox_inputs,
    "flux": _flux_inputs,
    "ltx_video": _ltx_inputs,
}
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
