"""What numbers were measured on: device, versions, commit, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

import dit_accel

KERNEL_PACKAGES = ("flash-attn", "flash_attn_3", "fa3-fwd", "flash-attn-4", "xformers")


@dataclass(frozen=True)
class Machine:
    """The columns that every row of results carries."""

    machine: str
    capability: str
    threads: str
    torch: str
    triton: str
    cuda: str
    cudnn: str
    diffusers: str
    kernel_packages: str
    dit_accel: str
    commit: str
    date: str
    command: str

    def columns(self) -> dict[str, str]:
        return asdict(self)


def machine(device: torch.device) -> Machine:
    """The machine that `device` belongs to, now. The variable COMMIT overrides git."""
    cuda = device.type == "cuda"
    packages = [f"{name} {v}" for name in KERNEL_PACKAGES if (v := installed(name))]
    return Machine(
        machine=torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU",
        capability=".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "",
        threads="" if cuda else str(torch.get_num_threads()),
        torch=torch.__version__,
        triton=installed("triton"),
        cuda=(torch.version.cuda or torch.version.hip or "") if cuda else "",
        cudnn=str(torch.backends.cudnn.version() or "") if cuda else "",
        diffusers=installed("diffusers"),
        kernel_packages="; ".join(packages),
        dit_accel=dit_accel.__version__,
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )


def installed(package: str) -> str:
    """Version of an installed package, "" where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Commit of the code: the variable COMMIT, else what git says of the checkout, else ""."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    folder = Path(dit_accel.__file__).resolve().parent.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
