"""What is known of a compute's plan before anything runs.

A pattern's plan is there as soon as the layout is. A selector's is made from q and k, so that only
its bounds are known: it is priced by lists that are as long as they may get, with blocks spread
evenly where q and k would choose.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from dit_accel.kernels.blocks import Blocks, block_tokens
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns import Pattern
from dit_accel.kernels.plan import BlockPlan, Shape, Visits, plan_of, visits_from_mask
from dit_accel.kernels.selectors import Selector
from dit_accel.layout import TokenLayout

SAMPLED, QUERIES = 96, 3
"""Query blocks, and queries of each, whose masked pairs are counted."""


@dataclass(frozen=True, eq=False)
class Outlook:
    """A compute on a layout, as one kind of backend runs it.

    shape: of the plans of a call. plan: a pattern's; of a selector the blocks that it always keeps.
    likely: a plan that takes as long as a call's. expected: launched density of a selector's call,
    None for a pattern, whose plan tells.
    """

    shape: Shape
    plan: BlockPlan
    likely: BlockPlan
    expected: float | None = None

    def launched(self, backend: str) -> float:
        """Launched density, to expect or known."""
        return self.plan.launched_density(backend) if self.expected is None else self.expected

    @property
    def kept(self) -> float:
        """Kept density, likewise; pairs under a token mask are counted for some queries."""
        return kept_share(self.likely)


def outlook(layout: TokenLayout, compute: Compute, heads: int, kind: LayoutKind) -> Outlook:
    """What there is to know, worked out on the CPU, for a call of one sample.

    Raises DitAccelError where a selector's lists would need more room than there is.
    """
    if isinstance(compute, Selector):
        blocks = blocks_of(layout, compute.tiling(layout, kind), "cpu")
        shape, expected = compute.shape(blocks, 1, heads), compute.expected(blocks)
        kept = plan_of(blocks, _visits(blocks, compute.always(blocks)))
        return Outlook(shape, kept, _likely(compute, blocks), expected)
    assert isinstance(compute, Pattern)
    plan = compute.build(layout, "cpu", heads, layout_kind=kind)
    return Outlook(plan.shape, plan, plan)


def _likely(selector: Selector, blocks: Blocks) -> BlockPlan:
    """A plan with lists as long as a selector's may be, one for all heads."""
    keep = selector.always(blocks)
    first, stop = blocks.first_video, blocks.first_video + blocks.video_blocks
    video = keep[first:stop, first:stop]
    most = min(selector.budget(blocks.video_blocks).most, blocks.video_blocks)
    more = (most - video.sum(1, keepdim=True)).clamp_min(0)
    free = ~video
    among = free.sum(1, keepdim=True).clamp_min(1)
    rank = free.cumsum(1)  # from 1; of `among` free blocks every (among / more)-th is taken
    row = torch.arange(len(video)).unsqueeze(1)
    video |= free & ((rank * more + row) // among != ((rank - 1) * more + row) // among)
    one = dataclasses.replace(selector, lists="shared")
    return BlockPlan(blocks, _visits(blocks, keep), one.shape(blocks, 1, 1))


def _visits(blocks: Blocks, keep: torch.Tensor) -> Visits:
    return visits_from_mask(keep[None, None], blocks.k.lengths == blocks.block_k)


def kept_share(made: BlockPlan) -> float:
    """Kept density; pairs under a token mask are counted for some queries of some blocks."""
    lists, mask, cut = made.visits, made.mask, made.blocks
    if mask is None:
        return made.kept_density()
    bare = plan_of(cut, dataclasses.replace(lists, count=lists.full))
    q_tokens, q_real = block_tokens(cut.q, 0, cut.block_q)
    k_tokens, k_real = block_tokens(cut.k, 0, cut.block_k)
    heads, blocks = lists.count.shape[1:]
    some = torch.linspace(0, heads * blocks - 1, SAMPLED).round().long().unique().tolist()
    pairs = 0.0
    for item in some:
        head, block = divmod(item, blocks)
        visited = lists.entries(0, head, block)[1].long()
        keys = k_tokens[visited][k_real[visited]]
        queries = q_tokens[block][q_real[block]]
        asked = queries[torch.linspace(0, len(queries) - 1, QUERIES).round().long()]
        pairs += float(mask.allowed(asked, keys).float().sum()) / len(asked) * len(queries)
    return bare.kept_density() + pairs / len(some) * blocks / (cut.q_length * cut.k_length)
