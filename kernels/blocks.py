"""How the queries and keys of a call are cut into blocks: what q and k cannot change.

Tokens are never moved in memory: `BlockTable.order` says which token stands at each position of
block order, a block is a run of positions, and a kernel reads and writes rows through `order`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.geometry.tiling import Tiling

Triple = tuple[int, int, int]
BlockForm = Literal["boxes", "gather", "lengths"]
"""How a backend reads blocks: boxes of the raster tensor, tokens gathered into slots of 64 or 128,
or exactly the tokens of each block."""


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Blocks over one side (queries or keys) of a call.

    order: int32 [L], the raster token at each position of block order; None is the identity.
    starts: int32 [N], the first position of each block.
    lengths: int32 [Bp, N], tokens of each block; Bp is 1, or the batch where samples differ.
    origins: int32 [N, 3], where each block begins: (t, h, w) of a video tile's first token,
        (-1, start, 0) of a run of consecutive tokens; None where nobody worked it out.
    """

    order: Tensor | None
    starts: Tensor
    lengths: Tensor
    origins: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.starts.shape[0]

    @property
    def sample_stride(self) -> int:
        """Stride of the samples in `lengths`, 0 where they share them."""
        return self.lengths.stride(0) if len(self.lengths) > 1 else 0

    def to(self, device: torch.device | str) -> BlockTable:
        """The same table on another device."""
        order, origins = (
            None if part is None else part.to(device) for part in (self.order, self.origins)
        )
        return BlockTable(order, self.starts.to(device), self.lengths.to(device), origins)

    def in_place(self, block: int, length: int) -> bool:
        """Whether the blocks are the `length` tokens themselves, cut every `block` tokens, for
        every sample."""
        if self.order is not None or self.count != -(-length // block):
            return False
        starts = torch.arange(self.count, device=self.starts.device) * block
        lengths = (length - starts).clamp_max(block)
        return bool((self.starts == starts).all() & (self.lengths == lengths).all())


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of both sides of a call.

    q, k: the blocks of queries and of keys; no query is in two blocks.
    q_length, k_length: tokens of the call, Lq and Lk.
    block_q, block_k: slots of a block in the kernel; no block is longer.
    box: (t, h, w) where every video block is the box of that size at its origin, clipped at the
        far edges of the grid; its edges are powers of two whose product is block_q and block_k.
    grid, video_start: (T, H, W) of the video and its first raster token, where known.
    first_video, video_blocks: on both sides the video's blocks are the numbers [first_video,
        first_video + video_blocks); the others hold text, audio and the like.
    tiling: what the video's blocks were cut by, where known.
    covers: whether every query is in a block of every sample; None is worked out from the table
        (and waits for the device).
    """

    q: BlockTable
    k: BlockTable
    q_length: int
    k_length: int
    block_q: int = 128
    block_k: int = 128
    box: Triple | None = None
    grid: Triple | None = None
    video_start: int = 0
    first_video: int = 0
    video_blocks: int = 0
    tiling: Tiling | None = None
    covers: bool = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.covers is None:
            covered = (self.q.lengths.sum(-1) == self.q_length).all()
            object.__setattr__(self, "covers", bool(covered))

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.k.starts.device

    @property
    def scattered(self) -> bool:
        """Whether blocks are neither boxes of the grid nor runs of tokens."""
        return self.box is None and (self.q.order is not None or self.k.order is not None)

    @property
    def mixed(self) -> bool:
        """Whether boxes of the video stand beside runs of other tokens."""
        if self.box is None:
            return False
        t, h, w = self.grid or (0, 0, 0)
        return (self.q_length, self.k_length) != (t * h * w, t * h * w)

    @property
    def gathered(self) -> bool:
        """Whether the keys of a block are not consecutive tokens."""
        return self.k.order is not None

    @cached_property
    def in_place(self) -> bool:
        """Whether blocks are the tokens themselves, cut every block_q and block_k tokens."""
        return self.q.in_place(self.block_q, self.q_length) and self.k.in_place(
            self.block_k, self.k_length
        )

    def to(self, device: torch.device | str) -> Blocks:
        """The same blocks on another device; sides that share a table still do."""
        q = self.q.to(device)
        k = q if self.k is self.q else self.k.to(device)
        if self.k.order is self.q.order:
            k = replace(k, order=q.order)
        if self.k.starts is self.q.starts:
            k = replace(k, starts=q.starts)
        return replace(self, q=q, k=k)


def block_tokens(table: BlockTable, sample: int, block: int) -> tuple[Tensor, Tensor]:
    """Raster tokens int64 [N, block] of every block for one sample, and which slots are real."""
    lengths = table.lengths[sample if table.lengths.shape[0] > 1 else 0]
    slots = torch.arange(block, device=lengths.device)
    real = slots < lengths.unsqueeze(-1)
    positions = torch.where(real, table.starts.unsqueeze(-1) + slots, 0).long()
    return (positions if table.order is None else table.order[positions].long()), real
