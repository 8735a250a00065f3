"""Block top-k: each row keeps the key blocks whose mean keys are closest to its mean query.

s_ij = scale qbar_i . kbar_j in float32, over the video's key blocks j; row i keeps the
m = max(1, round half to even(density x number of such blocks)) highest, of equal scores the lower
number. The own block, sinks and neighbours come first and count in m; where they are more than m,
all of them stay.
Source: the coarse stage of Video Sparse Attention (arXiv 2505.13389, there without forced blocks)
and of BiFormer (arXiv 2303.08810, there with lists = "shared"); here without training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.compute import param
from dit_accel.kernels.selectors.base import Selector
from dit_accel.kernels.selectors.budget import Budget


@dataclass(frozen=True)
class BlockTopK(Selector):
    """Keeps a fixed share of the video's key blocks, the highest scores of each row."""

    name: ClassVar[str] = "block_topk"

    density: float = param(
        0.25, above=0, high=1, usual=(0.1, 0.5),
        help="Share of the video's key blocks that each row keeps.",
    )  # fmt: skip

    def budget(self, blocks: int) -> Budget:
        """See Selector."""
        return Budget.of(self.density, blocks)
