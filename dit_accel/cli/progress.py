"""A progress bar over denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dit_accel.cli.console import err

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def steps_bar(**options: Any) -> Progress:
    """A bar over steps on stderr, with the time left."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, **options)


@contextmanager
def denoising_bar(steps: int, title: str = "Denoising") -> Iterator[StepCallback]:
    """Show a bar on stderr; yields the `callback_on_step_end` of diffusers that moves it.

    A scheduler that evaluates more than once a step (Heun) lengthens the bar to what it runs.
    """
    with steps_bar() as bar:
        task = bar.add_task(title, total=steps)

        def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            total = getattr(pipe, "num_timesteps", None) or steps
            bar.update(task, completed=step + 1, total=total)
            if step + 1 == total:
                bar.update(task, description="Decoding")
            return tensors

        yield on_step
        bar.update(task, description=title)
