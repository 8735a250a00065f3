"""Errors for what a user passes in: what is wrong, what was expected, the nearest valid value."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any


class DitAccelError(ValueError):
    """A request that cannot be carried out; the message says what to change."""


class StrictError(DitAccelError):
    """`strict=True` met an attention call that would have run dense without a plan to."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice closest to `name`, or None when nothing is close."""
    options = list(choices)
    lowered = {choice.lower(): choice for choice in options}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return lowered[found[0]] if found else None


def unknown(kind: str, name: str, choices: Iterable[str]) -> DitAccelError:
    """The error for a name that is not one of `choices`."""
    options = sorted(choices)
    close = nearest(name, options)
    hint = f" Did you mean {close!r}?" if close else ""
    known = ", ".join(options) or "none"
    return DitAccelError(f"unknown {kind} {shown(name)}.{hint} Known: {known}.")


def shown(value: Any, most: int = 120) -> str:
    """`value` as an error shows it: its repr, cut in the middle where that is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def whole_number(name: str, value: Any, least: int) -> int:
    """`value`, an integer of Python or numpy, as an int; DitAccelError unless it is >= `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = round(value) if isinstance(value, float) and math.isfinite(value) else None
    else:
        if number is not None and number >= least:
            return number
    near = "" if number is None else f"; the nearest legal value is {max(least, number)}"
    raise DitAccelError(f"{name}: expected a whole number >= {least}, got {shown(value)}{near}.")
