"""Which step of how many a transformer's forward belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dit_accel.errors import DitAccelError


class StepClock:
    """Tells step, number of steps, and when a new denoising run begins.

    `unsure` says that the run's forwards cannot be told from those of another window or run, so
    that nothing kept may be served.

    Sources, in order: the fields of diffusers' `CacheContext`, the scheduler's `step_index`, the
    position of the timestep in `scheduler.timesteps`, and the count of changes of the timestep.

    Args:
        schedulers: returns the schedulers that may drive the model now, the likeliest first.
        steps: number of steps where there is no scheduler.
    """

    def __init__(self, schedulers: Callable[[], Sequence[Any]], steps: int | None) -> None:
        self._schedulers = schedulers
        self._fixed = steps
        self._held: Any = next(iter(schedulers()), None)
        self._set: dict[int, Any] = {}
        self._timesteps: Any = None
        self._values: list[float] = []
        self._begin = 0
        self._last: float | None = None
        self._was: float | None = None
        self._seen: set[tuple[str, str]] = set()
        self.step = 0
        self.steps = 0
        self.unsure = False
        self._windows = False  # the first timestep has come again, which Heun's never does

    def tick(self, timestep: Any, caller: tuple[str, str], context: Mapping[str, Any]) -> bool:
        """Move to the forward that starts now; True when it begins a new denoising run.

        Args:
            timestep: what the model got as timestep: a number, a tensor or None.
            caller: (expert, branch); the same one recurring means a new step.
            context: the keyword arguments of `cache_context`.
        """
        scheduler = self._scheduler(timestep)
        timesteps = getattr(scheduler, "timesteps", None)
        fresh = self.steps == 0 or timesteps is not self._timesteps
        certain = fresh
        if fresh:
            self._begin_run(scheduler, timesteps, timestep)
        total = self._total(context)
        step, value = self._known(scheduler, context, timestep), None
        if step is None:
            value = _largest(timestep)  # waits for the device
            step = self._counted(value, caller, fresh, total)
        if step < 0 or step < self.step == self.steps - 1:
            # Another run over the same timesteps, which may begin elsewhere.
            self._begin += step if context.get("step_index") is None else 0
            step, total, fresh = 0, self._total(context), True
        fresh = fresh or step < self.step
        repeats = value is not None and value == self._was and not self._values
        rising = value is None or self._was is None or value > self._was
        if fresh and (certain or rising):
            self.unsure = self._windows = False
        elif repeats and caller[1] != "" and caller in self._seen:
            # A second window of this step, a second evaluation (Heun), or another run that begins
            # with the same timestep: without a scheduler nothing tells them apart.
            self.unsure = True
            fresh = step == 0 == self.step
            self._windows = self._windows or fresh
        if fresh or step != self.step:
            self._seen.clear()
        self._seen.add(caller)
        self._was = value
        self.step, self.steps = min(step, total - 1), total
        return fresh

    def _scheduler(self, timestep: Any) -> Any:
        """The scheduler of this forward: the one whose timesteps were set last.

        It is held, because the pipeline that has it may be gone.
        """
        found = [scheduler for scheduler in self._schedulers() if scheduler is not None]
        if len(found) > 1:
            before, self._set = self._set, {id(s): getattr(s, "timesteps", None) for s in found}
            changed = [s for s in found if self._set[id(s)] is not before.get(id(s))]
            ready = [s for s in changed if getattr(s, "num_inference_steps", None) is not None]
            value = _largest(timestep) if changed else None
            fitting = [s for s in ready or changed if _position(value, _values(s)) is not None]
            found = fitting or ready or changed or [self._held]
        self._held = found[0] if found else self._held
        return self._held

    def _begin_run(self, scheduler: Any, timesteps: Any, timestep: Any) -> None:
        self._timesteps, self._values = timesteps, _values(scheduler)
        begin = getattr(scheduler, "begin_index", None)
        if begin is None and getattr(scheduler, "step_index", None) is None:
            # A run that starts from a noised input uses the tail of the timesteps.
            begin = _place_in(timesteps, timestep)
            if begin is None:
                begin = _first_position(timestep, self._values)
        self._begin = begin or 0

    def _total(self, context: Mapping[str, Any]) -> int:
        total = context.get("num_inference_steps") or self._fixed
        total = int(total or len(self._values) - self._begin)
        if total <= 0:
            raise DitAccelError(
                "the number of denoising steps is not known: pass scheduler= or steps= to "
                "dit_accel.enable, so that a profile's step ranges have a meaning."
            )
        return total

    def _known(self, scheduler: Any, context: Mapping[str, Any], timestep: Any) -> int | None:
        """The step, where it can be told without waiting for the device."""
        if context.get("step_index") is not None:
            return int(context["step_index"])
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = _place_in(self._timesteps, timestep)
        return None if index is None else int(index) - self._begin

    def _counted(
        self, timestep: float | None, caller: tuple[str, str], fresh: bool, total: int
    ) -> int:
        last, self._last = self._last, timestep
        position = _position(timestep, self._values)
        if position is not None:
            return max(position - self._begin, 0) if fresh else position - self._begin
        if fresh:
            return 0
        named = caller[1] != ""
        same = timestep == last and (named or timestep is not None)
        known = not named or caller not in self._seen or self.step == 0
        if same and (known or self._windows):
            return self.step
        rising = timestep is not None and last is not None and timestep > last
        return 0 if rising or self.step + 1 >= total else self.step + 1


def _values(scheduler: Any) -> list[float]:
    timesteps = getattr(scheduler, "timesteps", None)
    return [] if timesteps is None else [float(t) for t in torch.as_tensor(timesteps).tolist()]


def _position(
    timestep: float | None, values: Sequence[float], tolerance: float = 1e-4
) -> int | None:
    """Index of a timestep, given as the scheduler counts it or as a fraction of 1000."""
    if timestep is None:
        return None
    for scale in (1.0, 1e3):
        for index, value in enumerate(values):
            if abs(timestep * scale - value) <= tolerance * max(1.0, abs(value)):
                return index
    return None


def _first_position(timestep: Any, values: Sequence[float]) -> int | None:
    """Index of the timestep that a run begins with; of two equal ones the second, as diffusers'
    schedulers take it. In half precision it may be as coarse as that type."""
    value = _largest(timestep)
    index = _position(value, values)
    if index is not None:
        return index + (values[index + 1 : index + 2] == [values[index]])
    if isinstance(timestep, torch.Tensor) and timestep.is_floating_point():
        return _position(value, values, torch.finfo(timestep.dtype).eps)
    return None


def _place_in(timesteps: Any, timestep: Any) -> int | None:
    """Index of a timestep that is a view of an element of `timesteps`, as loops over them give."""
    if not isinstance(timesteps, torch.Tensor) or not isinstance(timestep, torch.Tensor):
        return None
    same = timestep.dtype == timesteps.dtype and timesteps.is_contiguous() and max(
        timestep.stride(), default=0
    ) == 0  # fmt: skip
    memory = timesteps.untyped_storage().data_ptr()
    if not same or memory == 0 or timestep.untyped_storage().data_ptr() != memory:
        return None
    return int(timestep.storage_offset() - timesteps.storage_offset())


def _largest(timestep: Any) -> float | None:
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max())
    return None if timestep is None else float(timestep)
