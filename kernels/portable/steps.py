"""Step sizes of the portable kernel: how many rows and keys at a time, per GPU generation.

`TUNED` holds what `samples/tools/tune_portable.py` measured; where it has nothing that fits, the
largest step that fits registers and shared memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Rows and keys of one step, warps, pipeline stages, and whether whole blocks come by TMA."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False

    def shared_bytes(self, dim: int, itemsize: int) -> int:
        """Shared memory: q, the staged k and v tiles, and p where it passes through it."""
        tiles = (self.block_m + 2 * self.block_n * self.stages) * dim * itemsize
        return tiles + (self.block_m * self.block_n * itemsize if itemsize == 4 else 1024)


@dataclass(frozen=True)
class Machine:
    """What steps depend on: the generation (a key of `TUNED`) and shared memory in bytes."""

    name: str
    shared: int

    @property
    def tma(self) -> bool:
        """Whether it copies boxes of tensors on its own."""
        return self.name in ("sm90", "sm100", "sm120")


# (generation, padded head_dim, bytes of a number) -> best first. A step serves every plan whose
# blocks are at least as large. sm80: A100; sm86: also sm89; sm100: also sm103; sm120: also sm121.
TUNED: dict[tuple[str, int, int], tuple[Config, ...]] = {
    # In place (TMA): the fastest of seven steps each on an H200, triton 3.6.
    ("sm90", 64, 2): (
        Config(64, 128, 4, 2, True),
        Config(64, 64, 4, 4, True),
        Config(64, 64, 4, 3),
    ),
    ("sm90", 128, 2): (Config(64, 64, 4, 3, True),),
}

# (rows, keys, stages) of a step, largest first; the last one fits everywhere.
_STEPS = ((128, 64, 3), (128, 64, 2), (64, 64, 3), (64, 64, 2), (64, 32, 2),
          (32, 32, 2), (32, 32, 1), (32, 16, 2), (32, 16, 1), (16, 16, 1))  # fmt: skip


def pick_config(
    dim: int, itemsize: int, blocks: tuple[int, int], machine: Machine, boxes: bool = False
) -> Config:
    """The step for a padded head_dim and a plan's (block_q, block_k).

    boxes: whether the call's keys and values can come by TMA.

    float32 multiplies without tensor cores, fully unrolled: larger steps spill registers.
    """
    boxes = boxes and machine.tma
    for config in TUNED.get((machine.name, dim, itemsize), ()):
        fits = config.block_m <= blocks[0] and config.block_n <= blocks[1]
        if fits and config.tma <= boxes and config.shared_bytes(dim, itemsize) <= machine.shared:
            return config
    wide = itemsize >= 4
    for rows, keys, stages in _STEPS:
        rows, keys = min(rows, blocks[0]), min(keys, blocks[1])
        light = not wide and rows * dim <= 128 * (128 if boxes else 64)
        config = Config(rows, keys, 4 if light else 8, stages, boxes)
        spills = wide and rows * keys * dim > 64 * 32 * 64
        if not spills and config.shared_bytes(dim, itemsize) <= machine.shared:
            return config
    return config


def aligned(count: int) -> int:
    """The next multiple of 16: rows of so many numbers begin where vectors can."""
    return -(-count // 16) * 16


def shared_stride(table: Tensor | None, dim: int) -> int:
    """Stride of a contiguous table, 0 where it is shared along `dim`."""
    return table.stride(dim) if table is not None and table.shape[dim] > 1 else 0


def padded_dim(dim: int) -> int:
    """Columns of the kernel's tiles for a head_dim."""
    return max(16, triton.next_power_of_2(dim))


@lru_cache(maxsize=16)
def machine_of(device: torch.device) -> Machine:
    """The generation of a device; the interpreter's has no limits."""
    if device.type != "cuda":
        return Machine("cpu", 1 << 30)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    if torch.version.hip is not None:
        return Machine("hip", shared)
    major, minor = torch.cuda.get_device_capability(device)
    return Machine({8: "sm86" if minor in (6, 9) else "sm80"}.get(major, f"sm{major}0"), shared)


def boxable(x: Tensor) -> bool:
    """Whether x [B, S, H, D] can be read through a tensor descriptor: alignment, type, strides."""
    if x.element_size() != 2 or x.numel() == 0 or x.data_ptr() % 16 or x.stride(-1) != 1:
        return False
    strides = (step for step, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1)
    return _descriptor() is not None and all(step > 0 and step % 8 == 0 for step in strides)


def describe(x: Tensor, rows: int, columns: int) -> Any:
    """Tensor descriptor of x [B, S, H, D] in boxes of `rows` tokens of one head.

    Columns past D, and tokens past S, read as 0.
    """
    make = _descriptor()
    assert make is not None
    # Strides of axes of length 1 are arbitrary in torch; TMA wants multiples of 16 bytes.
    strides = [
        step if size > 1 else 8 for step, size in zip(x.stride()[:-1], x.shape, strict=False)
    ]
    return make(x, list(x.shape), [*strides, 1], [1, rows, 1, columns])


@lru_cache(maxsize=1)
def _descriptor() -> Any:
    """Triton's class of host tensor descriptors, None where this version has none."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor
