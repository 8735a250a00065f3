"""`dit-accel bench`: the commands and their options. Nothing here imports torch."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import option
from dit_accel.cli.console import guarded, out
from dit_accel.pipelines.registry import PRESETS

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Time attention kernels and whole denoising steps on this machine.",
)

what = partial(typer.Option, rich_help_panel="What to measure")
BUILT = [name for name, preset in PRESETS.items() if preset.config is not None]

Csv = Annotated[Path | None, option.output("--out", help="CSV file, written row by row.")]


@bench.command()
@guarded
def kernels(
    cases: Annotated[
        str | None,
        what(
            help="Shapes, separated by commas: wan-14b, hunyuan, 21x45x80, ... "
            "\\[default: all; with --quick those that goals are set for]"
        ),
    ] = None,
    densities: Annotated[
        str | None,
        what(help="Shares of key blocks, separated by commas. \\[default: 1,0.5,0.2,0.1,0.05]"),
    ] = None,
    plans: Annotated[
        str | None, what(help="random, gather64, sliding_tile, per_head. \\[default: all]")
    ] = None,
    backend: Annotated[
        list[str] | None, what(help="Whose kernels; may be given several times. \\[default: all]")
    ] = None,
    heads: Annotated[int | None, what(min=1, help="Heads of every case.")] = None,
    tile: Annotated[str, what(help="Tile of sliding_tile: auto or such as 2,8,8.")] = "auto",
    quick: Annotated[
        bool, what("--quick", help="Fewer cases, heads, densities and plans.")
    ] = False,
    tiny: Annotated[
        bool, what("--tiny", help="Cases cut down to what a CPU does in seconds.")
    ] = False,
    extras: Annotated[bool, what(help="Also whole calls and the machine's ceilings.")] = True,
    repeats: Annotated[int, option.run(min=3, help="Timed calls, of which the median.")] = 10,
    cold: Annotated[
        bool, option.run("--cold", help="Compile every kernel anew, to time first calls.")
    ] = False,
    dtype: option.DType = None,
    device: option.Device = None,
    debug: option.Debug = False,
    output: Csv = None,
) -> None:
    """Prove each kernel against an oracle, then time it beside the dense kernels there are.

    Example: [bold]dit-accel bench kernels --quick --out kernels.csv[/]
    """
    shares = option.numbers("--densities", densities, float) if densities else ()
    if cold:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="dit-accel-triton-")
    from dit_accel.bench.run_kernels import KernelRequest, run_kernels
    from dit_accel.cli.runtime import pick_device, pick_dtype

    where = pick_device(device)
    request = KernelRequest(
        device=where,
        dtype=pick_dtype(dtype, where),
        cases=option.names(cases),
        densities=shares,
        plans=option.names(plans),
        backends=option.names(",".join(backend or ())),
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
    model: Annotated[str, what(help=f"{', '.join(BUILT)}; tiny-wan for a CPU.")],
    profile: Annotated[
        list[str] | None,
        what(help="A profile's name or TOML file; may be given several times. \\[default: auto]"),
    ] = None,
    density: Annotated[
        list[float] | None,
        what(
            help="Also sliding_tile in every self-attention layer at about this launched "
            "density; may be given several times."
        ),
    ] = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    layers: Annotated[
        int | None, option.run(min=1, help="Build only about so many blocks, for small GPUs.")
    ] = None,
    compiled: Annotated[
        bool, option.run("--compile", help="Compile the repeated blocks, for both.")
    ] = False,
    dense: Annotated[
        str | None,
        option.run(
            help="Attention backend of diffusers for dense calls. \\[default: the fastest here]"
        ),
    ] = None,
    backend: option.SparseBackend = None,
    repeats: Annotated[
        int | None,
        option.run(min=2, help="Timed forwards. \\[default: 10, or 3 that take over 3 s]"),
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
    from dit_accel.bench.run_step import run_step
    from dit_accel.bench.step import StepOptions

    where = pick_device(device)
    options = StepOptions(
        where,
        pick_dtype(dtype, where),
        densities=tuple(density or ()),
        backend=backend,
        dense=dense,
        layers=layers,
        repeats=repeats,
        compile=compiled,
    )
    run_step(model, (height, width, frames), profile or (), options, output, out)
