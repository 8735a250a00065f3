"""From q and k to the lists of a plan, on their device: means, scores, selection, lists.

On a GPU two launches: the block means of q and k (`portable.pooling`), then scores, selection and
lists in one (`kernel`). Nothing waits for the device. Elsewhere, and for rows of more key blocks
than a program can hold, torch does the same, some rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.machine import runs_triton
from dit_accel.kernels.plan import Visits
from dit_accel.kernels.pooling import pool_queries_and_keys
from dit_accel.kernels.selectors.budget import keep_blocks, list_blocks
from dit_accel.kernels.selectors.lists import MOST_COLUMNS, Lists, Task, forced_mask

# Scores that torch holds at a time.
_CHUNK = 1 << 22
Scores = tuple[Tensor, Tensor | None, float]
"""Means of queries [B, NQ, H, D] and of keys [B, NK, Hkv, D], or scores [B, H, NV, NV] by key block
and then query block, and nothing; and the factor of either."""


def select_visits(
    q: Tensor, k: Tensor, blocks: Blocks, task: Task, scale: float, tally: Tensor | None = None,
    given: Tensor | None = None,
) -> Visits:  # fmt: skip
    """The lists of a call from q [B, Lq, H, D] and k [B, Lk, Hkv, D].

    tally: int64 [2], to which slot pairs and token pairs of the lists are added, for all heads.
    given: scores [B, H, NV, NV] by key block and then query block, in place of those of means.
    """
    lists = Lists.of(task.room)
    # The scores of all heads as one head of H x D numbers.
    factor = q.shape[2] ** -0.5 if task.shared else 1.0
    made = in_triton if runs_triton(q) and blocks.k.count <= MOST_COLUMNS else in_torch
    if given is None:
        scores: Scores = (*pool_queries_and_keys(q, k, blocks), scale * factor)
    else:
        scores = (given, None, factor)
    made(*scores[:2], blocks, task, scores[2], lists, tally)
    if tally is not None and task.room.tally is not None:
        tally += task.room.tally
    return Visits(task.room.start, lists.whole, lists.count, lists.count, lists.index)


def in_triton(
    queries: Tensor, keys: Tensor | None, blocks: Blocks, task: Task, factor: float, lists: Lists,
    tally: Tensor | None,
) -> None:  # fmt: skip
    """Fills `lists` in Triton; queries, keys, factor: see `Scores`."""
    from dit_accel.kernels.selectors.kernel import launch

    launch(queries, keys, blocks, task, factor, lists, tally)


def in_torch(
    queries: Tensor, keys: Tensor | None, blocks: Blocks, task: Task, factor: float, lists: Lists,
    tally: Tensor | None,
) -> None:  # fmt: skip
    """The same with torch alone, on any device."""
    every = blocks.k.count
    first, video = blocks.first_video, blocks.video_blocks
    heads = queries.shape[1 if keys is None else 2]
    stop, group = first + video, 1 if keys is None else heads // keys.shape[2]
    summed = heads if task.shared else 1
    index = lists.index[task.room.first_list :].view(*lists.count.shape[:2], video, task.most)
    is_forced = forced_mask(blocks, task.forced)
    some = max(1, _CHUNK // every)
    for sample in range(len(queries)):
        length = blocks.k.lengths[sample % len(blocks.k.lengths)]  # [NK]
        own = blocks.q.lengths[sample % len(blocks.q.lengths)][first:stop].long()  # [NV]
        text = (length > 0).clone()
        text[first:stop] = False
        for row in range(lists.count.shape[1]):
            of_head = range(row * summed, (row + 1) * summed)
            if keys is not None:
                # [NK, summed x D]: scores of several heads are one product of longer vectors.
                key = torch.cat([keys[sample, first:stop, head // group] for head in of_head], -1)
            for low in range(0, video, some):
                part = slice(low, min(low + some, video))
                if keys is None:  # [rows, NV]
                    score = queries[sample, of_head.start : of_head.stop, :, part].sum(0).mT
                else:
                    query = queries[sample, first:stop][part, row * summed : (row + 1) * summed]
                    score = query.flatten(1) @ key.mT
                score = score * factor
                keep = text.expand(len(score), -1).clone()  # [rows, NK]
                keep[:, first:stop] = keep_blocks(
                    score, is_forced[part], length[first:stop], task.budget
                )
                made = list_blocks(keep, length == blocks.block_k, task.most)
                index[sample, row, part] = made[0]
                lists.whole[sample, row, first:stop][part] = made[1]
                lists.count[sample, row, first:stop][part] = made[2]
                if tally is not None:
                    slots = made[2].sum(dtype=torch.int64) * blocks.block_q * blocks.block_k
                    pairs = (torch.where(keep, length, 0).sum(-1) * own[part]).sum()
                    tally += torch.stack([slots, pairs]) * summed
