"""What a measurement was made with, for people who read it later."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import dit_accel
from dit_accel.compare.results import Environment
from dit_accel.provenance import commit, installed, now


def environment(command: str, device: torch.device) -> Environment:
    """The machine, the versions and the dense kernel of this process.

    command: what to type to do it again.
    """
    return Environment(
        command=command,
        commit=commit(),
        device=device_name(device),
        cpu=_cpu(),
        threads=f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        torch=torch.__version__,
        triton=installed("triton"),
        diffusers=installed("diffusers"),
        dit_accel=dit_accel.__version__,
        dense_kernel=dense_kernel(device),
        date=f"{now()} UTC",
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)} ({memory:.0f} GiB)"
    return "CPU" if device.type == "cpu" else str(device)


def dense_kernel(device: torch.device) -> str:
    """The attention that every method's dense calls run on: diffusers' backend, and torch's own."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    name = _AttentionBackendRegistry.get_active_backend()[0].value
    if name != "native" or device.type != "cuda":
        return "torch scaled_dot_product_attention" if name == "native" else f"diffusers {name}"
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    allowed = ", ".join(name for name, on in enabled.items() if on)
    return f"torch scaled_dot_product_attention ({allowed} allowed)"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
