"""`dit-accel doctor`: what is installed, which devices there are, which backends can run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from rich.table import Table

import dit_accel
from dit_accel.errors import DitAccelError
from dit_accel.models.find import demo_folder
from dit_accel.provenance import installed

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "imageio-ffmpeg")
NO_GPU = "none: torch is a build without CUDA"


def examine() -> Table:
    """Versions, devices and backends, one per row."""
    table = Table(title="dit-accel doctor", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for rows in (_versions(), _devices(), _backends()):
        for name, value in rows:
            table.add_row(name, value)
        table.add_section()
    return table


def check_alone(**options: str | int | None) -> None:
    """Raise DitAccelError for an option that means nothing without --model."""
    for name, value in options.items():
        if value not in (None, "auto"):
            raise DitAccelError(f"--{name} is for --model: add that, or leave it out.")


def _versions() -> Iterator[tuple[str, str]]:
    yield "dit-accel", dit_accel.__version__
    yield "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    for name in PACKAGES:
        yield name, installed(name) or "not installed"
    try:
        yield "demo model", str(demo_folder())
    except DitAccelError:
        yield "demo model", "not here: it is part of a checkout of the repository"


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{index}", f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB"
    if not count:
        build = torch.version.cuda or torch.version.hip
        yield "GPU", f"none found, though torch is built for {build}" if build else NO_GPU
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} of them used by torch"


def _backends() -> Iterator[tuple[str, str]]:
    from dit_accel.kernels.backends import available

    for name, reason in available().items():
        yield f"backend {name}", f"cannot run here: {reason}" if reason else "can run"
