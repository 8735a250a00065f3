"""Size rules come from the pipelines themselves, for every supported family, without weights."""

from __future__ import annotations

import diffusers
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.models.find import Model
from dit_accel.models.sizes import fit_sizes, skeleton

SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
PIPELINES = {
    "WanPipeline": ("AutoencoderKLWan", "WanTransformer3DModel", SMALL, 16, 4),
    "WanImageToVideoPipeline": ("AutoencoderKLWan", "WanTransformer3DModel", SMALL, 16, 4),
    "HunyuanVideoPipeline": (
        "AutoencoderKLHunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        {**SMALL, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)},
        16,
        4,
    ),
    "CogVideoXPipeline": ("AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel", SMALL, 16, 4),
    "LTXPipeline": ("AutoencoderKLLTXVideo", "LTXVideoTransformer3DModel", SMALL, 32, 8),
    "FluxPipeline": (
        "AutoencoderKL",
        "FluxTransformer2DModel",
        {**SMALL, "num_single_layers": 1, "axes_dims_rope": (4, 6, 6)},
        None,
        None,
    ),
}


def model(name: str) -> tuple[Model, type]:
    vae, transformer, settings, *_ = PIPELINES[name]
    parts = {"vae": ["diffusers", vae], "transformer": ["diffusers", transformer]}
    configs = {"transformer": settings, "vae": {}}
    if name == "FluxPipeline":
        configs["vae"] = {
            "block_out_channels": [32] * 4,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
    index = {"_class_name": name, **parts}
    return Model("tests", index, configs), getattr(diffusers, name)


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request: pytest.FixtureRequest):
    return skeleton(*model(request.param))


def test_a_skeleton_has_no_weights(pipe):
    assert all(p.is_meta for p in pipe.transformer.parameters())


def test_valid_sizes_pass_unchanged(pipe):
    asked = {"height": 192, "width": 320}
    if PIPELINES[type(pipe).__name__][4]:
        asked["num_frames"] = 33
    assert fit_sizes(pipe, asked, pytest.fail) == asked


def test_refused_sizes_name_the_nearest(pipe):
    step = PIPELINES[type(pipe).__name__][3]
    if step is None:
        pytest.skip("rounds every size")
    with pytest.raises(DitAccelError, match="--height 192 --width 320"):
        fit_sizes(pipe, {"height": 193, "width": 321}, pytest.fail)


def test_rounded_sizes_are_announced(pipe):
    said: list[str] = []
    if type(pipe).__name__ in ("FluxPipeline", "CogVideoXPipeline"):
        fitted = fit_sizes(pipe, {"height": 200, "width": 320}, said.append)
        assert fitted == {"height": 192, "width": 320} and "200 becomes 192" in said[0]
    frames = PIPELINES[type(pipe).__name__][4]
    if frames:
        wanted = {33 + frames // 2: 33, 34 + frames // 2: 33 + frames}
        for asked, made in wanted.items():
            said.clear()
            assert fit_sizes(pipe, {"num_frames": asked}, said.append) == {"num_frames": made}
            assert f"{asked} becomes {made}" in said[0]
