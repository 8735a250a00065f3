"""What numbers were measured on: device, versions, commit, date and command."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import dit_accel
from dit_accel.provenance import commit, installed, now

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
        date=now(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    )
