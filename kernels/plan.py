"""The plan of a sparse attention call: for each query block, the key blocks to visit.

A plan is static (made from a layout; numbers about it are known on the host) or online (made from
q and k on the device; nothing about it is ever read back). Both are int32 tensors in the same form,
which every backend reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, Triple, block_tokens
from dit_accel.kernels.once import once
from dit_accel.kernels.plan_checks import check_plan
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES

if TYPE_CHECKING:
    from dit_accel.kernels.pooling import PooledKeys

Rule = tuple[str, tuple[int, ...]]
"""Name and parameters of a token rule."""


@dataclass(frozen=True, eq=False)
class TokenMask:
    """Which token pairs of a partial block count, from the tokens' coordinates.

    name: a rule of `token_rules.TOKEN_RULES`.
    params: the rule's int32 parameters, at most MAX_PARAMS.
    q_coords, k_coords: int32 [Lq, 3], [Lk, 3], (t, h, w) of each token in raster order.
    other: name and parameters of a second rule; a pair counts where either keeps it.
    """

    name: str
    params: tuple[int, ...]
    q_coords: Tensor
    k_coords: Tensor
    other: Rule | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules; a pair counts where one of them keeps it."""
        first = self.name, self.params
        return (first,) if self.other is None else (first, self.other)

    @property
    def label(self) -> str:
        """The rules' names, such as "disc" or "disc+radial"."""
        return "+".join(name for name, _ in self.rules)

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [..., m, n] for raster token numbers `queries` [..., m] and `keys` [..., n]."""
        query = self.q_coords[queries.long()].unsqueeze(-2).unbind(-1)
        key = self.k_coords[keys.long()].unsqueeze(-3).unbind(-1)
        kept: Tensor = TOKEN_RULES[self.name](*query, *key, self.params)
        if self.other is not None:
            kept = kept | TOKEN_RULES[self.other[0]](*query, *key, self.other[1])
        return kept

    @cached_property
    def packed(self) -> Tensor:
        """int32 [MAX_PARAMS * rules]: the parameters where kernels read them, rule after rule."""
        padded = [
            value
            for _, params in self.rules
            for value in (*params, *(0 for _ in range(MAX_PARAMS - len(params))))
        ]
        return torch.tensor(padded, dtype=torch.int32, device=self.q_coords.device)

    def to(self, device: torch.device | str) -> TokenMask:
        """The same mask on another device."""
        return replace(self, q_coords=self.q_coords.to(device), k_coords=self.k_coords.to(device))


@dataclass(frozen=True, eq=False)
class Visits:
    """The key blocks of every query block, as lists in compressed rows; all int32, contiguous.

    A list is a run of `index`: first the whole blocks (of exactly `block_k` tokens, which a kernel
    may read without a length mask), then the short ones, then those under the token mask. It names
    nothing twice. Lists may stand in any order, with gaps of any content between them. Heads that
    follow the same list share its place; samples do so where Bl is 1.

    start [Bl, Hl, NQ]: the list's first entry, counted from the beginning of `index`.
    whole, full, count [Bl, Hl, NQ]: entries that are whole; those before the token mask; all.
        Bl is 1 or the batch, Hl 1 or the number of query heads.
    index [E]: numbers of key blocks (or of pooled keys). E is what there is room for.
    """

    start: Tensor
    whole: Tensor
    full: Tensor
    count: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> Visits:
        """The same lists on another device."""
        return Visits(*(part.to(device) for part in self.parts))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        return self.start, self.whole, self.full, self.count, self.index

    def entries(self, sample: int, head: int, block: int) -> tuple[Tensor, Tensor]:
        """The key blocks of one list that count in full, and those under the token mask.

        Waits for the device. Where samples or heads share their lists, any number will do.
        """
        place = sample % len(self.start), head % self.start.shape[1], block
        start, full, count = (int(part[place]) for part in (self.start, self.full, self.count))
        return self.index[start : start + full], self.index[start + full : start + count]

    def rows(
        self, first: Tensor | None = None, stop: Tensor | None = None, width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The lists side by side: index int32 [Bl, Hl, NQ, M], and which of its places are entries.

        first, stop: from which entry of a list to which, like `count`; None is the whole list.
        width: M; None is the longest list's entries, read from the device. Other places are 0.
        """
        first = torch.zeros_like(self.count) if first is None else first
        length = (self.count if stop is None else stop) - first
        if width is None:
            width = max(1, int(length.max())) if length.numel() else 1
        places = torch.arange(width, device=self.count.device, dtype=torch.int32)
        listed = places < length.unsqueeze(-1)
        at = torch.where(listed, (self.start + first).unsqueeze(-1) + places, 0)
        index = self.index if len(self.index) else self.index.new_zeros(1)
        return torch.where(listed, index[at.long()], 0), listed


class ListKinds(NamedTuple):
    """Which kinds of entries any list of a plan may have; kernels leave out code for the others.

    whole: blocks that need no length mask. short: blocks under a length mask.
    partial: blocks under the token mask. pooled: pooled keys.
    """

    whole: bool
    short: bool
    partial: bool
    pooled: bool = False


@dataclass(frozen=True)
class Shape:
    """What the host knows of a plan: hashable, for eligibility, choice, price, kernel variant.

    block_q, block_k, box, grid, scattered, gathered, mixed, in_place: see Blocks.
    q_blocks, k_blocks: number of blocks of each side.
    kinds: may claim a kind without need, never leave one out.
    batch, heads: 1, or the batch and the number of query heads that the plan was made for.
    most: entries of a video block's list, at most. Lists of other blocks may have every key block.
    entries: room of all lists together, E.
    visits: entries of a list on average; where `online` as expected (`most` if nothing better).
    rules: names of the token rules.
    online: made on the device from q and k.
    even: all video blocks of an online plan have equally long lists.
    """

    block_q: int
    block_k: int
    q_blocks: int
    k_blocks: int
    box: Triple | None
    grid: Triple | None
    scattered: bool
    gathered: bool
    mixed: bool
    in_place: bool
    kinds: ListKinds
    batch: int
    heads: int
    most: int
    entries: int
    visits: float
    rules: tuple[str, ...] = ()
    online: bool = False
    even: bool = False


def shape_of(blocks: Blocks, *, batch: int, heads: int, **facts: Any) -> Shape:
    """The shape of a plan over `blocks` with lists for so many samples (Bl) and heads (Hl).

    facts: the other fields of `Shape`, from `kinds` on.
    """
    return Shape(
        blocks.block_q,
        blocks.block_k,
        blocks.q.count,
        blocks.k.count,
        blocks.box,
        blocks.grid,
        blocks.scattered,
        blocks.gathered,
        blocks.mixed,
        blocks.in_place,
        batch=max(batch, len(blocks.k.lengths)),
        heads=heads,
        **facts,
    )


@dataclass(frozen=True)
class Counts:
    """Numbers of all lists of a plan (Bl x Hl x NQ) together: lists, and entries by kind."""

    lists: int
    whole: int
    short: int
    partial: int
    pooled: int

    @property
    def entries(self) -> int:
        """All key blocks that the lists name."""
        return self.whole + self.short + self.partial


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """For each query block: key blocks to visit in full or under a token mask, and pooled keys.

    mask: of the entries past `visits.full`; None where there are none.
    pooled: lists of keys of the call's `pooling.PooledKeys`, which enter the same softmax, of the
        same Bl and Hl; entries are "whole".
    known: the numbers of the lists where the host knows them (of static plans).
    """

    blocks: Blocks
    visits: Visits
    shape: Shape
    mask: TokenMask | None = None
    pooled: Visits | None = None
    known: Counts | None = None

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors are."""
        return self.visits.count.device

    @property
    def batch(self) -> int:
        """1, or the batch that the plan was made for."""
        return self.shape.batch

    @property
    def heads(self) -> int:
        """1, or the number of query heads that the plan was made for."""
        return self.shape.heads

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        if torch.device(device) == self.device:
            return self
        return replace(
            self,
            blocks=self.blocks.to(device),
            visits=self.visits.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            pooled=None if self.pooled is None else self.pooled.to(device),
        )

    @cached_property
    def launch_order(self) -> Tensor:
        """int32 [NQ]: query blocks, longest lists first, so that no long one runs alone at last.

        Of an online plan: the blocks that are not video, which see everything, then the others.
        """
        if self.shape.online:
            return _video_last(self.blocks)
        work = self.visits.count.sum((0, 1))
        if self.pooled is not None:  # a block's worth of pooled keys is as long as a block
            work = work + self.pooled.count.sum((0, 1)) / self.blocks.block_k
        return work.argsort(descending=True, stable=True).int()

    @cached_property
    def counts(self) -> Counts:
        """Entries of all lists, read from the device: of static plans, nobody asks online ones."""
        return self.known or read_counts(self.visits, self.pooled)

    def launched_density(self, backend: str = "triton") -> float:
        """Launched query x key slots over Lq x Lk.

        `triton` (and every GPU kernel) spends block_q x block_k slots on a visit, `torch` the
        blocks' own lengths, `reference` computes everything.
        """
        if backend == "reference":
            return 1.0
        if backend == "torch":
            return (self.visited_pairs + self._pooled_pairs) / self._all_pairs
        counts, blocks = self.counts, self.blocks
        keys = counts.entries * blocks.block_k + counts.pooled
        heads = self.visits.count.shape[0] * self.visits.count.shape[1]
        return keys * blocks.block_q / (heads * blocks.q_length * blocks.k_length)

    def kept_density(self) -> float:
        """Pairs that enter the softmax, after all masks, over Lq x Lk; a pooled key is one key."""
        return (self.kept_pairs + self._pooled_pairs) / self._all_pairs

    @property
    def _all_pairs(self) -> int:
        return self.batch * self.heads * self.blocks.q_length * self.blocks.k_length

    @cached_property
    def visited_pairs(self) -> int:
        """Token pairs of all visits, for every sample and head of the plan."""
        return self._pairs(self.visits.count)

    @cached_property
    def kept_pairs(self) -> int:
        """Token pairs of all visits that the token mask keeps, likewise."""
        return self._pairs(self.visits.full) + self._masked_pairs()

    def _pairs(self, stop: Tensor) -> int:
        """Token pairs of the entries before `stop` of each list."""
        lists, keys, queries = self.visits, self.blocks.k, self.blocks.q
        if not keys.count:
            return 0
        index = lists.index.long().clamp(0, keys.count - 1)  # gaps may hold anything
        total = 0
        for sample in range(self.batch):
            lengths = keys.lengths[sample % len(keys.lengths)].long()
            before = torch.nn.functional.pad(lengths[index].cumsum(0), (1, 0))
            start, end = (x[sample % len(x)].long() for x in (lists.start, stop))
            seen = before[start + end] - before[start]  # [Hl, NQ]
            total += int((seen * queries.lengths[sample % len(queries.lengths)].long()).sum())
        return total

    @cached_property
    def _pooled_pairs(self) -> int:
        if self.pooled is None:
            return 0
        keys = self.pooled.count.long().expand(self.batch, -1, -1)
        return int((keys * self.blocks.q.lengths.long().unsqueeze(1)).sum())

    def _masked_pairs(self) -> int:
        if self.mask is None:
            return 0
        total = 0
        for sample in range(self.batch):
            q_tokens, q_real = block_tokens(self.blocks.q, sample, self.blocks.block_q)
            k_tokens, k_real = block_tokens(self.blocks.k, sample, self.blocks.block_k)
            known: dict[bytes, int] = {}  # heads that follow the same lists are counted once
            lists = self.visits.start, self.visits.full, self.visits.count
            for place in zip(*(x[sample % len(x)] for x in lists), strict=True):
                key = torch.stack(place).cpu().numpy().tobytes()
                if key not in known:
                    known[key] = 0
                    start, full, count = place
                    one = Visits(start, full, full, count, self.visits.index)
                    index, listed = one.rows(full)  # [NQ, M]
                    queries, keys = listed.nonzero()[:, 0], index[listed].long()
                    for some in range(0, len(keys), 256):
                        qs, ks = queries[some : some + 256], keys[some : some + 256]
                        kept = self.mask.allowed(q_tokens[qs], k_tokens[ks])
                        kept &= q_real[qs].unsqueeze(-1) & k_real[ks].unsqueeze(-2)
                        known[key] += int(kept.sum())
                total += known[key]
        return total

    def validate(self, pooled: PooledKeys | None = None) -> BlockPlan:
        """Check every rule that kernels rely on; DitAccelError for the first one broken.

        pooled: the pooled keys that calls will bring, to check the numbers in the lists. Reads the
        plan's tensors on the host: for once per plan, not for each call.
        """
        check_plan(self, pooled)
        return self


@once
def _video_last(blocks: Blocks) -> Tensor:
    stop = blocks.first_video + blocks.video_blocks
    video = torch.arange(blocks.q.count, dtype=torch.int32, device=blocks.device)
    video = (video >= blocks.first_video) & (video < stop)
    return video.int().argsort(stable=True).int()


def read_counts(visits: Visits, pooled: Visits | None = None) -> Counts:
    """The numbers of all lists, read together: waits for the device."""
    none = visits.count.new_zeros((), dtype=torch.int64)
    parts = (visits.whole, visits.full, visits.count, None if pooled is None else pooled.count)
    sums = [none if part is None else part.sum(dtype=torch.int64) for part in parts]
    whole, full, every, extra = torch.stack(sums).tolist()
    return Counts(visits.count.numel(), whole, full - whole, every - full, extra)


def plan_of(
    blocks: Blocks, visits: Visits, mask: TokenMask | None = None, pooled: Visits | None = None
) -> BlockPlan:
    """A static plan; its shape is worked out from the lists, which waits for the device."""
    counts = read_counts(visits, pooled)
    longest = int(visits.count.max()) if visits.count.numel() else 0
    shape = shape_of(
        blocks,
        batch=visits.count.shape[0],
        heads=visits.count.shape[1],
        kinds=ListKinds(counts.whole > 0, counts.short > 0, counts.partial > 0, counts.pooled > 0),
        most=longest,
        entries=len(visits.index),
        visits=counts.entries / max(1, counts.lists),
        rules=() if mask is None else tuple(name for name, _ in mask.rules),
    )
    return BlockPlan(blocks, visits, shape, mask, pooled, counts)


def visits_from_mask(
    mask: Tensor,
    whole: Tensor | None = None,
    partial: Tensor | None = None,
    width: int | None = None,
) -> Visits:
    """Lists of visible pairs of blocks, each list in ascending order within its kinds.

    mask: bool [Bl, Hl, NQ, NK], pairs that count in full. whole: bool [Bl, NK] or [1, NK], key
    blocks that fill their slots. partial: bool like mask, pairs under the token mask; where both
    are set, the pair counts in full.
    width: room of a list, where the longest one is known; else it is read back from the device,
    which waits for it. A list longer than `width` is cut.
    """
    short = mask if whole is None else mask & ~whole[:, None, None, :]
    kinds = torch.full(mask.shape, 3, dtype=torch.uint8, device=mask.device)
    if partial is not None:
        kinds.masked_fill_(partial, 2)
    kinds.masked_fill_(mask, 0).masked_fill_(short, 1)
    counts = [(kinds <= kind).sum(-1, dtype=torch.int32) for kind in range(3)]
    if width is None:
        width = max(1, int(counts[2].max())) if counts[2].numel() else 1
    some = max(1, (1 << 24) // max(1, mask.shape[-2] * mask.shape[-1]))  # argsort makes int64
    index = torch.zeros((*mask.shape[:3], width), dtype=torch.int32, device=mask.device)
    parts = (x.flatten(0, 1).split(some) for x in (kinds, index))
    for rows, target in zip(*parts, strict=True):
        best = rows.argsort(dim=-1, stable=True)[..., :width]
        target[..., : best.shape[-1]] = best
    start = torch.arange(counts[0].numel(), dtype=torch.int32, device=mask.device) * width
    bare, full, count = (each.clamp_max(width) for each in counts)
    return Visits(start.view(count.shape), bare, full, count, index.flatten())


Forward = Callable[..., tuple[Tensor, Tensor | None]]
"""(q, k, v [B, S, H, D], plan, scale, return_lse, perhaps pooled) -> (out [B, Lq, H, D], LSE
[B, H, Lq] or None): how a backend, or a part of one, computes a plan."""
