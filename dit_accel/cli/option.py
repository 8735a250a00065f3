"""Options that several commands have: the name, help, range and panel of each, said once.

A command takes one as `height: Height = None`. What needs torch to be checked (`--dtype`,
`--device`, `--offload`) is checked in `runtime`. Nothing here imports torch: `--help` answers at
once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL, SIZE, SAMPLING, RUN, OUTPUT = "Model", "Size", "Sampling", "How it runs", "Output"
"""Panels of the help, in every command alike."""

Pipeline = Annotated[
    str,
    typer.Option(help="demo, a folder in diffusers' format or a Hub id.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=MODEL)
]
Variant = Annotated[
    str | None, typer.Option(help="Variant of the weights: fp16.", rich_help_panel=MODEL)
]

Height = Annotated[
    int | None, typer.Option(min=1, help="Pixels. \\[default: the model's]", rich_help_panel=SIZE)
]
Width = Annotated[
    int | None, typer.Option(min=1, help="Pixels. \\[default: the model's]", rich_help_panel=SIZE)
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Frames of a video. \\[default: the model's]", rich_help_panel=SIZE),
]

Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps. \\[default: the model's]", rich_help_panel=SAMPLING),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How closely to follow the prompt.", rich_help_panel=SAMPLING)
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(
        help="Guidance against the negative prompt, for distilled models.",
        rich_help_panel=SAMPLING,
    ),
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What not to show.", rich_help_panel=SAMPLING)
]
Image = Annotated[
    Path | None,
    typer.Option(help="First frame, for image-to-video models.", rich_help_panel=SAMPLING),
]

OneProfile = Annotated[
    str,
    typer.Option(
        help="auto, dense, a name from `dit-accel profiles`, or a TOML file.", rich_help_panel=RUN
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Fail where attention that a profile plans sparse would run dense.",
        rich_help_panel=RUN,
    ),
]
SparseBackend = Annotated[
    str | None,
    typer.Option(help="Whose sparse kernels. \\[default: the best]", rich_help_panel=RUN),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="Such as h100: one with a table of measured costs. \\[default: the one in this "
        "machine]",
        rich_help_panel=RUN,
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        help="bf16, fp16 or fp32. \\[default: bf16 on a GPU, fp32 on a CPU]", rich_help_panel=RUN
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cuda, cuda:1, cpu. \\[default: the GPU if there is one]", rich_help_panel=RUN
    ),
]
Offload = Annotated[
    str,
    typer.Option(
        help="none, model, sequential or group: what waits in CPU memory.", rich_help_panel=RUN
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)
]

Fps = Annotated[
    float | None,
    typer.Option(
        min=0.1, help="Frames per second. \\[default: the model's]", rich_help_panel=OUTPUT
    ),
]
