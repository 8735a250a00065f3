"""Block-sparse attention: softmax(scale q k^T) v over the key blocks of a plan."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.backends import BACKENDS, choose, eligible
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.plan import BlockPlan, Shape
from dit_accel.kernels.pooling import PooledKeys

Layout = Literal["bshd", "bhsd"]


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
    layout: Layout = ...,
    pooled: PooledKeys | None = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
    layout: Layout = ...,
    pooled: PooledKeys | None = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    layout: Layout = "bshd",
    pooled: PooledKeys | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the token pairs that `plan` keeps.

    q: [B, Lq, H, D]; k, v: [B, Lk, Hkv, D] with H a multiple of Hkv (query head h reads key head
    h // (H / Hkv)). float16, bfloat16 or float32, any strides; with layout "bhsd" dimensions 1 and
    2 change places. Nothing is copied.
    pooled: keys that stand for many (always [B, NP, Hkv, D]), where the plan lists any.
    scale: D ** -0.5 unless given. backend: a name of `backends.BACKENDS`; None takes the first
    that can run the call.

    Returns the output, in q's layout and type, and with return_lse the natural log-sum-exp of
    each row, float32 [B, H, Lq]. Rows without keys are 0 with LSE -inf.

    A call over other keys of the same queries continues this one: `parts.merge` of the two results
    is the result over both. So a softmax that starts from a state (m, l, acc) is a merge with
    out = acc / l and LSE = m + ln l.

    Raises DitAccelError if the tensors do not fit together or the plan, or if the named backend
    cannot run the call. Numbers within the plan are checked by `plan.validate()`, on request.
    """
    if layout not in ("bshd", "bhsd"):
        raise DitAccelError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}.")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise _wrong_type(name, "a tensor", tensor)
        if tensor.ndim != 4:
            raise DitAccelError(f"{name}: expected four dimensions, got {tuple(tensor.shape)}.")
    if not isinstance(plan, BlockPlan):
        raise _wrong_type("plan", "a BlockPlan", plan)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif type(scale) is not float:
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise _wrong_type("scale", "a number", scale)
        scale = float(scale)
    if backend is not None and not isinstance(backend, str):
        raise unknown("backend", str(backend), BACKENDS)
    if layout == "bhsd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    check_call(q, k, v, plan.blocks, plan.shape)
    _check_pooled(q, k, plan, pooled)
    chosen = choose(q, k, v, plan) if backend is None else backend
    reason = eligible(chosen, q, k, v, plan)
    if reason is not None:
        raise DitAccelError(f"backend {chosen!r} cannot run this call: {reason}.")
    if q.numel():
        out, lse = BACKENDS[chosen].forward(q, k, v, plan, scale, return_lse, pooled)
    else:  # of a batch of 0, say: backends divide by sizes
        out = torch.empty_like(q)
        rows = (q.shape[0], q.shape[2], q.shape[1])
        lse = q.new_empty(rows, dtype=torch.float32) if return_lse else None
    if layout == "bhsd":
        out = out.transpose(1, 2)
    return out if lse is None else (out, lse)


def _wrong_type(name: str, expected: str, value: Any) -> DitAccelError:
    """The error for an argument of another type; a tensor's numbers are not shown."""
    shown = "a tensor" if isinstance(value, Tensor) else repr(value)
    return DitAccelError(f"{name}: expected {expected}, got {shown}.")


def check_call(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, shape: Shape) -> None:
    """DitAccelError unless tensors in BSHD fit together, and a plan of these blocks and shape."""
    batch, length, heads, dim = q.shape
    for name, tensor, expected in (
        ("q", q, (batch, blocks.q_length, heads, dim)),
        ("k", k, (batch, blocks.k_length, k.shape[2], dim)),
        ("v", v, (batch, blocks.k_length, k.shape[2], dim)),
    ):
        _check_tensor(name, tensor, "(batch, tokens, heads, head_dim)", expected, q)
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise DitAccelError(f"k: expected heads that divide {heads}, got {k.shape[2]}.")
    if blocks.device != q.device:
        raise DitAccelError(f"plan: expected it on {q.device} like q, got {blocks.device}.")
    if shape.batch not in (1, batch):
        raise DitAccelError(f"plan: expected one for batch 1 or {batch}, got {shape.batch}.")
    if shape.heads not in (1, heads):
        raise DitAccelError(f"plan: expected one for 1 or {heads} heads, got {shape.heads}.")


def _check_tensor(
    name: str, tensor: Tensor, sides: str, expected: tuple[int, ...], q: Tensor
) -> None:
    """DitAccelError unless a tensor has these sides, and the type and device of q."""
    if tensor.shape != expected:
        raise DitAccelError(f"{name}: expected {sides} = {expected}, got {tuple(tensor.shape)}.")
    if tensor.dtype != q.dtype or tensor.device != q.device:
        raise DitAccelError(
            f"{name}: expected {q.dtype} on {q.device} like q, "
            f"got {tensor.dtype} on {tensor.device}."
        )


def _check_pooled(q: Tensor, k: Tensor, plan: BlockPlan, pooled: PooledKeys | None) -> None:
    if (pooled is None) != (plan.pooled is None):
        given, lists = "none" if pooled is None else "some", "no" if pooled is not None else "its"
        raise DitAccelError(
            f"pooled: expected pooled keys exactly where the plan has lists of them, got {given} "
            f"with {lists} lists."
        )
    if pooled is None:
        return
    if not isinstance(pooled, PooledKeys):
        raise _wrong_type("pooled", "PooledKeys", pooled)
    expected = (q.shape[0], pooled.count, k.shape[2], q.shape[3])
    for name, tensor in (("key", pooled.key), ("value", pooled.value)):
        sides = "(batch, pooled keys, key heads, head_dim)"
        _check_tensor(f"pooled.{name}", tensor, sides, expected, q)
    logs = pooled.log_count
    if logs.ndim != 2 or logs.shape[0] not in (1, q.shape[0]):
        raise DitAccelError(
            f"pooled.log_count: expected shape (1 or {q.shape[0]}, {pooled.count}), "
            f"got {tuple(logs.shape)}."
        )
    if logs.dtype != torch.float32 or logs.device != q.device or not logs.is_contiguous():
        raise DitAccelError(
            f"pooled.log_count: expected contiguous torch.float32 on {q.device}, "
            f"got {logs.dtype} on {logs.device}."
        )
