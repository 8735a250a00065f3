"""Outputs kept to be served again: the state behind `reuse`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.engine.profile import Reuse

Key = tuple[str, str, str]
"""(expert, site name, CFG branch): nothing computed for one is ever served to another."""


@dataclass
class Entry:
    """One site's output: a tensor or tuple of tensors.

    `step` is the step that computed it, `served` how often it was served since, `calls` how many
    attention calls one computation makes. `prompt` is the conditioning of a branch without a
    name, held so that its memory is not used again.
    """

    output: Any
    step: int
    calls: int
    signature: tuple[Any, ...]
    prompt: Any = None
    served: int = 0


class OutputCache:
    """Site outputs within a byte limit.

    Args:
        limit: bytes that the entries may hold together; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.peak = 0
        self.refused = 0
        self._entries: dict[Key, Entry] = {}
        self._bytes = 0

    def serve(
        self,
        key: Key,
        reuse: Reuse,
        step: int,
        steps: int,
        signature: tuple[Any, ...],
        prompt: Any = None,
    ) -> Entry | None:
        """The entry that stands for this call, or None where the call must be computed.

        `signature` tells apart inputs that an output cannot be served across (shape, dtype,
        device). An output is never older than `every` steps, also where another cache skipped
        this site's calls in between.
        """
        entry = self._entries.get(key)
        if entry is None or entry.signature != signature or entry.served + 1 >= reuse.every:
            return None
        if not _same_memory(entry.prompt, prompt):
            return None
        age = step - entry.step
        if not 0 <= age < reuse.every or (
            reuse.max_age is not None and age / steps > reuse.max_age
        ):
            return None
        entry.served += 1
        return entry

    def store(self, key: Key, entry: Entry) -> bool:
        """Keep an output; False where the limit does not allow it."""
        self.drop(key)
        size = _size(entry.output)
        if self.limit is not None and self._bytes + size > self.limit:
            self.refused += 1
            return False
        self._entries[key] = entry
        self._bytes += size
        self.peak = max(self.peak, self._bytes)
        return True

    def drop(self, key: Key) -> None:
        if (old := self._entries.pop(key, None)) is not None:
            self._bytes -= _size(old.output)

    def drop_expert(self, expert: str) -> None:
        """Free what an expert that has had its turn holds."""
        for key in [k for k in self._entries if k[0] == expert]:
            self.drop(key)

    def drop_branch(self, expert: str, branch: str) -> None:
        """Free what one branch of one expert holds."""
        for key in [k for k in self._entries if (k[0], k[2]) == (expert, branch)]:
            self.drop(key)

    def reset(self) -> None:
        """Free every entry and start counting anew."""
        self._entries.clear()
        self._bytes = self.peak = self.refused = 0


def _same_memory(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a module's output: a tensor, or tuples and lists of them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_of(item)


def _size(output: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(output))
