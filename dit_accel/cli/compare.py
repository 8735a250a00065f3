"""The options of `dit-accel compare`. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import option

what = partial(typer.Option, rich_help_panel="What to compare")
alone = partial(typer.Option, rich_help_panel="Attention alone")


def compare(
    context: typer.Context,
    model: option.Pipeline = "demo",
    revision: option.Revision = None,
    variant: option.Variant = None,
    profiles: Annotated[
        str | None,
        what(
            help="Names, TOML files, and inline profiles such as sliding_tile:window=3,3,3 "
            "(whole numbers count tiles, decimals up to 1.0 are fractions) or "
            "block_topk:density=0.2. "
            "\\[default: dense,auto]"
        ),
    ] = None,
    against: Annotated[
        str,
        what(
            help="Other projects' methods: diffusers-pab, diffusers-first-block, "
            "diffusers-fastercache, diffusers-taylorseer, diffusers-magcache, "
            "diffusers-seacache, cache-dit, flex, sage, or all; with their parameters: "
            "diffusers-first-block:threshold=0.1.",
            show_default=False,
        ),
    ] = "",
    prompts: Annotated[
        str | None, what(help='A file with one a line, or "a prompt". \\[default: the demo\'s 24]')
    ] = None,
    seeds: Annotated[str, what(help="Every prompt runs with each of them.")] = "0",
    metrics: Annotated[
        str | None,
        what(
            help="psnr, ssim, lpips, flicker, adherence, vbench. "
            "\\[default: all that need no program of their own]"
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
        option.run(min=1, help="Timed runs of every clip. \\[default: as many as make 3 pairs]"),
    ] = None,
    error_maps: Annotated[
        str,
        option.run(
            help="Measure the error of every attention call, untimed: on the first clip of a "
            "profile, on all, or none."
        ),
    ] = "first",
    no_breakeven: Annotated[
        bool,
        option.run("--no-breakeven", help="Run sparse even where that pays on larger sizes only."),
    ] = False,
    strict: option.Strict = False,
    backend: option.SparseBackend = None,
    keep_going: Annotated[
        bool, option.run("--keep-going", help="Record a clip that fails, and go on.")
    ] = False,
    dtype: option.DType = None,
    device: option.Device = None,
    offload: option.Offload = "none",
    debug: option.Debug = False,
    output: Annotated[Path, option.output("--out", help="Folder of the report.")] = Path("report"),
    resume: Annotated[
        bool,
        option.output(
            "--resume", help="Add to the results in the folder that another request left."
        ),
    ] = False,
    overwrite: Annotated[
        bool, option.output("--overwrite", help="Replace the results in the folder.")
    ] = False,
    fps: option.Fps = None,
    attention: Annotated[
        bool,
        alone(
            "--attention",
            help="Tabulate the error of attention alone against density, for all patterns and "
            "selectors or those of --profiles, on q, k, v of a dense run.",
        ),
    ] = False,
    layers: Annotated[str | None, alone(help="Blocks to look at: 0,4,-1. \\[default: all]")] = None,
    moments: Annotated[
        str | None, alone(help="Parts of the run to look at. \\[default: 0,0.25,0.5,0.75,1]")
    ] = None,
) -> None:
    """Compare profiles with dense, and with others: quality and time, clip by clip.

    Same prompts, seeds and dense kernel for all; the report is one HTML file. Finished clips are
    kept: the same command goes on where it stopped.

    Example: [bold]dit-accel compare --profiles dense,balanced,fast --out report[/]
    """
    from dit_accel.cli.compare_job import Options, run, run_attention

    options = option.given(context)
    (run_attention if options.pop("attention") else run)(Options(**options))
