"""Attaching to diffusers: a processor's own code, with its attention call rebound to ours.

For a processor class X a subclass is made whose `__call__` is X's code over a copy of X's globals
in which `dispatch_attention_fn` and `F.scaled_dot_product_attention` lead to
`dispatch`. Projections, norms, rotary embeddings and LoRA stay upstream code. An
instance is switched by its `__class__`, so that whatever it carries survives, and back on disable.
A user's own processor may come to torch's function by other ways: it runs under a mode that leads
them all to `dispatch`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks import _helpers as diffusers_helpers

from dit_accel.errors import DitAccelError
from dit_accel.home import VERSION
from dit_accel.hosts.diffusers import compiled, dispatch, operator, reach  # noqa: F401
from dit_accel.hosts.diffusers.attachment import Attachment, BoundSite, places_of, sites_of

_BASE = "_dit_accel_base"
_numbers = itertools.count()
_PASS = {
    inspect.Parameter.POSITIONAL_ONLY: "{0}",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "{0}",
    inspect.Parameter.VAR_POSITIONAL: "*{0}",
    inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    inspect.Parameter.VAR_KEYWORD: "**{0}",
}


def follow(attachment: Attachment) -> None:
    """Hang the seam on the attention modules that a transformer has now, and off those it had.

    Blocks, modules and processors may have been exchanged since.

    Raises:
        DitAccelError: one of them has no processor whose attention call we know.
    """
    places = places_of(attachment.model, attachment.adapter)
    if places != attachment.places:
        _move(attachment)
        attachment.places = places
    for bound in attachment.sites:
        if not attached(bound):
            attach(bound)


def complete(attachment: Attachment) -> bool:
    """Whether the seam hangs on the attention modules that the transformer has now."""
    same = places_of(attachment.model, attachment.adapter) == attachment.places
    return same and all(map(attached, attachment.sites))


def _move(attachment: Attachment) -> None:
    now = sites_of(attachment.model, attachment.expert, attachment.adapter)
    held = {(id(bound.module), bound.site): bound for bound in attachment.sites}
    keys = [(id(module), site) for site, module in now]
    sites = [
        held[key] if key in held else BoundSite(site, module, attachment)
        for key, (site, module) in zip(keys, now, strict=True)
    ]
    for bound in sites:
        check(bound)
    for key in held.keys() - set(keys):
        detach(held[key])
    attachment.sites = sites


def attach(site: BoundSite) -> None:
    """Rebind the processor of a site's module; a no-op where it is rebound already.

    Raises:
        DitAccelError: the processor has no attention call that we know (names the version).
    """
    processor, new = _rebinding(site)
    module: Any = site.module
    module._dit_accel_site = site
    module._dit_accel_number = compiled.number(site)
    if type(processor) is not new:  # modules may share one
        processor.__class__ = new


def detach(site: BoundSite) -> None:
    """Restore a site's module exactly, unless another one has it by now."""
    module: Any = site.module
    if module.__dict__.get("_dit_accel_site") is site:
        restore(getattr(module, "processor", None))
        module.__dict__.pop("_dit_accel_site", None)
        module.__dict__.pop("_dit_accel_number", None)


def restore(processor: Any) -> None:
    """Make a processor one of its own class again; a no-op where it is."""
    base = getattr(type(processor), _BASE, None)
    if base is not None:
        processor.__class__ = base


def check(site: BoundSite) -> None:
    """Raise now what `attach` would raise for this site."""
    _rebinding(site)


def attached(site: BoundSite) -> bool:
    """Whether the site's module still runs our processor (fusing projections swaps it)."""
    module: Any = site.module
    ours = hasattr(type(getattr(module, "processor", None)), _BASE)
    return ours and module.__dict__.get("_dit_accel_site") is site


def _rebinding(site: BoundSite) -> tuple[Any, type]:
    """The processor of a site's module, and the class that it is to have."""
    processor: Any = getattr(site.module, "processor", None)
    if processor is None:
        raise DitAccelError(
            f"{site.site.name} is a {type(site.module).__name__}, which has no attention "
            "processor: give it one, as diffusers' attention modules have, or disable sparse "
            "attention for this model."
        )
    if hasattr(type(processor), _BASE):
        return processor, type(processor)
    new: Any = rebound
    return processor, new(type(processor))


@cache
def rebound(cls: type) -> type:
    """The subclass of a processor class whose attention calls are ours."""
    stock = cls.__call__
    if not isinstance(stock, FunctionType) or not reach.reaches_attention(cls):
        import diffusers

        raise DitAccelError(
            f"the attention processor {cls.__name__} of diffusers {diffusers.__version__} makes no "
            f"attention call that dit_accel {VERSION} knows; diffusers 0.42 is known to work. In a "
            "processor of your own call torch's scaled_dot_product_attention or diffusers' "
            "dispatch_attention_fn, in a class with a __call__ method."
        )
    own = not _of_diffusers(cls)
    # A graph cannot be made under the mode: there a user's code is led by its globals alone.
    context = dispatch.Caught if own else nullcontext
    call = _same_parameters(stock, _wrap(_over(stock), _over(stock, own), context))
    body = {
        "__slots__": (),
        "__call__": call,
        "__deepcopy__": _stock_copy,
        _BASE: cls,
        "__module__": cls.__module__,
    }
    parents = [_over_parent(each) for each in cls.__mro__[1:] if _has_call(each)]
    new = type(cls.__name__, (cls, *parents), body)
    _register_metadata(cls, new)
    return new


@cache
def _over_parent(cls: type) -> type:
    """The subclass of a class of diffusers that a processor derives from, for `super()`."""
    call: Any = cls.__dict__["__call__"]
    return type(cls.__name__, (cls,), {"__slots__": (), "__call__": _over(call)})


def _has_call(cls: type) -> bool:
    return isinstance(cls.__dict__.get("__call__"), FunctionType) and _of_diffusers(cls)


def _of_diffusers(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "diffusers"


def _stock_copy(processor: Any, memo: dict[int, Any]) -> Any:
    base = getattr(type(processor), _BASE)
    new = memo[id(processor)] = base.__new__(base)
    new.__dict__.update(copy.deepcopy(processor.__dict__, memo))
    return new


def _same_parameters(stock: FunctionType, call: FunctionType) -> FunctionType:
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
    inner = f"_dit_accel_{next(_numbers)}"
    names, scope = _registered("calls").__dict__, dict[str, Any]()
    names[inner] = call
    exec(f"def __call__{inspect.Signature(parameters)}: return {inner}({passed})", names, scope)
    new: FunctionType = scope["__call__"]
    new.__defaults__, new.__kwdefaults__ = stock.__defaults__, stock.__kwdefaults__
    new.__doc__ = stock.__doc__
    return new


def _wrap(
    stock: Callable[..., Any], traced: Callable[..., Any], context: Callable[[], Any]
) -> FunctionType:
    """A processor's code as the code of its site; what runs in a context, and what is compiled."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return stock(*args, **kwargs)

    def __call__(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        site = getattr(attn, "_dit_accel_site", None)
        if site is None:
            return stock(self, attn, *args, **kwargs)
        if torch.compiler.is_compiling():
            compiled.slots.site = attn._dit_accel_number
            compiled.slots.seen = False
            output = traced(self, attn, *args, **kwargs)
            return output if compiled.slots.seen else _counted(output)
        return dispatch.run_site(site, lambda: run(self, attn, *args, **kwargs), args, kwargs)

    assert isinstance(__call__, FunctionType)
    return __call__


def _counted(output: Any) -> Any:
    """The output of a processor in whose graph no attention call is seen, which counts that."""
    first, *others = output if isinstance(output, tuple) else (output,)
    first = torch.ops.dit_accel.unseen(first, compiled.slots.site, compiled.slots.token)
    return (first, *others) if isinstance(output, tuple) else first


def _over(function: FunctionType, deep: bool = False) -> FunctionType:
    """A function with our attention calls in its globals, where those of stock are in them; deep:
    or are reached through torch."""
    names = function.__globals__
    if not any(n in names and _instead(names[n], deep) for n in function.__code__.co_names):
        return function
    new = FunctionType(
        function.__code__,
        _shadow(function, deep).__dict__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _shadow(function: FunctionType, deep: bool) -> ModuleType:
    """A registered module with the function's globals and our attention calls in them."""
    shadow = _registered(function.__globals__["__name__"] + (".deep" if deep else ""))
    # Anew for each function: the module of a processor of your own may have grown since.
    for name, value in function.__globals__.items():
        if name != "__name__":
            shadow.__dict__[name] = _instead(value, deep) or value
    return shadow


def _instead(value: Any, deep: bool) -> Any:
    """What stands in for diffusers' or torch's attention function or its module, else None."""
    if value is reach.DISPATCH:
        return dispatch.dispatch_attention_fn
    if value is reach.TORCH:
        return dispatch.scaled_dot_product_attention
    if value is F:
        return _functional()
    if deep and value is torch.nn:
        return _like("nn", torch.nn, functional=_functional())
    if deep and value is torch:
        return _like("torch", torch, nn=_like("nn", torch.nn, functional=_functional()))
    return None


def _registered(name: str) -> ModuleType:
    """A module that can be imported: the compiler finds a function's globals by their name."""
    name = f"dit_accel._shadow.{name}"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
    return sys.modules[name]


def _functional() -> ModuleType:
    ours = dispatch.scaled_dot_product_attention
    return _like("functional", F, scaled_dot_product_attention=ours)


def _like(name: str, module: ModuleType, **instead: Any) -> ModuleType:
    """A registered module with the names of another, but for some."""
    ours = _registered(name)
    if len(ours.__dict__) < len(module.__dict__):
        ours.__dict__.update({**module.__dict__, "__name__": ours.__name__, **instead})
    return ours


def _register_metadata(cls: type, new: type) -> None:
    """Let diffusers' own hooks (skip-layer guidance) treat the subclass as its base."""
    registry = diffusers_helpers.AttentionProcessorRegistry
    try:
        registry.register(new, registry.get(cls))
    except ValueError:
        return
