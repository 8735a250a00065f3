"""One denoising run of one caller: everything that must not cross into another."""

from __future__ import annotations

from dit_accel.engine.ledger import Ledger
from dit_accel.engine.store import Store
from dit_accel.report import Report


class Run:
    """What a run keeps between calls, and what it has done so far.

    Two pipelines, threads or requests that use one transformer have a run each. The counts outlive
    the run, for the report; what is kept does not.
    """

    def __init__(self, steps: int, cache_limit: int | None = None) -> None:
        self.store = Store(cache_limit)
        self.ledger = Ledger(steps)
        self.over = False

    @property
    def steps(self) -> int:
        """Denoising steps of the run."""
        return self.ledger.steps

    def end(self) -> None:
        """Free what is kept, whatever ended the run; no forward belongs to it any more."""
        self.over = True
        self.store.forget()

    def report(self, profile: str, family: str, model: str) -> Report:
        """The receipt of the run so far, for a profile and a model of these names."""
        cache = {
            "peak_bytes": self.store.peak,
            "limit_bytes": self.store.limit,
            "refused": self.store.refused,
        }
        return self.ledger.report(profile, family, model, cache)
