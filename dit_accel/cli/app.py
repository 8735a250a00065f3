"""The commands and their options. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

import dit_accel
from dit_accel.cli import option
from dit_accel.cli.bench import bench
from dit_accel.cli.compare import compare
from dit_accel.cli.console import guarded, out
from dit_accel.cli.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Faster video and image diffusion transformers by sparse and cached attention.",
)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        out.print(f"dit-accel {dit_accel.__version__} (Python {platform.python_version()})")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command(no_args_is_help=True)
@guarded
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)],
    model: option.Pipeline = "demo",
    revision: option.Revision = None,
    variant: option.Variant = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    image: option.Image = None,
    negative_prompt: option.NegativePrompt = None,
    steps: option.Steps = None,
    guidance_scale: option.GuidanceScale = None,
    true_cfg_scale: option.TrueCfgScale = None,
    seed: Annotated[int, option.sampling(min=0, help="Same seed, same video.")] = 0,
    profile: option.OneProfile = "auto",
    strict: option.Strict = False,
    dtype: option.DType = None,
    device: option.Device = None,
    offload: option.Offload = "none",
    debug: option.Debug = False,
    output: Annotated[
        str | None,
        option.output(
            "--out", help="x.mp4, x.gif, x.png or a folder. \\[default: named after the prompt]"
        ),
    ] = None,
    fps: option.Fps = None,
    report: Annotated[Path | None, option.output(help="Write the report as JSON, too.")] = None,
) -> None:
    """Generate a video or an image, and report what ran sparse.

    Example: [bold]dit-accel generate "a red circle moving left" --out clip.mp4[/]
    """
    from dit_accel.cli.generate import Request, run

    run(Request(**option.given(context)))


@app.command()
@guarded
def profiles(
    family: Annotated[
        str | None, typer.Option(help="Only those of one model family.", show_default=False)
    ] = None,
) -> None:
    """List the profiles that are shipped."""
    from dit_accel.cli.tables import profiles_table

    out.print(profiles_table(family))


@app.command()
@guarded
def computes(
    name: Annotated[
        str | None, typer.Argument(help="Show the parameters of this one.", show_default=False)
    ] = None,
) -> None:
    """List the patterns, selectors and tails of profiles, or the parameters of one."""
    from dit_accel.cli.tables import computes_table

    out.print(computes_table(name))


@app.command()
@guarded
def models() -> None:
    """List the models that are supported."""
    from dit_accel.cli.tables import models_table

    out.print(models_table())


@app.command()
@guarded
def doctor(
    model: Annotated[
        str | None,
        option.model(
            help="Also tell why a profile is not faster on this model; names as for plan.",
            show_default=False,
        ),
    ] = None,
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    profile: option.OneProfile = "auto",
    gpu: option.Gpu = None,
    debug: option.Debug = False,
) -> None:
    """Show versions, devices and backends; with --model, why it is not faster here."""
    from dit_accel.cli.doctor import check_alone, examine
    from dit_accel.cli.plan import diagnosis

    if model is None:
        check_alone(height=height, width=width, frames=frames, profile=profile, gpu=gpu)
        out.print(examine())
        return
    found = diagnosis(model, height, width, frames, profile, gpu)
    out.print(examine())
    out.print(found)


app.command()(guarded(compare))
app.command()(guarded(plan))
