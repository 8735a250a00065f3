"""The model of a command with the device, type and call that it will run with; and its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from dit_accel.cli import runtime
from dit_accel.cli.arguments import pipeline_call
from dit_accel.cli.console import err, warn
from dit_accel.models.find import Model, find_model


@dataclass(frozen=True)
class Asked:
    """The options that say which model is to run, and how; `call` holds the arguments of its
    pipeline that were given."""

    model: str
    revision: str | None
    variant: str | None
    call: Mapping[str, Any]
    image: Path | None
    fps: float | None
    dtype: str | None
    device: str | None
    offload: str


@dataclass(frozen=True)
class Target:
    """A model that was looked at: nothing heavy has been done for it yet.

    arguments: of the pipeline's call. fps: of its videos.
    """

    model: Model
    pipeline_class: Any
    device: torch.device
    dtype: torch.dtype
    arguments: dict[str, Any]
    fps: float


def find_target(asked: Asked, prompt: str) -> Target:
    """Check options against the machine and the model, without loading weights."""
    device = runtime.pick_device(asked.device)
    dtype = runtime.pick_dtype(asked.dtype, device)
    runtime.check_offload(asked.offload, device)
    with err.status(Text(f"Looking at {asked.model}")):
        runtime.quiet()
        model = find_model(asked.model, asked.revision)
        made = pipeline_call(model, prompt, asked.call, asked.image, asked.fps, warn)
    pipeline_class, arguments, fps = made
    return Target(model, pipeline_class, device, dtype, arguments, fps)


def load_target(
    target: Target, asked: Asked, prepare: Callable[[Any], None] = lambda pipe: None
) -> Any:
    """The pipeline with its weights, where it runs. prepare: is called before it is put there."""
    with err.status(Text(f"Loading {target.model.source}")):
        pipe = runtime.load(target.model, target.pipeline_class, target.dtype, asked.variant)
        prepare(pipe)
        runtime.place(pipe, target.device, asked.offload)
    return pipe
