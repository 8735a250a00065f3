"""flash-attn-4 as a backend: a plan's lists become its block-sparse tensors.

Its CuTe kernel takes, per query block of 128 consecutive tokens, a list of key blocks of 128
consecutive tokens; only the last block may be short. It reads lists from the end, and masks the
sequence's end in the first block that it reads: so lists are sorted.
Source: Dao-AILab/flash-attention, flash_attn/cute/{interface,block_sparsity,block_sparse_utils}.py.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, Shape
from dit_accel.kernels.pooling import PooledKeys

BLOCK = 128
MAX_DIM = 128
"""Beyond it the kernel's key blocks are not of 128 tokens."""


@lru_cache(maxsize=1)
def fa4_missing() -> str | None:
    """Why flash-attn-4 cannot run on this machine, or None."""
    try:
        found = find_spec("flash_attn.cute") is not None
    except Exception:  # looking inside flash_attn imports it, and there may be none or a broken one
        found = False
    if not found:
        return "flash-attn-4 is not installed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    if torch.cuda.get_device_capability() != (9, 0):
        return "needs compute capability 9.0: elsewhere its blocks are not 128 x 128"
    try:
        _, tensors = _fa4()
    except Exception as error:  # its dependencies raise many kinds
        return f"flash-attn-4 cannot be imported: {error}"
    if "block_size" not in tensors._fields:
        return "this flash-attn-4 is too old: its block-sparse tensors have no block_size"
    return None


def fa4_obstacle(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> str | None:
    """Why flash-attn-4 cannot compute this call, or None."""
    if not q.is_cuda:
        return f"device {q.device.type}: needs CUDA"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}: needs float16 or bfloat16"
    if q.shape[-1] > MAX_DIM or q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]}: needs a multiple of 8 up to {MAX_DIM}"
    return plan_obstacle(shape)


def plan_obstacle(shape: Shape) -> str | None:
    """Why plans of this shape have no form as flash-attn-4's lists, or None."""
    if (shape.block_q, shape.block_k) != (BLOCK, BLOCK):
        return f"blocks of {shape.block_q} x {shape.block_k}: needs {BLOCK} x {BLOCK}"
    if shape.kinds.partial or shape.kinds.pooled:
        return "partial blocks or pooled keys: needs full blocks alone"
    if not shape.in_place:
        return f"blocks are not every {BLOCK} consecutive tokens"
    return None


def fa4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,  # its lists are empty, or `fa4_obstacle` would have said so
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    attend, tensors = _fa4()
    none, nothing, count, index = sparse_lists(plan)
    sparse = tensors(
        mask_block_cnt=none,
        mask_block_idx=nothing,
        full_block_cnt=count,
        full_block_idx=index,
        block_size=(BLOCK, BLOCK),
    )
    result = attend(
        q,
        k,
        v,
        softmax_scale=scale,
        pack_gqa=False,  # one query head for each row of the lists
        block_sparse_tensors=sparse,
        return_lse=return_lse,
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    return out, lse if return_lse else None


@once
def sparse_lists(plan: BlockPlan) -> tuple[Tensor, ...]:
    """(counts, indices) of masked and of full blocks, int32 [Bp, Hp, NQ] and [Bp, Hp, NQ, M].

    There are no masked blocks; full ones ascend.
    """
    last = plan.shape.k_blocks
    index, listed = plan.visits.rows()
    index = torch.where(listed, index, last).sort(-1).values[..., :last]
    index = torch.where(index < last, index, 0).int().contiguous()
    count = plan.visits.count
    return torch.zeros_like(count), torch.zeros_like(index[..., :1]), count, index


def _fa4() -> tuple[Any, Any]:
    """flash-attn-4's entry and its block-sparse tensors."""
    attend = import_module("flash_attn.cute").flash_attn_func
    return attend, import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
