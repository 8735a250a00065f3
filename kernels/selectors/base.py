"""What every selector is: an online rule that makes a plan from the q and k of a call.

A selector scores pairs of blocks and keeps some of the video's key blocks for each of its query
blocks. Key blocks that are not video are always kept, query blocks that are not video visit every
key block; a query block's own block, `sinks` and `neighbours` are forced. The plan is made on the
device of q: nothing is read back, so the host knows bounds alone (`most`, `shape`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import Compute, param, tile_param
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.tiling import Tiling, fixed_tiling
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, ListKinds, Shape, shape_of
from dit_accel.kernels.probe import Probe, Rank, probe
from dit_accel.kernels.selectors.budget import Budget
from dit_accel.kernels.selectors.lists import entries, forced_mask, forced_of, keys_of, room_of
from dit_accel.kernels.selectors.select import Task, select_visits
from dit_accel.kernels.selectors.tiles import compact_tiling
from dit_accel.layout import TokenLayout

# Lists are at absolute places, which are int32.
_MOST_ENTRIES = (1 << 31) - 1


@dataclass(eq=False)
class Context:
    """A call that a plan and its tail are made for.

    q: [B, Lq, H, D]; k, v: [B, Lk, Hkv, D], any strides. heads: number of query heads, H.
    tally: int64 [2] on the device of q, or None: the selector adds the slot pairs that the plan's
        visits launch (entries x block_q x block_k) and the token pairs that they keep, of all
        samples and heads.
    size: tokens of a pooled key of the call's tail; None is a block.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    scale: float
    heads: int
    tally: Tensor | None = None
    size: int | None = None
    _probe: Probe | None = field(default=None, init=False, repr=False)
    _rank: Rank | None = field(default=None, init=False, repr=False)

    def probe(self, rank: Rank | None = None) -> Probe:
        """The call's probe: one that is there, if it has the rank, else made now."""
        if self._probe is None or (rank is not None and self._rank != rank):
            self._rank = rank
            size = self.size or self.blocks.block_k
            self._probe = probe(self.q, self.k, self.blocks, self.scale, size, rank)
        return self._probe


@dataclass(frozen=True)
class Selector(Compute):
    """A selector. The score of query block i and key block j is scale x qbar_i . kbar_j, with the
    means over the valid tokens of each, unless it has `scores` of its own."""

    online: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    probes: ClassVar[bool] = False  # whether it asks for the call's probe

    sinks: int = param(
        0, low=0, unit="tiles", help="Tiles along t, from the first, that all queries see."
    )
    neighbours: bool = param(
        False, help="Whether a block always keeps the blocks next to it along each axis."
    )
    lists: str = param(
        "own", choices=("own", "shared"),
        help="Whether each head has lists of its own, or all follow the sum of their scores.",
    )  # fmt: skip
    tile: str | tuple[int, int, int] = tile_param(
        'Blocks of the video: "auto" takes full, compact ones; [t, h, w] (at most 128 tokens) is '
        "taken as it is and clipped at the far edges."
    )

    @abstractmethod
    def budget(self, blocks: int) -> Budget:
        """How many of so many key blocks of the video a row keeps."""

    def tiling(self, layout: TokenLayout, kind: LayoutKind) -> Tiling:
        """See Compute."""
        if isinstance(self.tile, tuple):
            return fixed_tiling(layout.grid, self.tile)
        return compact_tiling(layout.grid, kind)

    def always(self, blocks: Blocks) -> Tensor:
        """bool [NQ, NK]: which pairs of blocks every plan visits, of the first sample."""
        stop = blocks.first_video + blocks.video_blocks
        keep = torch.ones(blocks.q.count, blocks.k.count, dtype=torch.bool, device=blocks.device)
        forced = forced_of(blocks, self.sinks, self.neighbours)
        keep[blocks.first_video : stop, blocks.first_video : stop] = forced_mask(blocks, forced)
        return keep & (blocks.k.lengths[0] > 0)

    def most(self, blocks: Blocks) -> int:
        """Entries of a video block's list at most, with those that are not video."""
        forced = int(forced_of(blocks, self.sinks, self.neighbours).counts.max())
        kept = max(min(self.budget(blocks.video_blocks).most, blocks.video_blocks), forced)
        return kept + keys_of(blocks).most_text

    def expected(self, blocks: Blocks, padded: bool = True) -> float:
        """The launched density to expect before anything ran: the bound of every list.

        padded: whether blocks are computed with all their slots; else with their own tokens, taken
        to be alike.
        """
        if not padded:
            return self._visits(blocks) / max(1, blocks.k.count)
        return (
            self._visits(blocks)
            * blocks.q.count
            * (blocks.block_q * blocks.block_k)
            / (blocks.q_length * blocks.k_length)
        )

    def shape(self, blocks: Blocks, batch: int, heads: int) -> Shape:
        """The shape of every plan that `select` makes for such calls.

        Raises DitAccelError where the lists need more than 2^31 entries.
        """
        lists, most = self._lists(heads), self.most(blocks)
        room = entries(blocks, batch, lists, most)
        if room > _MOST_ENTRIES:
            raise DitAccelError(
                f"{self.name}: {batch} x {lists} x {blocks.video_blocks} lists of up to {most} "
                f"blocks are {room} entries, of which a plan has at most {_MOST_ENTRIES}: lower "
                "the density or the batch."
            )
        keys = keys_of(blocks)
        fills = keys.lengths == blocks.block_k
        kinds = ListKinds(bool(fills.any()), bool((~fills & (keys.lengths > 0)).any()), False)
        forced = int(forced_of(blocks, self.sinks, self.neighbours).counts.max())
        budget = self.budget(blocks.video_blocks)
        return shape_of(
            blocks,
            batch=batch,
            heads=lists,
            kinds=kinds,
            most=most,
            entries=room,
            visits=self._visits(blocks),
            online=True,
            even=budget.mass is None and forced <= budget.most and len(keys.lengths) == 1,
        )

    def select(self, context: Context) -> BlockPlan:
        """The plan of a call, on the device of q; nothing is read back.

        The same q and k give the same bits. What is known before q and k is worked out at the
        first call with `blocks`, and kept with them.
        """
        blocks, batch = context.blocks, context.q.shape[0]
        shape, task = prepared(blocks, self, batch, context.heads)
        visits = select_visits(
            context.q, context.k, blocks, task, context.scale, context.tally, self.scores(context)
        )
        return BlockPlan(blocks, visits, shape)

    def scores(self, context: Context) -> Tensor | None:
        """The selector's own scores, float32 [B, H, NV, NV] by key block and then query block;
        None are those of means."""
        return None

    def _lists(self, heads: int) -> int:
        return 1 if self.lists == "shared" else heads

    def _visits(self, blocks: Blocks) -> float:
        """Entries of a list on average, as expected."""
        keys, every = keys_of(blocks), blocks.q.count
        forced = forced_of(blocks, self.sinks, self.neighbours).counts
        most = min(self.budget(blocks.video_blocks).most, blocks.video_blocks)
        video = forced.clip(min=most).sum() + blocks.video_blocks * keys.text.mean()
        others = (every - blocks.video_blocks) * (blocks.video_blocks + keys.text.mean())
        return float(video + others) / every


@once
def prepared(blocks: Blocks, selector: Selector, batch: int, heads: int) -> tuple[Shape, Task]:
    """What the plans of such calls have in common."""
    shape = selector.shape(blocks, batch, heads)
    room = room_of(blocks, batch, shape.heads, heads, shape.most)
    forced = forced_of(blocks, selector.sinks, selector.neighbours)
    budget, shared = selector.budget(blocks.video_blocks), selector.lists == "shared"
    return shape, Task(forced, room, budget, shape.most, shared)
