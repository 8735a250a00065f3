"""The one place where anything lives between calls: what reuse keeps, within a limit.

A store belongs to one denoising run of one caller. Its slots are keyed by expert, site, what is
kept, and rows (branch, prompt, order), so that nothing computed for one of them is ever served to
another.

Where the limit is reached, those outputs stay that save most for each byte (`Kept.worth`); among
equals, those that were kept first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.engine.call import Row, Site, tensors_of

Slot = tuple[Site, str, tuple[Row, ...]]


@dataclass
class Kept:
    """What was kept of one computation.

    value: a tensor, or tuples of tensors.
    step: the step that computed it. calls: how many attention calls that took.
    signature: what tells apart inputs that it cannot be served across (shapes, types, devices).
    served: how often it was served since. last: the last step that it may be served at, None for
        any. worth: what keeping it saves for each byte, to compare.
    """

    value: Any
    step: int
    calls: int
    signature: tuple[Any, ...]
    served: int = 0
    last: int | None = None
    worth: float = 0.0


class Store:
    """What one run keeps.

    Args:
        limit: bytes that it may hold together; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.peak = 0
        self.refused = 0
        self._kept: dict[Slot, Kept] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._bytes

    def get(self, site: Site, what: str, rows: tuple[Row, ...]) -> Kept | None:
        """What was put there last, or None."""
        return self._kept.get((site, what, rows))

    def put(self, site: Site, what: str, rows: tuple[Row, ...], kept: Kept) -> bool:
        """Keep something in place of what was there; False where the limit does not allow it."""
        slot = site, what, rows
        self._drop(slot)
        size = _size(kept.value)
        if not self._make_room(size, kept.worth):
            self.refused += 1
            return False
        self._kept[slot] = kept
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        return True

    def forget(self, *, expert: str | None = None, rows: tuple[Row, ...] | None = None) -> None:
        """Free what is kept: of one expert, of one group of rows, of both, or everything."""
        for slot in list(self._kept):
            site, _, whose = slot
            if expert in (None, site.expert) and rows in (None, whose):
                self._drop(slot)

    def expire(self, step: int) -> None:
        """Free what can be served no more at this step and after it."""
        for slot, kept in list(self._kept.items()):
            if kept.last is not None and kept.last < step:
                self._drop(slot)

    def restrict(self, limit: int | None) -> None:
        """Another limit from now on; what saves least goes first until the rest fits."""
        self.limit = limit
        if limit is not None and self._bytes > limit:
            for slot in sorted(self._kept, key=lambda slot: self._kept[slot].worth):
                if self._bytes <= limit:
                    break
                self._drop(slot)

    def _make_room(self, size: int, worth: float) -> bool:
        """Whether it fits, after what is worth less has gone as far as that helps."""
        if self.limit is None or self._bytes + size <= self.limit:
            return True
        less = sorted(
            (slot for slot, kept in self._kept.items() if kept.worth < worth),
            key=lambda slot: self._kept[slot].worth,
        )
        free = self.limit - self._bytes + sum(_size(self._kept[slot].value) for slot in less)
        if free < size:
            return False
        for slot in less:
            if self._bytes + size <= self.limit:
                break
            self._drop(slot)
        return True

    def _drop(self, slot: Slot) -> None:
        if (old := self._kept.pop(slot, None)) is not None:
            self._bytes -= _size(old.value)


def _size(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(value))
