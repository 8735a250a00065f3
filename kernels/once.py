"""What is made from a plan or a table of blocks once, and kept as long as that lives."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch

Of = TypeVar("Of")
More = ParamSpec("More")
Made = TypeVar("Made")


def once(make: Callable[Concatenate[Of, More], Made]) -> Callable[Concatenate[Of, More], Made]:
    """`make`, called once for each first argument and further ones (hashable).

    A call that would make something while a CUDA graph is captured is a RuntimeError: tensors made
    then hold nothing before the graph is replayed, and others would be given them.
    """
    known: WeakKeyDictionary[Any, dict[Any, Made]] = WeakKeyDictionary()

    @wraps(make)
    def kept(of: Of, *more: More.args, **named: More.kwargs) -> Made:
        made = known.get(of)
        if made is None:
            made = known[of] = {}
        key = (more, *sorted(named.items())) if named else more
        if key not in made:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "a plan is used for the first time while a CUDA graph is captured: make the "
                    "same call once before the capture"
                )
            made[key] = make(of, *more, **named)
        return made[key]

    return kept
