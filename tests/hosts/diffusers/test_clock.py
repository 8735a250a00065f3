"""Steps are told from whatever the pipeline offers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.hosts.diffusers.clock import StepClock

CALLER = ("transformer", "cond")
OTHER = ("transformer", "uncond")


def walk(clock: StepClock, calls: list[tuple[Any, tuple[str, str]]]) -> list[tuple[int, bool]]:
    return [(clock_step(clock, t, caller)) for t, caller in calls]


def clock_step(clock: StepClock, timestep: Any, caller: tuple[str, str]) -> tuple[int, bool]:
    fresh = clock.tick(timestep, caller, {})
    return clock.step, fresh


def test_context_fields_win() -> None:
    clock = StepClock(lambda: [SimpleNamespace(timesteps=torch.arange(10), step_index=7)], None)
    clock.tick(5, CALLER, {"step_index": 3, "num_inference_steps": 6})
    assert (clock.step, clock.steps) == (3, 6)


def test_scheduler_index_and_partial_runs() -> None:
    scheduler = SimpleNamespace(timesteps=torch.arange(10), step_index=None, begin_index=4)
    clock = StepClock(lambda: [scheduler], None)
    clock.tick(4, CALLER, {})
    assert (clock.step, clock.steps) == (0, 6)
    scheduler.step_index = 6
    clock.tick(4, CALLER, {})
    assert (clock.step, clock.steps) == (2, 6)


def test_position_of_the_timestep() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([999, 500, 100]))
    clock = StepClock(lambda: [scheduler], None)
    calls = [(torch.tensor([t, t]), c) for t in (999, 500, 100) for c in (CALLER, OTHER)]
    assert [s for s, _ in walk(clock, calls)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_changes_of_unknown_timesteps(scale: float) -> None:
    clock = StepClock(lambda: [], 3)
    calls = [(t * scale, c) for t in (900, 500, 100) for c in (CALLER, OTHER)]
    assert (
        walk(clock, calls * 2)
        == [
            (0, True),
            (0, False),
            (1, False),
            (1, False),
            (2, False),
            (2, False),
        ]
        * 2
    )


def test_repeated_timesteps_count_when_the_caller_recurs() -> None:
    clock = StepClock(lambda: [], 4)
    calls = [(900, CALLER), (500, CALLER), (500, CALLER), (100, CALLER)]
    assert [s for s, _ in walk(clock, calls)] == [0, 1, 2, 3]


def test_coming_back_to_the_first_timestep_is_a_new_run() -> None:
    clock = StepClock(lambda: [], 4)
    assert walk(clock, [(900, CALLER), (900, CALLER)]) == [(0, True), (0, True)]
    scheduler = SimpleNamespace(timesteps=torch.tensor([900, 500, 100]))
    clock = StepClock(lambda: [scheduler], None)
    calls = [(900, CALLER), (500, CALLER), (900, CALLER)]
    assert walk(clock, calls) == [(0, True), (1, False), (0, True)]


def test_a_loop_that_never_steps_the_scheduler() -> None:
    scheduler = SimpleNamespace(timesteps=torch.tensor([900, 500, 100]), step_index=None)
    clock = StepClock(lambda: [scheduler], None)
    assert [s for s, _ in walk(clock, [(t / 1e3, CALLER) for t in (900, 500, 100)])] == [0, 1, 2]


def test_runs_from_a_noised_input_use_the_tail() -> None:
    scheduler = SimpleNamespace(timesteps=torch.arange(10).flip(0) * 100)
    clock = StepClock(lambda: [scheduler], None)
    assert [s for s, _ in walk(clock, [(t, CALLER) for t in (400, 300)])] == [0, 1]
    assert clock.steps == 5


def test_of_several_schedulers_the_one_that_has_the_timestep() -> None:
    other = SimpleNamespace(timesteps=torch.arange(1000).flip(0))
    mine = SimpleNamespace(timesteps=torch.tensor([900.5, 500.5]))
    clock = StepClock(lambda: [other, mine], None)
    assert [s for s, _ in walk(clock, [(900.5, CALLER), (500.5, CALLER)])] == [0, 1]
    assert clock.steps == 2


def test_a_new_schedule_begins_a_new_run() -> None:
    scheduler = SimpleNamespace(timesteps=torch.arange(2), step_index=None)
    clock = StepClock(lambda: [scheduler], None)
    assert clock.tick(1, CALLER, {}) is True
    assert clock.tick(1, OTHER, {}) is False
    scheduler.timesteps = torch.arange(2)
    assert clock.tick(1, CALLER, {}) is True


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_real_schedulers_run_from_first_to_last(build: Any, name: str) -> None:
    import diffusers

    tiny = build("cogvideox" if name.startswith("Heun") else "wan")
    tiny.pipe.scheduler = getattr(diffusers, name)()
    tiny.pipe.enable_sparse_attention("dense")
    tiny.run(num_inference_steps=4)
    report = tiny.pipe.sparse_attention_report()
    evaluations = 7 if name.startswith("Heun") else 4
    assert report.steps == evaluations
    assert [row["step"] for row in report.per_step] == list(range(evaluations))
