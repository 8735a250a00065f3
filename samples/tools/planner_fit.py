"""Constants of a cost table from measured calls: non-negative least squares of relative errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_accel.costs.clock import STEADY
from dit_accel.costs.table import FULL_BLOCK, PARTS, Constants
from dit_accel.kernels.plan import BlockPlan
from dit_accel.planner.work import Work, work_of

ROUNDS = 5
"""The busiest program depends a little on the constants: each round takes the last ones."""
SHORT = 1.2
"""Price of a visit under a length mask, over a whole one, where it was not measured."""
SEEN = 0.05
"""Part of a sample's visits from which on their price shows in its time."""


@dataclass(frozen=True)
class Sample:
    """A measured call: milliseconds, sizes, plan and backend; a dense call has none of these.

    mhz: the clock that it ran at; cycles are nanoseconds where nobody watched.
    """

    ms: float
    batch: int
    heads: int
    length: int
    plan: BlockPlan | None = None
    backend: str = ""
    mhz: float = STEADY.busy

    @property
    def cycles(self) -> float:
        return self.ms * self.mhz * 1e3

    @property
    def rule(self) -> str:
        """The label of the plan's token rule, "" where it has none."""
        return "+".join(self.rules)

    @property
    def rules(self) -> list[str]:
        """Names of the plan's token rules."""
        return [] if self.plan is None else list(self.plan.shape.rules)

    def work(self, programs: int) -> Work:
        """Its items; a dense call is dealt evenly, its blocks cut anywhere."""
        if self.plan is not None:
            return work_of(self.plan, self.backend, self.batch, self.heads, programs)
        blocks = self.length / FULL_BLOCK
        visits = (0.0, blocks) if self.length % FULL_BLOCK else (blocks, 0.0)
        each = np.array([[1.0, *visits, 0.0]]) * self.batch * self.heads * blocks / programs
        return Work(each, 1, float(each[:, 1:].sum()), np.zeros(1, int))


def fit(
    samples: Sequence[Sample], programs: int, given: Mapping[str, float] | None = None
) -> Constants:
    """The constants that tell the samples' cycles best, each to the same relative error.

    given: constants that are known already, from another kernel of the backend.
    Kinds of visits that are a small part of every sample cannot be told from the others: they are
    taken for whole ones. Then a masked visit costs what the dearest other one does, and a length
    mask what it usually does. Rules that a plan's token mask names get a `partial` of their own.
    """
    rules = sorted({sample.rule for sample in samples} - {""})
    columns = ["launch", *PARTS[:-1], *rules]
    found = np.ones(len(columns))
    spent = np.array([sample.cycles for sample in samples])
    works = [sample.work(programs) for sample in samples]
    for _ in range(ROUNDS):
        features = np.zeros((len(samples), len(columns)))
        for line, sample, work in zip(features, samples, works, strict=True):
            own = columns.index(sample.rule) if sample.rule else 0
            parts = work.busiest(np.append(found[1:4], found[own]), programs)
            line[:4] = 1.0, *parts[:3]
            if own:
                line[own] = parts[3]
        visits = features[:, 2:]
        part = (visits / visits.sum(1, keepdims=True)).max(0)
        for column in np.flatnonzero(part < SEEN).tolist():
            visits[:, 0] += visits[:, column] * (column > 0)
            visits[:, column] *= column == 0
        target = np.ones(len(samples))
        for name, value in (given or {}).items():
            place = columns.index(name)
            target -= value * features[:, place] / spent
            features[:, place] = 0
        found = _non_negative(features / spent[:, None], target)
        for name, value in (given or {}).items():
            found[columns.index(name)] = value
    known = dict(zip(columns, found.tolist(), strict=True))
    seen = dict(zip(columns, (features > 0).sum(0).tolist(), strict=True))
    dearest = max(known[name] for name in columns[2:] if seen[name])
    short = known["short"] if seen["short"] else SHORT * known["whole"]
    masks = {rule: known[rule] for rule in rules if seen[rule]}
    partial = max(masks.values(), default=max(dearest, short))
    known |= given or {}
    return Constants(known["launch"], known["row"], known["whole"], short, partial, masks)


def errors(samples: Sequence[Sample], known: Constants, programs: int) -> list[float]:
    """Relative errors of what constants tell of the samples' cycles."""
    found = []
    for sample in samples:
        prices = known.prices(sample.rules)
        spent = known.launch + prices @ sample.work(programs).busiest(prices, programs)
        found.append(float(spent) / sample.cycles - 1)
    return found


def _non_negative(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin |features x - target| over x >= 0: unknowns that come out negative are dropped."""
    scale = np.linalg.norm(features, axis=0)
    active = np.flatnonzero(scale)
    found = np.zeros(features.shape[1])
    while len(active):
        some = np.linalg.lstsq(features[:, active] / scale[active], target, rcond=None)[0]
        if some.min() >= 0:
            found[active] = some / scale[active]
            break
        active = np.delete(active, some.argmin())
    return found
