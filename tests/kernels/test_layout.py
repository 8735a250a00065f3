"""Token layouts: lengths, validation, hashing."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.layout import Run, Span, TokenLayout


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


VIDEO, TEXT = Span("video", grid=(3, 5, 7)), Span("text", 9)


def test_a_layout_is_its_spans() -> None:
    layout = TokenLayout((3, 5, 7), before=9, after=4, valid=((9, 1), (2, 4)))
    spans = Span("text", 9, valid=(9, 2)), VIDEO, Span("text", 4, valid=(1, 4))
    assert layout.spans == spans and layout == TokenLayout.of_spans(*spans)
    assert hash(layout) == hash(TokenLayout.of_spans(*spans))
    assert TokenLayout((3, 5, 7)).spans == (VIDEO,)
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout and hash(again) == hash(layout)
    assert eval(repr(layout)) == layout and repr(layout).startswith("TokenLayout(grid=(3, 5, 7), b")
    with pytest.raises(AttributeError):
        layout.spans = ()  # type: ignore[misc]


def test_several_videos_and_texts() -> None:
    reference = Span("video", grid=(1, 5, 7))
    layout = TokenLayout.of_spans(TEXT, VIDEO, reference, Span("other", 2))
    assert (layout.grid, layout.before, layout.after, layout.length) == ((3, 5, 7), 9, 37, 151)
    assert layout.valid is None and layout.samples is None and layout.sample(3) is layout
    assert layout.runs == ((Run(0, 9, None, None),), (Run(114, 37, None, None),))
    assert eval(repr(layout)) == layout
    gaps = TokenLayout.of_spans(Span("text", 9, valid=(3, 9)), Span("other", 2), VIDEO)
    assert gaps.runs[0] == (Run(0, 9, (3, 9), None), Run(9, 2, None, None))
    assert gaps.valid_tokens(0)[:6] == [0, 1, 2, 9, 10, 11]
    with pytest.raises(DitAccelError, match="valid: tokens of this layout are no prefix"):
        _ = gaps.valid
    assert gaps.sample(1) == TokenLayout.of_spans(TEXT, Span("other", 2), VIDEO)
    assert gaps.sample(0).samples == 1
    alike = TokenLayout((3, 5, 7), 9, valid=((4, 0), (4, 0)))
    assert alike.runs[0] == (Run(0, 9, (4,), None),)


def test_lists_of_valid_tokens() -> None:
    assert Span("text", 9, tokens=((0, 1), range(9))) == Span("text", 9, valid=(2, 9))
    assert Span("text", 9, tokens=(range(9),)) == TEXT
    shared = TokenLayout.of_spans(Span("text", 5, tokens=((4, 1), (1, 4))), VIDEO)
    assert shared.permuted and shared.obstacle is None
    assert shared.runs[0] == (Run(0, 5, (2,), (1, 4, 0, 2, 3)),)
    nested = TokenLayout.of_spans(Span("text", 5, tokens=((4,), (1, 4))), VIDEO)
    assert nested.runs[0] == (Run(0, 5, (1, 2), (4, 1, 0, 2, 3)),)
    assert nested.sample(0).runs[0] == (Run(0, 5, (1,), (4, 0, 1, 2, 3)),)
    crossed = TokenLayout.of_spans(Span("text", 5, tokens=((4,), (1,))), VIDEO)
    assert crossed.obstacle is not None and crossed.sample(1).obstacle is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Span("txt", 3), "unknown kind of span 'txt'. Did you mean 'text'"),
        (lambda: Span("text", grid=(1, 2, 3)), "grid: expected .* and for no other"),
        (lambda: Span("video", 3), "grid: expected .* got None for 'video'"),
        (lambda: Span("video", 7, (1, 2, 3)), "length: expected 6, got 7"),
        (lambda: Span("video", grid=(0, 2, 3)), "grid: expected three whole sizes"),
        (lambda: Span("text"), "length: expected a whole number >= 0, got None"),
        (lambda: Span("text", 3, valid=(4,)), "valid: expected .* within 0..3 per sample"),
        (lambda: Span("text", 3, valid=()), "valid: expected one number"),
        (lambda: Span("text", 3, valid=(1,), tokens=((2,),)), "expected one of them, got both"),
        (lambda: Span("text", 3, tokens=((3,),)), "tokens: expected .* within 0..2"),
        (lambda: Span("text", 3, tokens=((1, 1),)), "different places"),
        (lambda: Span("text", 3, tokens=(1,)), "tokens: expected"),
        (lambda: TokenLayout.of_spans(TEXT), "at least one video, got none"),
        (lambda: TokenLayout.of_spans(Span("video", grid=(1, 2, 3), valid=(3,))), "first video"),
        (lambda: TokenLayout.of_spans(VIDEO, Span("text", 3, valid=(1,)),
                                      Span("text", 3, valid=(1, 2))), r"samples, got \[1, 2\]"),
    ],
)  # fmt: skip
def test_impossible_spans(make: Callable[[], object], words: str) -> None:
    with pytest.raises(DitAccelError, match=words):
        make()
