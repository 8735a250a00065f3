"""What this machine can run: Triton, its interpreter, Hopper's Gluon."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

HOPPER_TRITON = ((3, 6), (3, 9))
"""Minor versions of Triton whose Gluon the Hopper kernel is proven with."""


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


def triton_machine() -> str | None:
    """Why Triton kernels cannot run here, or None."""
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
    return x.is_cuda and _gpu_runs_triton()


@lru_cache(maxsize=1)
def _gpu_runs_triton() -> bool:
    """Asked several times in every call."""
    return triton_machine() is None


def gluon_machine() -> str | None:
    """Why a Gluon kernel for Hopper cannot run here, or None."""
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
    return None


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
