"""What every tail is: an addition to the rows of the video's query blocks, under the same softmax.

A tail works on any plan whose blocks of queries and of keys are the same tokens of the video. A
block that is visited, be it under a token mask, is not of the tail; tokens beside the video neither
have one nor are in one.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, shown
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import Parametrised, param
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.tails.join import Form, join_tail

if TYPE_CHECKING:
    from dit_accel.kernels.selectors.base import Context

SIZES = (16, 32, 64)
"""Tokens of a pooled key, where it is not a whole block."""


@dataclass(frozen=True)
class Tail(Parametrised):
    """A tail; see `Drop` for none."""

    empty: ClassVar[bool] = False

    @abstractmethod
    def form(self, blocks: Blocks) -> Form | None:
        """How it is computed over such blocks; None of a tail that is nothing."""

    def size(self, blocks: Blocks) -> int:
        """Tokens of a pooled key."""
        form = self.form(blocks)
        assert form is not None, "nothing is pooled"
        return form.size

    def join(self, context: Context, plan: BlockPlan, out: Tensor, lse: Tensor) -> None:
        """Adds the tail to what the plan's visits gave, in place.

        out: [B, Lq, H, D]; lse: float32 [B, H, Lq].
        """
        form = self.form(plan.blocks)
        if form is not None:
            join_tail(context, plan, form, out, lse)

    def density(self, blocks: Blocks, padded: bool = True, probed: bool = False) -> float:
        """What it adds to a launched density: a pooled key is a key; a probe, which is scores
        without values, counts half.

        padded: whether blocks are computed with all their slots; else with their own tokens.
        probed: whether the selector of the call makes a probe in any case.
        """
        if not blocks.video_blocks:
            return 0.0
        form = self.form(blocks)
        video = slice(blocks.first_video, blocks.first_video + blocks.video_blocks)
        queries, keys = (table.lengths[0, video].cpu() for table in (blocks.q, blocks.k))
        if padded:
            queries = torch.full_like(queries, blocks.block_q)
            keys = torch.full_like(keys, blocks.block_k)
        pairs = 0.0
        if form is not None:
            size = min(form.size, blocks.block_k)
            pairs = float(queries.sum()) * float((-(-keys // size)).sum())
        if probed or (form is not None and form.exact):
            pairs += blocks.video_blocks * float(keys.sum()) / 2
        return pairs / (blocks.q_length * blocks.k_length)


@dataclass(frozen=True)
class Drop(Tail):
    """Nothing: keys that are not visited count for nothing."""

    name: ClassVar[str] = "drop"
    empty: ClassVar[bool] = True

    def form(self, blocks: Blocks) -> None:
        """See Tail."""


def pool_param() -> int | str:
    """The parameter `pool`."""
    made: int | str = param(
        "block", form='"block" | 16 | 32 | 64', unit="tokens", parse=_pool,
        help="Consecutive tokens of a block that stand as one key; fewer are closer and dearer.",
    )  # fmt: skip
    return made


def pool_size(pool: int | str, blocks: Blocks) -> int:
    """Tokens of a pooled key for a value of the parameter `pool`."""
    return blocks.block_k if isinstance(pool, str) else min(pool, blocks.block_k)


def _pool(value: object, name: str) -> int | str:
    if value == "block" or (type(value) is int and value in SIZES):
        return value
    near = f'the nearest legal value is {min(SIZES, key=lambda n: abs(n - value))}' if (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    ) else 'a legal value is "block"'  # fmt: skip
    raise DitAccelError(f'{name}: expected "block", 16, 32 or 64, got {shown(value)}; {near}.')
