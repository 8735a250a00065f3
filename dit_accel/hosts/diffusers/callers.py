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
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from dit_accel.engine.call import Moment, Row
from dit_accel.engine.policy import branch_class
from dit_accel.engine.run import Run
from dit_accel.hosts.diffusers.attachment import Attachment, unwrapped
from dit_accel.hosts.diffusers.clock import StepClock
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.layout import TokenLayout

Whose = tuple[str, Row]
"""An expert, and what tells its forwards of a step apart."""
CONDITIONING = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "encoder_attention_mask",
    "pooled_projections",
)
"""Arguments of a forward that together are its prompt."""
OUTSIDE = (
    "not known outside of the transformer's forward: call the transformer itself, not its "
    "forward() or a part of it"
)


class Caller:
    """One caller in one thread.

    Args:
        schedulers: returns the schedulers that may drive it, the likeliest first.
        steps: number of steps where there is no scheduler.

    Attributes:
        frame: identity of the frame of its call, where nothing but the stack tells that the call
            is over: of a pipeline that is not enabled itself.
    """

    def __init__(self, schedulers: Callable[[], Sequence[Any]], steps: int | None) -> None:
        self._clock = StepClock(schedulers, steps)
        self._run: Run | None = None
        self._expert = ""
        self._step = -1
        self._seen: set[Whose] = set()
        self._before: set[Whose] = set()
        self._several: set[Whose] = set()
        self._layouts: dict[Any, Any] = {}
        self._places: WeakSet[Attachment] = WeakSet()
        self._last = finalize(self, int)
        self.frame: int | None = None
        self._outside: Run | None = None
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
            # The run's counts are held for the report. What it keeps goes with its caller: a
            # thread may end in the middle of a loop.
            self._last.detach()
            self._last = finalize(self, self._run.end)
            self._known = None
        elif self._expert != expert:
            self._run.store.forget(expert=self._expert)
        self._expert = expert
        if self._clock.step != self._step:
            self._step = self._clock.step
            self._before, self._seen = self._seen, set()
            self._run.store.expire(self._step)
        given = [bound[name] for name in CONDITIONING if bound.get(name) is not None]
        row = Row(branch, self._run.prompts.number(given, self._step))
        recurs = self._recurs((expert, row))
        layouts = attachment.adapter.layouts(attachment.model, bound, self._layouts)
        for layout in layouts.values():
            if isinstance(layout, TokenLayout):
                attachment.session.policy.admit(layout, kind_for(_device(bound)))
        self._limit(attachment, layouts, bound, branch)
        here.moment = Moment(
            self._run, expert, self._step, self._clock.steps, (row,), layouts, recurs
        )
        _publish(self._run, attachment, owner)
        self._places.add(attachment)
        self._run.ledger.forward_started(_device(bound))

    def outside(self, attachment: Attachment, owner: Any) -> Moment:
        """The moment of attention that is called outside of a forward that `begin` knows.

        Neither step nor tokens are known. It counts in the run that goes on, else in one of its
        own.
        """
        run = self._run
        if run is None or run.over:
            if self._outside is None or self._outside.over:
                self._outside = Run(1, attachment.session.fixed_limit)
            run = self._outside
            _publish(run, attachment, owner)
        steps = max(run.steps, 1)
        layouts = {bound.site.layout: OUTSIDE for bound in attachment.sites}
        return Moment(run, attachment.expert, max(self._step, 0), steps, (Row(""),), layouts)

    def end_forward(self, moment: Moment, *, failed: bool) -> None:
        """The forward that `begin` started is over; where it failed, so is the run."""
        moment.run.ledger.forward_ended()
        # It holds the session, and must not outlive the forward.
        first, self._size = self._size, None
        if first is not None and not failed:
            session, size, device = first
            moment.run.store.restrict(session.auto.after(size, device))
            _warn(moment.run)
        if failed:
            self.end()
        elif moment.step == moment.steps - 1:
            if self._before <= self._seen:  # whatever came in the step before has come again
                moment.run.store.forget()
            else:
                moment.run.store.forget(expert=moment.expert, rows=moment.rows)

    def end(self) -> None:
        """The run is over: free what it keeps."""
        if self._run is not None:
            self._run.end()
        self._outside = None
        self._step = -1
        self._seen.clear()
        self._before.clear()
        self._several.clear()
        self._layouts.clear()
        for attachment in self._places:
            attachment.here.moment, attachment.here.inside = None, False
        self._places.clear()

    def _limit(
        self,
        attachment: Attachment,
        layouts: Mapping[str, Any],
        bound: Mapping[str, Any],
        branch: str,
    ) -> None:
        """What this forward may keep, and at the first of a run what all will want to keep."""
        assert self._run is not None
        session, hidden = attachment.session, bound.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            return
        size = (attachment.expert, tuple(layouts.items()), tuple(hidden.shape), hidden.dtype)
        if size == self._known:
            return
        self._known = size
        if session.settings.cache_limit == "auto":
            self._run.store.restrict(session.auto.before(size, hidden.device))
            self._size = session, size, hidden.device
        config: Any = attachment.model.config
        width = config.num_attention_heads * config.attention_head_dim * hidden.element_size()
        # Another forward for the other branch.
        rows = hidden.shape[0] * (1 if branch_class(branch) == "any" else 2)
        wanted = 0
        for site in (bound_site.site for bound_site in attachment.sites):
            layout = layouts.get(site.layout)
            if isinstance(layout, TokenLayout) and session.policy.reuses(site):
                tokens = layout.length if site.kind == "self" else layout.video_length
                wanted += rows * tokens * width
        self._run.estimate = max(self._run.estimate, wanted)
        if self._size is None:
            _warn(self._run)

    def _recurs(self, whose: Whose) -> bool:
        """Whether a step has one forward of this expert, branch and prompt: nothing tells several,
        windows and regions, apart from step to step."""
        if whose in self._seen and whose not in self._several:
            self._several.add(whose)
            assert self._run is not None
            self._run.store.forget(expert=whose[0], rows=(whose[1],))
        self._seen.add(whose)
        return whose not in self._several and not self._clock.unsure


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
    pipe, frame, stack = _calling_pipeline()
    for whose, other in list(_thread.callers.items()):
        # Another frame may lie where one was that is over.
        over = other.frame not in stack or (other.frame == frame and whose is not pipe)
        if other.frame is not None and over:
            other.end()
            other.frame = None
    owner = _owner(attachment, pipe)
    attachment.here.inside = True
    if owner is None:
        return
    attachment.here.caller = caller = _caller(owner, attachment)
    caller.frame = frame if owner is pipe else None
    caller.begin(attachment, owner, bound)
    attachment.here.inside = True  # a run that has ended for this one has cleared it


def end_forward(attachment: Attachment, *, failed: bool) -> None:
    """The forward that runs in this thread is over; failed: by an exception."""
    here = attachment.here
    moment, here.moment, here.inside = here.moment, None, False
    if moment is not None:
        here.caller.end_forward(moment, failed=failed)


def end_attention(attachment: Attachment, *, failed: bool) -> None:
    """The last attention of a compiled forward is over, whose own end is not seen; or one failed.

    The moment stays: the last module may make another call.
    """
    here = attachment.here
    if here.moment is not None:
        here.caller.end_forward(here.moment, failed=failed)


def moment_of(attachment: Attachment) -> Moment | None:
    """Where a transformer stands in this thread as its attention is called; None where it is to
    be stock."""
    here = attachment.here
    if here.moment is not None or here.inside:
        return here.moment
    owner = _owner(attachment, _calling_pipeline()[0])
    return None if owner is None else _caller(owner, attachment).outside(attachment, owner)


def _owner(attachment: Attachment, pipe: Any) -> Any:
    """Whose run a forward of a transformer belongs to: the pipeline whose call has led here, or the
    session for a loop of your own; None where it is to be stock."""
    if pipe is None:
        return attachment.session
    if pipe in stock:
        return None
    model = attachment.model
    if any(each is model for each in unwrapped(getattr(pipe, attachment.expert, None))):
        return pipe
    # It may have another name there.
    held = (each for part in pipe.components.values() for each in unwrapped(part))
    return pipe if any(each is model for each in held) else attachment.session


def _caller(owner: Any, attachment: Attachment) -> Caller:
    caller = _thread.callers.get(owner)
    if caller is None:
        caller = _thread.callers[owner] = Caller(*_schedule_of(owner, attachment))
    return caller


def _publish(run: Run, attachment: Attachment, owner: Any) -> None:
    """Let reports find a run."""
    attachment.session.runs[owner] = run
    if owner is attachment.session:
        owner.here.run = run


def _schedule_of(
    owner: Any, attachment: Attachment
) -> tuple[Callable[[], Sequence[Any]], int | None]:
    """Where a caller's schedule is read: a pipeline's own scheduler, or what a loop was given."""
    if owner is attachment.session:
        return owner.schedulers, owner.settings.steps
    pipe = ref(owner)
    return (lambda: [getattr(pipe(), "scheduler", None)]), None


def _calling_pipeline() -> tuple[Any, int | None, set[int]]:
    """The innermost pipeline whose call has led here, or None; its frame, where it is not enabled;
    and the frames of all calls but those of enabled ones.

    It may share its transformer with the one that was enabled, and be called in its callback.
    """
    frames: dict[int, FrameType] = {}
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            frames[id(frame)] = frame
        frame = frame.f_back
    inner, pipes = list(frames), set(frames)
    for _, enabled in reversed(_thread.running):
        # In its own frame the enabled pipeline calls the stock one, which is next to it.
        place = list(frames).index(id(enabled))
        pipes -= {*list(frames)[max(place - 1, 0) : place + 1]}
    pipe, outermost = _thread.running[-1] if _thread.running else (None, None)
    if outermost is not None:
        inner = inner[: max(inner.index(id(outermost)) - 1, 0)]
    for each in inner:
        # Only such a frame is asked for its variables: asking keeps them alive as long as it.
        caller = frames[each].f_locals.get("self")
        if isinstance(caller, (DiffusionPipeline, ModularPipeline)):
            return caller, each, pipes
    return pipe, None, pipes


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
