"""The result of attention over two disjoint key sets from the results over each.

With LSE L = ln sum_j exp(s_j) of a row: m = max(La, Lb), L = m + ln(e^(La - m) + e^(Lb - m)),
out = e^(La - L) out_a + e^(Lb - L) out_b. A side without keys (L = -inf) counts for nothing; two
such sides give 0 and -inf. All arithmetic is float32.

A softmax that starts from a state (maximum m, sum l = sum_j exp(s_j - m), acc = sum_j exp(s_j - m)
v_j) is a merge with `from_state(m, l, acc)`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError


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
    from dit_accel.kernels.backends import runs_triton

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


def from_state(top: Tensor, total: Tensor, acc: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, D], LSE [B, H, L]) of an online softmax's state, float32.

    top, total: m and l, [B, H, L]; acc: [B, L, H, D], not yet divided by l. Rows that have seen no
    key (l = 0) give 0 and -inf.
    """
    seen = total != 0
    safe = torch.where(seen, total.float(), 1.0)
    out = acc.float() / safe.transpose(1, 2).unsqueeze(-1)
    return out, torch.where(seen, top.float() + safe.log(), -torch.inf)


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
