"""Attention over disjoint sets of keys, joined: an attention call is a merge of parts.

With LSE L = ln sum_j exp(s_j) of a row: m = max(La, Lb), L = m + ln(e^(La - m) + e^(Lb - m)),
out = e^(La - L) out_a + e^(Lb - L) out_b. A part without keys (L = -inf) counts for nothing; two
such parts give 0 and -inf. All arithmetic is float32.

A softmax that starts from a state (maximum m, sum l = sum_j exp(s_j - m), acc = sum_j exp(s_j - m)
v_j) is the part with out = acc / l and LSE = m + ln l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels.machine import runs_triton
from dit_accel.kernels.once import once
from dit_accel.kernels.plan import BlockPlan, Forward, ListKinds
from dit_accel.kernels.pooling import PooledKeys


@dataclass(frozen=True, eq=False)
class Part:
    """Attention over some keys: out [B, L, H, D], and LSE float32 [B, H, L] (natural log)."""

    out: Tensor
    lse: Tensor


def combine(parts: Sequence[Part]) -> Part:
    """The attention over the keys of all parts, in the type of the first."""
    return reduce(lambda a, b: Part(*merge(a.out, a.lse, b.out, b.lse)), parts)


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    layout: Literal["bshd", "bhsd"] = "bshd",
) -> tuple[Tensor, Tensor]:
    """out like out_a and LSE float32 [B, H, L] over the keys of both results.

    out_a, out_b: [B, L, H, D] ([B, H, L, D] with layout "bhsd"), any types and strides; the result
    has the type of out_a. lse_a, lse_b: float32 [B, H, L], natural logarithm.

    Raises DitAccelError where shapes, types of the LSE or devices do not fit together.
    """
    if layout not in ("bshd", "bhsd"):
        raise DitAccelError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}.")
    if layout == "bhsd":
        out_a, out_b = out_a.transpose(1, 2), out_b.transpose(1, 2)
    _check(out_a, lse_a, out_b, lse_b)
    if runs_triton(out_a):
        from dit_accel.kernels.portable.merge import merge_results

        out, lse = merge_results(out_a, lse_a, out_b, lse_b)
    else:
        out, lse = _merge(out_a, lse_a, out_b, lse_b)
    return (out.transpose(1, 2) if layout == "bhsd" else out), lse


def _merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    top = torch.maximum(lse_a, lse_b)
    base = torch.where(top.isneginf(), 0.0, top)
    # Relative to the maximum: e^(La - L) would lose digits where L is large.
    weights = (lse_a - base).exp(), (lse_b - base).exp()
    total = weights[0] + weights[1]
    seen = total != 0
    total = torch.where(seen, total, 1.0)
    out = torch.zeros((), device=a.device)
    for part, weight in zip((a, b), weights, strict=True):
        share = (weight / total).transpose(1, 2).unsqueeze(-1)  # [B, L, H, 1]
        out = out + torch.where(share != 0, part.float() * share, 0.0)
    return out.to(a.dtype), torch.where(seen, base + total.log(), -torch.inf)


def _check(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> None:
    if a.ndim != 4 or b.shape != a.shape:
        raise DitAccelError(
            f"out_b: expected four dimensions like out_a, {tuple(a.shape)}, got {tuple(b.shape)}."
        )
    batch, length, heads, _ = a.shape
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != (batch, heads, length) or lse.dtype != torch.float32:
            raise DitAccelError(
                f"{name}: expected torch.float32 {(batch, heads, length)}, "
                f"got {lse.dtype} {tuple(lse.shape)}."
            )
    for name, tensor in (("lse_a", lse_a), ("out_b", b), ("lse_b", lse_b)):
        if tensor.device != a.device:
            raise DitAccelError(f"{name}: expected it on {a.device}, got {tensor.device}.")


@dataclass(frozen=True, eq=False)
class Halves:
    """Two plans over the same blocks: `blocks` has no pooled lists, `pooled` nothing else."""

    blocks: BlockPlan
    pooled: BlockPlan


@once
def halves_of(plan: BlockPlan) -> Halves:
    """The halves of a plan with pooled lists; nothing is read from the device."""
    none = torch.zeros_like(plan.visits.count)
    kinds = ListKinds(whole=False, short=False, partial=False, pooled=True)
    shape, known = plan.shape, plan.known
    return Halves(
        replace(
            plan,
            pooled=None,
            shape=replace(shape, kinds=shape.kinds._replace(pooled=False)),
            known=known and replace(known, pooled=0),
        ),
        replace(
            plan,
            visits=replace(plan.visits, whole=none, full=none, count=none),
            mask=None,
            shape=replace(shape, kinds=kinds, most=0, visits=0.0, rules=()),
            known=known and replace(known, whole=0, short=0, partial=0),
        ),
    )


def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    pooled: PooledKeys,
    on_blocks: Forward,
    on_pooled: Forward,
) -> tuple[Tensor, Tensor | None]:
    """A plan's blocks by one backend, its pooled keys by another: for kernels that take blocks
    alone. out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD.

    on_blocks is called without pooled keys, on_pooled with them as its last argument and with lists
    of nothing else; both must give 0 and -inf where a row sees no key.
    """
    halves = halves_of(plan)
    near, near_lse = on_blocks(q, k, v, halves.blocks, scale, True)
    far, far_lse = on_pooled(q, k, v, halves.pooled, scale, True, pooled)
    assert near_lse is not None and far_lse is not None, "both were asked for it"
    both = combine([Part(near, near_lse), Part(far, far_lse)])
    return both.out, both.lse if return_lse else None
