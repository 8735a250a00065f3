"""The pooled tail: every block that is not visited enters the softmax as its mean key and value.

Pooled key j has the score scale q . kbar_j + b_j and the value vbar_j: with `weights = "count"`
b_j = ln n_j, with "exact" the b_ij of the probe, with which the block has its exact mass at the
query block's mean query. Sources: Sol-Attn and Pyramid Sparse Attention use the first form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import param
from dit_accel.kernels.tails.base import Tail, pool_param, pool_size
from dit_accel.kernels.tails.join import Form

WEIGHTS_HELP = (
    'How a pooled key weighs: "exact" as its tokens do for the mean query of the query block, '
    '"count" as so many tokens at their mean.'
)


@dataclass(frozen=True)
class Pooled(Tail):
    """Means of keys and values, zeroth order."""

    name: ClassVar[str] = "pooled"

    pool: int | str = pool_param()
    weights: str = param("count", choices=("count", "exact"), help=WEIGHTS_HELP)

    def form(self, blocks: Blocks) -> Form:
        """See Tail."""
        return Form(pool_size(self.pool, blocks), self.weights == "exact", None)
