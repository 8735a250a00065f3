"""Block top-p: each row keeps as many key blocks as it takes to gather a share of its mass.

p_ij = softmax over the video's key blocks j of scale qbar_i . kbar_j + ln n_j, with n_j valid
tokens: what attention would give block j if its keys were equal to their mean. Row i keeps the
fewest of its highest probabilities that add up to at least p, the block that crosses p included
(so at least 1), of equal ones the lower number. The own block, sinks and neighbours come first:
they are kept and their mass counts. A row that would keep more than max_density of the blocks
keeps the first ones of this order; forced blocks stay.
Source: the sets of SVG2 (arXiv 2505.18875) and Rectified SpaAttn, over blocks in place of
clusters; SpargeAttn (arXiv 2502.18137) leaves the crossing block out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.compute import param
from dit_accel.kernels.selectors.base import Selector
from dit_accel.kernels.selectors.budget import Budget


@dataclass(frozen=True)
class BlockTopP(Selector):
    """Keeps the fewest key blocks of the video that hold a share p of a row's estimated mass."""

    name: ClassVar[str] = "block_topp"

    p: float = param(
        0.9, above=0, high=1, usual=(0.8, 0.98),
        help="Share of the estimated mass that each row keeps.",
    )  # fmt: skip
    max_density: float = param(
        0.5, above=0, high=1,
        help="Share of the video's key blocks that a row keeps at most.",
    )  # fmt: skip

    def budget(self, blocks: int) -> Budget:
        """See Selector."""
        return Budget.of(self.max_density, blocks, self.p)
