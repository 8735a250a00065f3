"""Token layouts: lengths, validation, hashing."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.layout import TokenLayout


def test_lengths() -> None:
    layout = TokenLayout((3, 5, 7), before=11, after=2)
    assert (layout.video_length, layout.length, layout.video_start) == (105, 118, 11)


def test_hashable_and_normalised() -> None:
    one = TokenLayout([3, 5, 7], before=4, valid=[[4, 0], [2, 0]])  # type: ignore[arg-type]
    two = TokenLayout((3, 5, 7), before=4, valid=((4, 0), (2, 0)))
    assert one == two and hash(one) == hash(two)
    assert TokenLayout((3, 5, 7), before=4, valid=((4, 0),)) == TokenLayout((3, 5, 7), before=4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": (0, 5, 7)},
        {"grid": (5, 7)},
        {"grid": (1, 5, 7), "before": -1},
        {"grid": (1, 5, 7), "before": 4, "valid": ((5, 0),)},
        {"grid": (1, 5, 7), "after": 4, "valid": ()},
        {"grid": 5},
        {"grid": ("a", 1, 1)},
        {"grid": (math.nan, 1, 1)},
        {"grid": (1.5, 2, 2)},
        {"grid": (1, 5, 7), "before": 1.5},
        {"grid": (1, 5, 7), "after": None},
        {"grid": (1, 5, 7), "after": "4"},
        {"grid": (1, 5, 7), "before": 4, "valid": 5},
        {"grid": (1, 5, 7), "before": 4, "valid": (4, 0)},
        {"grid": (1, 5, 7), "before": 4, "valid": ((4, 0, 0),)},
        {"grid": (1, 5, 7), "before": 4, "valid": ((1.5, 0),)},
    ],
    ids=str,
)
def test_impossible_layouts(arguments: dict) -> None:
    """The message names the argument that is wrong, the last one here, and what came."""
    name, value = list(arguments.items())[-1]
    shown = "(5, 0)" if value == ((5, 0),) else repr(value)
    with pytest.raises(DitAccelError, match=f"^{name}: expected .* got {re.escape(shown)}"):
        TokenLayout(**arguments)


def test_integers_of_numpy() -> None:
    three, five = np.int64(3), np.int32(5)
    layout = TokenLayout((three, five, 7), before=five, valid=((three, 0),))
    assert layout == TokenLayout((3, 5, 7), before=5, valid=((3, 0),))
    assert {type(size) for size in (*layout.grid, layout.before, *layout.valid[0])} == {int}
