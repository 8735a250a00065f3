"""`dit-accel bench`: the commands and their options. Nothing here imports torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import option
from dit_accel.cli.console import guarded, out
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.registry import PRESETS

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Time attention kernels and whole denoising steps on this machine.",
)

WHAT = "What to measure"
BUILT = [name for name, preset in PRESETS.items() if preset.config is not None]

Csv = Annotated[
    Path | None,
    typer.Option("--out", help="CSV file, written row by row.", rich_help_panel=option.OUTPUT),
]


@bench.command()
@guarded
def kernels(
    cases: Annotated[
        str | None,
        typer.Option(
            help="Shapes, separated by commas: wan-14b, hunyuan, 21x45x80, ... "
            "\\[default: all; with --quick those that goals are set for]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    densities: Annotated[
        str | None,
        typer.Option(
            help="Shares of key blocks, separated by commas. \\[default: 1,0.5,0.2,0.1,0.05]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    plans: Annotated[
        str | None,
        typer.Option(
            help="random, gather64, sliding_tile, per_head. \\[default: all]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose kernels; may be given several times. \\[default: all]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of every case.", rich_help_panel=WHAT)
    ] = None,
    tile: Annotated[
        str,
        typer.Option(help="Tile of sliding_tile: auto or such as 2,8,8.", rich_help_panel=WHAT),
    ] = "auto",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Fewer cases, heads, densities and plans.", rich_help_panel=WHAT
        ),
    ] = False,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny", help="Cases cut down to what a CPU does in seconds.", rich_help_panel=WHAT
        ),
    ] = False,
    extras: Annotated[
        bool,
        typer.Option(help="Also whole calls and the machine's ceilings.", rich_help_panel=WHAT),
    ] = True,
    repeats: Annotated[
        int,
        typer.Option(min=3, help="Timed calls, of which the median.", rich_help_panel=option.RUN),
    ] = 10,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold",
            help="Compile every kernel anew, to time first calls.",
            rich_help_panel=option.RUN,
        ),
    ] = False,
    dtype: option.DType = None,
    device: option.Device = None,
    debug: option.Debug = False,
    output: Csv = None,
) -> None:
    """Prove each kernel against an oracle, then time it beside the dense kernels there are.

    Example: [bold]dit-accel bench kernels --quick --out kernels.csv[/]
    """
    numbers = _numbers("--densities", densities)
    if cold:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="dit-accel-triton-")
    from dit_accel.bench.run_kernels import KernelRequest, run_kernels
    from dit_accel.cli.runtime import pick_device, pick_dtype

    where = pick_device(device)
    request = KernelRequest(
        device=where,
        dtype=pick_dtype(dtype, where),
        cases=_names(cases),
        densities=numbers,
        plans=_names(plans),
        backends=_names(",".join(backend or ())),
        heads=heads,
        repeats=repeats,
        tile=tile,
        quick=quick,
        tiny=tiny,
        extras=extras,
        out=output,
    )
    run_kernels(request, out)


@bench.command()
@guarded
def step(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(BUILT)}; tiny-wan for a CPU.",
            rich_help_panel=WHAT,
        ),
    ],
    profile: Annotated[
        list[str] | None,
        typer.Option(
            help="A profile's name or TOML file; may be given several times. \\[default: auto]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            help="Also sliding_tile in every self-attention layer at about this launched "
            "density; may be given several times.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Build only about so many blocks, for small GPUs.",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the repeated blocks, for both.", rich_help_panel=option.RUN
        ),
    ] = False,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Attention backend of diffusers for dense calls. \\[default: the fastest here]",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    backend: option.SparseBackend = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Timed forwards. \\[default: 10, or 3 that take over 3 s]",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    dtype: option.DType = None,
    device: option.Device = None,
    debug: option.Debug = False,
    output: Csv = None,
) -> None:
    """Time one denoising step of a real configuration, dense and with profiles.

    Weights are random: nothing is downloaded, and times are those of the real model.

    Example: [bold]dit-accel bench step --model wan-14b --density 0.15[/]
    """
    from dit_accel.cli.runtime import pick_device, pick_dtype, quiet

    quiet()
    from dit_accel.bench.run_step import StepRequest, run_step

    where = pick_device(device)
    request = StepRequest(
        model=model,
        device=where,
        dtype=pick_dtype(dtype, where),
        profiles=tuple(profile or ()),
        densities=tuple(density or ()),
        height=height,
        width=width,
        frames=frames,
        backend=backend,
        dense=dense,
        layers=layers,
        repeats=repeats,
        compile=compiled,
        out=output,
    )
    run_step(request, out)


def _names(text: str | None) -> tuple[str, ...]:
    """The parts of a list that is separated by commas."""
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(name) for name in _names(text))
    except ValueError:
        raise DitAccelError(
            f"{option}: expected numbers separated by commas, such as 0.5,0.2, got {text!r}."
        ) from None
