"""Constants of a cost table from measured calls: non-negative least squares of relative errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_accel.kernels.plan import BlockPlan
from dit_accel.planner.costs import FULL_BLOCK, Constants, area_of, busiest, list_visits

ROUNDS = 3
"""The busiest program depends a little on the constants: each round takes the last ones."""
SHORT = 1.2
"""Price of a visit under a length mask, over a whole one, where it was not measured."""
SEEN = 0.05
"""Part of a sample's visits from which on their price shows in its time."""


@dataclass(frozen=True)
class Sample:
    """A measured call: its plan, batch, heads and milliseconds; a dense call has no plan."""

    ms: float
    batch: int
    heads: int
    length: int
    plan: BlockPlan | None = None


def fit(
    samples: Sequence[Sample], programs: int, given: Mapping[str, float] | None = None
) -> Constants:
    """The constants that tell the samples' times best, each to the same relative error.

    given: constants that are known already, from another kernel of the backend.
    Kinds of visits that are a small part of every sample cannot be told from the others: they are
    taken for whole ones. Then a masked visit costs what the dearest other one does, and a length
    mask what it usually does. Rules that a plan's token mask names get a `partial` of their own.
    """
    rules = sorted({name for sample in samples if (name := _rule(sample))})
    columns = ["launch", "row", "whole", "short", *rules]
    found = np.ones(len(columns))
    times = np.array([sample.ms * 1e6 for sample in samples])
    for _ in range(ROUNDS):
        features = np.stack([_features(s, rules, found, programs) for s in samples])
        visits = features[:, 2:]
        part = (visits / visits.sum(1, keepdims=True)).max(0)
        for column in np.flatnonzero(part < SEEN).tolist():
            visits[:, 0] += visits[:, column] * (column > 0)
            visits[:, column] *= column == 0
        target = np.ones(len(samples))
        for name, value in (given or {}).items():
            place = columns.index(name)
            target -= value * features[:, place] / times
            features[:, place] = 0
        found = _non_negative(features / times[:, None], target)
    known = dict(zip(columns, found.tolist(), strict=True))
    seen = dict(zip(columns, (features > 0).sum(0).tolist(), strict=True))
    dearest = max(known[name] for name in columns[2:] if seen[name])
    short = known["short"] if seen["short"] else SHORT * known["whole"]
    masks = {rule: known[rule] for rule in rules if seen[rule]}
    partial = max(masks.values(), default=max(dearest, short))
    known |= given or {}
    return Constants(known["launch"], known["row"], known["whole"], short, partial, masks)


def _rule(sample: Sample) -> str:
    mask = None if sample.plan is None else sample.plan.token_mask
    return "" if mask is None else mask.label


def _features(sample: Sample, rules: Sequence[str], known: np.ndarray, programs: int) -> np.ndarray:
    """What each constant is multiplied by: 1, then rows and visits of the busiest program."""
    if sample.plan is None:
        blocks = sample.length / FULL_BLOCK
        rows = sample.batch * sample.heads * blocks / programs
        visits = (0.0, rows * blocks) if sample.length % FULL_BLOCK else (rows * blocks, 0.0)
        return np.array([1.0, rows, *visits, *(0.0 for _ in rules)])
    plan = sample.plan
    area = area_of(plan)
    whole, short, partial = (area * visits for visits in list_visits(plan))
    masks = [partial * (rule == _rule(sample)) for rule in rules]
    row = np.full_like(whole, plan.block_q / FULL_BLOCK)
    parts = [row, whole, short, *masks]
    shared = (sample.batch // whole.shape[0]) * (sample.heads // whole.shape[1])
    work = sum(price * part for price, part in zip(known[1:], parts, strict=True))
    items = np.tile(np.ravel(work), shared)
    # The busiest program has this many times the mean.
    share = busiest(items, programs) / max(items.sum(), 1e-9)
    return np.array([1.0, *(share * shared * part.sum() for part in parts)])


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
