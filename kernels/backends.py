"""Who can compute a plan: the backends, and for each call the reason why one cannot.

A new backend is a `Backend` in `BACKENDS`; `block_sparse_attention` takes the first eligible one
of `AUTOMATIC`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.costs.kernels import split_pays
from dit_accel.errors import unknown
from dit_accel.kernels.blocks import BlockForm
from dit_accel.kernels.libraries.fa4 import fa4_attention, fa4_missing, fa4_obstacle
from dit_accel.kernels.libraries.flex import flex_attention, flex_missing, flex_obstacle
from dit_accel.kernels.machine import gluon_machine, interpreted, triton_machine
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.kernels.plan import BlockPlan, Forward, Shape
from dit_accel.kernels.reference import reference_attention
from dit_accel.kernels.torch_backend import torch_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_DIMS = (1, 256)
"""head_dim of our kernels, which pad it in registers."""
LIBRARY_DIMS = (32, 256)
Obstacle = Callable[[Tensor, Tensor, Tensor, Shape], str | None]


@dataclass(frozen=True)
class Backend:
    """A way to compute plans.

    forward: computes one. machine, refuses, obstacle: why it cannot on this machine, run plans of
        a shape, and run a call (q, k, v, shape), or None; nothing is read from the device.
    forms: how it can read blocks, the best one first.
    compiles: whether the first call of a variant compiles. online: whether it runs plans that were
        made on the device. moves: whether it moves tokens in memory to run a plan.
    dims: the smallest and the largest head_dim; the largest may be None, for any.
    pays: whether it is the fastest of what can run a call (head_dim, shape); `choose` asks, nobody
        else.
    """

    name: str
    forward: Forward
    machine: Callable[[], str | None] = lambda: None
    refuses: Callable[[Shape], str | None] = lambda shape: None
    obstacle: Obstacle = lambda q, k, v, shape: None
    forms: tuple[BlockForm, ...] = ("gather",)
    compiles: bool = True
    online: bool = True
    dims: tuple[int, int | None] = KERNEL_DIMS
    moves: Callable[[Shape], bool] = lambda shape: False
    pays: Callable[[int, Shape], bool] = lambda head_dim, shape: True


def _triton_obstacle(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> str | None:
    if q.device.type != "cuda" and not interpreted():
        return f"device {q.device.type}: needs CUDA"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def _triton_refuses(shape: Shape) -> str | None:
    if shape.block_q not in (64, 128) or shape.block_k not in (64, 128):
        return f"blocks of {shape.block_q} x {shape.block_k}: needs 64 or 128"
    return None


def _triton_forward(*call: Any) -> tuple[Tensor, Tensor | None]:
    from dit_accel.kernels.portable.forward import triton_attention

    return triton_attention(*call)


def _hopper_machine() -> str | None:
    if missing := gluon_machine():
        return missing
    from dit_accel.kernels.hopper.proof import broken

    return broken()


def _hopper_obstacle(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> str | None:
    from dit_accel.kernels.hopper.launch import tensor_obstacle

    return tensor_obstacle(q, k, v)


def _hopper_refuses(shape: Shape) -> str | None:
    from dit_accel.kernels.hopper.lists import plan_obstacle

    # Pooled keys go to the portable kernel, which runs every call that passes this.
    return plan_obstacle(shape)


def _hopper_pays(head_dim: int, shape: Shape) -> bool:
    return not shape.kinds.pooled or split_pays(
        head_dim, shape.visits, shape.block_k, gathered=shape.gathered, moved=shape.scattered
    )


def _hopper_forward(*call: Any) -> tuple[Tensor, Tensor | None]:
    from dit_accel.kernels.hopper.launch import hopper_attention

    return hopper_attention(*call)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "hopper", _hopper_forward, _hopper_machine, _hopper_refuses, _hopper_obstacle,
            ("boxes", "gather"),
            moves=lambda shape: shape.scattered, pays=_hopper_pays,
        ),
        Backend("triton", _triton_forward, triton_machine, _triton_refuses, _triton_obstacle),
        Backend(
            "fa4", fa4_attention, fa4_missing, obstacle=fa4_obstacle, online=False,
            dims=LIBRARY_DIMS,
        ),
        Backend(
            "flex", flex_attention, flex_missing, obstacle=flex_obstacle, online=False,
            dims=LIBRARY_DIMS,
        ),
        Backend(
            "torch", torch_attention, forms=("lengths",), compiles=False, dims=(1, None)
        ),
        Backend(
            "reference", reference_attention, forms=("lengths",), compiles=False, dims=(1, None)
        ),
    )
}  # fmt: skip
AUTOMATIC = ("hopper", "triton", "torch")
LAYOUT_KINDS: dict[str, tuple[BlockForm, ...]] = {name: BACKENDS[name].forms for name in AUTOMATIC}
"""How each automatic backend can read blocks, on the device that it is for."""


def layout_kind(q: Tensor, k: Tensor, v: Tensor, backend: str | None = None) -> BlockForm:
    """How plans for this call should lay the video out: for the backend that will run it.

    backend: a name of `BACKENDS`; None is the one that `choose` would take.
    """
    if backend in (None, "hopper") and q.is_cuda and _hopper_machine() is None:
        from dit_accel.kernels.hopper.launch import tensor_obstacle

        if tensor_obstacle(q, k, v) is None:
            return "boxes"
    return kind_for(q.device)


def eligible(
    name: str, q: Tensor, k: Tensor, v: Tensor, plan_or_shape: BlockPlan | Shape
) -> str | None:
    """None if backend `name` can compute this call (tensors in BSHD), else the reason why not.

    Raises DitAccelError for an unknown backend.
    """
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: needs float16, bfloat16 or float32"
    backend, shape = BACKENDS[name], _shape(plan_or_shape)
    least, most = backend.dims
    if q.shape[-1] < least or (most is not None and q.shape[-1] > most):
        return f"head_dim {q.shape[-1]}: needs {least} " + (f"to {most}" if most else "or more")
    if shape.online and not backend.online:
        return "the plan is made from q and k on the device: this backend takes static ones"
    return backend.machine() or backend.obstacle(q, k, v, shape) or backend.refuses(shape)


def available() -> dict[str, str | None]:
    """For each backend: None if it can run on this machine, else why not."""
    return {name: backend.machine() for name, backend in BACKENDS.items()}


def choose(q: Tensor, k: Tensor, v: Tensor, plan_or_shape: BlockPlan | Shape) -> str:
    """The first eligible backend that pays; on a GPU Hopper's or Triton, on a CPU torch."""
    names = AUTOMATIC if q.is_cuda else ("torch",)
    shape = _shape(plan_or_shape)
    able = (n for n in names if eligible(n, q, k, v, shape) is None)
    return next((n for n in able if BACKENDS[n].pays(q.shape[-1], shape)), "torch")


def _shape(plan_or_shape: BlockPlan | Shape) -> Shape:
    return plan_or_shape.shape if isinstance(plan_or_shape, BlockPlan) else plan_or_shape
