"""Where the tokens of one self-attention call are: spans of video, text and others."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from dit_accel.errors import DitAccelError, shown, unknown, whole_number

Triple = tuple[int, int, int]
KINDS = ("video", "text", "other")
NO_PREFIX = "text mask differs per sample and is no prefix"
MAX_AXIS = 2048
MAX_VIDEO = 1 << 19
"""Tokens of the longest axis, and of the largest video, that a plan is made for: what one axis says
takes their number squared, and lists take the number of blocks squared."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind.

    kind: "video" (frame-major, row-major over `grid`), "text", or "other" (audio, references).
    length: tokens; of a video it may be left out.
    grid: (T, H, W) in tokens, of a video.
    valid: per sample, how many tokens at the front are valid. None: all, if `tokens` is None too.
    tokens: per sample, which tokens are valid (places within the span), where they are no prefix.

    Keys that are not valid are what the stock model masks out; nobody attends to them. Lists that
    are prefixes become `valid`, and None where all is valid. Raises DitAccelError for what is no
    span.
    """

    kind: str
    length: int | None = None
    grid: Triple | None = None
    valid: tuple[int, ...] | None = None
    tokens: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        own = object.__setattr__
        if self.kind not in KINDS:
            raise unknown("kind of span", str(self.kind), KINDS)
        if (self.grid is None) == (self.kind == "video"):
            raise DitAccelError(
                f"grid: expected (T, H, W) for a span of video and for no other, got "
                f"{shown(self.grid)} for {self.kind!r}."
            )
        if self.grid is not None:
            own(self, "grid", _grid(self.grid))
            own(self, "length", math.prod(self.grid) if self.length is None else self.length)
        own(self, "length", whole_number("length", self.length, 0))
        if self.grid is not None and self.length != math.prod(self.grid):
            raise DitAccelError(f"length: expected {math.prod(self.grid)}, got {self.length}.")
        if self.valid is not None and self.tokens is not None:
            raise DitAccelError("valid, tokens: expected one of them, got both.")
        if self.tokens is not None:
            own(self, "tokens", self._checked_tokens())
            if all(each == tuple(range(len(each))) for each in self.tokens):
                own(self, "valid", tuple(map(len, self.tokens)))
                own(self, "tokens", None)
        if self.valid is not None:
            own(self, "valid", self._checked_valid())

    @property
    def size(self) -> int:
        """`length`, which is known by now."""
        assert self.length is not None
        return self.length

    @property
    def samples(self) -> int | None:
        """How many samples `valid` or `tokens` tells apart; None where all tokens are valid."""
        told = self.tokens if self.valid is None else self.valid
        return None if told is None else len(told)

    def sample(self, number: int) -> Span:
        """What it is for one sample."""
        if self.valid is not None:
            return replace(self, valid=self.valid[number : number + 1])
        if self.tokens is not None:
            return replace(self, tokens=self.tokens[number : number + 1])
        return self

    def valid_tokens(self, number: int = 0) -> tuple[int, ...]:
        """The valid tokens of one sample, as places within the span."""
        if self.tokens is not None:
            return self.tokens[number]
        return tuple(range(self.size if self.valid is None else self.valid[number]))

    def _checked_valid(self) -> tuple[int, ...] | None:
        try:
            valid = tuple(map(operator.index, self.valid or ()))
        except TypeError:
            valid = ()
        if not valid or not all(0 <= number <= self.size for number in valid):
            raise DitAccelError(
                f"valid: expected one number of tokens within 0..{self.size} per sample, got "
                f"{shown(self.valid)}."
            )
        return None if set(valid) == {self.size} else valid

    def _checked_tokens(self) -> tuple[tuple[int, ...], ...]:
        try:
            tokens = tuple(tuple(map(operator.index, each)) for each in self.tokens or ())
        except TypeError:
            tokens = ()
        places = [place for each in tokens for place in each]
        within = all(0 <= place < self.size for place in places)
        if not tokens or not within or any(len(set(each)) != len(each) for each in tokens):
            raise DitAccelError(
                f"tokens: expected one list of different places within 0..{self.size - 1} per "
                f"sample, got {shown(self.tokens)}."
            )
        return tuple(tuple(sorted(each)) for each in tokens)


class Run(NamedTuple):
    """Tokens that are cut into blocks together: valid ones of every sample come first.

    start, length: its places in the sequence. valid: per sample, how many of its first tokens are
    valid; None means all. order: the tokens in their new order (places within the run); None leaves
    them as they are.
    """

    start: int
    length: int
    valid: tuple[int, ...] | None
    order: tuple[int, ...] | None


@dataclass(frozen=True, init=False, repr=False)
class TokenLayout:
    """The spans of one self-attention call: one video grid and other tokens before and after it.

    Other tokens are text, audio, references, and further video grids: their queries see every valid
    key and their keys are seen by every query. Hashable, so that plans can be cached on it.

    TokenLayout(grid, before, after, valid) is a video with text:
    grid: (T, H, W) in tokens, each at least 1.
    before, after: number of other tokens in front of and behind the video tokens.
    valid: per sample, the valid prefix (tokens) of the two spans; None means that all are valid.
    Any other sequence is made by `of_spans`.

    Raises DitAccelError for sizes that describe no token sequence.
    """

    spans: tuple[Span, ...]

    def __init__(
        self,
        grid: Triple,
        before: int = 0,
        after: int = 0,
        valid: Iterable[tuple[int, int]] | None = None,
    ) -> None:
        grid = _grid(grid)
        before, after = whole_number("before", before, 0), whole_number("after", after, 0)
        fronts, backs = _pairs(valid, before, after)
        text = (Span("text", before, valid=fronts), Span("text", after, valid=backs))
        self._set((text[0], Span("video", grid=grid), text[1]))

    @classmethod
    def of_spans(cls, *spans: Span) -> TokenLayout:
        """The layout of a sequence of spans; the first video's grid is the one that plans cut.

        Raises DitAccelError without a video, where that video has tokens that are not valid, or
        where spans disagree about the number of samples.
        """
        layout = cls.__new__(cls)
        layout._set(spans)
        return layout

    def _set(self, spans: Iterable[Span]) -> None:
        kept = tuple(span for span in spans if span.size)
        videos = [span for span in kept if span.kind == "video"]
        if not videos:
            raise DitAccelError("spans: expected at least one video, got none.")
        if videos[0].samples is not None:
            raise DitAccelError("spans: expected that all tokens of the first video are valid.")
        counts = {span.samples for span in kept} - {None}
        if len(counts) > 1:
            raise DitAccelError(
                f"spans: expected one number of samples, got {sorted(map(int, counts))}."  # type: ignore[arg-type]
            )
        object.__setattr__(self, "spans", kept)
        object.__setattr__(self, "_hash", hash(kept))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> Any:
        return TokenLayout.of_spans, self.spans  # hashes of text differ between processes

    def __repr__(self) -> str:
        if all(len(side) <= 1 and all(s.kind == "text" for s in side) for side in self._sides):
            try:
                numbers = f"grid={self.grid}, before={self.before}, after={self.after}"
                return f"TokenLayout({numbers}, valid={self.valid})"
            except DitAccelError:
                pass
        return f"TokenLayout.of_spans({', '.join(map(repr, self.spans))})"

    @cached_property
    def _main(self) -> int:
        return next(i for i, span in enumerate(self.spans) if span.kind == "video")

    @cached_property
    def _sides(self) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        return self.spans[: self._main], self.spans[self._main + 1 :]

    @cached_property
    def grid(self) -> Triple:
        """(T, H, W) of the first video, in tokens."""
        grid = self.spans[self._main].grid
        assert grid is not None
        return grid

    @cached_property
    def before(self) -> int:
        """Number of tokens in front of the first video."""
        return sum(span.size for span in self._sides[0])

    @cached_property
    def after(self) -> int:
        """Number of tokens behind the first video, further videos among them."""
        return sum(span.size for span in self._sides[1])

    @cached_property
    def video_length(self) -> int:
        """Number of tokens of the first video, T * H * W."""
        return math.prod(self.grid)

    @property
    def video_start(self) -> int:
        """Position of the first video's first token."""
        return self.before

    @cached_property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return sum(span.size for span in self.spans)

    @cached_property
    def samples(self) -> int | None:
        """How many samples the layout tells apart; None where they are all alike."""
        return next((span.samples for span in self.spans if span.samples is not None), None)

    @cached_property
    def valid(self) -> tuple[tuple[int, int], ...] | None:
        """Per sample, the valid prefix of what is before and after the video; None if all is valid.

        Raises DitAccelError where the valid tokens of a side are no prefix: see `valid_tokens`.
        """
        if self.samples is None:
            return None
        found = []
        for number in range(self.samples):
            counts = []
            for side in self._sides:
                tokens = _joined(side, number)
                if tokens != list(range(len(tokens))):
                    raise DitAccelError("valid: tokens of this layout are no prefix.")
                counts.append(len(tokens))
            found.append((counts[0], counts[1]))
        return tuple(found)

    def valid_tokens(self, number: int = 0) -> list[int]:
        """Positions of the valid tokens of one sample, in order."""
        return _joined(self.spans, number)

    def sample(self, number: int) -> TokenLayout:
        """The layout of one sample."""
        if self.samples is None:
            return self
        return TokenLayout.of_spans(*(span.sample(number) for span in self.spans))

    @cached_property
    def runs(self) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """How the tokens before and after the first video are cut into blocks.

        Neighbouring spans whose tokens are all valid are one run. Samples that are all alike are
        told once. Raises DitAccelError where there is an `obstacle`.
        """
        self.check()
        starts = [0, *accumulate(span.size for span in self.spans)]
        placed = [
            Run(start, span.size, *(_one_order(span) or (None, None)))
            for start, span in zip(starts, self.spans, strict=False)
        ]
        if self.samples is not None and len({self.sample(i) for i in range(self.samples)}) == 1:
            placed = [run._replace(valid=run.valid and run.valid[:1]) for run in placed]
        return _merged(placed[: self._main]), _merged(placed[self._main + 1 :])

    @cached_property
    def permuted(self) -> bool:
        """Whether runs put tokens in another order."""
        return any(run.order is not None for side in self.runs for run in side)

    def check(self) -> None:
        """DitAccelError where there is an `obstacle`."""
        if self.obstacle is not None:
            raise DitAccelError(f"spans: {self.obstacle}.")

    @cached_property
    def too_large(self) -> str | None:
        """Why no plan that looks at places in the video can be made, or None."""
        if max(self.grid) <= MAX_AXIS and self.video_length <= MAX_VIDEO:
            return None
        return (
            f"grid {'x'.join(map(str, self.grid))}: plans take axes of at most {MAX_AXIS:,} "
            f"tokens and videos of at most {MAX_VIDEO:,}"
        )

    @cached_property
    def obstacle(self) -> str | None:
        """Why no plan can be made, or None: no order of a span puts the valid tokens of all samples
        first. There is one where samples share their valid tokens, or each has some of the next's.
        """
        able = all(span.tokens is None or _one_order(span) for span in self.spans)
        return None if able else NO_PREFIX


def _grid(value: Any) -> Triple:
    try:
        grid = tuple(map(operator.index, value))
    except TypeError:
        grid = ()
    if len(grid) != 3 or min(grid) < 1:
        raise DitAccelError(f"grid: expected three whole sizes (T, H, W) >= 1, got {shown(value)}.")
    return grid[0], grid[1], grid[2]


def _pairs(
    value: Any, before: int, after: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The valid prefixes of the two spans, per sample."""
    if value is None:
        return None, None
    try:
        pairs = tuple((operator.index(b), operator.index(a)) for b, a in value)
    except (TypeError, ValueError):  # no pairs, or none of whole numbers
        pairs = ()
    if not pairs:
        raise DitAccelError(
            "valid: expected one (before, after) pair of token counts per sample, "
            f"got {shown(value)}."
        )
    for front, back in pairs:
        if not (0 <= front <= before and 0 <= back <= after):
            raise DitAccelError(
                f"valid: expected prefixes within (0..{before}, 0..{after}), got ({front}, {back})."
            )
    return tuple(front for front, _ in pairs), tuple(back for _, back in pairs)


def _joined(spans: Iterable[Span], number: int) -> list[int]:
    """Valid tokens of one sample in spans that follow each other."""
    tokens, start = [], 0
    for span in spans:
        tokens += [start + place for place in span.valid_tokens(number)]
        start += span.size
    return tokens


def _one_order(span: Span) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None:
    """(valid prefix per sample, order) of a span; None where no order makes prefixes of all.

    Tokens that more samples have come first, so that lists which contain each other are prefixes.
    """
    if span.tokens is None:
        return span.valid, None
    votes = [0] * span.size
    for each in span.tokens:
        for place in each:
            votes[place] += 1
    order = tuple(sorted(range(span.size), key=lambda place: -votes[place]))
    if any(set(order[: len(each)]) != set(each) for each in span.tokens):
        return None
    return tuple(map(len, span.tokens)), order


def _merged(runs: list[Run]) -> tuple[Run, ...]:
    """Neighbouring runs without masks as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].valid is None and run.valid is None:
            found[-1] = found[-1]._replace(length=found[-1].length + run.length)
        else:
            found.append(run)
    return tuple(found)
