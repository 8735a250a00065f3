"""Hooks around a transformer: when a forward of it begins and ends, and in which CFG branch."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers import callers, compiled
from dit_accel.hosts.diffusers.attachment import Attached, Attachment, Here


class RootHook(Attached):
    """Tells the caller when a transformer's forward begins and ends.

    Torch's own forward hooks and an instance-wrapped `cache_context` are used: both survive
    accelerate's and diffusers' replacing of `forward`.

    Args:
        refresh: called before each eager forward; modules and processors may have been exchanged.
        complete: asked before a compiled one, whose graph is made already.
    """

    def __init__(
        self,
        attachment: Attachment,
        refresh: Callable[[Attachment], None],
        complete: Callable[[Attachment], bool],
    ) -> None:
        model = attachment.model
        self._names = [n for n in inspect.signature(type(model).forward).parameters if n != "self"]
        self._attachment = attachment
        self._refresh = refresh
        self._complete = complete
        self._number = compiled.number(self)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._wraps_context = hasattr(model, "cache_context")
        if self._wraps_context:
            model.cache_context = _Context(model, attachment.here)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        return _silent()

    def __reduce__(self) -> Any:
        return super().__reduce__() if self._names else (_silent, ())

    def begin(self, bound: Mapping[str, Any]) -> None:
        """Start a compiled forward of the hook's transformer with these arguments."""
        if not self._complete(self._attachment):
            raise DitAccelError(
                "attention modules or processors were exchanged in a compiled transformer: enable "
                "sparse attention again, so that the next graph has them."
            )
        callers.begin(self._attachment, bound)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        model = self._attachment.alive
        if self._wraps_context and model is not None:
            model.__dict__.pop("cache_context", None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._names:
            return
        arguments = [*zip(self._names, args, strict=False), *kwargs.items()]
        if torch.compiler.is_compiling():
            compiled.begin(self._number, arguments)
            return
        self._refresh(self._attachment)
        callers.begin(self._attachment, dict(arguments))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._names and not torch.compiler.is_compiling():
            callers.end_forward(self._attachment, failed=output is None)


def _silent() -> RootHook:
    """What a copy of a model has in place of a hook: it does nothing."""
    hook = object.__new__(RootHook)
    hook._names = []
    return hook


class _Context(Attached):
    """Stands in for a model's `cache_context`: notes the branch, and does what stock does."""

    def __init__(self, model: nn.Module, here: Here) -> None:
        self._model = weakref.ref(model)
        self._here = here

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        model: Any = self._model()
        outer, self._here.context = self._here.context, (name, kwargs)
        try:
            with type(model).cache_context(model, name, **kwargs):
                yield
        finally:
            self._here.context = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model: Any = self._model()
        return type(model).cache_context.__get__(memo.get(id(model), model))
