"""Where the tokens of one self-attention call are."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.errors import DitAccelError


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
        grid = tuple(int(size) for size in self.grid)
        if len(grid) != 3 or min(grid) < 1:
            raise DitAccelError(f"grid: expected three sizes (T, H, W) >= 1, got {self.grid}.")
        if self.before < 0 or self.after < 0:
            raise DitAccelError(
                f"before, after: expected token counts >= 0, got {self.before}, {self.after}."
            )
        object.__setattr__(self, "grid", grid)
        if self.valid is not None:
            object.__setattr__(self, "valid", self._normalised_valid())

    def _normalised_valid(self) -> tuple[tuple[int, int], ...] | None:
        valid = tuple((int(before), int(after)) for before, after in self.valid or ())
        if not valid:
            raise DitAccelError("valid: expected one (before, after) pair per sample, got none.")
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
