"""An enabled pipeline knows when it is called: its runs begin and end with its calls.

The instance is switched to a subclass of its class whose `__call__` is the stock one between two
marks, and back on disable. Copies of it are stock.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from dit_accel.hosts.diffusers import callers

_BASE = "_dit_accel_base"


def mark(pipe: Any, before_call: Callable[[Any], None]) -> None:
    """Let a pipeline's calls be runs, and call `before_call` with it before each."""
    if not hasattr(type(pipe), _BASE):
        object.__setattr__(pipe, "__class__", _marked(type(pipe), before_call))  # type: ignore[arg-type]


def unmark(pipe: Any) -> None:
    """Make it a pipeline of its own class again."""
    object.__setattr__(pipe, "__class__", getattr(type(pipe), _BASE, type(pipe)))


@cache
def _marked(base: Any, before_call: Callable[[Any], None]) -> type:
    @wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before_call(self)
        with callers.running(self, sys._getframe()):
            return base.__call__(self, *args, **kwargs)

    def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = base.__new__(base)  # also what class methods make is stock
        made.__init__(*args, **kwargs)
        return made

    def __copy__(self: Any) -> Any:
        copied = base.__new__(base)
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = base.__new__(base)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    body = {
        "__call__": __call__,
        "__new__": __new__,
        "__copy__": __copy__,
        "__deepcopy__": __deepcopy__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _BASE: base,
    }
    return type(base.__name__, (base,), body)
