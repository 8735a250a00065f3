"""Where the tokens of one self-attention call are."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from dit_accel.errors import DitAccelError, whole_number


@dataclass(frozen=True)
class TokenLayout:
    """The spans of one self-attention call: `before` other tokens, the video grid, `after` others.

    Video tokens are frame-major, row-major. Other tokens are text, audio, references: their
    queries see every valid key and their keys are seen by every query. Hashable, so that plans
    can be cached on it.

    grid: (T, H, W) in tokens, each at least 1.
    before, after: number of other tokens in front of and behind the video tokens.
    valid: per sample, the valid prefix (tokens) of the two spans; None means that all are valid.
        Keys past the prefix are what the stock model masks out; nobody attends to them.

    Raises DitAccelError for sizes that describe no token sequence.
    """

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0
    valid: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        try:
            grid = tuple(map(operator.index, self.grid))
        except TypeError:
            grid = ()
        if len(grid) != 3 or min(grid) < 1:
            raise DitAccelError(
                f"grid: expected three whole sizes (T, H, W) >= 1, got {self.grid!r}."
            )
        object.__setattr__(self, "grid", grid)
        for name in ("before", "after"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
        if self.valid is not None:
            object.__setattr__(self, "valid", self._normalised_valid())

    def _normalised_valid(self) -> tuple[tuple[int, int], ...] | None:
        try:
            valid = tuple((operator.index(b), operator.index(a)) for b, a in self.valid or ())
        except (TypeError, ValueError):  # no pairs, or none of whole numbers
            valid = ()
        if not valid:
            raise DitAccelError(
                "valid: expected one (before, after) pair of token counts per sample, "
                f"got {self.valid!r}."
            )
        for before, after in valid:
            if not (0 <= before <= self.before and 0 <= after <= self.after):
                raise DitAccelError(
                    f"valid: expected prefixes within (0..{self.before}, 0..{self.after}), "
                    f"got ({before}, {after})."
                )
        everything = all(pair == (self.before, self.after) for pair in valid)
        return None if everything else valid

    @property
    def video_length(self) -> int:
        """Number of video tokens, T * H * W."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def video_start(self) -> int:
        """Position of the first video token."""
        return self.before

    @property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return self.before + self.video_length + self.after
