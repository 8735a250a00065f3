"""Where the lists of a selector's plans lie: known before q and k are, made once for blocks.

The video's query blocks have lists of their own, with room for `most` entries each. All other
query blocks visit every key block: they share one list per sample, which is made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.geometry.tiling import Tiling
from dit_accel.kernels.once import once
from dit_accel.kernels.selectors.budget import Budget

# Places of `index` start at a multiple of so many numbers: kernels read aligned tensors faster.
_ALIGNED = 32
MOST_COLUMNS = 1 << 14
"""Key blocks of a row that a Triton program can hold."""


@dataclass(frozen=True, eq=False)
class Keys:
    """Numbers about the key blocks, on the host.

    lengths: int32 [Bp, NK], valid tokens. text: valid key blocks that are not video, [Bp].
    """

    lengths: np.ndarray
    text: np.ndarray

    @property
    def most_text(self) -> int:
        """Valid key blocks of a sample that are not video, at most."""
        return int(self.text.max())


@once
def keys_of(blocks: Blocks) -> Keys:
    """Reads the table of key blocks, the one time that it waits for the device."""
    lengths = blocks.k.lengths.cpu().numpy()
    others = np.ones(lengths.shape[1], bool)
    others[blocks.first_video : blocks.first_video + blocks.video_blocks] = False
    return Keys(lengths, (lengths[:, others] > 0).sum(1))


@dataclass(frozen=True, eq=False)
class Room:
    """Room for the lists of a call, in one int32 buffer: counts, then `index`.

    start: int32 [B, Hl, NQ]; absolute in `index`.
    fixed: int32, the front of the buffer: counts and lists of blocks that are not video.
    index: where `index` begins in the buffer; first_list: the video's first entry in `index`.
    size: of the buffer. tally: int64 [2], what blocks that are not video add to the tally; None
        where there are none.
    text: whether there are blocks that are not video.
    """

    start: Tensor
    fixed: Tensor
    index: int
    first_list: int
    size: int
    tally: Tensor | None
    text: bool


def entries(blocks: Blocks, batch: int, lists: int, most: int) -> int:
    """Room of `index`: E. lists: per sample, 1 or the number of heads."""
    every = blocks.k.count
    shared = len(blocks.k.lengths) * every if blocks.video_blocks < every else 0
    return shared + batch * lists * blocks.video_blocks * most


@once
def room_of(blocks: Blocks, batch: int, lists: int, heads: int, most: int) -> Room:
    """The room for a call of `batch` samples, with so many lists per sample for all heads."""
    lengths = keys_of(blocks).lengths
    samples, every = lengths.shape
    queries, video, first = blocks.q.count, blocks.video_blocks, blocks.first_video
    others = np.ones(queries, bool)
    others[first : first + video] = False
    shared = samples * every if others.any() else 0
    # A stable sort of 0 whole, 1 short, 2 without tokens.
    kinds = np.where(lengths == blocks.block_k, 0, np.where(lengths > 0, 1, 2))
    which = np.arange(batch) if samples > 1 else np.zeros(batch, np.int64)

    start = np.empty((batch, lists, queries), np.int64)
    rows = np.arange(batch * lists * video).reshape(batch, lists, video)
    start[..., first : first + video] = shared + rows * most
    start[..., others] = (which * every)[:, None, None]
    counts = np.zeros((2, batch, lists, queries), np.int32)
    for number, kind in enumerate((0, 1)):
        counts[number][..., others] = (kinds <= kind).sum(1)[which][:, None, None]
    index = -(-counts.size // _ALIGNED) * _ALIGNED
    fixed = np.zeros(index + shared, np.int32)
    fixed[: counts.size] = counts.ravel()
    if shared:
        fixed[index:] = kinds.argsort(1, kind="stable").ravel()

    tally = None
    if others.any():
        own = blocks.q.lengths.cpu().numpy()
        own = np.broadcast_to(own, (batch, queries))[:, others].sum(1)
        keys = lengths.sum(1)[which]
        launched = int(counts[1][:, 0, others].sum()) * blocks.block_q * blocks.block_k
        kept = int((own.astype(np.int64) * keys).sum())
        tally = torch.tensor([launched * heads, kept * heads], device=blocks.device)
    return Room(
        torch.from_numpy(start.astype(np.int32)).to(blocks.device),
        torch.from_numpy(fixed).to(blocks.device),
        index,
        shared,
        index + entries(blocks, batch, lists, most),
        tally,
        blocks.video_blocks < blocks.q.count,
    )


@dataclass(frozen=True, eq=False)
class Forced:
    """Video blocks that are always kept, by number within the video.

    near: int32 [NV, n], for each query block itself and its neighbours; itself again where there
        are fewer. sinks: the first so many blocks, for all. counts: int [NV], of both together.
    """

    near: Tensor
    sinks: int
    counts: np.ndarray


@once
def forced_of(blocks: Blocks, sinks: int, neighbours: bool) -> Forced:
    """The forced blocks of a plan over `blocks`; its tiling must be known."""
    assert blocks.tiling is not None
    near, first = _forced(blocks.tiling, sinks, neighbours)
    beyond = [len(set(row) - set(range(first))) for row in near.tolist()]
    return Forced(torch.from_numpy(near).to(blocks.device), first, first + np.array(beyond))


@once
def forced_mask(blocks: Blocks, forced: Forced) -> Tensor:
    """bool [NV, NV]: which video blocks each one keeps in any case."""
    mask = torch.zeros(blocks.video_blocks, blocks.video_blocks, dtype=torch.bool)
    mask[:, : forced.sinks] = True
    mask.scatter_(1, forced.near.cpu().long(), True)
    return mask.to(blocks.device)


@lru_cache(maxsize=64)
def _forced(tiling: Tiling, sinks: int, neighbours: bool) -> tuple[np.ndarray, int]:
    """near int32 [NV, n], and how many blocks at the front are sinks.

    A block is a sink where it has tokens of the first `sinks` tiles along t. Blocks are neighbours
    where a token of one is next to a token of the other along an axis: adjacent tiles.
    """
    owner = block_numbers(tiling)
    frames = sum(tiling.parts[0][:sinks])
    first = int(owner[:frames].max()) + 1 if frames else 0
    near = [{block} for block in range(tiling.blocks)]
    for axis in range(3) if neighbours else ():
        line = np.moveaxis(owner, axis, 0)
        pairs = np.unique(np.stack([line[:-1].ravel(), line[1:].ravel()]), axis=1)
        for one, other in pairs.T.tolist():
            near[one].add(other)
            near[other].add(one)
    width = max(map(len, near))
    table = [sorted(row) + [own] * (width - len(row)) for own, row in enumerate(near)]
    return np.array(table, np.int32), first


def block_numbers(tiling: Tiling) -> np.ndarray:
    """int [T, H, W]: the block of each token of the video."""
    t, h, w = (np.repeat(np.arange(len(parts)), parts) for parts in tiling.parts)
    _, rows, columns = tiling.counts
    tile = (t[:, None, None] * rows + h[:, None]) * columns + w
    if not tiling.straddles:
        return tile
    place = np.empty(tile.size, np.int64)
    place[tile.ravel().argsort(kind="stable")] = np.arange(tile.size)
    return place.reshape(tile.shape) // tiling.block


@dataclass(frozen=True, eq=False)
class Task:
    """One selection.

    forced, room: what is known before q and k. budget: of each row. most: room of a video list.
    shared: whether all heads follow one list, by the sum of their scores. It names no blocks: it
    is kept with them.
    """

    forced: Forced
    room: Room
    budget: Budget
    most: int
    shared: bool


@dataclass(frozen=True, eq=False)
class Lists:
    """The tensors that a selection fills: whole, count int32 [B, Hl, NQ], index int32 [E].

    What belongs to blocks that are not video is there already.
    """

    whole: Tensor
    count: Tensor
    index: Tensor

    @classmethod
    def of(cls, room: Room) -> Lists:
        """New ones."""
        buffer = torch.empty(room.size, dtype=torch.int32, device=room.start.device)
        if room.text:
            buffer[: len(room.fixed)].copy_(room.fixed)
        shape = (2, *room.start.shape)
        whole, count = buffer[: 2 * room.start.numel()].view(shape).unbind()
        return cls(whole, count, buffer[room.index :])
