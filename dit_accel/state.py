"""Where a denoising run stands: step, CFG branch, expert and token layout of a forward."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_accel import compiled
from dit_accel.broadcast import OutputCache
from dit_accel.clock import StepClock
from dit_accel.errors import DitAccelError
from dit_accel.layout import TokenLayout
from dit_accel.policy import Decision, Policy, SiteKey
from dit_accel.report import Recorder


@dataclass(frozen=True)
class Settings:
    """How a pipeline was enabled; see `dit_accel.enable`."""

    strict: bool | str = False
    backend: str | None = None
    steps: int | None = None


class Attached:
    """What hangs on an enabled model: a deep copy of the model is a stock one, without it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return None

    def __reduce__(self) -> Any:
        raise DitAccelError(
            "a model cannot be pickled while sparse attention is enabled on it: call "
            "disable_sparse_attention() first, or use save_pretrained."
        )


@dataclass
class Site(Attached):
    """One attention module under our seam."""

    key: SiteKey
    module: nn.Module
    state: RunState
    masks: str = "none"
    original: Any = None


@dataclass
class Forward:
    """The transformer forward that is running.

    `layout` is None where the adapter cannot place the tokens; `why` then says the reason.
    """

    expert: str
    branch: str
    step: int
    steps: int
    layout: TokenLayout | None
    why: str = ""
    prompt: Any = None


@dataclass
class RunState:
    """What the sites of one pipeline share."""

    adapter: Any
    policy: Policy
    settings: Settings
    clock: StepClock
    recorder: Recorder
    cache: OutputCache
    forward: Forward | None = None
    expert: str = ""
    context: tuple[str, Mapping[str, Any]] | None = None
    warm: set[Any] = field(default_factory=set)
    choices: dict[Any, Any] = field(default_factory=dict)
    _calls: dict[tuple[str, int], int] = field(default_factory=dict)
    _layouts: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def begin(self, expert: str, model: nn.Module, bound: Mapping[str, Any]) -> None:
        """Start a transformer forward; `bound` holds its arguments by name."""
        branch, fields = self.context or ("", {})
        fresh = self.clock.tick(bound.get("timestep"), (expert, branch), fields)
        if fresh:
            self.cache.reset()
            self.recorder.start(self.clock.steps)
            self._calls.clear()
        elif self.expert != expert:
            self.cache.drop_expert(self.expert)
        self.expert = expert
        step = self.clock.step
        prompt = None
        if not branch:
            # Unnamed branches are numbered by their order, and checked by their prompt.
            prompt = bound.get("encoder_hidden_states")
            order = self._calls.get((expert, step), 0)
            self._calls = {(expert, step): order + 1}
            branch = f"call{order}"
        layout, why = self.adapter.layout(model, bound, self._layouts)
        self.forward = Forward(expert, branch, step, self.clock.steps, layout, why, prompt)
        self.recorder.forward_started(_device(bound))

    def end(self) -> None:
        """The forward that `begin` started is over."""
        forward = self.forward
        self.forward = None
        if forward is None:
            return
        self.recorder.forward_ended()
        if forward.step == forward.steps - 1:
            self.cache.drop_branch(forward.expert, forward.branch)

    def decide(self, site: Site) -> Decision:
        forward = self.forward
        if forward is None:
            return Decision()
        return self.policy.decide(site.key, forward.branch, forward.step, forward.steps)


class RootHook(Attached):
    """Tells the state when a transformer's forward begins and ends, and in which CFG branch.

    Torch's own forward hooks and an instance-wrapped `cache_context` are used: both survive
    accelerate's and diffusers' replacing of `forward`.
    """

    def __init__(
        self, model: nn.Module, expert: str, state: RunState, refresh: Callable[[], None]
    ) -> None:
        self._model = weakref.ref(model)
        self._names = [n for n in inspect.signature(type(model).forward).parameters if n != "self"]
        self._expert = expert
        self._state = state
        self._refresh = refresh
        self._number = compiled.number(self)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        self._wraps_context = hasattr(model, "cache_context")
        if self._wraps_context:
            model.cache_context = _Context(model, state)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> RootHook:
        silent = object.__new__(RootHook)
        silent._names = []
        return silent

    def begin(self, bound: Mapping[str, Any]) -> None:
        """Start a forward of the hook's transformer with these arguments."""
        model = self._model()
        assert model is not None
        self._state.begin(self._expert, model, bound)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is not None and self._wraps_context:
            model.__dict__.pop("cache_context", None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._names:
            return
        arguments = [*zip(self._names, args, strict=False), *kwargs.items()]
        if torch.compiler.is_compiling():
            compiled.begin(self._number, arguments)
            return
        self._refresh()
        self.begin(dict(arguments))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._names and not torch.compiler.is_compiling():
            self._state.end()


class _Context(Attached):
    """Stands in for a model's `cache_context`: notes the branch, and does what stock does."""

    def __init__(self, model: nn.Module, state: RunState) -> None:
        self._model = weakref.ref(model)
        self._state = state

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Iterator[None]:
        model: Any = self._model()
        outer, self._state.context = self._state.context, (name, kwargs)
        try:
            with type(model).cache_context(model, name, **kwargs):
                yield
        finally:
            self._state.context = outer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model: Any = self._model()
        return type(model).cache_context.__get__(memo.get(id(model), model))


def _device(bound: Mapping[str, Any]) -> torch.device:
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
