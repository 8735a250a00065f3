"""Which attention call is planned: a model by its name, or any pipeline's own configuration."""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from dit_accel.errors import DitAccelError, whole_number
from dit_accel.layout import TokenLayout
from dit_accel.models.find import DEMO_DEFAULTS, find_model
from dit_accel.models.sizes import fit_sizes, skeleton
from dit_accel.pipelines.preset import Preset, Size
from dit_accel.pipelines.registry import ALIASES, PRESETS, adapter_of

MOST_TOKENS = 1_000_000
"""Tokens of a call up to which plans are made: in 5 to 40 s then, and at most 2.6 GB."""


@dataclass(frozen=True)
class Subject:
    """A model at a size: what a planner needs to know of it.

    layout: the tokens of a self-attention call. layers: self-attention calls of a forward. family:
    of its profiles, "" where there are none.
    forwards: of the transformer in a step (2 with guidance). token_weights: weights of the linear
    layers that every video token passes in a forward. notes: what of the asked size was changed.
    """

    name: str
    layout: TokenLayout
    heads: int
    head_dim: int
    layers: int
    forwards: int
    token_weights: float
    size: str
    family: str = ""
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def attention_flops(self) -> float:
        """Of one dense self-attention call."""
        return 4.0 * self.width * self.layout.length**2


def subject(
    model: str | PathLike[str],
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Subject:
    """The model of that name, folder or Hub id, at a size in pixels and frames.

    Raises DitAccelError for an unknown model, or a size without a single token.
    """
    if isinstance(model, PathLike):
        model = str(model)
    if not isinstance(model, str):
        raise DitAccelError(
            "model: expected a name such as 'wan-14b', a folder in diffusers' format or a Hub id, "
            f"as text, got {model!r}."
        )
    sizes = {"height": height, "width": width, "frames": frames}
    height, width, frames = (
        None if size is None else whole_number(side, size, 1) for side, size in sizes.items()
    )
    name = ALIASES.get(model, model)
    if name in PRESETS:
        return _preset(PRESETS[name], height, width, frames)
    if "/" not in model and not Path(model).exists() and model != "demo":
        close = _close_model(model)
        if close or not Path(model).suffix:
            hint = f" Did you mean {close!r}?" if close else ""
            raise DitAccelError(
                f"unknown model {model!r}.{hint} Known: {', '.join([*PRESETS, 'demo'])}, a folder "
                "in diffusers' format, or a Hub id written owner/name."
            )
    return _configured(model, height, width, frames)


def _close_model(model: str) -> str | None:
    """The known name that is nearly this one: a few letters in common are not enough."""
    found = difflib.get_close_matches(model.lower(), [*PRESETS, *ALIASES, "demo"], n=1, cutoff=0.7)
    return found[0] if found else None


def _preset(preset: Preset, height: int | None, width: int | None, frames: int | None) -> Subject:
    name, usual = preset.name, preset.size
    _check_frames(name, frames, images=usual.frames == 1)
    per_frame, per_pixel = preset.scales
    notes: list[str] = []
    sizes = {"height": height or usual.height, "width": width or usual.width}
    for side, pixels in sizes.items():
        if pixels % per_pixel and pixels > per_pixel:
            sizes[side] = pixels // per_pixel * per_pixel
            notes.append(
                f"{name} has tokens of {per_pixel} pixels: a {side} of {pixels} becomes "
                f"{sizes[side]}."
            )
    asked = frames or usual.frames
    long = (asked - 1 + per_frame // 2) // per_frame * per_frame + 1
    if long != asked:
        notes.append(f"{name} makes {per_frame}n+1 frames: {asked} becomes {long}.")
    size = Size(sizes["height"], sizes["width"], long)
    return Subject(
        name,
        _layout(preset.grid(size), preset.text, size),
        preset.heads,
        preset.head_dim,
        preset.depth,
        preset.forwards,
        preset.token_weights,
        _size_text(size),
        preset.family,
        tuple(notes),
    )


def _size_text(size: Size) -> str:
    frames = f", {size.frames} frames" if size.frames > 1 else ""
    return f"{size.width}x{size.height}{frames}"


def _check_frames(model: str, frames: int | None, *, images: bool) -> None:
    """DitAccelError for frames of a model that makes single images."""
    if images and frames not in (None, 1):
        raise DitAccelError(
            f"frames: {model} makes single images, got {frames}; leave frames out (or 1)."
        )


def _layout(grid: tuple[int, int, int], text: tuple[int, int], size: Size) -> TokenLayout:
    """size: what the grid is of."""
    high, wide, long = size
    if min(grid) < 1:
        raise DitAccelError(f"height, width, frames: {wide}x{high}x{long} is smaller than a token.")
    tokens = math.prod(grid) + sum(text)
    if tokens > MOST_TOKENS:
        t, h, w = _within(grid, MOST_TOKENS - sum(text))
        frames = (long - 1) // max(1, grid[0] - 1) * (t - 1) + 1
        near = f"{wide * w // grid[2]}x{high * h // grid[1]}x{frames}"
        raise DitAccelError(
            f"height, width, frames: {wide}x{high}x{long} is a call of {tokens:,} tokens; plans "
            f"are made for at most {MOST_TOKENS:,}. The nearest that is not more is {near}."
        )
    return TokenLayout(grid, *text)


def _within(grid: tuple[int, int, int], most: int) -> tuple[int, int, int]:
    """The grid, its longest axes cut to one length so that it has so many tokens at most."""
    shortest, middle, _ = sorted(grid)
    cut = most // (shortest * middle)
    if cut < middle:
        cut = math.isqrt(most // shortest)
    if cut < shortest:
        cut = int(most ** (1 / 3))
        cut += (cut + 1) ** 3 <= most  # of an exact cube, the root may come out a little less
    t, h, w = (min(axis, cut) for axis in grid)
    return t, h, w


def _configured(model: str, height: int | None, width: int | None, frames: int | None) -> Subject:
    """From the configuration of a pipeline, its transformer made without weights."""
    import diffusers

    found = find_model(model)
    adapter = adapter_of(found.family)
    assert adapter is not None, "find_model checks that the family is supported"
    pipe = skeleton(found, getattr(diffusers, found.pipeline_name()))
    accepted = inspect.signature(pipe.__call__).parameters
    _check_frames(model, frames, images="num_frames" not in accepted)
    asked = {"height": height, "width": width, "num_frames": frames}
    sizes = DEMO_DEFAULTS if found.demo else _defaults(pipe)
    given = {key: value or sizes.get(key) for key, value in asked.items()}
    notes: list[str] = []
    fitted = fit_sizes(pipe, {k: v for k, v in given.items() if v}, notes.append)
    high, wide, long = fitted.get("height"), fitted.get("width"), fitted.get("num_frames", 1)
    if high is None or wide is None:
        raise DitAccelError(f"height, width: {model} has no size of its own; give both.")
    size = Size(high, wide, long)
    transformer = pipe.transformer or pipe.transformer_2
    config = transformer.config
    sites = [site for site in adapter.modules(transformer) if site[3] == "self"]
    grid = adapter.grid(pipe, *size)
    return Subject(
        Path(found.source).name if found.demo else found.source,
        _layout(grid, adapter.text_tokens, size),
        config.num_attention_heads,
        config.attention_head_dim,
        len(sites),
        1 if getattr(config, "guidance_embeds", False) else 2,
        token_weights(transformer, {site.blocks for site in adapter.sites}),
        _size_text(size),
        found.family,
        tuple(notes),
    )


def _defaults(pipe: Any) -> dict[str, int]:
    parameters = inspect.signature(pipe.__call__).parameters
    names = ("height", "width", "num_frames")
    return {n: parameters[n].default for n in names if n in parameters and parameters[n].default}


OTHER_TOKENS = ("norm", "mod", "time", "add_", "context", "attn2.to_k", "attn2.to_v")
"""Parts of names of linear layers that see no video token: modulation, and text's own layers."""


def token_weights(transformer: Any, blocks: set[str]) -> float:
    """Weights of the linear layers in these block lists that every video token passes."""
    from torch import nn

    return float(
        sum(
            math.prod(module.weight.shape)
            for name in blocks
            if hasattr(transformer, name)
            for path, module in getattr(transformer, name).named_modules()
            if isinstance(module, nn.Linear) and not any(part in path for part in OTHER_TOKENS)
        )
    )


def at_grid(grid: tuple[int, int, int], heads: int, head_dim: int) -> Subject:
    """A self-attention call of no model in particular."""
    one = replace(PRESETS["wan-14b"], heads=heads, head_dim=head_dim, layers={"num_layers": 1})
    t, h, w = grid
    text, layout = "x".join(map(str, grid)), _layout(grid, (0, 0), Size(h, w, t))
    return Subject(
        f"grid {text}", layout, heads, head_dim, 1, 1, one.token_weights, f"{text} tokens"
    )
