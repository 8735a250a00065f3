"""Which options go to which pipeline, decided from configuration files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dit_accel.cli import runtime
from dit_accel.engine.ledger import Ledger
from dit_accel.report import Report

FLUX = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
WAN = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write the configuration of a pipeline, without weights."""

    def write(name: str, transformer: str, settings: dict[str, Any], **index: object) -> Path:
        data = {"_class_name": name, "transformer": ["diffusers", transformer], **index}
        made = tmp_path / name
        (made / "transformer").mkdir(parents=True)
        (made / "model_index.json").write_text(json.dumps(data))
        (made / "transformer" / "config.json").write_text(json.dumps(settings))
        return made

    return write


class Recorder:
    """Stands for a loaded pipeline: remembers its class and call, and makes one gray picture."""

    def __init__(self, pipeline_class: type) -> None:
        self.name = pipeline_class.__name__

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        self.arguments = arguments
        picture = Image.new("RGB", (32, 16), "gray")
        return SimpleNamespace(frames=[[picture]]) if "num_frames" in arguments else Images(picture)

    def enable_sparse_attention(self, *args: Any, **kwargs: Any) -> None:
        self.enabled = kwargs

    def sparse_attention_report(self) -> Report:
        return Ledger().report("auto", "wan", self.name, {})


class Images:
    def __init__(self, picture: Image.Image) -> None:
        self.images = [picture]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made: list[Recorder] = []

    def load(model: Any, pipeline_class: type, *args: Any) -> Recorder:
        made.append(Recorder(pipeline_class))
        return made[-1]

    monkeypatch.setattr(runtime, "load", load)
    monkeypatch.setattr(runtime, "place", lambda *args: None)
    return made


def test_an_image_model_writes_a_png(cli, folder, loaded: list[Recorder]):
    model = folder("FluxPipeline", "FluxTransformer2DModel", FLUX)
    code, text = cli("generate", "a red circle", "--model", model, "--height", 48, "--strict")
    assert code == 0, text
    assert os.listdir() == ["a-red-circle-0.png"] and "a-red-circle-0.png (32x16)" in text
    assert loaded[0].name == "FluxPipeline" and loaded[0].enabled == {"strict": True}
    given = loaded[0].arguments
    assert given["height"] == 48 and given["generator"].initial_seed() == 0
    assert "guidance_scale" not in given and "num_inference_steps" not in given


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--frames", 9), "FluxPipeline takes no --frames: it makes single images"),
        (("--negative-prompt", "blur"), "only with --true-cfg-scale above 1"),
        (("--negative-prompt", "blur", "--true-cfg-scale", 1), "only with --true-cfg-scale"),
    ],
)
def test_options_that_flux_lacks(cli, folder, loaded: list[Recorder], options, says: str):
    model = folder("FluxPipeline", "FluxTransformer2DModel", FLUX)
    code, text = cli("generate", "a red circle", "--model", model, *options)
    assert code == 2 and says in text and not loaded


def test_true_guidance_reaches_the_pipeline(cli, folder, loaded: list[Recorder]):
    model = folder("FluxPipeline", "FluxTransformer2DModel", FLUX)
    options = ("--negative-prompt", "blur", "--true-cfg-scale", 3)
    code, text = cli("generate", "a red circle", "--model", model, *options)
    assert code == 0, text
    assert loaded[0].arguments["true_cfg_scale"] == 3.0
    assert loaded[0].arguments["negative_prompt"] == "blur"


@pytest.mark.parametrize(
    ("name", "transformer", "index", "taken"),
    [
        ("FluxPipeline", "FluxTransformer2DModel", {}, "FluxImg2ImgPipeline"),
        (
            "WanPipeline",
            "WanTransformer3DModel",
            {"expand_timesteps": True},
            "WanImageToVideoPipeline",
        ),
        ("WanImageToVideoPipeline", "WanTransformer3DModel", {}, "WanImageToVideoPipeline"),
    ],
)
def test_an_image_picks_the_pipeline(
    cli, folder, loaded: list[Recorder], name: str, transformer: str, index, taken: str
):
    Image.new("L", (20, 20)).save("../first.png")
    model = folder(name, transformer, FLUX if "Flux" in name else WAN, **index)
    sizes = ("--frames", 5) if "Wan" in name else ()
    args = ("--model", model, "--image", "../first.png", *sizes, "--out", "x.png")
    code, text = cli("generate", "a red circle", *args)
    assert code == 0, text
    assert loaded[0].name == taken and loaded[0].arguments["image"].mode == "RGB"


def test_an_image_to_video_model_needs_an_image(cli, folder, loaded: list[Recorder]):
    model = folder("WanImageToVideoPipeline", "WanTransformer3DModel", WAN)
    code, text = cli("generate", "a red circle", "--model", model)
    assert code == 2 and "starts from an image: give one with --image" in text and not loaded


def test_ltx_is_told_the_frame_rate(cli, folder, loaded: list[Recorder]):
    settings = {**WAN, "cross_attention_dim": 16, "caption_channels": 16}
    model = folder("LTXPipeline", "LTXVideoTransformer3DModel", settings)
    args = ("--model", model, "--frames", 9, "--fps", 12, "--out", "x.gif")
    code, text = cli("generate", "a red circle", *args)
    assert code == 0, text
    assert loaded[0].arguments["frame_rate"] == 12 and "12 fps" in text


def test_demo_defaults(cli, tiny_wan: Path, loaded: list[Recorder], monkeypatch):
    from dit_accel.models import find as models

    monkeypatch.setattr(models, "demo_folder", lambda: tiny_wan)
    monkeypatch.setattr("dit_accel.cli.generate._check_words", lambda *args: None)
    code, text = cli("generate", "a red circle", "--steps", 3, "--out", "x.png")
    assert code == 0, text
    given = loaded[0].arguments
    assert (given["num_frames"], given["height"], given["width"]) == (33, 192, 192)
    assert given["num_inference_steps"] == 3


def test_demo_says_which_words_it_does_not_know(cli, tiny_wan: Path, monkeypatch):
    from dit_accel.models import find as models

    monkeypatch.setattr(models, "demo_folder", lambda: tiny_wan)
    args = ("--steps", 1, "--height", 32, "--width", 32, "--frames", 1, "--out", "x.png")
    code, text = cli("generate", "a red cat moves, cat", *args)
    assert code == 0, text
    assert "warning: The demo model was not taught: cat." in text
