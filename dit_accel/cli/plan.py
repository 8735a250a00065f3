"""The options of `dit-accel plan`. Nothing here imports torch: `--help` answers at once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli import option
from dit_accel.cli.console import out
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.registry import PRESETS

of_pattern = partial(typer.Option, rich_help_panel="Pattern")


def plan(
    model: Annotated[
        str,
        option.model(
            help=f"{', '.join(PRESETS)}, demo, a folder in diffusers' format or a Hub id."
        ),
    ] = "wan-14b",
    height: option.Height = None,
    width: option.Width = None,
    frames: option.Frames = None,
    pattern: Annotated[
        str,
        of_pattern(
            help="Name of a pattern or a selector, with parameters as in "
            "radial:decay=0.2,exact=true or block_topk:density=0.2."
        ),
    ] = "sliding_tile",
    window: Annotated[
        str | None,
        of_pattern(
            help="t,h,w: whole numbers count tiles, decimals up to 1.0 are fractions of an axis; "
            "with a unit: tokens=9,15,24.",
            show_default=False,
        ),
    ] = None,
    tile: Annotated[str, of_pattern(help="t,h,w in tokens; auto is the best one.")] = "auto",
    gpu: option.Gpu = None,
    backend: Annotated[
        str | None, option.run(help="hopper, triton or torch. \\[default: the fastest there]")
    ] = None,
    debug: option.Debug = False,
    picture: Annotated[
        Path | None, option.output("--out", help="Draw the pattern into this PNG.")
    ] = None,
    query: Annotated[
        str | None,
        option.output(help="t,h,w in tokens of the query to draw. \\[default: the middle]"),
    ] = None,
    as_json: Annotated[bool, option.output("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a pattern will cost on a model, and draw it, before anything runs.

    Example: [bold]dit-accel plan --model wan-14b --height 720 --width 1280 --frames 81
    --pattern sliding_tile --window 3,3,3 --gpu h100 --out plan.png[/]
    """
    from dit_accel.cli import runtime
    from dit_accel.compare.specs import parameters_of
    from dit_accel.planner import plan as forecast
    from dit_accel.planner.forecast import rows

    runtime.quiet()
    place = None if query is None else _triple("--query", query)
    name = pattern.partition(":")[0].strip()
    parameters: dict[str, Any] = parameters_of(pattern) if ":" in pattern else {}
    if window is not None:
        parameters["window"] = _window(window)
    if tile != "auto":
        parameters["tile"] = list(_triple("--tile", tile))
    if picture is not None and picture.suffix.lower() != ".png":
        raise DitAccelError(f"--out: expected a file that ends in .png, got {picture}.")
    cast = forecast(model, height, width, frames, name, gpu=gpu, backend=backend, **parameters)
    try:
        drawn = None if picture is None else cast.draw(picture, place)
    except OSError as error:
        raise DitAccelError(f"--out: {picture} cannot be written: {error.strerror}.") from None
    if as_json:
        out.print_json(json.dumps(cast.to_dict(), default=str))
        return
    out.print(_table("dit-accel plan", rows(cast)))
    if drawn is not None:
        out.print(f"drawn: {drawn}", highlight=False)


def diagnosis(
    model: str,
    height: int | None,
    width: int | None,
    frames: int | None,
    profile: str,
    gpu: str | None,
) -> Any:
    """The table of `dit-accel doctor --model`."""
    from dit_accel.cli import runtime
    from dit_accel.planner import diagnose

    runtime.quiet()
    found = diagnose(model, height, width, frames, profile, gpu=gpu)
    return _table("why is it not faster here?", found.rows())


def _table(title: str, rows: list[tuple[str, str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))  # brackets are no markup here
    return table


def _window(text: str) -> dict[str, list[float]]:
    """A window from `3,3,3` (tiles), `0.5,0.5,0.5` (fractions) or `tokens=9,15,24`."""
    unit, equals, rest = text.partition("=")
    from dit_accel.kernels.geometry.windows import bare_window

    numbers = _numbers("--window", rest if equals else text)
    return {unit.strip(): numbers} if equals else bare_window(numbers)


def _triple(option: str, text: str) -> tuple[int, int, int]:
    numbers = _numbers(option, text)
    if len(numbers) != 3 or not all(isinstance(number, int) for number in numbers):
        raise DitAccelError(f"{option}: expected three whole numbers t,h,w, got {text!r}.")
    t, h, w = (int(number) for number in numbers)
    return t, h, w


def _numbers(option: str, text: str) -> list[Any]:
    try:
        return [
            float(part) if "." in part or "e" in part.lower() else int(part)
            for part in text.strip("[] ").split(",")
        ]
    except ValueError:
        raise DitAccelError(f"{option}: expected numbers t,h,w, got {text!r}.") from None
