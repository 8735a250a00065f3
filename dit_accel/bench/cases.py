"""The attention calls that are measured: those of real models, and round sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, unknown
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.preset import Size
from dit_accel.pipelines.registry import PRESETS

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
QUICK_DENSITIES = (0.5, 0.2, 0.1)
QUICK_HEADS = 8
TINY_GRID = (3, 10, 11)
LOUDNESS = 0.8


@dataclass(frozen=True)
class Case:
    """A self-attention call: where its tokens are, and its heads.

    video: whether the grid means anything; without, the tokens are a plain sequence.
    table: whether `--quick` measures it: round sizes, and the ones that goals are set for.
    """

    name: str
    title: str
    layout: TokenLayout
    heads: int
    head_dim: int
    video: bool = True
    table: bool = False

    def shrunk(self) -> Case:
        """The same kind of call, small enough for a CPU and with ragged sizes."""
        t, h, w = (min(size, most) for size, most in zip(self.layout.grid, TINY_GRID, strict=True))
        if not self.video:
            t, h, w = 1, 1, 384 if self.layout.length % 128 == 0 else 301
        before, after = (min(13, n) for n in (self.layout.before, self.layout.after))
        layout = TokenLayout((t, h, w), before, after)
        title = f"{self.title}, cut down"
        return replace(self, title=title, layout=layout, heads=2, head_dim=self.head_dim // 2)


def _sequence(length: int) -> TokenLayout:
    return TokenLayout((1, 1, length))


def _model(name: str, size: Size | None = None) -> Case:
    """A model's call; at another size than its own, its height is a part of the name."""
    preset = PRESETS[name]
    height, width, frames = size or preset.size
    what = f"{width}x{height}" + f"x{frames}" * (frames > 1)
    return Case(
        f"{name}-{height}" if size else name,
        f"{preset.title}, {what}",
        preset.layout(size),
        preset.heads,
        preset.head_dim,
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("l32768", "32,768 tokens", _sequence(32768), 12, 128, video=False, table=True),
        Case("l75776", "75,776 tokens", _sequence(75776), 8, 128, video=False, table=True),
        Case("21x45x80", "grid 21x45x80", TokenLayout((21, 45, 80)), 8, 128, table=True),
        Case("l17664", "17,664 tokens, D64", _sequence(17664), 16, 64, video=False, table=True),
        Case("13x30x45", "grid 13x30x45, D64", TokenLayout((13, 30, 45)), 16, 64, table=True),
        *(_model(name) for name in ("wan-1.3b", "wan-14b", "hunyuan", "cogvideox-5b")),
        _model("flux", Size(1024, 1024)),
        _model("flux", Size(4096, 4096)),
    )
}


def pick_cases(
    names: Sequence[str], *, quick: bool = False, tiny: bool = False, heads: int | None = None
) -> list[Case]:
    """The cases that these names mean; none means all, or those of the table where `quick`.

    Raises DitAccelError for an unknown name.
    """
    for name in names:
        if name not in (*CASES, "all"):
            raise unknown("case", name, (*CASES, "all"))
    chosen = [CASES[name] for name in names if name != "all"]
    if "all" in names or not names:
        chosen = [case for case in CASES.values() if case.table or not quick or names]
    if tiny:
        chosen = [case.shrunk() for case in chosen]
    if heads is None and quick:
        chosen = [
            case if case.table else replace(case, heads=min(case.heads, QUICK_HEADS))
            for case in chosen
        ]
    return [case if heads is None else replace(case, heads=heads) for case in chosen]


def check_densities(densities: Sequence[float], option: str) -> tuple[float, ...]:
    """The densities, each in (0, 1]; DitAccelError for another, by the option that gave it."""
    for value in densities:
        if not 0 < value <= 1:
            near = 1.0 if value > 1 else 0.05
            raise DitAccelError(
                f"{option}: expected numbers in (0, 1], got {value:g}; the nearest is {near}."
            )
    return tuple(densities)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [1, L, heads, head_dim].

    q and k lean to opposite sides, so that real scores are far below 0: a key that a kernel reads
    as zeros by mistake (a padded slot has score 0) then outweighs all the real ones and shows.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, case.layout.length, case.heads, case.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    lean = torch.randint(2, (case.head_dim,), generator=generator, device=device)
    lean = (2 * lean - 1).to(dtype) * LOUDNESS
    return q.add_(lean), k.sub_(lean), v
