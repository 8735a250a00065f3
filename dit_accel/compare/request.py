"""What a comparison is asked for, and who is told how it goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from dit_accel.compare.environment import device_name
from dit_accel.compare.methods import Method
from dit_accel.compare.metrics import DEFAULT
from dit_accel.compare.store import Run
from dit_accel.errors import DitAccelError, unknown

WARMUP_STEPS = 4
"""Steps of a method's untimed first call; enough that every part of a schedule is entered."""
LEAST_PAIRS = 3
"""Timed pairs per method that the default number of repeats makes."""
ERROR_MAPS = ("first", "all", "none")


class Watcher:
    """Who is told how a comparison goes on; this one does nothing about it."""

    def steps(self, total: int) -> None:
        """So many denoising steps there are to do, from now on."""

    def at(self, text: str) -> None:
        """What is being done now."""

    def step(self) -> None:
        """One denoising step is done."""

    def say(self, text: str) -> None:
        """Something to know: what was skipped, or failed."""


@dataclass(frozen=True)
class Request:
    """What to compare.

    Args:
        prompts, seeds: every prompt runs with every seed.
        call: further arguments of the pipeline's call, the same for all.
        repeats: timed runs of every clip; None for as many as make `LEAST_PAIRS` pairs.
        error_maps: "first" measures attention errors on the first pair, "all" on all, "none".
        demo: whether the model is the demo model.
        command: what to type to do it again.
    """

    prompts: Sequence[str]
    seeds: Sequence[int] = (0,)
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[str] = DEFAULT
    fps: float = 16.0
    repeats: int | None = None
    error_maps: str = "first"
    keep_going: bool = False
    model: str = ""
    demo: bool = False
    command: str = ""


def check(request: Request) -> None:
    """Raise DitAccelError for a request that makes no sense."""
    if not request.prompts or not request.seeds:
        raise DitAccelError("a comparison needs at least one prompt and one seed.")
    if request.repeats is not None and request.repeats < 1:
        raise DitAccelError(f"repeats must be 1 or more, got {request.repeats}.")
    if request.error_maps not in ERROR_MAPS:
        raise unknown("choice of error maps", request.error_maps, ERROR_MAPS)


def run_of(
    request: Request, methods: Sequence[Method], device: torch.device, dtype: torch.dtype
) -> Run:
    """What the store needs to tell this run from another."""
    check(request)
    call = {key: _plain(value) for key, value in sorted(request.call.items())}
    setting = {
        "model": request.model,
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "fps": request.fps,
        **{key: value for key, value in call.items() if value is not None},
    }
    texts = {method.info.name: method.info.text for method in methods}
    return Run(setting, texts, list(request.prompts), list(request.seeds), list(request.metrics))


def repeats_for(request: Request) -> int:
    """Timed runs per clip."""
    pairs = len(request.prompts) * len(request.seeds)
    return request.repeats or max(1, math.ceil(LEAST_PAIRS / pairs))


def _plain(value: Any) -> Any:
    """An argument as JSON has it: pictures and tensors by a digest of their bytes."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    data = value.tobytes() if isinstance(value, Image.Image) or hasattr(value, "tobytes") else None
    return hashlib.sha256(data).hexdigest()[:16] if data is not None else str(value)
