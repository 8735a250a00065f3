"""Which blocks a row of scores keeps, and its list: the rule, in torch.

Of the candidates (the video's key blocks with valid tokens) the forced ones come first, then the
highest scores, of equal ones the lower number. A row keeps the first `most` of this order; with a
`mass`, only as many as it takes until their probabilities add up to it, the block that gets there
included: softmax over the candidates of score + ln n, n being the valid tokens of a block. Forced
blocks are kept whatever the bounds, and their probabilities count.

`kernel.py` does the same in Triton, with the scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How many of the video's blocks a row keeps.

    most: at most so many, but for forced ones. mass: until their probabilities reach this; None
        keeps `most`, 1 keeps every block up to `most`.
    """

    most: int
    mass: float | None = None

    @classmethod
    def of(cls, density: float, blocks: int, mass: float | None = None) -> Budget:
        """At most that share of so many blocks, at least one; Python rounds half to even."""
        return cls(max(1, round(density * blocks)), mass)

    @property
    def share(self) -> float:
        """The mass to reach; of a mass of 1 infinity, as blocks of no weight are to be kept too."""
        return math.inf if self.mass is None or self.mass >= 1 else self.mass


def keep_blocks(score: Tensor, forced: Tensor, length: Tensor, budget: Budget) -> Tensor:
    """bool [R, N]: what rows of scores (float32 [R, N]) keep.

    forced: bool [R, N]. length: int32 [N], valid tokens of the blocks.
    """
    candidate = length > 0
    if budget.mass is not None:
        score = score + length.clamp_min(1).float().log()
    ranked = torch.where(score.isnan(), torch.finfo(score.dtype).max, score)  # after forced ones
    ranked = ranked.masked_fill(forced, torch.inf).masked_fill(~candidate, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    taken = (torch.arange(len(length), device=score.device) < budget.most).expand(score.shape)
    if budget.mass is not None:
        score = score.masked_fill(~candidate, -torch.inf)
        weight = (score - score.amax(-1, keepdim=True)).exp()
        sums = weight.gather(-1, order).cumsum(-1)
        # What has been gathered before a block: the first one always counts.
        before = torch.nn.functional.pad(sums[:, :-1], (1, 0))
        taken = taken & (before < weight.sum(-1, keepdim=True) * budget.share)
    kept = torch.zeros_like(forced).scatter_(-1, order, taken)
    return (kept | forced) & candidate


def list_blocks(keep: Tensor, fills: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists int32 [R, most] of kept blocks, whole ones first, ascending; their whole and all.

    keep: bool [R, N], at most `most` in a row. fills: bool [N], blocks without a free slot.
    """
    kinds = torch.where(keep, torch.where(fills, 0, 1), 2).to(torch.uint8)
    index = kinds.sort(dim=-1, stable=True).indices[:, :most].int()
    whole, count = ((kinds <= kind).sum(-1, dtype=torch.int32) for kind in (0, 1))
    return index, whole, count
