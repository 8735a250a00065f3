"""Attaching composes with what else changes processors, and refuses what it does not know."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.engine.profile import Profile, parse_profile
from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers import seam

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
)
DENSE = Profile("dense")


@pytest.mark.parametrize("family", ["wan", "cogvideox", "flux"])
def test_fusing_projections_after_enabling(build: Any, family: str) -> None:
    tiny = build(family)
    model = tiny.pipe.transformer
    model.fuse_qkv_projections()
    fused = tiny.run()
    model.unfuse_qkv_projections()
    tiny.pipe.enable_sparse_attention(DENSE)
    model.fuse_qkv_projections()
    assert torch.equal(tiny.run(), fused)
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["calls"] == tiny.self_sites * tiny.branches * tiny.steps
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(), fused)


def test_lora_added_after_enabling(build: Any) -> None:
    from peft import LoraConfig

    tiny = build("wan")
    stock = tiny.run()
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    tiny.pipe.enable_sparse_attention(DENSE)
    torch.manual_seed(0)
    tiny.pipe.transformer.add_adapter(config)
    with_lora = tiny.run()
    assert not torch.equal(with_lora, stock)
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(), with_lora)


def test_enabling_twice_replaces(tiny_wan: Any) -> None:
    stock = tiny_wan.run()
    tiny_wan.pipe.enable_sparse_attention(SPARSE)
    tiny_wan.pipe.enable_sparse_attention(DENSE)
    assert torch.equal(tiny_wan.run(), stock)
    report = tiny_wan.pipe.sparse_attention_report()
    assert report.profile == "dense" and report.kinds["self"]["calls"] == 18
    assert len(tiny_wan.pipe.transformer._forward_pre_hooks) == 1


def test_disabling_what_was_never_enabled_is_a_no_op(tiny_wan: Any) -> None:
    assert tiny_wan.pipe.disable_sparse_attention() is tiny_wan.pipe
    with pytest.raises(DitAccelError, match="not enabled"):
        tiny_wan.pipe.sparse_attention_report()


def test_shared_processors_get_copies_and_come_back(tiny_wan: Any) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    shared = WanAttnProcessor()
    tiny_wan.pipe.transformer.set_attn_processor(shared)
    stock = tiny_wan.run()
    tiny_wan.pipe.enable_sparse_attention(DENSE)
    assert torch.equal(tiny_wan.run(), stock)
    tiny_wan.pipe.disable_sparse_attention()
    processors = {id(p) for p in tiny_wan.pipe.transformer.attn_processors.values()}
    assert processors == {id(shared)} and type(shared) is WanAttnProcessor
    assert "_dit_accel_owner" not in shared.__dict__


def test_skip_layer_guidance_knows_our_processors(build: Any) -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    tiny = build("flux")
    attention = tiny.pipe.transformer.transformer_blocks[0].attn
    stock = AttentionProcessorRegistry.get(type(attention.processor))
    tiny.pipe.enable_sparse_attention(SPARSE)
    assert AttentionProcessorRegistry.get(type(attention.processor)) is stock


def test_first_block_cache_composes(build: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    tiny = build("wan")
    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = tiny.run()
    tiny.pipe.enable_sparse_attention(DENSE)
    assert torch.equal(tiny.run(), cached)
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(), cached)


def test_a_processor_without_an_attention_call_is_an_error() -> None:
    class Linear:
        def __call__(self, attn: Any, hidden_states: Any) -> Any:
            return hidden_states

    with pytest.raises(DitAccelError, match="Linear of diffusers .* knows"):
        seam.rebound(Linear)


def test_unsupported_pipelines_name_what_is_supported() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe: Any = DDPMPipeline(unet, DDPMScheduler())
    with pytest.raises(DitAccelError, match="DDPMPipeline is not supported.*WanPipeline"):
        pipe.enable_sparse_attention()
    with pytest.raises(DitAccelError, match="UNet2DModel.*WanTransformer3DModel"):
        dit_accel.enable(unet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": "always"}, "strict"),
        ({"backend": "tritn"}, "Did you mean 'triton'"),
        ({"cache_limit": -1}, "cache_limit"),
        ({"profile": "balancd"}, "Did you mean 'balanced'"),
    ],
)
def test_wrong_options_change_nothing(tiny_wan: Any, options: dict[str, Any], message: str) -> None:
    tiny_wan.pipe.enable_sparse_attention(SPARSE)
    with pytest.raises(DitAccelError, match=message):
        tiny_wan.pipe.enable_sparse_attention(**options)
    tiny_wan.run()
    assert tiny_wan.pipe.sparse_attention_report().kinds["self"]["sparse"] == 18


def test_own_loop(build: Any) -> None:
    """`dit_accel.enable` on a transformer, with a scheduler and with a number of steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = build("wan").pipe.transformer
    noise = torch.randn(1, 16, 5, 10, 14, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))

    def loop(scheduler: Any) -> None:
        latents = noise
        scheduler.set_timesteps(4)
        with torch.no_grad():
            for t in scheduler.timesteps:
                flow = model(latents, t.expand(1), text, return_dict=False)[0]
                latents = scheduler.step(flow, t, latents, return_dict=False)[0]

    scheduler = FlowMatchEulerDiscreteScheduler()
    for options in ({"scheduler": scheduler}, {"steps": 4}):
        session = dit_accel.enable(model, profile=SPARSE, **options)
        loop(scheduler)
        loop(scheduler)
        report = session.report()
        assert [row["step"] for row in report.per_step] == [0, 1, 2, 3]
        assert report.kinds["self"]["sparse"] == report.kinds["self"]["calls"] == 12
    dit_accel.enable(model, profile=SPARSE)
    with pytest.raises(DitAccelError, match="number of denoising steps is not known"):
        loop(scheduler)
    dit_accel.disable(model)
    loop(scheduler)


def test_an_enabled_pipeline_is_freed(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run()
    ref = weakref.ref(tiny.pipe.transformer)
    del tiny
    gc.collect()
    assert ref() is None


def test_a_session_reports_after_it_was_disabled(build: Any) -> None:
    model = build("wan").pipe.transformer
    session = dit_accel.enable(model, profile=SPARSE, steps=2)
    noise, text = torch.zeros(1, 16, 5, 10, 14), torch.zeros(1, 8, 16)
    with torch.no_grad():
        model(noise, torch.tensor([900.0]), text, return_dict=False)
    dit_accel.disable(model)
    assert session.report().kinds["self"]["sparse"] == 3
