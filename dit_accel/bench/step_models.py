"""Real transformer configurations with random weights, and the inputs of one denoising forward.

Every `config` is what the checkpoint's transformer/config.json sets beyond the defaults of its
class in diffusers; `source` names the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import DitAccelError, unknown

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """Pixels and frames of what is generated; an image has one frame."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class StepModel:
    """A transformer to time.

    config: arguments of the class `transformer` of diffusers, beyond its defaults.
    layers: the arguments that count its blocks, with their values.
    scales: (frames, pixels) that the autoencoder makes one latent of.
    multiple: pixels that a height and width are a multiple of.
    inputs: makes the arguments of a forward.
    masked: whether the model passes an attention mask to its self-attention.
    """

    name: str
    transformer: str
    config: Config
    layers: Mapping[str, int]
    size: Size
    scales: tuple[int, int]
    multiple: int
    inputs: Callable[[StepModel, Any, Size, torch.device, torch.dtype], dict[str, Any]]
    source: str
    masked: bool = False
    text: int = field(default=512)

    def fit(self, height: int | None, width: int | None, frames: int | None) -> Size:
        """The size asked for, the model's own where nothing is; DitAccelError for a wrong one."""
        size = Size(
            height or self.size.height, width or self.size.width, frames or self.size.frames
        )
        for name, pixels in (("height", size.height), ("width", size.width)):
            if pixels % self.multiple:
                near = max(1, round(pixels / self.multiple)) * self.multiple
                raise DitAccelError(
                    f"--{name} {pixels}: {self.name} takes multiples of {self.multiple}; "
                    f"the nearest is {near}."
                )
        if self.size.frames == 1 and size.frames != 1:
            raise DitAccelError(f"--frames {size.frames}: {self.name} makes single images.")
        step = self.scales[0]
        if (size.frames - 1) % step:
            near = round((size.frames - 1) / step) * step + 1
            raise DitAccelError(
                f"--frames {size.frames}: {self.name} takes {step}n+1 frames; "
                f"the nearest is {near}."
            )
        return size

    def cut(self, layers: int | None) -> dict[str, int]:
        """The arguments that count blocks, for about `layers` of them in the same proportion."""
        total = sum(self.layers.values())
        if layers is None or layers >= total:
            return dict(self.layers)
        return {name: max(1, round(n * layers / total)) for name, n in self.layers.items()}


def latent(model: StepModel, size: Size) -> tuple[int, int, int]:
    """(frames, height, width) of the latent video."""
    per_frame, per_pixel = model.scales
    frames = (size.frames - 1) // per_frame + 1
    return frames, size.height // per_pixel, size.width // per_pixel


def build(
    model: StepModel, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> nn.Module:
    """The transformer with random weights, made on the device in the type it runs in.

    Parameters that diffusers keeps in float32 when it loads a checkpoint are float32 here too.
    """
    import diffusers

    cls = getattr(diffusers, model.transformer)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: nn.Module = cls(**{**model.config, **model.cut(layers)})
    finally:
        torch.set_default_dtype(before)
    kept = cls._keep_in_fp32_modules or ()
    for name, parameter in made.named_parameters():
        if any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.float()
    return made.eval().requires_grad_(False)


def pick_model(name: str) -> StepModel:
    """The model of that name; DitAccelError for an unknown one."""
    if name not in STEP_MODELS:
        raise unknown("model", name, STEP_MODELS)
    return STEP_MODELS[name]


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device, dtype=dtype)


def _wan_inputs(
    model: StepModel, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    return {
        "hidden_states": draw(1, made.config.in_channels, *latent(model, size)),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.text, made.config.text_dim),
        "return_dict": False,
    }


def _hunyuan_inputs(
    model: StepModel, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    return {
        "hidden_states": draw(1, made.config.in_channels, *latent(model, size)),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.text, made.config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, model.text, device=device, dtype=torch.int64),
        "pooled_projections": draw(1, made.config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        "return_dict": False,
    }


def _cogvideox_inputs(
    model: StepModel, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import CogVideoXPipeline

    draw = _random(device, dtype)
    frames, height, width = latent(model, size)
    pipe: Any = SimpleNamespace(transformer=made, vae_scale_factor_spatial=model.scales[1])
    return {
        "hidden_states": draw(1, frames, made.config.in_channels, height, width),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.text, made.config.text_embed_dim),
        "image_rotary_emb": CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipe, size.height, size.width, frames, device
        ),
        "return_dict": False,
    }


def _flux_inputs(
    model: StepModel, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import FluxPipeline

    draw = _random(device, dtype)
    height, width = size.height // model.multiple, size.width // model.multiple
    return {
        "hidden_states": draw(1, height * width, made.config.in_channels),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": draw(1, model.text, made.config.joint_attention_dim),
        "pooled_projections": draw(1, made.config.pooled_projection_dim),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, height, width, device, dtype),
        "txt_ids": torch.zeros(model.text, 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "return_dict": False,
    }


def _ltx_inputs(
    model: StepModel, made: Any, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    draw = _random(device, dtype)
    frames, height, width = latent(model, size)
    return {
        "hidden_states": draw(1, frames * height * width, made.config.in_channels),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, model.text, made.config.caption_channels),
        "encoder_attention_mask": torch.ones(1, model.text, device=device, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
        "return_dict": False,
    }


_WAN = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
STEP_MODELS: dict[str, StepModel] = {
    model.name: model
    for model in (
        StepModel(
            "wan-1.3b", "WanTransformer3DModel",
            {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960},
            {"num_layers": 30}, Size(480, 832, 81), (4, 8), 16, _wan_inputs,
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        ),
        StepModel(
            "wan-14b", "WanTransformer3DModel", _WAN, {"num_layers": 40},
            Size(720, 1280, 81), (4, 8), 16, _wan_inputs, "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        ),
        StepModel(
            "wan-5b", "WanTransformer3DModel",
            {**_WAN, "num_attention_heads": 24, "ffn_dim": 14336,
             "in_channels": 48, "out_channels": 48},
            {"num_layers": 30}, Size(704, 1280, 121), (4, 16), 32, _wan_inputs,
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ),
        StepModel(
            "hunyuan", "HunyuanVideoTransformer3DModel", {},
            {"num_layers": 20, "num_single_layers": 40}, Size(720, 1280, 129), (4, 8), 16,
            _hunyuan_inputs, "hunyuanvideo-community/HunyuanVideo", masked=True, text=256,
        ),
        StepModel(
            "cogvideox-5b", "CogVideoXTransformer3DModel",
            {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
            {"num_layers": 42}, Size(480, 720, 49), (4, 8), 16, _cogvideox_inputs,
            "THUDM/CogVideoX-5b", text=226,
        ),
        StepModel(
            "flux", "FluxTransformer2DModel", {"guidance_embeds": True},
            {"num_layers": 19, "num_single_layers": 38}, Size(1024, 1024), (1, 8), 16,
            _flux_inputs, "black-forest-labs/FLUX.1-dev",
        ),
        StepModel(
            "ltx", "LTXVideoTransformer3DModel", {}, {"num_layers": 28}, Size(512, 704, 161),
            (8, 32), 32, _ltx_inputs, "Lightricks/LTX-Video", text=128,
        ),
        StepModel(
            "tiny-wan", "WanTransformer3DModel",
            {**_WAN, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 16,
             "freq_dim": 32, "ffn_dim": 64},
            {"num_layers": 3}, Size(160, 224, 17), (4, 8), 16, _wan_inputs,
            "no checkpoint: to try the command without a GPU", text=24,
        ),
    )
}  # fmt: skip
