"""Options that several commands have: the name, help, range and panel of each, said once.

A command takes one as `height: Height = None`. What needs torch to be checked (`--dtype`,
`--device`, `--offload`) is checked in `runtime`. Nothing here imports torch: `--help` answers at
once.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.errors import DitAccelError

MODEL, SIZE, SAMPLING, RUN, OUTPUT = "Model", "Size", "Sampling", "How it runs", "Output"
"""Panels of the help, in every command alike."""
model, size, sampling, run, output = (
    partial(typer.Option, rich_help_panel=panel) for panel in (MODEL, SIZE, SAMPLING, RUN, OUTPUT)
)
CALL = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "true_cfg_scale": "true_cfg_scale",
    "negative_prompt": "negative_prompt",
}
"""Options that are arguments of a pipeline's call, by their names there."""


def given(context: typer.Context) -> dict[str, Any]:
    """The options of a command that calls a pipeline, the arguments of that as `call`."""
    options = {name: value for name, value in context.params.items() if name != "debug"}
    call = {argument: options.pop(name) for name, argument in CALL.items()}
    return {**options, "call": call}


def names(text: str | None) -> tuple[str, ...]:
    """The parts of a list that is separated by commas, once each."""
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """The numbers of such a list, of a kind; DitAccelError that names the option."""
    with suppress(ValueError):
        if found := tuple(map(kind, names(text))):
            return found
    example = "0,1,2" if kind is int else "0.5,0.2"
    raise DitAccelError(
        f"{name}: expected numbers separated by commas, such as {example}, got {text!r}."
    )


Pipeline = Annotated[str, model(help="demo, a folder in diffusers' format or a Hub id.")]
Revision = Annotated[str | None, model(help="Branch, tag or commit of a Hub model.")]
Variant = Annotated[str | None, model(help="Variant of the weights: fp16.")]

Height = Annotated[int | None, size(min=1, help="Pixels. \\[default: the model's]")]
Width = Annotated[int | None, size(min=1, help="Pixels. \\[default: the model's]")]
Frames = Annotated[int | None, size(min=1, help="Frames of a video. \\[default: the model's]")]

Steps = Annotated[int | None, sampling(min=1, help="Denoising steps. \\[default: the model's]")]
GuidanceScale = Annotated[float | None, sampling(help="How closely to follow the prompt.")]
TrueCfgScale = Annotated[
    float | None, sampling(help="Guidance against the negative prompt, for distilled models.")
]
NegativePrompt = Annotated[str | None, sampling(help="What not to show.")]
Image = Annotated[Path | None, sampling(help="First frame, for image-to-video models.")]

OneProfile = Annotated[
    str, run(help="auto, dense, a name from `dit-accel profiles`, or a TOML file.")
]
Strict = Annotated[
    bool, run("--strict", help="Fail where attention that a profile plans sparse would run dense.")
]
SparseBackend = Annotated[str | None, run(help="Whose sparse kernels. \\[default: the best]")]
Gpu = Annotated[
    str | None,
    run(
        help="Such as h100: one with a table of measured costs. \\[default: the one in this "
        "machine]"
    ),
]
DType = Annotated[
    str | None, run(help="bf16, fp16 or fp32. \\[default: bf16 on a GPU, fp32 on a CPU]")
]
Device = Annotated[str | None, run(help="cuda, cuda:1, cpu. \\[default: the GPU if there is one]")]
Offload = Annotated[str, run(help="none, model, sequential or group: what waits in CPU memory.")]
Debug = Annotated[bool, run("--debug", help="Show the traceback of an error.")]

Fps = Annotated[float | None, output(min=0.1, help="Frames per second. \\[default: the model's]")]
