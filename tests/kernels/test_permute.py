"""Tokens in block order and back, in torch and in Triton, against a loop over the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.blocks import BlockTable
from dit_accel.kernels.permute import block_order, gather, raster_order
from dit_accel.kernels.portable.permute import gather_tokens

Make = Callable[..., Any]
WAYS = {"torch": gather, "triton": gather_tokens}


def table(device: torch.device, shuffled: bool) -> BlockTable:
    """Three blocks over 40 of 50 tokens, shorter in the second sample."""
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).int()
    starts = torch.tensor([0, 16, 40], dtype=torch.int32)
    lengths = torch.tensor([[16, 14, 10], [16, 3, 0]], dtype=torch.int32)
    return BlockTable(order if shuffled else None, starts, lengths).to(device)


@pytest.mark.parametrize("shuffled", [False, True])
def test_orders_by_enumeration(shuffled: bool, device: torch.device) -> None:
    blocks = table(device, shuffled)
    tokens = torch.arange(50) if blocks.order is None else blocks.order.cpu()
    slots, back = [-1] * 48, [-1] * 50
    for block, (start, length) in enumerate(zip((0, 16, 40), (16, 14, 10), strict=True)):
        for place in range(length):
            token = int(tokens[start + place])
            slots[block * 16 + place], back[token] = token, block * 16 + place
    assert block_order(blocks, 16).tolist() == slots
    assert raster_order(blocks, 16, 50).tolist() == back


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize(("dim", "dtype"), [(32, torch.float32), (80, torch.float16)])
def test_there_and_back(
    way: str, dim: int, dtype: torch.dtype, qkv: Make, device: torch.device
) -> None:
    blocks = table(device, True)
    index = block_order(blocks, 16)
    q, k, v = qkv(50, batch=2, heads=4, kv_heads=2, dim=dim, dtype=dtype)
    head_major = v.transpose(1, 2).contiguous().transpose(1, 2)
    for tensors in ((q, k, head_major), (q,), (k, v)):
        moved = WAYS[way](list(tensors), index)
        back = WAYS[way](moved[:1], raster_order(blocks, 16, 50))
        for x, y in zip(tensors, moved, strict=True):
            assert y.shape == (2, 48, *x.shape[2:]) and y.dtype == dtype and y.is_contiguous()
            for slot, token in enumerate(index.tolist()):
                row = torch.zeros_like(x[:, 0]) if token < 0 else x[:, token]
                assert torch.equal(y[:, slot], row)
        inside = raster_order(blocks, 16, 50) >= 0
        assert torch.equal(back[0][:, inside], tensors[0][:, inside])
        assert (back[0][:, ~inside] == 0).all()


def test_opcheck(qkv: Make, device: torch.device) -> None:
    q, k, v = qkv(50, heads=4, kv_heads=2, dim=32)
    index = block_order(table(device, True), 16)
    torch.library.opcheck(gather_tokens, ([q, k, v], index))
    torch.library.opcheck(gather_tokens, ([q], index))
