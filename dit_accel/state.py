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


@dataclass
class Site:
    """One attention module under our seam."""

    key: SiteKey
    module: nn.Module
    state: RunState
    masks: str = "none"
    original: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return self


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


class StepClock:
    """Which step of how many a forward belongs to.

    Sources, in order: the fields of diffusers' `CacheContext`, the scheduler's `step_index`, the
    position of the timestep in `scheduler.timesteps`, and the count of changes of the timestep.
    """

    def __init__(self, scheduler: Callable[[], Any], steps: int | None) -> None:
        self._scheduler = scheduler
        self._fixed = steps
        self._timesteps: Any = None
        self._values: list[float] = []
        self._last: float | None = None
        self._seen: set[tuple[str, str]] = set()
        self.step = 0
        self.steps = 0

    def tick(self, timestep: Any, caller: tuple[str, str], context: Mapping[str, Any]) -> bool:
        """Move to the forward that starts now; True when it begins a new denoising run.

        Args:
            timestep: what the model got as timestep: a number, a tensor or None.
            caller: (expert, branch); the same one recurring means a new step.
            context: the keyword arguments of `cache_context`.
        """
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        fresh = timesteps is not self._timesteps or self.steps == 0
        if fresh and timesteps is not None:
            self._timesteps = timesteps
            self._values = [float(t) for t in torch.as_tensor(timesteps).tolist()]
        begin = getattr(scheduler, "begin_index", None) or 0
        total = context.get("num_inference_steps") or self._fixed or len(self._values) - begin
        if total <= 0:
            raise DitAccelError(
                "the number of denoising steps is not known: pass scheduler= or steps= to "
                "dit_accel.enable, so that a profile's step ranges have a meaning."
            )
        step = self._known(scheduler, context, begin)
        if step is None:
            step = self._counted(_largest(timestep), caller, fresh, total)
        if timesteps is None and not fresh:
            fresh = step < self.step or (step == 0 == self.step and caller in self._seen)
        if fresh or step != self.step:
            self._seen.clear()
        self._seen.add(caller)
        self.step, self.steps = min(step, total - 1), total
        return fresh

    def _known(self, scheduler: Any, context: Mapping[str, Any], begin: int) -> int | None:
        if context.get("step_index") is not None:
            return int(context["step_index"])
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            return 0 if index is None else max(int(index) - begin, 0)
        return None

    def _counted(
        self, timestep: float | None, caller: tuple[str, str], fresh: bool, total: int
    ) -> int:
        last, self._last = self._last, timestep
        if timestep in self._values:
            return self._values.index(timestep)
        if fresh:
            return 0
        if timestep == last and caller not in self._seen:
            return self.step
        rising = timestep is not None and last is not None and timestep > last
        return 0 if rising or self.step + 1 >= total else self.step + 1


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
    context: tuple[str, Mapping[str, Any]] | None = None
    warm: set[Any] = field(default_factory=set)
    _calls: dict[tuple[str, int], int] = field(default_factory=dict)
    _layouts: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> RunState:
        return self

    def begin(self, expert: str, model: nn.Module, bound: Mapping[str, Any]) -> None:
        """Start a transformer forward; `bound` holds its arguments by name."""
        if self.context is not None:
            branch, fields = self.context
        else:
            branch, fields = "", {}
        fresh = self.clock.tick(bound.get("timestep"), (expert, branch), fields)
        if fresh:
            self.cache.reset()
            self.recorder.start(self.clock.steps)
            self._calls.clear()
        step = self.clock.step
        if not branch:
            order = self._calls.get((expert, step), 0)
            self._calls = {(expert, step): order + 1}
            branch = f"call{order}"
        layout, why = self.adapter.layout(model, bound, self._layouts)
        self.forward = Forward(expert, branch, step, self.clock.steps, layout, why)
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


class RootHook:
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
            stock: Any = model.cache_context
            model.cache_context = self._wrap(stock)  # type: ignore[assignment]

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
        arguments = [*zip(self._names, args, strict=False), *kwargs.items()]
        if torch.compiler.is_compiling():
            compiled.begin(self._number, arguments)
            return
        self._refresh()
        self.begin(dict(arguments))

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._state.end()

    def _wrap(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        state = self._state

        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            outer, state.context = state.context, (name, kwargs)
            try:
                with stock(name, **kwargs):
                    yield
            finally:
                state.context = outer

        return cache_context


def _largest(timestep: Any) -> float | None:
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max())
    return None if timestep is None else float(timestep)


def _device(bound: Mapping[str, Any]) -> torch.device:
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
