"""Numbers as people read them: the right digits and units, one minus sign, a word for infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable

MISSING = "–"
INFINITE = "∞"
BYTE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def decimals(values: Iterable[float | None]) -> int:
    """Digits after the point that show about three figures of the largest finite value.

    Numbers of one column share them, so that their points line up.
    """
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=1.0)
    if largest == 0:
        return 2
    if 0.1 <= largest <= 1:
        return 3
    return min(max(2 - math.floor(math.log10(largest)), 0), 6)


def number(value: float | None, digits: int) -> str:
    """The value with so many digits after the point; a dash for None."""
    if value is None:
        return MISSING
    if math.isinf(value):
        return INFINITE if value > 0 else f"−{INFINITE}"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        return text.lstrip("-")
    return text.replace("-", "−")


def unit_of_bytes(values: Iterable[float | None]) -> tuple[str, int]:
    """The largest binary unit that the largest value reaches, and its size in bytes."""
    largest = max((value for value in values if value is not None), default=0)
    return next((unit for unit in BYTE_UNITS if largest >= unit[1]), BYTE_UNITS[-1])


def seconds(value: float | None) -> str:
    """A duration with three figures: "0.45 s", "12.3 s", "4 min 08 s", "1 h 05 min"."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 s"
    if value < 120:
        return f"{number(value, 3 if value < 0.1 else decimals([value]))} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def plural(count: int, noun: str) -> str:
    """ "1 clip", "3 clips"."""
    return f"{count:,} {noun if count == 1 else noun + 's'}"
