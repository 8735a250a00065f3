"""The commands and their options. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

import dit_accel
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

MODEL, SIZE, SAMPLING, RUN, OUTPUT = "Model", "Size", "Sampling", "How it runs", "Output"


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
    prompt: Annotated[str, typer.Argument(help="What to show.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="demo, a folder in diffusers' format or a Hub id.", rich_help_panel=MODEL
        ),
    ] = "demo",
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=MODEL),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant of the weights: fp16.", rich_help_panel=MODEL)
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="auto, dense, a name from `dit-accel profiles`, or a TOML file.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail where attention that the profile plans sparse would run dense.",
            rich_help_panel=RUN,
        ),
    ] = False,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video.", rich_help_panel=SIZE)
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="First frame, for image-to-video models.", rich_help_panel=SAMPLING),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to show.", rich_help_panel=SAMPLING)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps.", rich_help_panel=SAMPLING)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How closely to follow the prompt.", rich_help_panel=SAMPLING),
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance against the negative prompt, for distilled models.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Same seed, same video.", rich_help_panel=SAMPLING)
    ] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="fp32, bf16 or fp16. \\[default: bf16 on a GPU, fp32 on a CPU]",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda, cuda:1, cpu. \\[default: the GPU if there is one]", rich_help_panel=RUN
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            help="none, model, sequential or group: what waits in CPU memory.",
            rich_help_panel=RUN,
        ),
    ] = "none",
    output: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="x.mp4, x.gif, x.png or a folder. \\[default: named after the prompt]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Frames per second. \\[default: the model's]", rich_help_panel=OUTPUT
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the report as JSON, too.", rich_help_panel=OUTPUT),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Generate a video or an image, and report what ran sparse.

    Example: [bold]dit-accel generate "a red circle moving left" --out clip.mp4[/]
    """
    from dit_accel.cli.generate import Request, run

    call = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
        "negative_prompt": negative_prompt,
    }
    run(
        Request(
            prompt=prompt,
            call=call,
            model=model,
            revision=revision,
            variant=variant,
            profile=profile,
            seed=seed,
            dtype=dtype,
            device=device,
            offload=offload,
            image=image,
            out=output,
            fps=fps,
            report=report,
            strict=strict,
        )
    )


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
def models() -> None:
    """List the models that are supported."""
    from dit_accel.cli.tables import models_table

    out.print(models_table())


@app.command()
@guarded
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Also tell why a profile is not faster on this model; names as for plan.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="auto, dense, a name, or a TOML file.", rich_help_panel=RUN)
    ] = "auto",
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames of a video.", rich_help_panel=SIZE)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Such as h100. \\[default: the one in this machine]", rich_help_panel=RUN
        ),
    ] = None,
) -> None:
    """Show versions, devices and backends; with --model, why it is not faster here."""
    from dit_accel.cli.doctor import examine
    from dit_accel.cli.plan import diagnosis

    out.print(examine())
    if model is not None:
        out.print(diagnosis(model, height, width, frames, profile, gpu))


app.command()(guarded(compare))
app.command()(guarded(plan))
