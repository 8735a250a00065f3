"""Who drives a transformer, and the denoising run that a forward of it belongs to.

A run belongs to a caller: a pipeline's call in one thread, or a loop of the user's own. Two callers
may use one transformer at the same time; each has its own schedule, what it keeps, and its counts.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from dit_accel.engine.call import Moment, Row, tensors_of
from dit_accel.engine.run import Run
from dit_accel.hosts.diffusers.attachment import Attachment
from dit_accel.hosts.diffusers.clock import StepClock


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
        self._orders: Counter[tuple[str, str]] = Counter()
        self._prompts: dict[Any, tuple[int, Any]] = {}
        self._layouts: dict[Any, Any] = {}
        self._places: WeakSet[Attachment] = WeakSet()

    def begin(self, attachment: Attachment, owner: Any, bound: Mapping[str, Any]) -> None:
        """A forward of a transformer starts, with these arguments by name."""
        expert, here = attachment.expert, attachment.here
        branch, fields = here.context or ("", {})
        fresh = self._clock.tick(bound.get("timestep"), (expert, branch), fields)
        if fresh or self._run is None or self._run.over:
            self.end()
            self._run = Run(self._clock.steps, attachment.session.settings.cache_limit)
        elif self._expert != expert:
            self._run.store.forget(expert=self._expert)
        self._expert = expert
        if self._clock.step != self._step:
            self._step = self._clock.step
            self._orders.clear()
        order = self._orders[expert, branch]
        self._orders[expert, branch] += 1
        if self._clock.unsure:  # a row that has never been
            self._strangers += 1
            order = -self._strangers
        row = Row(branch, order, self._prompt(bound.get("encoder_hidden_states")))
        layouts = attachment.adapter.layouts(attachment.model, bound, self._layouts)
        here.moment = Moment(self._run, expert, self._step, self._clock.steps, (row,), layouts)
        attachment.session.runs[owner] = self._run
        self._places.add(attachment)
        self._run.ledger.forward_started(_device(bound))

    def end_forward(self, moment: Moment, *, failed: bool) -> None:
        """The forward that `begin` started is over; where it failed, so is the run."""
        moment.run.ledger.forward_ended()
        if failed:
            self.end()
        elif moment.step == moment.steps - 1:
            moment.run.store.forget(expert=moment.expert, rows=moment.rows)

    def end(self) -> None:
        """The run is over: free what it keeps."""
        if self._run is not None:
            self._run.end()
        self._step = -1
        self._orders.clear()
        self._prompts.clear()
        self._layouts.clear()
        for attachment in self._places:
            attachment.here.moment = None
        self._places.clear()

    def _prompt(self, conditioning: Any) -> int:
        """A number for the conditioning: another one where it is another tensor, or was written to.

        The tensors are held, so that their memory is not another prompt's within the run.
        """
        tensors = tensors_of(conditioning)
        key = tuple((x.data_ptr(), x.shape, x.dtype, _version(x)) for x in tensors)
        return self._prompts.setdefault(key, (len(self._prompts), tensors))[0]


class _Thread(threading.local):
    """callers: of this thread, by pipeline or session. running: enabled pipelines in their call."""

    def __init__(self) -> None:
        self.callers: WeakKeyDictionary[Any, Caller] = WeakKeyDictionary()
        self.running: list[Any] = []


_thread = _Thread()


@contextmanager
def running(pipe: Any) -> Iterator[None]:
    """A pipeline's call: what its run keeps is freed at the end, whatever ends it."""
    _thread.running.append(pipe)
    try:
        yield
    finally:
        _thread.running.pop()
        caller = _thread.callers.get(pipe)
        if caller is not None:
            caller.end()


def begin(attachment: Attachment, bound: Mapping[str, Any]) -> None:
    """A forward of a transformer starts in this thread."""
    owner = _thread.running[-1] if _thread.running else _calling_pipeline()
    if owner is None:
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
    """The pipeline whose call has led here, where that one was not enabled itself.

    It may share its transformer with one that was: then its own scheduler tells the step.
    """
    frame = sys._getframe()
    while frame is not None:
        # Only a pipeline's own frame is asked for its variables: asking keeps them alive with it.
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            caller = frame.f_locals["self"]
            if isinstance(caller, (DiffusionPipeline, ModularPipeline)):
                return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _version(x: torch.Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def _device(bound: Mapping[str, Any]) -> torch.device:
    for value in bound.values():
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
