"""A small Wan pipeline that takes prompts and makes frames, in memory and on disk."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

# 3 x 8 x 8 tokens: tiles of 1 x 4 x 4 leave 12 tiles, so that windows really are sparse.
CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
}
SPARSE = "sliding_tile:window=1,1,1,tile=1,4,4,steps=0.3,1.0"


def _cli_conftest() -> ModuleType:
    path = Path(__file__).parents[2] / "cli" / "conftest.py"
    spec = importlib.util.spec_from_file_location("cli_conftest", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan model on disk whose attention matters to the picture."""
    from diffusers import WanPipeline

    folder = _cli_conftest().save_tiny_wan(tmp_path_factory.mktemp("models") / "wan")
    pipe = WanPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(wan_folder: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(loaded: Any) -> Any:
    """A fresh pipeline for every test."""
    return copy.deepcopy(loaded)


@pytest.fixture
def generate() -> Callable[..., np.ndarray]:
    """Run a pipeline as it is; frames [T, H, W, 3] uint8."""

    def run(pipe: Any, prompt: str = "a red circle moves left", seed: int = 0) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(prompt, generator=generator, output_type="pil", **CALL).frames[0]
        return np.stack([np.asarray(frame) for frame in frames])

    return run


@pytest.fixture
def call() -> dict[str, Any]:
    """Arguments of a small call."""
    return dict(CALL)


@pytest.fixture
def sparse() -> str:
    """An inline profile that runs sparse at that size, after a dense first step."""
    return SPARSE


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run `dit-accel compare ARGS` in an empty folder; exit code and all that it printed."""
    from typer.testing import CliRunner

    from dit_accel.cli.app import app

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> tuple[int, str]:
        words = ["compare", *(str(arg) for arg in args)]
        result = CliRunner().invoke(app, words, prog_name="dit-accel")
        return result.exit_code, " ".join(result.output.split())

    return run
