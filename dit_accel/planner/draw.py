"""Pictures of a plan: what one query sees on the video, and which blocks visit which."""

from __future__ import annotations

import math
import operator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.errors import DitAccelError
from dit_accel.kernels.blocks import block_tokens
from dit_accel.kernels.plan import BlockPlan

if TYPE_CHECKING:
    from dit_accel.planner.forecast import Forecast

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
INK: Color = (38, 42, 51)
FAINT: Color = (112, 118, 130)
DROPPED: Color = (229, 231, 235)
KEPT: Color = (37, 99, 180)
MASKED: Color = (138, 180, 228)
TEXT: Color = (222, 160, 44)
QUERY: Color = (214, 51, 50)
PALETTE = np.array([DROPPED, MASKED, KEPT], np.uint8)
MARGIN, GAP = 24, 10
WIDTH = 1180
MASK_SIDE = 420
LEGEND = (
    ("the query", QUERY), ("keys it sees", KEPT), ("computed, but masked", MASKED),
    ("not computed", DROPPED), ("text: always seen", TEXT),
)  # fmt: skip
ONLINE_LEGEND = (
    ("the query", QUERY), ("keys it always sees", KEPT), ("some of these, by q and k", DROPPED),
    ("text: always seen", TEXT),
)  # fmt: skip


def draw_plan(
    cast: Forecast, path: Path, query: tuple[int, int, int] | None = None, head: int = 0
) -> Path:
    """Write the PNG of a forecast; see `Forecast.draw`. Raises DitAccelError for a wrong query."""
    grid = cast.layout.grid
    place = (grid[0] // 2, grid[1] // 2, grid[2] // 2) if query is None else _place(query)
    for name, value, size in zip("thw", place, grid, strict=True):
        if not 0 <= value < size:
            raise DitAccelError(
                f"query: expected 0 <= {name} < {size}, got {value}; the nearest legal value is "
                f"{min(max(value, 0), size - 1)}."
            )
    if not isinstance(head, Integral) or not 0 <= head < max(cast.heads, 1):
        raise DitAccelError(f"head: expected 0 to {cast.heads - 1}, got {head!r}.")
    token = cast.layout.video_start + (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    seen = query_sees(cast.plan, token, head)
    start, stop = cast.layout.video_start, cast.layout.video_start + cast.layout.video_length
    colors = PALETTE[seen[start:stop].reshape(grid)]
    colors[place] = QUERY
    frames = [Image.fromarray(frame) for frame in colors]  # a token a pixel
    image = _page(cast, frames, _mask(cast, head), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def _place(query: Any) -> tuple[int, int, int]:
    """A query as three ints; DitAccelError if it is none."""
    try:
        t, h, w = map(operator.index, query)
    except (TypeError, ValueError):
        raise DitAccelError(
            f"query: expected three whole numbers (t, h, w), got {query!r}."
        ) from None
    return t, h, w


def query_sees(plan: BlockPlan, token: int, head: int = 0) -> np.ndarray:
    """uint8 [Lk]: 2 for keys that enter the query's softmax, 1 for computed but masked ones, 0."""
    head = min(head, plan.heads - 1)
    blocks = plan.blocks
    q_tokens, q_real = block_tokens(blocks.q, 0, blocks.block_q)
    block = int(((q_tokens == token) & q_real).any(-1).nonzero()[0])
    k_tokens, k_real = block_tokens(blocks.k, 0, blocks.block_k)
    seen = np.zeros(blocks.k_length, np.uint8)
    full, masked = (some.long() for some in plan.visits.entries(0, head, block))
    seen[k_tokens[full][k_real[full]].cpu().numpy()] = 2
    if plan.mask is not None:
        keys = k_tokens[masked][k_real[masked]]
        kept = plan.mask.allowed(q_tokens.new_tensor([token]), keys)[0]
        seen[keys.cpu().numpy()] = 1 + kept.cpu().numpy().astype(np.uint8)
    return seen


def block_mask(plan: BlockPlan, head: int = 0) -> np.ndarray:
    """uint8 [NQ, NK]: 2 for full visits, 1 for partial ones, 0 for none."""
    head = min(head, plan.heads - 1)
    mask = np.zeros((plan.shape.q_blocks, plan.shape.k_blocks), np.uint8)
    for block, row in enumerate(mask):
        full, masked = plan.visits.entries(0, head, block)
        row[full.cpu().numpy()] = 2
        row[masked.cpu().numpy()] = 1
    return mask


def _mask(cast: Forecast, head: int) -> Image.Image:
    """The block mask, other tokens' rows and columns in their own color, a block a pixel."""
    plan, layout = cast.plan, cast.layout
    mask = block_mask(plan, head)
    colors = PALETTE[mask]
    for axis, table in ((0, plan.blocks.q), (1, plan.blocks.k)):
        starts = table.starts.cpu().numpy()
        stop = layout.video_start + layout.video_length
        others = (starts < layout.video_start) | (starts >= stop)
        place = others[:, None] if axis == 0 else others[None]
        colors[np.broadcast_to(place, mask.shape) & (mask > 0)] = TEXT
    return Image.fromarray(colors)


def _page(
    cast: Forecast, frames: list[Image.Image], mask: Image.Image, query: tuple[int, int, int]
) -> Image.Image:
    title, note, small = map(ImageFont.load_default, (22, 15, 12))
    room = WIDTH - 3 * MARGIN - MASK_SIDE
    columns, scale = _arrange(len(frames), frames[0].size, room)
    cell_w = max(frames[0].width * scale, 24)
    cell_h = frames[0].height * scale + 18
    lines = -(-len(frames) // columns)
    top = 3 * MARGIN + 88
    used, known = _used(frames, mask), ONLINE_LEGEND if cast.online else LEGEND
    legend = [entry for entry in known if entry[1] in used]
    height = top + max(lines * (cell_h + GAP), MASK_SIDE + 30) + MARGIN + 24
    page = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN), f"{cast.pattern} on {cast.model}, {cast.size}", INK, title)
    facts = f"{cast.blocks:,} {cast.cut}, waste {cast.waste - 1:.1%}, {cast.densities}"
    if cast.speedup is not None:
        facts += f", predicted {cast.speedup:.2f}x on {cast.gpu}"
    pen.text((MARGIN, MARGIN + 32), facts, FAINT, note)
    pen.text((MARGIN, MARGIN + 54), _fit(cast.parameters, 180), FAINT, small)
    t, h, w = query
    pen.text((MARGIN, top - 26), f"Keys of the query at frame {t}, row {h}, column {w}", INK, note)
    for number, frame in enumerate(frames):
        x = MARGIN + number % columns * (cell_w + GAP)
        y = top + number // columns * (cell_h + GAP)
        page.paste(
            frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST),
            (x, y),
        )
        if number == t and scale < 5:  # a single token is hard to find: circle it
            at = x + (w + 0.5) * scale, y + (h + 0.5) * scale
            pen.ellipse((at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6), outline=QUERY, width=2)
        color = QUERY if number == t else FAINT
        pen.text((x, y + frame.height * scale + 2), f"frame {number}", color, small)
    left = WIDTH - MARGIN - MASK_SIDE
    count = f"{mask.height:,} x {mask.width:,}"
    pen.text((left, top - 26), f"Blocks: queries down, keys across ({count})", INK, note)
    # Fewer pixels than blocks: average, so that thin lines fade instead of vanishing.
    how = Image.Resampling.BOX if max(mask.size) > MASK_SIDE else Image.Resampling.NEAREST
    page.paste(mask.resize((MASK_SIDE, MASK_SIDE), how), (left, top))
    pen.rectangle((left - 1, top - 1, left + MASK_SIDE, top + MASK_SIDE), outline=FAINT)
    _legend(pen, legend, height - MARGIN - 8, note)
    return page


def _arrange(frames: int, size: tuple[int, int], room: int) -> tuple[int, int]:
    """Columns and pixels a token: as large as fits a page about as high as wide."""
    for scale in range(12, 0, -1):
        columns = (room + GAP) // (max(size[0] * scale, 24) + GAP)
        if columns < 1:
            continue
        lines = math.ceil(frames / columns)
        if lines * (size[1] * scale + 18 + GAP) <= 1.1 * WIDTH or scale == 1:
            return min(columns, frames), scale
    return 1, 1


def _used(frames: list[Image.Image], mask: Image.Image) -> set[Color]:
    found: set[Color] = set()
    for image in (*frames, mask):
        colors = image.getcolors(image.width * image.height) or []
        found.update((c[0], c[1], c[2]) for _, c in colors if isinstance(c, tuple))
    return found


def _legend(
    pen: ImageDraw.ImageDraw,
    entries: list[tuple[str, Color]],
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x = MARGIN
    for label, color in entries:
        pen.rectangle((x, top, x + 14, top + 14), fill=color)
        pen.text((x + 22, top - 2), label, INK, font)
        x += 22 + round(pen.textlength(label, font)) + 26


def _fit(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."
