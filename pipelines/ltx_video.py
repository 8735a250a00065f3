"""LTX-Video: text by cross-attention; the grid comes with the forward's arguments."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter, Bound, Sites, video_grid
from dit_accel.pipelines.preset import Preset, Size

if TYPE_CHECKING:
    from torch import nn


def _place(model: nn.Module, bound: Bound, cache: dict[Any, Any]) -> TokenLayout | str:
    coordinates = bound.get("video_coords")
    if coordinates is not None:  # then the model does not look at the grid's arguments
        held = cache.get("video_coords")
        if held is None or held[0] is not coordinates:
            held = cache["video_coords"] = (coordinates, _read(coordinates.float().cpu()))
        return held[1]
    grid = (bound.get("num_frames"), bound.get("height"), bound.get("width"))
    if None in grid:
        return "the call gives neither a grid nor coordinates"
    shape = tuple(int(n) for n in grid if n is not None)
    if bound["hidden_states"].shape[1] != prod(shape):
        return "the tokens are not those of the grid"
    return TokenLayout((shape[0], shape[1], shape[2]))


def _read(coordinates: Any) -> TokenLayout | str:
    """The layout of tokens with these coordinates, [batch, (t, y, x), tokens]: the largest raster
    among them is the video, and the others are conditions."""
    if not bool((coordinates == coordinates[:1]).all()):
        return "the coordinates differ between the samples"
    grids = _rasters(coordinates[0])
    frames, height, width = max(grids, key=prod)
    place = grids.index((frames, height, width))
    if 2 * prod(grids[place]) < coordinates.shape[-1]:
        return "the coordinates are not one grid in raster order"
    before, after = (sum(map(prod, part)) for part in (grids[:place], grids[place + 1 :]))
    return TokenLayout((frames, height, width), before=before, after=after)


def _rasters(coordinates: Any) -> list[tuple[int, int, int]]:
    """(T, H, W) of the rasters that follow each other, of coordinates [(t, y, x), tokens].

    A row goes on while x rises, a frame while rows of equal x follow each other downwards, a raster
    while frames of equal rows follow each other in time.
    """
    t, y, x = coordinates.tolist()
    rows: list[tuple[float, float, tuple[float, ...]]] = []
    begin = 0
    for i in range(1, len(x) + 1):
        if i == len(x) or (t[i], y[i]) != (t[begin], y[begin]) or x[i] <= x[i - 1]:
            rows.append((t[begin], y[begin], tuple(x[begin:i])))
            begin = i
    frames: list[tuple[float, tuple[float, ...], tuple[float, ...]]] = []
    for time, down, across in rows:
        if frames:
            latest, downs, same = frames[-1]
            if latest == time and same == across and downs[-1] < down:
                frames[-1] = (time, (*downs, down), across)
                continue
        frames.append((time, (down,), across))
    grids: list[tuple[int, int, int]] = []
    before: tuple[float, tuple[float, ...], tuple[float, ...]] | None = None
    for frame in frames:
        if before is not None and before[1:] == frame[1:] and before[0] < frame[0]:
            grids[-1] = (grids[-1][0] + 1, *grids[-1][1:])
        else:
            grids.append((1, len(frame[1]), len(frame[2])))
        before = frame
    return grids


LTX_VIDEO = Adapter(
    branches=("cond_uncond",),
    family="ltx_video",
    transformers=("LTXVideoTransformer3DModel",),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline"),
    sites=(
        Sites("transformer_blocks", "attn1", "self"),
        Sites("transformer_blocks", "attn2", "cross"),
    ),
    place=_place,
    grid=video_grid,
    text_valid="the prompt's own tokens (stock masks the padding)",
    fps=24.0,
    presets=(
        Preset(
            "ltx", "LTX-Video 2B", "ltx_video", 32, 64, {"num_layers": 28}, 8192, True,
            Size(512, 704, 161), scales=(8, 32), latent=32, prompt=128, config={},
            source="Lightricks/LTX-Video", aliases=("ltx-video",),
        ),
    ),
)  # fmt: skip
