"""What a pattern will do to a model at a size, told before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from dit_accel.costs.files import known_gpus, no_table, this_gpu
from dit_accel.costs.table import CostTable, cost_table
from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.backends import BACKENDS, LAYOUT_KINDS
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.computes import compute, parse_compute
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.windows import bare_window
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.selectors import Selector
from dit_accel.layout import TokenLayout
from dit_accel.planner.models import Subject, subject
from dit_accel.planner.outlook import Outlook, outlook
from dit_accel.planner.work import sparse_ms

PASSES = 280
"""Times that a layer's channels are read or written outside self-attention and matrix products, in
eager: what samples/results/step_wan14b_h200.csv leaves for them (casts, norms and rotations in
float32, cross-attention)."""


@dataclass(frozen=True)
class Forecast:
    """A plan's shape and its predicted times; `str()` gives a table, `draw()` a picture.

    Densities are over all token pairs: launched counts the blocks that the kernel computes, kept
    the pairs that enter the softmax. waste: slots of the blocks over tokens. bound: speed-up of the
    call if time were launched pairs. Times are milliseconds of one call and of one denoising step,
    None without a table for the GPU. breakeven: launched density above which dense is faster.
    best_tile, best_launched: of the tile that would be chosen, where another one was given. moved:
    whether tokens are moved into the blocks' order in memory. assumed: whether nobody named the
    backend and no table tells which is the fastest. notes: what of the request was changed, and
    what the numbers leave out. online: whether q and k choose the blocks, call by call: then
    densities and times are those to expect, and `plan` holds the blocks that are always kept.
    """

    model: str
    size: str
    layout: TokenLayout
    heads: int
    head_dim: int
    layers: int
    forwards: int
    pattern: str
    parameters: str
    backend: str
    gpu: str
    measured_on: str
    tile: tuple[int, int, int]
    blocks: int
    block: int
    cut: str
    waste: float
    launched: float
    kept: float
    best_tile: tuple[int, int, int] | None
    best_launched: float | None
    dense_ms: float | None
    sparse_ms: float | None
    dense_step_ms: float | None
    sparse_step_ms: float | None
    breakeven: float | None
    moved: bool
    assumed: bool
    notes: tuple[str, ...]
    online: bool
    plan: BlockPlan = field(repr=False, compare=False)

    @property
    def bound(self) -> float:
        """Speed-up of the call if time were launched pairs."""
        return 1 / self.launched

    @property
    def speedup(self) -> float | None:
        """Predicted speed-up of the call."""
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None

    @property
    def step_speedup(self) -> float | None:
        """Predicted speed-up of a step."""
        if not self.dense_step_ms or not self.sparse_step_ms:
            return None
        return self.dense_step_ms / self.sparse_step_ms

    @property
    def densities(self) -> str:
        """Launched and kept density in words."""
        expected = "about " if self.online else ""
        return f"launched {self.launched:.1%}, kept {expected}{self.kept:.1%}"

    @property
    def verdict(self) -> str:
        """One sentence: whether the pattern pays, and why not."""
        if self.speedup is None or self.breakeven is None:
            return f"at best {self.bound:.2f}x for the call; no table to say more."
        if self.speedup <= 1:
            launched = f"it launches {self.launched:.1%} of the pairs"
            return f"cannot pay here: {launched}, and {breakeven_text(self)}."
        step = f", {self.step_speedup:.2f}x a step" if self.step_speedup else ""
        return f"pays: {self.speedup:.2f}x for the call{step}."

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the plan."""
        data = {name: value for name, value in vars(self).items() if name not in ("plan", "layout")}
        extra = ("bound", "speedup", "step_speedup", "verdict")
        layout = {"grid": self.layout.grid, "text": self.layout.before + self.layout.after}
        return {**data, **layout, **{name: getattr(self, name) for name in extra}}

    def draw(
        self, path: str | Path, query: tuple[int, int, int] | None = None, head: int = 0
    ) -> Path:
        """Write a PNG: the keys that a query sees, frame by frame, and the block mask.

        query: (t, h, w) in tokens, the middle of the video unless given.

        Raises DitAccelError for a path that is none, and a query or a head that is not there.
        """
        from dit_accel.planner.draw import draw_plan

        if not isinstance(path, (str, PathLike)) or Path(path).suffix.lower() != ".png":
            raise DitAccelError(f"path: expected a file that ends in .png, got {path!r}.")
        return draw_plan(self, Path(path), query, head)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in rows(self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows(self))


def plan(
    model: str | Subject,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    pattern: str | Compute | Mapping[str, Any] = "sliding_tile",
    *,
    gpu: str | None = None,
    backend: str | None = None,
    **parameters: Any,
) -> Forecast:
    """What a pattern would do to a model's self-attention at a size.

    Args:
        model: "wan-14b" and the like (see `pipelines.registry`), a folder in diffusers' format, a
            Hub id, or "demo".
        height, width, frames: in pixels; the model's usual ones unless given.
        pattern: a pattern or a selector, a table such as {"compute": "radial", "decay": 0.3}, or
            the name of one with its `parameters`.
        gpu: such as "h100"; this machine's unless given. Times need a table for it.
        window: of those patterns that have one, also as three bare numbers: whole ones count tiles,
            with a decimal among them they are fractions of each axis.
        backend: whose kernels run it; the fastest that was measured unless given.

    Raises:
        DitAccelError: an unknown name or a wrong value, with the nearest.
    """
    what = model if isinstance(model, Subject) else subject(model, height, width, frames)
    rule = _compute(pattern, parameters)
    table = cost_table(gpu)
    if table is None and gpu is not None:
        raise no_table(gpu)
    if backend is not None and not (isinstance(backend, str) and backend in LAYOUT_KINDS):
        raise unknown("backend", str(backend), LAYOUT_KINDS)
    names = [backend] if backend else [n for n in LAYOUT_KINDS if table and n in table.backends]
    options = [_Option(name, kind) for name in names or ["triton"] for kind in LAYOUT_KINDS[name]]
    made = {o: outlook(what.layout, rule, what.heads, o.kind) for o in options}
    able = [o for o in options if BACKENDS[o.backend].refuses(made[o].shape) is None]
    options = able or options
    priced = {option: _price(table, made[option], option, what) for option in options}
    best = min(options, key=lambda option: priced[option] or 0.0)
    cast = _forecast(what, rule, table, best, made[best], priced[best])
    return dataclasses.replace(cast, assumed=backend is None and priced[best] is None)


@dataclass(frozen=True)
class _Option:
    """A backend, and how it reads blocks."""

    backend: str
    kind: LayoutKind


def _compute(given: str | Compute | Mapping[str, Any], parameters: Mapping[str, Any]) -> Compute:
    if isinstance(given, str):
        window = parameters.get("window")
        if isinstance(window, Sequence) and not isinstance(window, str):
            parameters = {**parameters, "window": bare_window(window)}
        return compute(given, **parameters)
    rule = parse_compute(given, "pattern")
    if parameters:
        raise DitAccelError("pattern: give its parameters with its name, or in the pattern itself.")
    return rule


def _price(table: CostTable | None, made: Outlook, option: _Option, what: Subject) -> float | None:
    if table is None or option.backend not in table.backends:
        return None
    moved = BACKENDS[option.backend].moves(made.shape)
    return sparse_ms(table, made.likely, option.backend, 1, what.heads, what.head_dim, moved=moved)


_SHARED = ("size", "layout", "heads", "head_dim", "layers", "forwards")
"""What a forecast says of its subject."""


def _forecast(
    what: Subject,
    rule: Compute,
    table: CostTable | None,
    option: _Option,
    made: Outlook,
    sparse: float | None,
) -> Forecast:
    backend = option.backend
    tiling = rule.tiling(what.layout, option.kind)
    dense = dense_step = sparse_step = breakeven = None
    launched = made.launched(backend)
    if table is not None:
        dense = table.dense_ms(1, what.heads, what.layout.length, what.head_dim)
        calls = what.layers * what.forwards
        dense_step = other_ms(table, what) + calls * dense
        if sparse is not None:
            sparse_step = dense_step + calls * (sparse - dense)
            fixed = table.launch_ms(backend, what.head_dim)
            breakeven = launched * max(0.0, dense - fixed) / max(1e-9, sparse - fixed)
    best_tile, best_launched = _best_tile(what, rule, option)
    return Forecast(
        model=what.name,
        **{name: getattr(what, name) for name in _SHARED},
        pattern=rule.name,
        parameters=rule.describe(),
        backend=backend,
        gpu=(table.stands_for or table.gpu) if table else this_gpu(),
        measured_on=table.gpu if table else "",
        tile=tiling.box or tiling.tile,
        blocks=tiling.blocks,
        block=tiling.block,
        cut=tiling.words,
        waste=tiling.waste if option.kind != "lengths" else 1.0,
        launched=launched,
        kept=made.kept,
        best_tile=best_tile,
        best_launched=best_launched,
        dense_ms=dense,
        sparse_ms=sparse,
        dense_step_ms=dense_step,
        sparse_step_ms=sparse_step,
        breakeven=breakeven,
        moved=BACKENDS[backend].moves(made.shape),
        assumed=False,
        notes=(
            *what.notes,
            *_cut_tiles(rule, what.layout.grid),
            *_chosen_later(rule, sparse is not None),
        ),
        online=rule.online,
        plan=made.plan,
    )


def _cut_tiles(rule: Compute, grid: tuple[int, int, int]) -> list[str]:
    """What to say of a given tile that is longer than the grid."""
    tile: Any = getattr(rule, "tile", "auto")
    if tile == "auto" or all(edge <= size for edge, size in zip(tile, grid, strict=True)):
        return []
    t, h, w = (min(edge, size) for edge, size in zip(tile, grid, strict=True))
    return [f"a tile of {_x(tile)} is longer than the grid {_x(grid)}: it holds {_x((t, h, w))}."]


def _chosen_later(rule: Compute, timed: bool) -> list[str]:
    """What to say of a selector: which numbers are only to be expected."""
    if not isinstance(rule, Selector):
        return []
    most = " at most" if rule.budget(1).mass is not None else ""
    notes = [f"blocks are chosen from q and k at each call: densities are those to expect{most}."]
    if timed:
        notes.append("the choice of blocks is not in the times: its price was not measured.")
    return notes


def other_ms(table: CostTable, what: Subject) -> float:
    """Estimated milliseconds of a step outside self-attention."""
    tokens = what.layout.length
    passes = table.passes_ms(PASSES * what.layers, tokens * what.width)
    return what.forwards * (table.linear_ms(what.token_weights, tokens) + passes)


def _best_tile(
    what: Subject, rule: Compute, option: _Option
) -> tuple[tuple[int, int, int] | None, float | None]:
    """The tile that would be chosen, where the user gave another one."""
    if getattr(rule, "tile", "auto") == "auto":
        return None, None
    free = dataclasses.replace(rule, tile="auto")  # type: ignore[call-arg]
    tiling = free.tiling(what.layout, option.kind)
    made = outlook(what.layout, free, what.heads, option.kind)
    return tiling.box or tiling.tile, made.launched(option.backend)


def rows(cast: Forecast) -> list[tuple[str, str]]:
    """Names and values for a table."""
    t, h, w = cast.layout.grid
    text = cast.layout.before + cast.layout.after
    tokens = f"{cast.layout.length:,} tokens: {t} x {h} x {w}" + (f" + {text} text" * bool(text))
    found = [
        ("model", f"{cast.model}, {cast.size}"),
        ("call", f"{tokens}, {cast.heads} heads of {cast.head_dim}, {cast.layers} layers"),
        ("pattern", f"{cast.pattern}: {cast.parameters}" if cast.parameters else cast.pattern),
        ("backend", _backend(cast)),
        ("blocks", f"{cast.blocks:,} of {cast.block} slots: {cast.cut}"),
        ("waste", f"{cast.waste - 1:.1%} more slots than tokens"),
        ("density", f"{cast.densities} of all pairs"),
        ("bound", f"{cast.bound:.2f}x for the call, at the dense kernel's speed"),
    ]
    if cast.best_tile is not None and cast.best_launched is not None:
        found.append(("best tile", f"{_x(cast.best_tile)}: launched {cast.best_launched:.1%}"))
    found[1:1] = [("note", note) for note in cast.notes]
    where = cast.gpu or "no GPU here or named"
    if cast.measured_on and cast.measured_on != cast.gpu:
        where += f" (numbers of the {cast.measured_on})"
    if cast.dense_ms is None:
        return [*found, ("times", f"{where}: no table to predict from (there are: {known_gpus()})")]
    found.append(("predicted for", where))
    found.append(("dense", "the fastest kernel that comes with torch"))
    found.append(("call", _times(cast.dense_ms, cast.sparse_ms)))
    step = "step" if cast.forwards == 1 else f"step, {cast.forwards} forwards"
    found.append((step, _times(cast.dense_step_ms, cast.sparse_step_ms)))
    if cast.breakeven is not None:
        found.append(("break-even", breakeven_text(cast)))
    return [*found, ("verdict", cast.verdict)]


def breakeven_text(cast: Forecast) -> str:
    """Launched density and tokens at which sparse and dense calls take as long."""
    if cast.breakeven is None:
        return "not known: it needs a table of this GPU"
    tokens = f"at {cast.layout.length:,} tokens"
    share = max(0.0, cast.breakeven)
    if round(share, 2) >= 1 and (cast.speedup or math.inf) > 1:
        return f"{tokens} sparse is never slower than dense, however much is launched"
    return f"{tokens} dense is faster above {share:.1%} launched"


def _backend(cast: Forecast) -> str:
    """Whose kernels are meant, and why."""
    why = " (assumed: no table tells which is the fastest)" if cast.assumed else ""
    return f"{cast.backend}{', tokens moved into tiles' * cast.moved}{why}"


def _x(tile: tuple[int, int, int]) -> str:
    return "x".join(map(str, tile))


def _times(dense: float | None, sparse: float | None) -> str:
    if dense is None or sparse is None:
        return "not known"
    return f"{dense:,.2f} ms dense, {sparse:,.2f} ms sparse: {dense / sparse:.2f}x"
