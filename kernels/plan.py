"""The plan of a sparse attention call: for each query block, the key blocks to visit.

A plan holds int32 tensors only and is shared by every backend. Tokens are never moved in memory:
`BlockTable.order` says which token stands at each position of block order, a block is a run of
positions, and a kernel reads and writes rows through `order`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

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

    def to(self, device: torch.device | str) -> BlockTable:
        """The same table on another device."""
        order, origins = (
            None if part is None else part.to(device) for part in (self.order, self.origins)
        )
        return BlockTable(order, self.starts.to(device), self.lengths.to(device), origins)


class ListKinds(NamedTuple):
    """Which kinds of entries any list of a plan may have; kernels leave out code for the others.

    whole: full entries that need no length mask. short: full entries under a length mask.
    partial: entries under the token mask. pooled: pooled keys.
    """

    whole: bool
    short: bool
    partial: bool
    pooled: bool = False


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """For each query block: key blocks to visit in full or under a token mask, and pooled keys.

    Bp is 1 or the batch, Hp 1 or the number of query heads, NQ the number of query blocks, M the
    width of a list. Entries past a count are ignored. All lists have the same Bp and Hp, are
    contiguous, and name nothing twice.

    full_count int32 [Bp, Hp, NQ], full_index int32 [Bp, Hp, NQ, M]: every pair counts.
    unmasked_count int32 [Bp, Hp, NQ]: this many entries at the front of a full list are blocks of
        exactly `block_k` tokens, which a kernel may read without a length mask; None means 0.
    partial_count, partial_index: likewise, pairs of `token_mask` only; all three or none.
    pooled_count, pooled_index: likewise, numbers of keys of the call's `pooling.PooledKeys`, which
        enter the same softmax; both or none.
    block_q, block_k: slots of a block in the kernel; no block is longer.
    q_length, k_length: tokens of the call, Lq and Lk.
    kinds, covers: what `list_kinds` and `covers_queries` would work out, where the maker of the
        plan knows: then a plan made on the GPU never waits for it. A kind may be claimed without
        need, never left out.
    box: (t, h, w) where every video block is the box of that size at its origin, clipped at the
        far edges of the grid; its edges are powers of two whose product is block_q and block_k.
    grid, video_start: (T, H, W) of the video and its first raster token, where known.
    """

    q_blocks: BlockTable
    k_blocks: BlockTable
    full_count: Tensor
    full_index: Tensor
    q_length: int
    k_length: int
    block_q: int = 128
    block_k: int = 128
    unmasked_count: Tensor | None = None
    partial_count: Tensor | None = None
    partial_index: Tensor | None = None
    token_mask: TokenMask | None = None
    pooled_count: Tensor | None = None
    pooled_index: Tensor | None = None
    kinds: ListKinds | None = None
    covers: bool | None = None
    box: tuple[int, int, int] | None = None
    grid: tuple[int, int, int] | None = None
    video_start: int = 0

    @property
    def device(self) -> torch.device:
        """Where the plan's tensors are."""
        return self.full_count.device

    @property
    def batch(self) -> int:
        """1, or the batch that the plan was made for."""
        return max(self.full_count.shape[0], self.k_blocks.lengths.shape[0])

    @property
    def heads(self) -> int:
        """1, or the number of query heads that the plan was made for."""
        return self.full_count.shape[1]

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan on another device."""
        if torch.device(device) == self.device:
            return self
        moved = {
            name: value.to(device)
            for name, value in self.__dict__.items()
            if name in self.__dataclass_fields__ and value is not None and hasattr(value, "to")
        }
        return replace(self, **moved)

    @cached_property
    def launch_order(self) -> Tensor:
        """int32 [NQ]: query blocks, longest lists first, so that no long one runs alone at last."""
        work = self.full_count.sum((0, 1))
        if self.partial_count is not None:
            work = work + self.partial_count.sum((0, 1))
        if self.pooled_count is not None:  # a block's worth of pooled keys is as long as a block
            work = work + self.pooled_count.sum((0, 1)) / self.block_k
        return work.argsort(descending=True, stable=True).int()

    @property
    def scattered(self) -> bool:
        """Whether blocks are neither boxes of the grid nor runs of tokens."""
        ordered = self.q_blocks.order is not None or self.k_blocks.order is not None
        return self.box is None and ordered

    @property
    def mixed(self) -> bool:
        """Whether boxes of the video stand beside runs of other tokens."""
        video = math.prod(self.grid or (0,))
        return self.box is not None and (self.q_length, self.k_length) != (video, video)

    @cached_property
    def covers_queries(self) -> bool:
        """Whether every query token lies in a block of every sample."""
        if self.covers is not None:
            return self.covers
        return bool((self.q_blocks.lengths.sum(-1) == self.q_length).all())

    @cached_property
    def list_kinds(self) -> ListKinds:
        """Which kinds of entries the lists may have."""
        if self.kinds is not None:
            return self.kinds._replace(pooled=self.pooled_count is not None)
        full, bare, partial, pooled = self.entries
        return ListKinds(bare > 0, full > bare, partial > 0, pooled > 0)

    @property
    def visits(self) -> float:
        """Key blocks of a list on average; at most so many where `kinds` is given.

        Then the widths of the lists are taken, since to read the counts would wait for the device.
        """
        if self.kinds is None:
            return (self.entries[0] + self.entries[2]) / max(1, self.full_count.numel())
        partial = 0 if self.partial_index is None else self.partial_index.shape[-1]
        return min(self.full_index.shape[-1] + partial, self.k_blocks.count)

    @cached_property
    def entries(self) -> tuple[int, int, int, int]:
        """Entries of all lists, full, of these unmasked, partial and pooled, read together."""
        counts = (self.full_count, self.unmasked_count, self.partial_count, self.pooled_count)
        none = self.full_count.new_zeros((), dtype=torch.int64)
        full, bare, partial, pooled = torch.stack(
            [none if count is None else count.sum(dtype=torch.int64) for count in counts]
        ).tolist()
        return full, bare, partial, pooled

    def launched_density(self, backend: str = "triton") -> float:
        """Launched query x key slots over Lq x Lk.

        `triton` (and every GPU kernel) spends block_q x block_k slots on a visit, `torch` the
        blocks' own lengths, `reference` computes everything.
        """
        if backend == "reference":
            return 1.0
        if backend == "torch":
            return self._visited_density
        return self._slot_density

    @cached_property
    def _slot_density(self) -> float:
        full, _, partial, pooled = self.entries
        keys = (full + partial) * self.block_k + pooled
        lists = self.full_count.shape[0] * self.full_count.shape[1]
        return keys * self.block_q / (lists * self.q_length * self.k_length)

    @cached_property
    def _visited_density(self) -> float:
        pairs = self._pairs(self.full_count, self.full_index)
        if self.partial_count is not None and self.partial_index is not None:
            pairs += self._pairs(self.partial_count, self.partial_index)
        return (pairs + self._pooled_pairs()) / self._all_pairs

    def kept_density(self) -> float:
        """Pairs that enter the softmax, after all masks, over Lq x Lk; a pooled key is one key."""
        return self._kept_density

    @cached_property
    def _kept_density(self) -> float:
        pairs = self._pairs(self.full_count, self.full_index)
        return (pairs + self._partial_pairs() + self._pooled_pairs()) / self._all_pairs

    @property
    def _all_pairs(self) -> int:
        return self.batch * self.heads * self.q_length * self.k_length

    def _pairs(self, count: Tensor, index: Tensor) -> int:
        listed = listed_entries(count, index)
        batch, heads, queries, width = index.shape
        samples = self.batch
        lengths = self.k_blocks.lengths.long().expand(samples, -1)
        total = 0
        for sample in range(samples):  # one sample at a time keeps this to [Hp, NQ, M]
            row = sample if batch > 1 else 0
            keys = torch.where(listed[row], lengths[sample][index[row].long()], 0).sum(-1)
            q_row = sample if self.q_blocks.lengths.shape[0] > 1 else 0
            total += int((keys * self.q_blocks.lengths[q_row].long()).sum())
        return total

    def _pooled_pairs(self) -> int:
        if self.pooled_count is None:
            return 0
        keys = self.pooled_count.long().expand(self.batch, -1, -1)
        return int((keys * self.q_blocks.lengths.long().unsqueeze(1)).sum())

    def _partial_pairs(self) -> int:
        if self.partial_count is None or self.partial_index is None or self.token_mask is None:
            return 0
        batch, heads = self.partial_count.shape[:2]
        total = 0
        for sample in range(self.batch):
            row = sample if batch > 1 else 0
            q_tokens, q_ok = block_tokens(self.q_blocks, sample, self.block_q)
            k_tokens, k_ok = block_tokens(self.k_blocks, sample, self.block_k)
            for head in range(heads):
                entries = listed_entries(
                    self.partial_count[row, head], self.partial_index[row, head]
                )
                queries = entries.nonzero()[:, 0]
                keys = self.partial_index[row, head][entries].long()
                for some in range(0, len(keys), 256):
                    qs, ks = queries[some : some + 256], keys[some : some + 256]
                    kept = self.token_mask.allowed(q_tokens[qs], k_tokens[ks])
                    kept &= q_ok[qs].unsqueeze(-1) & k_ok[ks].unsqueeze(-2)
                    total += int(kept.sum())
        return total

    def validate(self, pooled: PooledKeys | None = None) -> BlockPlan:
        """Check every rule that kernels rely on; DitAccelError for the first one broken.

        pooled: the pooled keys that calls will bring, to check the numbers in the lists. Reads the
        plan's tensors on the host: for once per plan, not for each call.
        """
        from dit_accel.kernels.plan_checks import check_plan

        check_plan(self, pooled)
        return self


def listed_entries(count: Tensor, index: Tensor) -> Tensor:
    """bool like `index` [..., M]: the entries before `count` [...]."""
    return torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)


def block_tokens(table: BlockTable, sample: int, block: int) -> tuple[Tensor, Tensor]:
    """Raster tokens int64 [N, block] of every block for one sample, and which slots are real."""
    lengths = table.lengths[sample if table.lengths.shape[0] > 1 else 0]
    slots = torch.arange(block, device=lengths.device)
    real = slots < lengths.unsqueeze(-1)
    positions = torch.where(real, table.starts.unsqueeze(-1) + slots, 0).long()
    return (positions if table.order is None else table.order[positions].long()), real


def lists_from_mask(
    mask: Tensor, whole: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [Bp, Hp, NQ], indices [Bp, Hp, NQ, M] and unmasked counts from visible block pairs.

    mask: bool [Bp, Hp, NQ, NK]. whole: bool [Bp, NK] or [1, NK], key blocks that fill their slots;
    they come first in each list. Order within a list is otherwise ascending.
    width: M, where the longest list is known; else it is read back from the device, which waits
    for it. A list longer than `width` is cut.
    """
    first = torch.zeros_like(mask) if whole is None else mask & whole[:, None, None, :]
    count, unmasked = (x.sum(-1, dtype=torch.int32) for x in (mask, first))
    if width is None:
        width = max(1, int(count.max())) if count.numel() else 1
    blocks = mask.shape[-1]
    numbers = torch.arange(blocks, dtype=torch.int32, device=mask.device)
    index = torch.zeros((*mask.shape[:3], width + 1), dtype=torch.int32, device=mask.device)
    some = max(1, (1 << 24) // max(1, mask.shape[-2] * blocks))  # scatter's int64 stays small
    rows = (x.flatten(0, 1).split(some) for x in (mask, first, unmasked, index))
    for seen, leading, before, target in zip(*rows, strict=True):
        others = before.unsqueeze(-1) + (seen & ~leading).cumsum(-1, dtype=torch.int32)
        place = torch.where(leading, leading.cumsum(-1, dtype=torch.int32), others) - 1
        place = torch.where(seen, place.clamp_max(width), width)  # the last slot takes the rest
        target.scatter_(-1, place.long(), numbers.expand(seen.shape))
    index = index[..., :width].contiguous()
    return count.clamp_max(width), index, unmasked.clamp_max(width)
