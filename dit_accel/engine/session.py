"""What is enabled on the transformers of one enable call: shared by every run of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dit_accel.engine.budget import AutoLimit, Limit
from dit_accel.engine.call import Moment, Site
from dit_accel.engine.ledger import Observer
from dit_accel.engine.policy import Decision, Policy
from dit_accel.engine.route import RouteCache


@dataclass(frozen=True)
class Settings:
    """How it was enabled; see `dit_accel.enable`."""

    strict: bool | str = False
    backend: str | None = None
    steps: int | None = None
    cache_limit: Limit = "auto"


@dataclass(eq=False)
class Session:
    """The policy, and what is worked out once for it.

    observers: each is called after every attention call, with an `Observation`.
    warm: variants of kernels that have run, and so are compiled.
    """

    policy: Policy
    settings: Settings
    routes: RouteCache = field(default_factory=RouteCache)
    observers: list[Observer] = field(default_factory=list)
    warm: set[Any] = field(default_factory=set)
    auto: AutoLimit = field(default_factory=AutoLimit)

    @property
    def fixed_limit(self) -> int | None:
        """The bytes that reuse may keep, where they do not depend on free memory; 0 before that."""
        limit = self.settings.cache_limit
        return 0 if limit == "auto" else limit

    def decide(self, site: Site, moment: Moment) -> Decision:
        """What a site does at a moment."""
        return self.policy.decide(site, moment.branch, moment.step, moment.steps)
