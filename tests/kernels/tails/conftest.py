"""Shared by the tests of tails: the rules of the probe and of tails, in loops and in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.geometry.tiling import fixed_tiling
from dit_accel.kernels.selectors import Context
from dit_accel.layout import TokenLayout

SCALE = 0.2


@pytest.fixture(params=["torch", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The steps of tails in torch, and in Triton (in its interpreter where there is no GPU)."""
    from dit_accel.kernels import probe
    from dit_accel.kernels.selectors import select
    from dit_accel.kernels.tails import join

    for module in (probe, select, join):
        monkeypatch.setattr(module, "runs_triton", lambda x: request.param == "triton")
    return str(request.param)


class Video:
    """Blocks of a video by enumeration: raster tokens of each, and the valid keys per sample."""

    def __init__(self, layout: TokenLayout, tile: tuple[int, int, int]) -> None:
        t, h, w = layout.grid
        tiles: dict[tuple[int, ...], list[int]] = {}
        for token, place in enumerate(itertools.product(range(t), range(h), range(w))):
            at = tuple(x // n for x, n in zip(place, tile, strict=True))
            tiles.setdefault(at, []).append(token + layout.before)
        self.queries = [tiles[at] for at in sorted(tiles)]


class Rule:
    """A tail by its definition, for one sample and head: k, v of that head, float64."""

    def __init__(
        self, q: Any, k: Any, v: Any, blocks: list[list[int]], size: int, exact: bool
    ) -> None:
        self.q, self.k, self.v, self.blocks = q, k, v, blocks
        self.pieces = [[b[n : n + size] for n in range(0, len(b), size)] for b in blocks]
        self.exact = exact

    def row(self, i: int, j: int) -> list[float]:
        """The probe of query block i over key block j."""
        mean = self.q[self.blocks[i]].mean(0)
        return [SCALE * float(mean @ self.k[t]) for t in self.blocks[j]]

    def mass(self, i: int, j: int) -> float:
        if self.exact:
            return math.log(sum(map(math.exp, self.row(i, j))))
        mean = self.q[self.blocks[i]].mean(0)
        own = SCALE * float(mean @ self.k[self.blocks[j]].mean(0))
        return own + math.log(len(self.blocks[j]))

    def error(self, i: int, j: int) -> float:
        row = self.row(i, j)
        mean = sum(row) / len(row)
        spread = sum((x - mean) ** 2 for x in row) / len(row)
        return self.mass(i, j) + 0.5 * math.log(spread + 1e-3)

    def shift(self, i: int, piece: list[int]) -> float:
        if not self.exact:
            return math.log(len(piece))
        mean = self.q[self.blocks[i]].mean(0)
        row = [SCALE * float(mean @ self.k[t]) for t in piece]
        return math.log(sum(map(math.exp, row))) - sum(row) / len(row)

    def covariance(self, j: int) -> Any:
        """C_j: of each piece about its own means, weighed by its tokens."""
        total = torch.zeros(self.k.shape[1], self.v.shape[1], dtype=torch.float64)
        for piece in self.pieces[j]:
            key, value = self.k[piece].mean(0), self.v[piece].mean(0)
            for t in piece:
                total += torch.outer(self.k[t] - key, self.v[t] - value)
        return total / len(self.blocks[j])

    def weights(self, i: int, far: list[int]) -> list[float]:
        masses = [self.mass(i, j) for j in far]
        top = max(masses)
        each = [math.exp(x - top) for x in masses]
        return [x / sum(each) for x in each]


@pytest.fixture
def video() -> type[Video]:
    return Video


@pytest.fixture
def rule() -> type[Rule]:
    return Rule


@pytest.fixture
def call(device: torch.device) -> Callable[..., Context]:
    """A call over a layout that is cut into tiles; tokens differ, neighbours are alike."""

    def make(
        layout: TokenLayout,
        tile: tuple[int, int, int],
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        dim: int = 32,
        size: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Context:
        generator = torch.Generator().manual_seed(layout.length)
        kv = kv_heads or heads
        tensors = [
            torch.randn(batch, layout.length, n, dim, generator=generator).cumsum(1) * 0.3
            + torch.randn(batch, layout.length, n, dim, generator=generator)
            for n in (heads, kv, kv)
        ]
        tensors = [(x / x.std()).to(device, dtype) for x in tensors]
        blocks = blocks_of(layout, fixed_tiling(layout.grid, tile), device)
        return Context(*tensors, blocks, SCALE, heads, size=size)

    return make
