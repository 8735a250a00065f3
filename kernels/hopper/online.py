"""Plans made on the device as the Hopper kernel's work lists, without waiting for the device.

The host knows how many items there are, and which are long: the rows of text, which visit every key
block. So it deals them before it knows the lists (`deal.in_rounds`): a static table says which
program gets the j-th item, and where in `items` that stands. The j-th item is settled on the
device: text rows first, then head by head the rows of video, the longest list first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dit_accel.costs.kernels import deal_weights
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.hopper.deal import in_rounds
from dit_accel.kernels.hopper.lists import (
    TILES,
    WorkLists,
    block_codes,
    copies_of,
    key_lists,
    list_items,
    rooms,
)
from dit_accel.kernels.launching import Launch, launches_of
from dit_accel.kernels.machine import runs_triton
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan


@dataclass(frozen=True, eq=False)
class Deal:
    """Who computes the j-th item, and where it stands; all int32, on the device.

    owners, slots [n]: the j-th item's program and row of `WorkLists.items`.
    work [P, 2]: each program's first item, and 0 for its tiles.
    first, video: as in Blocks; where nothing is known to be video, every block is dealt as such.
    """

    owners: Tensor
    slots: Tensor
    work: Tensor
    first: int
    video: int


@once
def dealt(blocks: Blocks, lines: int, programs: int, visits: float) -> Deal:
    """The deal of `lines` (samples x heads) times all query blocks, with so many visits expected
    of a block on average."""
    by, together = deal_weights(), 128 // blocks.block_k
    every, longest = blocks.q.count, blocks.k.count
    first, video = blocks.first_video, blocks.video_blocks
    if not video:
        first, video = 0, every
    text = every - video
    short = (visits * every - text * longest) / max(1, video)
    long_weight, weight = (by.item + by.tile * max(1.0, n / together) for n in (longest, short))
    owners = in_rounds(lines * text, lines, video, long_weight / weight, programs)
    by_program = np.argsort(owners, kind="stable")
    slots = np.empty_like(owners)
    slots[by_program] = np.arange(len(owners), dtype=np.int32)
    firsts = np.searchsorted(owners[by_program], np.arange(programs)).astype(np.int32)
    work = np.stack([firsts, np.zeros_like(firsts)], -1)
    there = [torch.from_numpy(part).to(blocks.device) for part in (owners, slots, work)]
    return Deal(there[0], there[1], there[2], first, video)


@once
def _codes(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Codes of the query blocks and of the key blocks."""
    boxes = blocks.box is not None
    queries, keys = (block_codes(table, boxes).int() for table in (blocks.q, blocks.k))
    return queries.contiguous(), keys.contiguous()


def online_lists(plan: BlockPlan, batch: int, heads: int, programs: int) -> WorkLists:
    """The lists of a plan for a call of that batch and number of heads: one launch on a GPU."""
    deal = dealt(plan.blocks, batch * heads, programs, plan.shape.visits)
    make = emit if runs_triton(plan.visits.count) else emit_in_torch
    return make(plan, deal, batch, heads)


def emit_in_torch(plan: BlockPlan, deal: Deal, batch: int, heads: int) -> WorkLists:
    """What `emit` does, with torch alone; it waits for the device."""
    blocks, lists = plan.blocks, plan.visits
    codes, metas = key_lists(blocks, lists, int(lists.count.sum()))
    items = list_items(blocks, lists, batch, heads)
    numbers = _numbers(plan, deal, batch, heads)
    work = deal.work.clone()
    work[:, 1].index_add_(0, deal.owners[numbers], items[:, TILES].contiguous())
    placed = torch.empty_like(items)
    placed[deal.slots[numbers].long()] = items
    return WorkLists(placed, work, codes, metas)


def _numbers(plan: BlockPlan, deal: Deal, batch: int, heads: int) -> Tensor:
    """int64 [batch * heads * NQ]: which item each is, sample and head major."""
    count = plan.visits.count
    sample = torch.arange(batch, device=count.device)[:, None] % len(count)
    count = count[sample, torch.arange(heads, device=count.device) % count.shape[1]].flatten(0, 1)
    lines, every = count.shape
    stop = deal.first + deal.video
    line = torch.arange(lines, device=count.device)[:, None]
    numbers = torch.empty(lines, every, dtype=torch.int64, device=count.device)
    text = [*range(deal.first), *range(stop, every)]
    numbers[:, text] = line * len(text) + torch.arange(len(text), device=count.device)
    rank = torch.arange(deal.video, device=count.device).expand(lines, -1)
    if not plan.shape.even:
        order = (-count[:, deal.first : stop]).argsort(dim=-1, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, rank)
    numbers[:, deal.first : stop] = lines * len(text) + line * deal.video + rank
    return numbers.flatten()


def emit(plan: BlockPlan, deal: Deal, batch: int, heads: int) -> WorkLists:
    """The work lists by one Triton launch, in which every item is a program."""
    lists, device = plan.visits, plan.visits.index.device
    kept, places = launches_of(deal), [x.data_ptr() & 15 for x in lists.parts]
    key = "lists", batch, heads, plan.shape.entries, plan.shape.even, lists.count.shape, *places
    found: _Prepared | None = kept.get(key)
    if found is None:
        found = kept[key] = _prepared(plan, deal, batch, heads)
    # Codes, metas and items, in one piece; aligned as Triton likes it.
    room, rows = found.room, found.rows
    piece = torch.empty(2 * room + 8 * rows, dtype=torch.int32, device=device)
    codes, metas, items = piece.split((room, room, 8 * rows))
    items, work = items.view(rows, 8), deal.work.clone()
    found.launch(device, *lists.parts, codes, metas, items, work)
    return WorkLists(items, work, codes, metas)


_CHANGING = (0, 1, 2, 3, 4, 11, 12, 13, 14)
"""Places of the lists and of what is made of them among the arguments of `emit_item`."""


class _Prepared(NamedTuple):
    """A launch, and the room for codes and for items."""

    launch: Launch
    room: int
    rows: int


def _prepared(plan: BlockPlan, deal: Deal, batch: int, heads: int) -> _Prepared:
    from dit_accel.kernels.hopper.online_kernel import emit_item

    blocks, lists = plan.blocks, plan.visits
    together, entries = 128 // blocks.block_k, len(lists.index)
    room, copies = rooms(entries, blocks.block_k), copies_of(blocks, lists)
    every = blocks.q.count
    query_codes, key_codes = _codes(blocks)
    codes = metas = items = work = lists.index  # given at each call
    arguments = (
        *lists.parts, query_codes, blocks.q.lengths, key_codes, blocks.k.lengths,
        deal.slots, deal.owners, codes, metas, items, work, heads, every, deal.first, deal.video,
        *lists.count.shape[:2], copies, entries * together, room,
        blocks.q.sample_stride, blocks.k.sample_stride, batch * heads * (every - deal.video),
    )  # fmt: skip
    constants = {"TOGETHER": together, "BLOCK": 128, "EVEN": plan.shape.even, "num_warps": 1}
    rows = batch * heads * every
    launch = Launch(emit_item, (rows,), arguments, constants, _CHANGING)
    return _Prepared(launch, -(-copies * room // 4) * 4, rows)
