"""The torch backend reads tensors of any strides, static plans too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.layout import TokenLayout

LAYOUT = TokenLayout((4, 8, 8), after=20)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("name", ["full", "sliding_tile"])
def test_numbers_of_a_row_need_not_be_neighbours(
    name: str, lse: bool, which: int, qkv: Callable[..., Any]
) -> None:
    plan = plan_for(LAYOUT, pattern(name), "cpu", 2)
    tensors = [x.cpu() for x in qkv(LAYOUT.length)]
    usual = block_sparse_attention(*tensors, plan, backend="torch", return_lse=lse)
    tensors[which] = tensors[which].transpose(1, 3).contiguous().transpose(1, 3)
    assert tensors[which].stride(-1) != 1
    strided = block_sparse_attention(*tensors, plan, backend="torch", return_lse=lse)
    pairs = zip(usual, strided, strict=True) if lse else [(usual, strided)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
