"""Windows of patterns: widths in tiles, tokens, or as a fraction of the axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from dit_accel.errors import DitAccelError, shown, unknown

WHOLE = -1
"""In tiles and tokens: the whole axis, whatever its length."""
LARGEST = 2**31 - 1
"""The most tiles or tokens that a window counts: what kernels take as a parameter."""
AXES = {3: "[t, h, w]", 2: "[h, w]", 1: "n"}


@dataclass(frozen=True)
class Window:
    """How far a query sees along each axis: a number of tiles or tokens, or a fraction of the axis.

    values: one per axis, in the order t, h, w; -1 (in tiles and tokens) and a fraction of 1 are the
        whole axis.
    """

    unit: str
    values: tuple[float, ...]

    UNITS = ("tiles", "tokens", "fraction")

    @classmethod
    def parse(cls, window: object, name: str = "window", axes: int = 3) -> Window:
        """A window over `axes` axes from `{unit: values}`; DitAccelError if it is none."""
        if isinstance(window, Window) and len(window.values) == axes:
            return window
        form = AXES[axes]
        if not isinstance(window, Mapping) or len(window) != 1:
            raise DitAccelError(
                f"{name}: expected one of {{tiles = {form}}}, {{tokens = {form}}}, "
                f"{{fraction = {form}}}, got {shown(window)}."
            )
        unit, values = next(iter(window.items()))
        if unit not in cls.UNITS:
            raise unknown(f"unit of {name}", str(unit), cls.UNITS)
        if axes == 1 and not isinstance(values, Sequence):
            values = [values]
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != axes:
            words = {3: "three values", 2: "two values", 1: "one value"}[axes]
            raise DitAccelError(f"{name}.{unit}: expected {words} {form}, got {shown(values)}.")
        values = tuple(map(_plain, values))
        for value in values:
            _check_value(f"{name}.{unit}", unit, value, form)
        return cls(unit, values)

    def as_dict(self) -> dict[str, list[float]]:
        """The form that a profile file has."""
        return {self.unit: list(self.values)}

    def tiles(self, axis: int, length: int, parts: int) -> int:
        """Odd number of tiles k <= parts that a tile sees on an axis in `parts` tiles, or `parts`.

        The smallest odd number that is not below the asked share (`value` tiles, `value / length *
        parts` for tokens, `value * parts` for fractions). So the mean window is at least what was
        asked, every tile sees exactly k tiles, and an even number of tiles k < parts means k + 1,
        as sliding tile attention's own rule |centre - tile| <= k // 2 has it.
        """
        return parts if self.whole(axis) else min(parts, self._odd_tiles(axis, length, parts))

    def tokens(self, axis: int, length: int, edge: int = 1) -> int:
        """Tokens on an axis of `length` tokens whose tiles are `edge` long, at most `length`."""
        return length if self.whole(axis) else min(length, self._tokens(axis, length, edge))

    def whole(self, axis: int) -> bool:
        """Whether it is the whole axis, whatever its length."""
        return self.values[axis] == (1 if self.unit == "fraction" else WHOLE)

    def tiles_aside(self, axis: int, length: int, parts: int) -> int:
        """Tiles seen to either side, where a window is cut off at the borders: half of `tiles`, and
        all for a whole axis."""
        return parts if self.whole(axis) else self._odd_tiles(axis, length, parts) // 2

    def tokens_aside(self, axis: int, length: int, edge: int = 1) -> int:
        """Tokens seen to either side, where a window is cut off at the borders: half of `tokens`,
        and all for a whole axis."""
        return length if self.whole(axis) else min(length, self._tokens(axis, length, edge) // 2)

    def _odd_tiles(self, axis: int, length: int, parts: int) -> int:
        value = self.values[axis]
        share = {"tiles": value, "tokens": value / length * parts, "fraction": value * parts}
        whole = max(1, math.ceil(share[self.unit] - 1e-6))
        return whole + 1 - whole % 2

    def _tokens(self, axis: int, length: int, edge: int) -> int:
        value = self.values[axis]
        asked = {"tiles": value * edge, "tokens": value, "fraction": value * length}
        return max(1, math.ceil(asked[self.unit] - 1e-6))


def _plain(value: object) -> object:
    """A number, of numpy too, as an int or a float of Python; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_value(name: str, unit: str, value: Any, form: str) -> None:
    """form: the window's values in words, as in AXES."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if unit == "fraction":
        if not number or not 0 < value <= 1:
            above = number and value > 1
            tiles = f" (values are fractions here; tiles are whole numbers in {{tiles = {form}}})"
            raise DitAccelError(
                f"{name}: expected 0 < value <= 1, got {shown(value)}; the nearest legal value "
                f"is {1.0 if above else 0.1}{tiles if above and type(value) is int else ''}."
            )
    elif type(value) is not int or not (1 <= value <= LARGEST or value == WHOLE):
        near = min(max(1, value), LARGEST) if number and value == value else 1
        most = f" and at most {LARGEST}" if near == LARGEST else ""
        raise DitAccelError(
            f"{name}: expected whole numbers >= 1{most}, or -1 for the whole axis, got "
            f"{shown(value)}; the nearest legal value is {round(near)}."
        )


def bare_window(numbers: Sequence[float]) -> dict[str, list[float]]:
    """The window of bare numbers: whole ones count tiles, else they are fractions of each axis."""
    whole = not any(isinstance(n, Real) and not isinstance(n, Integral) for n in numbers)
    return {"tiles" if whole else "fraction": list(numbers)}
