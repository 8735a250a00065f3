"""What compiled graphs need: numbers for Python objects, and an operator that begins a forward.

A graph must not see step, branch or policy, or it would be compiled anew for each. So a site
travels as a 0-d CPU tensor, and what happens at the start of a forward happens inside an opaque
operator. It returns a token that every attention operator of the graph consumes, so that none of
them can run before it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Beginner(Protocol):
    """Whoever can start a forward from the arguments by name."""

    def begin(self, bound: Mapping[str, Any]) -> None: ...


class Slots:
    """What the traced code around an attention call leaves for it, and whether there was one."""

    def __init__(self) -> None:
        self.site = torch.tensor(-1)
        self.token = torch.zeros(())
        self.seen = False


slots = Slots()
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(of: Any) -> torch.Tensor:
    """A 0-d CPU tensor that stands for an object (held weakly)."""
    index = next(_numbers)
    _objects[index] = of
    return torch.tensor(index, dtype=torch.int64)


def object_of(index: torch.Tensor) -> Any:
    """The object that `number` made the tensor for."""
    return _objects[int(index)]


def begin(index: torch.Tensor, arguments: list[tuple[str, Any]]) -> None:
    """Start a forward from inside a graph; `index` stands for a `Beginner`.

    Lists only: a dictionary that changes while it is traced breaks the graphs of models that
    inspect signatures.
    """
    tensors = [(name, value) for name, value in arguments if isinstance(value, torch.Tensor)]
    sizes = [
        (name, value)
        for name, value in arguments
        if isinstance(value, int) and not isinstance(value, bool)  # which is an int to Python
    ]
    slots.token = torch.ops.dit_accel.begin(
        index,
        [value for _, value in tensors],
        ",".join([name for name, _ in tensors]),
        [value for _, value in sizes],
        ",".join([name for name, _ in sizes]),
    )


@torch.library.custom_op("dit_accel::begin", mutates_args=())
def _begin_op(
    index: torch.Tensor, tensors: list[torch.Tensor], names: str, sizes: list[int], size_names: str
) -> torch.Tensor:
    bound: dict[str, Any] = dict(zip(names.split(","), tensors, strict=True))
    if sizes:
        bound |= dict(zip(size_names.split(","), sizes, strict=True))
    object_of(index).begin(bound)
    return torch.zeros(())


@_begin_op.register_fake
def _(index: torch.Tensor, *arguments: object) -> torch.Tensor:
    return torch.zeros(())
