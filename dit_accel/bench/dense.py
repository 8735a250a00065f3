"""The dense attention kernels that a machine has: what a sparse one is measured against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface", "fa3_fwd")
FA4_MODULES = ("flash_attn.cute",)
CUDNN_TO_FA3 = 1.08
"""FA3 over cuDNN on an H100 (B1 H12 L32768 D128): stands in for FA3 where it is not installed."""


@dataclass(frozen=True)
class DenseKernel:
    """A dense attention: `run` takes and returns BSHD tensors; `missing` says why it cannot."""

    name: str
    missing: Callable[[torch.device], str | None]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(*backends: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(list(backends)) if backends else nullcontext():
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return run


@lru_cache(maxsize=8)
def _function(modules: tuple[str, ...]) -> Callable[..., Any] | str:
    """`flash_attn_func` of the first module that imports, else the reason why none does."""
    reason = ""
    for module in modules:
        try:
            return getattr(import_module(module), "flash_attn_func")  # noqa: B009
        except ModuleNotFoundError:
            continue
        except Exception as error:  # compiled extensions fail to load in many ways
            reason = f"{module} cannot be imported: {error}"
    return reason or f"{' or '.join(modules)} is not installed"


def _flash(modules: tuple[str, ...]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = _function(modules)
        assert not isinstance(function, str)
        out = function(q, k, v)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return run


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"device {device.type}: needs CUDA"


def _needs(modules: tuple[str, ...]) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if (reason := _needs_cuda(device)) is not None:
            return reason
        found = _function(modules)
        return found if isinstance(found, str) else None

    return missing


DENSE: tuple[DenseKernel, ...] = (
    DenseKernel("cudnn", _needs_cuda, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    DenseKernel("fa2", _needs_cuda, _sdpa(SDPBackend.FLASH_ATTENTION)),
    DenseKernel("fa3", _needs(FA3_MODULES), _flash(FA3_MODULES)),
    DenseKernel("fa4", _needs(FA4_MODULES), _flash(FA4_MODULES)),
    DenseKernel(
        "sdpa", lambda device: None if device.type == "cpu" else "stands for the CPU", _sdpa()
    ),
)
"""cuDNN, FlashAttention 2 (both in torch), 3 and 4 (packages); on a CPU torch's own choice."""


def present(device: torch.device) -> tuple[list[DenseKernel], dict[str, str]]:
    """The kernels to try on a device, and for each other one why it is not there."""
    reasons = {kernel.name: kernel.missing(device) for kernel in DENSE}
    missing = {name: why for name, why in reasons.items() if why}
    return [kernel for kernel in DENSE if kernel.name not in missing], missing
