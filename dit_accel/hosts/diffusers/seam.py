"""Attaching to diffusers: a processor's own code, with its attention call rebound to ours.

For a processor class X a subclass is made whose `__call__` is X's code over a copy of X's globals
in which `dispatch_attention_fn` and `F.scaled_dot_product_attention` lead to
`dispatch`. Projections, norms, rotary embeddings and LoRA stay upstream code. An
instance is switched by its `__class__`, so that whatever it carries survives, and back on disable.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import _helpers as diffusers_helpers

from dit_accel.errors import DitAccelError
from dit_accel.home import VERSION
from dit_accel.hosts.diffusers import compiled, dispatch, operator  # noqa: F401  (the operator)
from dit_accel.hosts.diffusers.attachment import BoundSite

_TARGETS = ("dispatch_attention_fn", "scaled_dot_product_attention")
_BASE = "_dit_accel_base"
_PASS = {
    inspect.Parameter.POSITIONAL_ONLY: "{0}",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "{0}",
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


def attach(site: BoundSite) -> None:
    """Rebind the processor of a site's module; a no-op where it is rebound already.

    Raises:
        DitAccelError: the processor has no attention call that we know (names the version).
    """
    module: Any = site.module
    processor = module.processor
    module._dit_accel_site = site
    module._dit_accel_number = compiled.number(site)
    if hasattr(type(processor), _BASE):  # modules may share one
        return
    new: Any = rebound
    processor.__class__ = new(type(processor))


def detach(site: BoundSite) -> None:
    """Restore a site's module exactly."""
    module: Any = site.module
    restore(module.processor)
    module.__dict__.pop("_dit_accel_site", None)
    module.__dict__.pop("_dit_accel_number", None)


def restore(processor: Any) -> None:
    """Make a processor one of its own class again; a no-op where it is."""
    processor.__class__ = getattr(type(processor), _BASE, type(processor))


def check(site: BoundSite) -> None:
    """Raise now what `attach` would raise for this site."""
    processor: Any = site.module.processor
    if not hasattr(type(processor), _BASE):
        new: Any = rebound
        new(type(processor))


def attached(site: BoundSite) -> bool:
    """Whether the site's module still runs our processor (fusing projections swaps it)."""
    processor: Any = site.module.processor
    return hasattr(type(processor), _BASE)


@cache
def rebound(cls: type) -> type:
    """The subclass of a processor class whose attention calls are ours."""
    stock = cls.__call__
    if not isinstance(stock, FunctionType) or not _mentions(stock.__code__):
        import diffusers

        raise DitAccelError(
            f"the attention processor {cls.__name__} of diffusers {diffusers.__version__} makes no "
            f"attention call that dit_accel {VERSION} knows; diffusers 0.42 is known to work."
        )
    call = _same_parameters(cls.__name__, stock, _wrap(_over(stock, _shadow(stock))))
    body = {"__call__": call, "__deepcopy__": _stock_copy, _BASE: cls, "__module__": cls.__module__}
    new = type(cls.__name__, (cls,), body)
    _register_metadata(cls, new)
    return new


def _stock_copy(processor: Any, memo: dict[int, Any]) -> Any:
    base = getattr(type(processor), _BASE)
    new = memo[id(processor)] = base.__new__(base)
    new.__dict__.update(copy.deepcopy(processor.__dict__, memo))
    return new


def _same_parameters(name: str, stock: FunctionType, call: FunctionType) -> FunctionType:
    """`call` behind a function that has the parameters of `stock`.

    Callers read them: legacy attention modules drop keyword arguments that the processor does not
    name. A `__signature__` attribute would do in eager, but breaks compiled graphs.
    """
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=empty if p.default is empty else None)
        for p in inspect.signature(stock).parameters.values()
    ]
    passed = ", ".join(_PASS[p.kind].format(p.name) for p in parameters)
    shadow, inner = _shadow(stock).__dict__, f"_dit_accel_{name}"
    shadow[inner] = call
    scope: dict[str, Any] = {}
    exec(f"def __call__{inspect.Signature(parameters)}: return {inner}({passed})", shadow, scope)
    new: FunctionType = scope["__call__"]
    new.__defaults__, new.__kwdefaults__ = stock.__defaults__, stock.__kwdefaults__
    new.__doc__ = stock.__doc__
    return new


def _wrap(stock: Callable[..., Any]) -> FunctionType:
    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        site = getattr(attn, "_dit_accel_site", None)
        if site is None:
            return stock(self, attn, *args, **kwargs)
        if torch.compiler.is_compiling():
            compiled.slots.site = attn._dit_accel_number
            return stock(self, attn, *args, **kwargs)
        return dispatch.run_site(site, lambda: stock(self, attn, *args, **kwargs), args, kwargs)

    assert isinstance(__call__, FunctionType)
    return __call__


def _over(function: FunctionType, shadow: ModuleType) -> FunctionType:
    new = FunctionType(
        function.__code__,
        shadow.__dict__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _shadow(function: FunctionType) -> ModuleType:
    """A registered module with the function's globals and our attention calls in them.

    Registered, because the compiler finds a function's globals by importing their `__name__`.
    """
    origin = function.__globals__["__name__"]
    name = f"dit_accel._shadow.{origin}"
    if name in sys.modules:
        return sys.modules[name]
    shadow = ModuleType(name)
    shadow.__dict__.update(function.__globals__)
    shadow.__dict__["__name__"] = name
    if "dispatch_attention_fn" in shadow.__dict__:
        shadow.__dict__["dispatch_attention_fn"] = dispatch.dispatch_attention_fn
    if shadow.__dict__.get("F") is F:
        shadow.__dict__["F"] = _functional()
    sys.modules[name] = shadow
    return shadow


def _functional() -> ModuleType:
    name = "dit_accel._shadow.functional"
    if name not in sys.modules:
        ours = ModuleType(name)
        ours.__dict__.update(F.__dict__)
        ours.__dict__["__name__"] = name
        ours.__dict__["scaled_dot_product_attention"] = dispatch.scaled_dot_product_attention
        sys.modules[name] = ours
    return sys.modules[name]


def _mentions(code: CodeType) -> bool:
    return any(target in code.co_names for target in _TARGETS)


def _register_metadata(cls: type, new: type) -> None:
    """Let diffusers' own hooks (skip-layer guidance) treat the subclass as its base."""
    registry = diffusers_helpers.AttentionProcessorRegistry
    try:
        registry.register(new, registry.get(cls))
    except ValueError:
        return
