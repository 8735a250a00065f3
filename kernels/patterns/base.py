"""What every pattern is: a static rule that makes a plan from a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

LayoutKind = Literal["boxes", "gather", "lengths"]
"""How a backend reads blocks: power-of-two boxes of the grid, gathered into whole blocks of slots,
or tiles at their own lengths."""


def kind_for(device: torch.device | str) -> LayoutKind:
    """What is planned for where the caller does not say: gathered slots on a GPU, else lengths."""
    return "lengths" if torch.device(device).type == "cpu" else "gather"


@dataclass(frozen=True)
class Pattern(ABC):
    """Parameters are the dataclass fields (and the keys of a profile's rule); hashable."""

    name: ClassVar[str]

    @abstractmethod
    def build(
        self,
        layout: TokenLayout,
        device: torch.device | str,
        heads: int | None = None,
        *,
        block_efficiency: Mapping[int, float] | None = None,
        layout_kind: LayoutKind | None = None,
    ) -> BlockPlan:
        """The plan of this pattern for one layout, with its tensors on `device`.

        heads: number of query heads, for patterns that differ per head.
        block_efficiency: relative kernel speed by block size (64, 128), for GPU planning.
        layout_kind: what the backend reads; None is `kind_for(device)`.
        """
