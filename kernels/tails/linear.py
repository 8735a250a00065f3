"""The linear tail: what is not visited, to first order around each query block's mean query.

Row q of query block i, with j over the blocks that are not visited and LSE of the whole row:
    z_j = scale q . kbar_j + b_ij, g = sum_j exp(z_j - LSE),
    tail = sum_j exp(z_j - LSE) vbar_j + g scale q M_i,
    M_i = sum_j w_ij C_j, w_ij = softmax_j l_ij,
    C_j = (1 / n_j) sum_t (k_t - kbar)^T (v_t - vbar), about the means of each pooled key.
l and b are the probe's (`kernels.probe`); with `weights = "count"` l_ij = scale qbar_i . kbar_j +
ln n_j and b = ln n. M is of one query block, of `slope` neighbouring ones, or of all of a head, by
the mean of w over those that have a tail. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.errors import DitAccelError, shown
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import param
from dit_accel.kernels.tails.base import Tail, pool_param, pool_size
from dit_accel.kernels.tails.join import Form
from dit_accel.kernels.tails.pooled import WEIGHTS_HELP

MOST = 4096


def _slope(value: object, name: str) -> int | str:
    if value in ("block", "head") or (type(value) is int and 1 <= value <= MOST):
        return value
    raise DitAccelError(
        f'{name}: expected "block", "head" or a whole number of blocks from 1 to {MOST}, got '
        f'{shown(value)}; a legal value is "block".'
    )


@dataclass(frozen=True)
class Linear(Tail):
    """Pooled keys with exact weights, and one linear map a query block for what they leave out."""

    name: ClassVar[str] = "linear"

    slope: int | str = param(
        "block", form='"block" | "head" | blocks', unit="query blocks", parse=_slope,
        help="Query blocks that share one linear map; more are cheaper.",
    )  # fmt: skip
    pool: int | str = pool_param()
    weights: str = param("exact", choices=("exact", "count"), help=WEIGHTS_HELP)

    def form(self, blocks: Blocks) -> Form:
        """See Tail."""
        slope = {"block": 1, "head": max(1, blocks.video_blocks)}.get(str(self.slope), self.slope)
        assert isinstance(slope, int)
        return Form(pool_size(self.pool, blocks), self.weights == "exact", slope)
