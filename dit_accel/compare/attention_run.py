"""The run behind `compare --attention`: a dense generation whose calls are looked at."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from dit_accel.compare.attention_level import Candidate, Row, measure
from dit_accel.compare.environment import environment
from dit_accel.compare.probe import Capture, capturing
from dit_accel.compare.request import Request, Watcher
from dit_accel.errors import DitAccelError


def tabulate(
    pipe: Any,
    request: Request,
    tried: Sequence[Candidate],
    layers: Sequence[int] | None,
    moments: Sequence[float],
    watcher: Watcher | None = None,
) -> list[Row]:
    """Every candidate on every captured call of dense runs of all prompts and seeds.

    Args:
        layers: indices of blocks, negative ones from the end; None for all.
        moments: fractions of the run in [0, 1].

    Raises:
        DitAccelError: the layers or moments select no call.
    """
    watcher = watcher or Watcher()
    steps = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    steps = request.call.get("num_inference_steps") or steps
    watcher.steps(len(request.prompts) * len(request.seeds) * steps)
    rows: list[Row] = []

    def use(capture: Capture) -> None:
        rows.extend(measure(capture, tried))

    def on_step(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        watcher.step()
        return tensors

    pipe.enable_sparse_attention("dense")
    try:
        for prompt in request.prompts:
            for seed in request.seeds:
                watcher.at(f"{prompt} (seed {seed})")
                with capturing(pipe, layers, moments, use):
                    pipe(
                        prompt=prompt,
                        generator=torch.Generator("cpu").manual_seed(seed),
                        output_type="latent",
                        callback_on_step_end=on_step,
                        **request.call,
                    )
    finally:
        pipe.disable_sparse_attention()
    if not rows:
        raise DitAccelError("--layers and --moments select no self-attention call over the video.")
    return rows


def about(request: Request, device: torch.device) -> dict[str, Any]:
    """What the table was measured on."""
    plain = {k: v for k, v in request.call.items() if isinstance(v, (str, int, float))}
    return {
        "model": request.model,
        "prompts": list(request.prompts),
        "seeds": list(request.seeds),
        "call": plain,
        "environment": dataclasses.asdict(environment(request.command, device)),
    }
