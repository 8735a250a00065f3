"""Small random pipelines of every supported family, shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Without a GPU kernels are interpreted; read when Triton is first imported, by diffusers even.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@dataclass
class Tiny:
    """A small pipeline and the arguments of a call of it; `run` returns the latents."""

    pipe: Any
    inputs: dict[str, Any]
    self_sites: int
    cross_sites: int
    branches: int
    steps: int = 3
    extra: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str, dtype: torch.dtype = torch.float32) -> Tiny:
        """The pipeline and its inputs on another device."""
        self.pipe.to(device, dtype)
        for name, value in self.inputs.items():
            if isinstance(value, torch.Tensor):
                kind = dtype if value.is_floating_point() else value.dtype
                self.inputs[name] = value.to(device, kind)
        return self

    def run(self, **changes: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        inputs = {**self.inputs, "num_inference_steps": self.steps, **changes}
        out = self.pipe(**inputs, generator=generator, output_type="latent", return_dict=False)
        return out[0]


def _seed(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention matters to the output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def _embeds(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _clip() -> dict[str, Any]:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return {
        "image_encoder": _seed(CLIPVisionModel(config)),
        "image_processor": CLIPImageProcessor(size=16, crop_size=16),
    }


def wan(experts: int = 1, image: bool = False) -> Tiny:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )

    def transformer() -> Any:
        return _seed(
            WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=32,
                in_channels=36 if image else 16,
                out_channels=16,
                text_dim=16,
                freq_dim=32,
                ffn_dim=32,
                num_layers=3,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
                image_dim=24 if image else None,
                added_kv_proj_dim=64 if image else None,
                pos_embed_seq_len=None,
            )
        )

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": transformer(),
    }
    if experts == 2:
        parts |= {"transformer_2": transformer(), "boundary_ratio": 0.8}
    prompt = _embeds(1, 512 if image else 24, 16)
    # Padding that stock attends: the prompt's tail is zeros, as the pipeline itself pads it.
    prompt[:, 9:] = 0
    inputs = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": _embeds(*prompt.shape, seed=2),
        "height": 80,
        "width": 112,
        "num_frames": 17,
        "guidance_scale": 4.0,
    }
    if image:
        parts |= _clip()
        noise = torch.rand(80, 112, 3, generator=torch.Generator().manual_seed(3))
        inputs["image"] = Image.fromarray((noise * 255).to(torch.uint8).numpy())
        return Tiny(WanImageToVideoPipeline(**parts), inputs, 3, 3, 2)
    return Tiny(WanPipeline(**parts), inputs, 3, 3, 2, steps=3 if experts == 1 else 6)


def hunyuan_video() -> Tiny:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    )
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=_seed(model),
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 11:] = 0
    mask[1, 4:] = 0
    inputs = {
        "prompt_embeds": _embeds(2, 20, 16),
        "pooled_prompt_embeds": _embeds(2, 8, seed=2),
        "prompt_attention_mask": mask,
        "height": 80,
        "width": 48,
        "num_frames": 17,
    }
    return Tiny(pipe, inputs, 4, 0, 1)


def cogvideox() -> Tiny:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=3,
        sample_width=14,
        sample_height=10,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=13,
        use_rotary_positional_embeddings=True,
    )
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=_seed(model),
        scheduler=CogVideoXDDIMScheduler(),
    )
    inputs = {
        "prompt_embeds": _embeds(1, 13, 16),
        "negative_prompt_embeds": _embeds(1, 13, 16, seed=2),
        "height": 80,
        "width": 112,
        "num_frames": 17,
        "guidance_scale": 4.0,
    }
    return Tiny(pipe, inputs, 3, 0, 1)


def ltx_video() -> Tiny:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=3,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=_seed(model),
    )
    mask = torch.ones(1, 12)
    mask[:, 7:] = 0
    inputs = {
        "prompt_embeds": _embeds(1, 12, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": _embeds(1, 12, 16, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, 12),
        "height": 160,
        "width": 224,
        "num_frames": 33,
        "guidance_scale": 3.0,
    }
    return Tiny(pipe, inputs, 3, 3, 1)


def flux() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=True,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_seed(model),
    )
    inputs = {
        "prompt_embeds": _embeds(1, 19, 32),
        "pooled_prompt_embeds": _embeds(1, 32, seed=2),
        "height": 176,
        "width": 304,
    }
    return Tiny(pipe, inputs, 4, 0, 1)


BUILDERS: dict[str, Callable[[], Tiny]] = {
    "wan": wan,
    "wan_two_experts": lambda: wan(experts=2),
    "wan_image": lambda: wan(image=True),
    "hunyuan_video": hunyuan_video,
    "cogvideox": cogvideox,
    "ltx_video": ltx_video,
    "flux": flux,
}


@pytest.fixture(params=list(BUILDERS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A small pipeline of each family in turn."""
    made = BUILDERS[request.param]()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def tiny_wan() -> Tiny:
    """A small Wan text-to-video pipeline."""
    made = wan()
    made.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def build() -> Callable[[str], Tiny]:
    """Builds a small pipeline by name."""

    def make(name: str) -> Tiny:
        made = BUILDERS[name]()
        made.pipe.set_progress_bar_config(disable=True)
        return made

    return make
