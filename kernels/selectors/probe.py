"""Selection by a probe: the exact log mass of every key block for the mean query of a block.

One exact row for each query block (`kernels.probe`) gives the mass l_ij of every key block; row i
keeps the m = max(1, round half to even(density x number of such blocks)) highest. With
`rank = "error"` (the selector `probe_error`) the score is l_ij + ln(var_ij + 1e-3) / 2: the mass
times what a linear tail would get wrong. Forced blocks are as in `block_topk`. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.kernels.compute import param
from dit_accel.kernels.selectors.base import Context, Selector
from dit_accel.kernels.selectors.budget import Budget


@dataclass(frozen=True)
class ProbeSelector(Selector):
    """Keeps a fixed share of the video's key blocks, those that a probe finds heaviest."""

    name: ClassVar[str] = "probe"
    probes: ClassVar[bool] = True

    density: float = param(
        0.2, above=0, high=1, usual=(0.1, 0.3),
        help="Share of the video's key blocks that each row keeps.",
    )  # fmt: skip
    rank: str = param(
        "mass", choices=("mass", "error"),
        help="By a block's mass, or by its mass times the spread of its scores.",
    )  # fmt: skip

    def budget(self, blocks: int) -> Budget:
        """See Selector."""
        return Budget.of(self.density, blocks)

    def scores(self, context: Context) -> Tensor:
        """See Selector."""
        found = context.probe("error" if self.rank == "error" else "mass").rank
        assert found is not None, "it was asked for it"
        return found


@dataclass(frozen=True)
class ProbeError(ProbeSelector):
    """`probe` with another default of its rank."""

    name: ClassVar[str] = "probe_error"

    rank: str = param(
        "error", choices=("mass", "error"),
        help="By a block's mass, or by its mass times the spread of its scores.",
    )  # fmt: skip
