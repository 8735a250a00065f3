"""FlexAttention as a backend: a plan's lists become a BlockMask, never a dense mask.

FlexAttention wants blocks of one size, one after another. Where a plan's blocks are not (an order,
short blocks in the middle), q, k and v are gathered into padded blocks first, and the output is
gathered back. A list's unmasked entries are FlexAttention's full blocks; all others go to its
masked list, where `mask_mod` looks up the lengths of key blocks and evaluates the token rule.
Pooled keys are the portable backends', merged by LSE.

Always compiled: eager FlexAttention makes the whole score matrix and does not read the lists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.once import once
from dit_accel.kernels.parts import attend_split
from dit_accel.kernels.permute import block_order, gather, raster_order
from dit_accel.kernels.plan import BlockPlan, Forward, Shape, Visits
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES
from dit_accel.kernels.torch_backend import torch_attention

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """A plan as FlexAttention reads it.

    q_index, k_index: int32 [slots], the token in each slot, None where tokens stay in place.
    back: int32 [Lq], the slot of each query token, -1 for tokens in no block; None like q_index.
    full_count, full_index, masked_count, masked_index: int32 [Bp, Hp, NQ] and [Bp, Hp, NQ, NK].
    """

    q_index: Tensor | None
    k_index: Tensor | None
    back: Tensor | None
    full_count: Tensor
    full_index: Tensor
    masked_count: Tensor
    masked_index: Tensor
    mask_mod: MaskMod
    q_slots: int
    k_slots: int


KINDS = 1024
"""Kinds of inputs (dtype, head_dim, mask, ...) that FlexAttention may be compiled for."""


def flex_missing() -> str | None:
    """Why FlexAttention cannot run on this machine, or None."""
    try:
        from torch.nn.attention.flex_attention import BlockMask
    except ImportError:
        return f"torch {torch.__version__} has no FlexAttention"
    if "seq_lengths" not in inspect.signature(BlockMask.from_kv_blocks).parameters:
        return f"torch {torch.__version__}: BlockMask.from_kv_blocks takes no seq_lengths"
    if not torch.cuda.is_available():
        return "no CUDA device (on a CPU FlexAttention keeps back the LSE)"
    return None


def flex_obstacle(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> str | None:
    """Why FlexAttention cannot compute this call, or None."""
    if not q.is_cuda:
        return f"device {q.device.type}: needs CUDA"
    if shape.block_q not in (64, 128) or shape.block_k not in (64, 128):
        return f"blocks of {shape.block_q} x {shape.block_k}: needs 64 or 128"
    if shape.q_blocks == 0 or shape.k_blocks == 0:
        return "no blocks"
    return None


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD."""
    if pooled is not None and plan.shape.kinds.pooled:
        return attend_split(q, k, v, plan, scale, return_lse, pooled, flex_attention, _portable(q))
    flex = flex_plan(plan)
    query = q if flex.q_index is None else gather([q], flex.q_index)[0]
    key, value = (k, v) if flex.k_index is None else gather([k, v], flex.k_index)
    out, lse = _call(query, key, value, _block_mask(flex, plan), scale, return_lse)
    if flex.back is None:
        return out, lse if return_lse else None
    (out,) = gather([out], flex.back)
    if not plan.blocks.covers:
        out, lse = _clear_outside(out, lse, plan, flex.back)
    elif lse is not None:
        lse = lse[..., flex.back.long()]
    return out, lse if return_lse else None


def _portable(q: Tensor) -> Forward:
    """What computes pooled keys."""
    if not q.is_cuda:
        return torch_attention
    from dit_accel.kernels.portable.forward import triton_attention

    return triton_attention


@once
def flex_plan(plan: BlockPlan) -> FlexPlan:
    """The plan as FlexAttention takes it."""
    blocks, lists = plan.blocks, plan.visits
    q_index = k_index = back = None
    q_slots, k_slots = blocks.q_length, blocks.k_length
    if not blocks.q.in_place(blocks.block_q, blocks.q_length):
        q_index = block_order(blocks.q, blocks.block_q)
        back = raster_order(blocks.q, blocks.block_q, blocks.q_length)
        q_slots = len(q_index)
    if not blocks.k.in_place(blocks.block_k, blocks.k_length):
        k_index = block_order(blocks.k, blocks.block_k)
        k_slots = len(k_index)
    width = blocks.k.count
    full_index, _ = lists.rows(stop=lists.whole, width=width)
    masked_index, _ = lists.rows(lists.whole, width=width)
    mask_mod = _mask_mod(plan, q_index, k_index)
    return FlexPlan(
        q_index, k_index, back, lists.whole, full_index, lists.count - lists.whole, masked_index,
        mask_mod, q_slots, k_slots,
    )  # fmt: skip


def _mask_mod(plan: BlockPlan, q_index: Tensor | None, k_index: Tensor | None) -> MaskMod:
    """Which pairs of the masked list count, from slot numbers."""
    lengths = plan.blocks.k.lengths
    block_q, block_k, per_sample = plan.blocks.block_q, plan.blocks.block_k, len(lengths) > 1

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        sample = b if per_sample else 0
        return k % block_k < lengths[sample, k // block_k]

    _, short, partial, _ = plan.shape.kinds
    if not partial or plan.mask is None:
        return inside
    rule, *others = (TOKEN_RULES[name] for name, _ in plan.mask.rules)
    first, *rest = plan.mask.packed.split(MAX_PARAMS)
    other, second = (others[0], rest[0]) if others else (None, first)
    q_at, k_at = (
        coords if index is None else coords[index.clamp_min(0).long()]
        for coords, index in (
            (plan.mask.q_coords, q_index),
            (plan.mask.k_coords, k_index),
        )
    )

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = (q_at[q, 0], q_at[q, 1], q_at[q, 2]), (k_at[k, 0], k_at[k, 1], k_at[k, 2])
        kept: Tensor = rule(*query, *key, first)
        if other is not None:
            kept = kept | other(*query, *key, second)
        return inside(b, h, q, k) & kept

    if not short:
        return allowed
    # Short full blocks share the masked list with partial ones: a table of blocks tells which.
    partials = _block_table(plan.visits, plan.blocks.k.count, plan.visits.full)
    samples, heads = len(partials) > 1, partials.shape[1] > 1

    def mixed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = partials[b if samples else 0, h if heads else 0, q // block_q, k // block_k]
        return inside(b, h, q, k) & (allowed(b, h, q, k) | ~row)

    return mixed


def _block_table(lists: Visits, blocks: int, first: Tensor | None = None) -> Tensor:
    """bool [Bl, Hl, NQ, blocks]: which entries the lists have, from number `first` on."""
    index, listed = lists.rows(first, width=blocks)
    table = torch.zeros((*index.shape[:3], blocks + 1), dtype=torch.bool, device=index.device)
    slots = torch.where(listed, index, blocks).long()
    return table.scatter_(-1, slots, True)[..., :blocks].contiguous()


def _block_mask(flex: FlexPlan, plan: BlockPlan) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    return BlockMask.from_kv_blocks(
        flex.masked_count, flex.masked_index, flex.full_count, flex.full_index,
        BLOCK_SIZE=(plan.blocks.block_q, plan.blocks.block_k), mask_mod=flex.mask_mod,
        seq_lengths=(flex.q_slots, flex.k_slots), **_forward_only(),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _forward_only() -> dict[str, Any]:
    """Leaves out the transposed lists of a backward pass, where this torch can."""
    from torch.nn.attention.flex_attention import BlockMask

    known = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters
    return {"compute_q_blocks": False} if known else {}


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """FlexAttention, always compiled: eager, it ignores the lists of a block mask.

    torch.compile goes back to eager when a function has been compiled for too many kinds of
    inputs, so that limit is lifted here, and where it is met all the same it is an error.
    """
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention as flex

    new = hasattr(config, "fail_on_recompile_limit_hit")
    names = (
        ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
        if new
        else ("cache_size_limit", "accumulated_cache_size_limit", "fail_on_cache_limit_hit")
    )
    patch: Any = config.patch
    return patch(dict(zip(names, (KINDS, KINDS, True), strict=True)))(torch.compile(flex))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compiled FlexAttention on BSHD tensors."""
    from torch.nn.attention import flex_attention as module

    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    keywords: dict[str, Any] = {
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[2] != k.shape[2],
    }
    if not return_lse:
        out = _compiled()(query, key, value, **keywords)
        return out.transpose(1, 2), None
    if hasattr(module, "AuxRequest"):
        out, aux = _compiled()(
            query, key, value, **keywords, return_aux=module.AuxRequest(lse=True)
        )
        return out.transpose(1, 2), aux.lse
    out, lse = _compiled()(query, key, value, **keywords, return_lse=True)
    return out.transpose(1, 2), lse


def _clear_outside(
    out: Tensor, lse: Tensor | None, plan: BlockPlan, back: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Rows in no block (of their sample) become 0 with LSE -inf."""
    slots = back.clamp_min(0).long()
    lengths = plan.blocks.q.lengths[:, slots // plan.blocks.block_q]
    inside = (back >= 0) & (slots % plan.blocks.block_q < lengths)  # [Bp, Lq]
    out = torch.where(inside[:, :, None, None], out, 0.0)
    if lse is not None:
        lse = torch.where(inside[:, None], lse[..., slots], -torch.inf)
    return out, lse
