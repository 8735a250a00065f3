"""Who can compute a plan: the backends, and for each call the reason why one cannot.

A new backend is a `Backend` in `BACKENDS`; `block_sparse_attention` takes the first eligible one
of `AUTOMATIC`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dit_accel.costs.kernels import split_pays
from dit_accel.errors import unknown
from dit_accel.kernels.libraries.fa4 import fa4_attention, fa4_missing, fa4_obstacle
from dit_accel.kernels.patterns.base import LayoutKind, kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.reference import reference_attention
from dit_accel.kernels.torch_backend import torch_attention

# (q, k, v [B, S, H, D], plan, scale, return_lse, pooled) -> (out [B, Lq, H, D], LSE [B, H, Lq] or
# None)
Forward = Callable[..., tuple[Tensor, Tensor | None]]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (32, 256)


@dataclass(frozen=True)
class Backend:
    """forward computes a plan; machine and call give the reason why they cannot, or None.

    pays: whether it is the fastest of what can run a call (q, plan); `choose` asks, nobody else.
    """

    forward: Forward
    machine: Callable[[], str | None]
    call: Callable[[Tensor, Tensor, Tensor, BlockPlan], str | None]
    pays: Callable[[Tensor, BlockPlan], bool] = lambda q, plan: True


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken driver or wheel raises many kinds
        return f"triton cannot be imported: {error}"
    return None


def _triton_machine() -> str | None:
    if (missing := triton_missing()) or interpreted():
        return missing
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def runs_triton(x: Tensor) -> bool:
    """Whether Triton kernels can run where x is; in the interpreter only where a test asks."""
    return x.is_cuda and _triton_machine() is None


def _triton_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    if q.device.type != "cuda" and not interpreted():
        return f"device {q.device.type}: needs CUDA"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if plan.block_q not in (64, 128) or plan.block_k not in (64, 128):
        return f"blocks of {plan.block_q} x {plan.block_k}: needs 64 or 128"
    return None


def _triton_forward(*call: Any) -> tuple[Tensor, Tensor | None]:
    from dit_accel.kernels.portable.forward import triton_attention

    return triton_attention(*call)


HOPPER_TRITON = ((3, 6), (3, 9))
"""Minor versions of Triton whose Gluon the Hopper kernel is proven with."""


@lru_cache(maxsize=1)
def _hopper_machine() -> str | None:
    if missing := triton_missing():
        return missing
    if interpreted() or not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None or torch.cuda.get_device_capability() != (9, 0):
        return "needs compute capability 9.0"
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version not in HOPPER_TRITON:
        known = ", ".join(f"{major}.{minor}" for major, minor in HOPPER_TRITON)
        return f"triton {triton.__version__}: proven with {known}"
    from dit_accel.kernels.hopper.launch import broken

    return broken()


def _hopper_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    from dit_accel.kernels.hopper.launch import tensor_obstacle
    from dit_accel.kernels.hopper.lists import plan_obstacle

    # Pooled keys go to the portable kernel, which runs every call that passes these.
    return plan_obstacle(plan) or tensor_obstacle(q, k, v)


def _hopper_pays(q: Tensor, plan: BlockPlan) -> bool:
    return not plan.list_kinds.pooled or split_pays(
        q.shape[-1],
        plan.visits,
        plan.block_k,
        gathered=plan.k_blocks.order is not None,
        moved=plan.scattered,
    )


def _hopper_forward(*call: Any) -> tuple[Tensor, Tensor | None]:
    from dit_accel.kernels.hopper.launch import hopper_attention

    return hopper_attention(*call)


def _flex_machine() -> str | None:
    from dit_accel.kernels.libraries.flex import flex_missing

    return flex_missing()


def _flex_call(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    from dit_accel.kernels.libraries.flex import flex_obstacle

    return flex_obstacle(q, k, v, plan)


def _flex_forward(*call: Any) -> tuple[Tensor, Tensor | None]:
    from dit_accel.kernels.libraries.flex import flex_attention

    return flex_attention(*call)


BACKENDS: dict[str, Backend] = {
    "hopper": Backend(_hopper_forward, _hopper_machine, _hopper_call, _hopper_pays),
    "triton": Backend(_triton_forward, _triton_machine, _triton_call),
    "fa4": Backend(fa4_attention, fa4_missing, fa4_obstacle),
    "flex": Backend(_flex_forward, _flex_machine, _flex_call),
    "torch": Backend(torch_attention, lambda: None, lambda q, k, v, plan: None),
    "reference": Backend(reference_attention, lambda: None, lambda q, k, v, plan: None),
}
AUTOMATIC = ("hopper", "triton", "torch")
LAYOUT_KINDS: dict[str, tuple[LayoutKind, ...]] = {
    "hopper": ("boxes", "gather"),
    "triton": ("gather",),
    "torch": ("lengths",),
}
"""How each automatic backend can read blocks, on the device that it is for."""


def layout_kind(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> LayoutKind:
    """How plans for this call should lay the video out: for the backend that will run it.

    backend: a name of `BACKENDS`; None is the one that `choose` would take.
    """
    if backend in (None, "hopper") and q.is_cuda and _hopper_machine() is None:
        from dit_accel.kernels.hopper.launch import tensor_obstacle

        if tensor_obstacle(q, k, v) is None:
            return "boxes"
    return kind_for(q.device)


def moves_tokens(name: str, plan: BlockPlan) -> bool:
    """Whether backend `name` moves tokens in memory to run this plan: its bulk copies take boxes
    and runs alone."""
    return name == "hopper" and plan.scattered


def eligible(name: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str | None:
    """None if backend `name` can compute this call (tensors in BSHD), else the reason why not.

    Raises DitAccelError for an unknown backend.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: needs float16, bfloat16 or float32"
    if not HEAD_DIMS[0] <= q.shape[-1] <= HEAD_DIMS[1]:
        return f"head_dim {q.shape[-1]}: needs {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    backend = BACKENDS[name]
    return backend.machine() or backend.call(q, k, v, plan)


def available() -> dict[str, str | None]:
    """For each backend: None if it can run on this machine, else why not."""
    return {name: backend.machine() for name, backend in BACKENDS.items()}


def choose(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> str:
    """The first eligible backend that pays; on a GPU Hopper's or Triton, on a CPU torch."""
    names = AUTOMATIC if q.is_cuda else ("torch",)
    able = (n for n in names if eligible(n, q, k, v, plan) is None)
    return next((n for n in able if BACKENDS[n].pays(q, plan)), "torch")
