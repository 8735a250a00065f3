"""What is enabled on the transformers of one pipeline or loop, under diffusers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dit_accel.engine.run import Run
from dit_accel.engine.session import Session
from dit_accel.report import Report

if TYPE_CHECKING:
    from dit_accel.hosts.diffusers.attachment import Attachment, BoundSite
    from dit_accel.pipelines.adapter import Adapter


class Loops(threading.local):
    """run: the latest run of loops of your own in this thread."""

    run: Run | None = None


@dataclass(eq=False)
class DiffusersSession(Session):
    """What `dit_accel.enable` returns.

    adapter: the models' family. model: the class of the first of them.
    schedulers: of loops that no pipeline runs, the likeliest first.
    attachments: what hangs on each transformer, by its name as a component.
    runs: the latest run of each caller: a pipeline, or this session for loops of your own.
    here: the latest one of this thread's own loops.
    """

    adapter: Adapter = field(kw_only=True)
    model: str = field(kw_only=True)
    schedulers: Callable[[], Sequence[Any]] = field(kw_only=True)
    attachments: dict[str, Attachment] = field(default_factory=dict)
    runs: WeakKeyDictionary[Any, Run] = field(default_factory=WeakKeyDictionary)
    here: Loops = field(default_factory=Loops)

    @property
    def sites(self) -> list[BoundSite]:
        """Every attention site, in the order of the forwards."""
        return [site for each in self.attachments.values() for site in each.sites]

    def run_of(self, owner: Any) -> Run:
        """The last run of a pipeline, or of this session's own loop; an empty one before that."""
        theirs = None if owner is self else self.runs.get(owner)
        found = theirs or self.here.run or self.runs.get(self)
        return found or Run(0, self.fixed_limit)

    def report(self, reset: bool = False) -> Report:
        """The receipt of the last denoising run of a loop of your own; `reset` then forgets it."""
        return self.report_of(self, reset)

    def report_of(self, owner: Any, reset: bool = False) -> Report:
        """The receipt of the last run of a pipeline, or of this session's own loop."""
        run = self.run_of(owner)
        made = run.report(self.policy.profile.name, self.adapter.family, self.model)
        if reset:
            run.end()
            for other in [other for other, its in self.runs.items() if its is run]:
                del self.runs[other]
            if self.here.run is run:
                self.here.run = None
        return made
