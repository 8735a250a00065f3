"""How much reuse may keep: a number of bytes, or a share of the memory that dense leaves free."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from typing import Any, Literal

import torch

from dit_accel.errors import DitAccelError, shown

Limit = int | Literal["auto"] | None
_UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_limit(value: Any) -> Limit:
    """ "auto", None (no limit), bytes, or a text such as "8GB", "512 MiB" (both count in 1024s)."""
    if value is None or value == "auto":
        return value
    if type(value) is int and value >= 0:
        return value
    match = isinstance(value, str) and re.fullmatch(
        r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT]?)i?B?\s*", value, re.IGNORECASE | re.ASCII
    )
    if match:
        power = _UNITS[match[2].upper()]
        return int(float(match[1]) * (1 if power == 1 else 1 << power))
    raise DitAccelError(
        'cache_limit: expected "auto", a whole number of bytes >= 0, a text such as "8GB", or None '
        f"for no limit, got {shown(value)}; the nearest legal value is "
        f"{0 if isinstance(value, (int, float)) and value < 0 else repr('auto')}."
    )


class AutoLimit:
    """What `cache_limit="auto"` means: half of what the stock model leaves free.

    On a GPU that is half of (free memory + what torch has reserved - the largest amount ever in
    use), looked up once a forward of the same size has ended; before that nothing is kept, since
    nobody knows how much the forward needs. On a CPU it is half of the memory that is free when the
    run begins; elsewhere, where nobody can tell, 0.
    """

    def __init__(self) -> None:
        self._peaks: dict[Hashable, int] = {}

    def before(self, size: Hashable, device: torch.device) -> int:
        """Bytes that may be kept while a forward of this size runs."""
        if device.type == "cuda":
            peak = self._peaks.get((size, device))
            return 0 if peak is None else max(0, _capacity(device) - peak) // 2
        return _free_host() // 2 if device.type == "cpu" else 0

    def after(self, size: Hashable, device: torch.device) -> int:
        """Likewise, now that one has ended."""
        if device.type == "cuda" and (size, device) not in self._peaks:
            self._peaks[size, device] = torch.cuda.max_memory_allocated(device)
        return self.before(size, device)


def _capacity(device: torch.device) -> int:
    """Bytes that torch could hold at most."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _free_host() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such question on this system
        return 0
