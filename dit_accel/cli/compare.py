"""The options of `dit-accel compare`. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import option

WHAT, ATTENTION = "What to compare", "Attention alone"


def compare(
    model: option.Pipeline = "demo",
    revision: option.Revision = None,
    variant: option.Variant = None,
    profiles: Annotated[
        str | None,
        typer.Option(
            help="Names, TOML files, and inline profiles such as sliding_tile:window=3,3,3 "
            "(whole numbers count tiles, decimals up to 1.0 are fractions). "
            "\\[default: dense,auto]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Other projects' methods: diffusers-pab, diffusers-first-block, "
            "diffusers-fastercache, diffusers-taylorseer, diffusers-magcache, "
            "diffusers-seacache, cache-dit, flex, sage, or all; with their parameters: "
            "diffusers-first-block:threshold=0.1.",
            rich_help_panel=WHAT,
            show_default=False,
        ),
    ] = "",
    prompts: Annotated[
        str | None,
        typer.Option(
            help='A file with one a line, or "a prompt". \\[default: the demo\'s 24]',
            rich_help_panel=WHAT,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Every prompt runs with each of them.", rich_help_panel=WHAT)
    ] = "0",
    metrics: Annotated[
        str | None,
        typer.Option(
            help="psnr, ssim, lpips, flicker, adherence, vbench. "
            "\\[default: all that need no program of their own]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    steps: option.Steps = None,
    guidance_scale: option.GuidanceScale = None,
    true_cfg_scale: option.TrueCfgScale = None,
    negative_prompt: option.NegativePrompt = None,
    image: option.Image = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Timed runs of every clip. \\[default: as many as make 3 pairs]",
            rich_help_panel=option.RUN,
        ),
    ] = None,
    error_maps: Annotated[
        str,
        typer.Option(
            help="Measure the error of every attention call, untimed: on the first clip of a "
            "profile, on all, or none.",
            rich_help_panel=option.RUN,
        ),
    ] = "first",
    no_breakeven: Annotated[
        bool,
        typer.Option(
            "--no-breakeven",
            help="Run sparse even where that pays on larger sizes only.",
            rich_help_panel=option.RUN,
        ),
    ] = False,
    strict: option.Strict = False,
    backend: option.SparseBackend = None,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going", help="Record a clip that fails, and go on.", rich_help_panel=option.RUN
        ),
    ] = False,
    dtype: option.DType = None,
    device: option.Device = None,
    offload: option.Offload = "none",
    debug: option.Debug = False,
    output: Annotated[
        Path, typer.Option("--out", help="Folder of the report.", rich_help_panel=option.OUTPUT)
    ] = Path("report"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Add to the results in the folder that another request left.",
            rich_help_panel=option.OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the results in the folder.", rich_help_panel=option.OUTPUT
        ),
    ] = False,
    fps: option.Fps = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Tabulate the error of attention alone against density, for all patterns or "
            "those of --profiles, on q, k, v of a dense run.",
            rich_help_panel=ATTENTION,
        ),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks to look at: 0,4,-1. \\[default: all]", rich_help_panel=ATTENTION),
    ] = None,
    moments: Annotated[
        str | None,
        typer.Option(
            help="Parts of the run to look at. \\[default: 0,0.25,0.5,0.75,1]",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
) -> None:
    """Compare profiles with dense, and with others: quality and time, clip by clip.

    Same prompts, seeds and dense kernel for all; the report is one HTML file. Finished clips are
    kept: the same command goes on where it stopped.

    Example: [bold]dit-accel compare --profiles dense,balanced,fast --out report[/]
    """
    from dit_accel.cli.compare_job import Options, run, run_attention

    call = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "negative_prompt": negative_prompt,
    }
    options = Options(
        model=model,
        profiles=profiles,
        prompts=prompts,
        out=output,
        call=call,
        against=against,
        seeds=seeds,
        metrics=metrics,
        revision=revision,
        variant=variant,
        image=image,
        dtype=dtype,
        device=device,
        offload=offload,
        backend=backend,
        fps=fps,
        repeats=repeats,
        error_maps=error_maps,
        breakeven=False if no_breakeven else None,
        strict=strict,
        keep_going=keep_going,
        resume=resume,
        overwrite=overwrite,
        layers=layers,
        moments=moments,
    )
    (run_attention if attention else run)(options)
