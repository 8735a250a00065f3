"""Who drives a transformer, and the denoising run that a forward of it belongs to.

A run belongs to a caller: a pipeline's call in one thread, or a loop of the user's own. Two callers
may use one transformer at the same time; each has its own schedule, what it keeps, and its counts.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from dit_accel.engine.call import Moment, Row
from dit_accel.engine.run import Run
from dit_accel.hosts.diffusers.attachment import Attachment
from dit_accel.hosts.diffusers.clock import StepClock
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.layout import TokenLayout


class Caller:
    """One caller in one thread.

    Args:
        schedulers: returns the schedulers that may drive it, the likeliest first.
        steps: number of steps where there is no scheduler.
    """

    def __init__(self, schedulers: Callable[[], Sequence[Any]], steps: int | None) -> None:
        self._clock = StepClock(schedulers, steps)
        self._run: Run | None = None
        self._expert = ""
        self._step = -1
        self._strangers = 0
        self._seen: set[tuple[str, str, int]] = set()
        self._several: set[tuple[str, str, int]] = set()
        self._layouts: dict[Any, Any] = {}
        self._places: WeakSet[Attachment] = WeakSet()
        self._size: tuple[Any, Any, torch.device] | None = None
        self._known: Any = None

    def begin(self, attachment: Attachment, owner: Any, bound: Mapping[str, Any]) -> None:
        """A forward of a transformer starts, with these arguments by name."""
        expert, here = attachment.expert, attachment.here
        branch, fields = here.context or ("", {})
        fresh = self._clock.tick(bound.get("timestep"), (expert, branch), fields)
        if fresh or self._run is None or self._run.over:
            self.end()
            self._run = Run(self._clock.steps, attachment.session.fixed_limit)
        elif self._expert != expert:
            self._run.store.forget(expert=self._expert)
        self._expert = expert
        if self._clock.step != self._step:
            self._step = self._clock.step
            self._seen.clear()
        prompt = self._run.prompts.number(bound.get("encoder_hidden_states"), self._step)
        row = Row(branch, prompt, self._window((expert, branch, prompt)))
        layouts = attachment.adapter.layouts(attachment.model, bound, self._layouts)
        for layout in layouts.values():
            if isinstance(layout, TokenLayout):
                attachment.session.policy.admit(layout, kind_for(_device(bound)))
        self._limit(attachment, layouts, bound, branch, fresh=fresh)
        here.moment = Moment(self._run, expert, self._step, self._clock.steps, (row,), layouts)
        attachment.session.runs[owner] = self._run
        if owner is attachment.session:
            owner.here.run = self._run
        self._places.add(attachment)
        self._run.ledger.forward_started(_device(bound))

    def end_forward(self, moment: Moment, *, failed: bool) -> None:
        """The forward that `begin` started is over; where it failed, so is the run."""
        moment.run.ledger.forward_ended()
        first, self._size = (
            self._size,
            None,
        )  # it must not outlive the forward: it holds the session
        if first is not None and not failed:
            session, size, device = first
            moment.run.store.restrict(session.auto.after(size, device))
            _warn(moment.run)
        if failed:
            self.end()
        elif moment.step == moment.steps - 1:
            moment.run.store.forget(expert=moment.expert, rows=moment.rows)

    def end(self) -> None:
        """The run is over: free what it keeps."""
        if self._run is not None:
            self._run.end()
        self._step = -1
        self._seen.clear()
        self._several.clear()
        self._layouts.clear()
        for attachment in self._places:
            attachment.here.moment = None
        self._places.clear()

    def _limit(
        self,
        attachment: Attachment,
        layouts: Mapping[str, Any],
        bound: Mapping[str, Any],
        branch: str,
        *,
        fresh: bool,
    ) -> None:
        """What this forward may keep, and at the first of a run what all will want to keep."""
        assert self._run is not None
        session, hidden = attachment.session, bound.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            return
        size = (attachment.expert, tuple(layouts.items()), tuple(hidden.shape), hidden.dtype)
        if not fresh and size == self._known:
            return
        self._known = size
        if session.settings.cache_limit == "auto":
            self._run.store.restrict(session.auto.before(size, hidden.device))
            self._size = session, size, hidden.device
        config: Any = attachment.model.config
        width = config.num_attention_heads * config.attention_head_dim * hidden.element_size()
        rows = hidden.shape[0] * (2 if branch == "cond" else 1)  # another forward for "uncond"
        wanted = 0
        for site in (bound_site.site for bound_site in attachment.sites):
            layout = layouts.get(site.layout)
            if isinstance(layout, TokenLayout) and session.policy.reuses(site):
                tokens = layout.length if site.kind == "self" else layout.video_length
                wanted += rows * tokens * width
        self._run.estimate = max(self._run.estimate, wanted)
        if self._size is None:
            _warn(self._run)

    def _window(self, whose: tuple[str, str, int]) -> int | None:
        """None where a step has one forward of this expert, branch and prompt; else a number that
        was never before: nothing tells windows and regions apart from step to step."""
        if whose in self._seen:
            self._several.add(whose)
        self._seen.add(whose)
        if whose not in self._several and not self._clock.unsure:
            return None
        self._strangers += 1
        return self._strangers


class _Thread(threading.local):
    """callers: of this thread, by pipeline or session. running: enabled pipelines in their call,
    with the frame that it is made in."""

    def __init__(self) -> None:
        self.callers: WeakKeyDictionary[Any, Caller] = WeakKeyDictionary()
        self.running: list[tuple[Any, FrameType]] = []


_thread = _Thread()
stock: WeakSet[Any] = WeakSet()
"""Pipelines that were disabled while another one keeps their transformer enabled."""


@contextmanager
def running(pipe: Any, frame: FrameType) -> Iterator[None]:
    """A pipeline's call, in this frame: what its run keeps is freed, whatever ends it."""
    _thread.running.append((pipe, frame))
    try:
        yield
    finally:
        _thread.running.pop()
        caller = _thread.callers.get(pipe)
        if caller is not None:
            caller.end()


def begin(attachment: Attachment, bound: Mapping[str, Any]) -> None:
    """A forward of a transformer starts in this thread."""
    owner = _calling_pipeline()
    if owner is not None and owner in stock:
        return
    part = getattr(owner, attachment.expert, None)
    if getattr(part, "_orig_mod", part) is not attachment.model:
        owner = attachment.session
    caller = _thread.callers.get(owner)
    if caller is None:
        caller = _thread.callers[owner] = Caller(*_schedule_of(owner, attachment))
    attachment.here.caller = caller
    caller.begin(attachment, owner, bound)


def end_forward(attachment: Attachment, *, failed: bool) -> None:
    """The forward that runs in this thread is over; failed: by an exception."""
    here = attachment.here
    moment, here.moment = here.moment, None
    if moment is not None:
        here.caller.end_forward(moment, failed=failed)


def _schedule_of(
    owner: Any, attachment: Attachment
) -> tuple[Callable[[], Sequence[Any]], int | None]:
    """Where a caller's schedule is read: a pipeline's own scheduler, or what a loop was given."""
    if owner is attachment.session:
        return owner.schedulers, owner.settings.steps
    pipe = ref(owner)
    return (lambda: [getattr(pipe(), "scheduler", None)]), None


def _calling_pipeline() -> Any:
    """The innermost pipeline whose call has led here, or None.

    It may share its transformer with the one that was enabled, and be called in its callback.
    """
    pipe, outermost = _thread.running[-1] if _thread.running else (None, None)
    frame: FrameType | None = sys._getframe()
    calls: list[FrameType] = []
    while frame is not None and frame is not outermost:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            calls.append(frame)
        frame = frame.f_back
    if outermost is not None:
        calls = calls[:-1]  # the enabled pipeline's own
    for call in calls:
        # Only such a frame is asked for its variables: asking keeps them alive as long as it.
        caller = call.f_locals.get("self")
        if isinstance(caller, (DiffusionPipeline, ModularPipeline)):
            return caller
    return pipe


def _warn(run: Run) -> None:
    limit = run.store.limit
    if limit is not None and run.estimate > limit:
        warnings.warn(
            f"dit_accel: reuse wants to keep about {run.estimate / 2**20:,.1f} MiB, cache_limit "
            f"allows {limit / 2**20:,.1f} MiB: sites that save most for each byte keep theirs.",
            stacklevel=2,
        )


def _device(bound: Mapping[str, Any]) -> torch.device:
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
