"""What a measurement was made with, for people who read it later."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import dit_accel
from dit_accel.compare.results import Environment


def environment(command: str, device: torch.device) -> Environment:
    """The machine, the versions and the dense kernel of this process.

    command: what to type to do it again.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return Environment(
        command=command,
        commit=commit(),
        device=device_name(device),
        cpu=_cpu(),
        threads=f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        torch=torch.__version__,
        triton=_version("triton"),
        diffusers=_version("diffusers"),
        dit_accel=dit_accel.__version__,
        dense_kernel=dense_kernel(device),
        date=now.strftime("%Y-%m-%d %H:%M UTC"),
    )


def commit() -> str:
    """The checkout's commit (`-dirty` with changes), or $COMMIT where there is no git, else ""."""
    folder = Path(dit_accel.__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    command += ["--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("COMMIT", "")
    return done.stdout.strip() or os.environ.get("COMMIT", "")


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


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
