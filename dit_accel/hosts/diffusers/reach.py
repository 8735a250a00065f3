"""Whether the code of an attention processor comes to an attention function that we know."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch.nn.functional as F
from diffusers.models import attention_dispatch

DISPATCH = attention_dispatch.dispatch_attention_fn
TORCH = F.scaled_dot_product_attention
"""What processors name; the modules' attributes may be other people's by the time of a call."""
_NAMES = {"dispatch_attention_fn", "scaled_dot_product_attention"}
_ENDS = {"torch", "numpy", "einops", "builtins"}
"""Packages whose functions are not followed."""


def reaches_attention(cls: type) -> bool:
    """Whether a method of the class, or a function that one of them names, names an attention
    function: torch's, or diffusers' dispatch."""
    methods = [value for each in cls.__mro__ for value in vars(each).values()]
    todo = [_function(value) for value in methods]
    known: set[int] = set()
    while todo:
        function = todo.pop()
        if function is None or id(function.__code__) in known:
            continue
        known.add(id(function.__code__))
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        if names & _NAMES:
            return True
        values = list(_named(function, names))
        if any(value is DISPATCH or value is TORCH for value in values):
            return True
        todo += map(_function, values)
    return False


def _named(function: FunctionType, names: set[str]) -> Iterator[Any]:
    """What a function's code names in its globals, in modules and classes there, and in its
    closure."""
    cells = [cell for cell in function.__closure__ or () if _filled(cell)]
    values = [function.__globals__.get(name) for name in names]
    for value in (*values, *(cell.cell_contents for cell in cells)):
        yield value
        if isinstance(value, (ModuleType, type)) and _package(value) not in _ENDS:
            yield from (vars(value).get(name) for name in names)


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    followed = isinstance(value, FunctionType) and _package(value) not in _ENDS
    return value if followed else None


def _package(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return str(name).split(".")[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
