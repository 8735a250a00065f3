"""Token layouts: lengths, validation, hashing."""

from __future__ import annotations

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
    ],
)
def test_impossible_layouts(arguments: dict) -> None:
    with pytest.raises(DitAccelError):
        TokenLayout(**arguments)
