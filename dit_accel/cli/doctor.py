"""`dit-accel doctor`: what is installed, which devices there are, which backends can run."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from rich.console import Group
from rich.table import Table

import dit_accel
from dit_accel.cli.models import demo_folder
from dit_accel.errors import DitAccelError

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "imageio-ffmpeg")


def examine() -> Group:
    """Three tables: versions, devices, backends."""
    return Group(_versions(), _devices(), _backends())


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _versions() -> Table:
    table = _table("Versions")
    table.add_row("dit-accel", dit_accel.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        table.add_row(name, version)
    try:
        table.add_row("demo model", str(demo_folder()))
    except DitAccelError:
        table.add_row("demo model", "not here: it is part of a checkout of the repository")
    return table


def _devices() -> Table:
    import torch

    table = _table("Devices")
    build = torch.version.cuda or torch.version.hip
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(
            f"cuda:{index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    if not count:
        none = f"none found, though torch is built for CUDA {build}" if build else "none: torch is "
        table.add_row("GPU", none if build else none + "a build without CUDA")
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} of them used by torch")
    return table


def _backends() -> Table:
    from dit_accel.kernels.backends import available

    table = _table("Attention backends")
    for name, reason in available().items():
        table.add_row(name, f"no: {reason}" if reason else "yes")
    return table
