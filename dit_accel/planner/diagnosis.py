"""Why a profile is not faster on a model here: shares of a run, and what each part can gain."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.costs.files import no_table
from dit_accel.costs.table import cost_table
from dit_accel.engine.call import Site
from dit_accel.engine.policy import Policy
from dit_accel.engine.profile import Profile, load_profile
from dit_accel.errors import DitAccelError
from dit_accel.kernels.compute import Compute
from dit_accel.pipelines.registry import adapter_of
from dit_accel.planner.forecast import Forecast, breakeven_text, other_ms, plan
from dit_accel.planner.models import Subject, subject

STEPS = 50
WORTH = 0.03
"""Shares of a run below this are not worth a line."""


@dataclass(frozen=True)
class Diagnosis:
    """What a profile does to a run, predicted.

    shares: part of the run's self-attention calls for each pattern, None for dense ones.
    attention: share of self-attention in a dense step: of time where a table tells, else of
    floating-point operations. run: predicted speed-up of the run, None without a table.
    """

    subject: Subject
    profile: str
    steps: int
    shares: dict[Compute | None, float]
    forecasts: dict[Compute, Forecast]
    attention: float
    measured: bool
    run: float | None

    @property
    def limit(self) -> float:
        """Speed-up of the run if its self-attention took no time."""
        return math.inf if self.attention >= 1 else 1 / (1 - self.attention)

    def rows(self) -> list[tuple[str, str]]:
        """Names and sentences for a table."""
        what = "time" if self.measured else "floating-point operations (no table of this GPU)"
        tokens = self.subject.layout.length
        found = [
            ("model", f"{self.subject.name}, {self.subject.size}: {tokens:,} tokens a call"),
            (
                "limit",
                f"self-attention is {self.attention:.0%} of a dense step's {what}: without it, a "
                f"run would be {self.limit:.2f}x as fast",
            ),
        ]
        dense = self.shares.get(None, 0.0)
        if dense >= WORTH:
            found.append(
                ("kept dense", f"profile {self.profile!r} keeps {dense:.0%} of the calls dense")
            )
        told = [note for cast in self.forecasts.values() for note in cast.notes]
        found += [("note", note) for note in dict.fromkeys([*self.subject.notes, *told])]
        for pattern, share in self.shares.items():
            if pattern is not None:
                found.append((pattern.name, f"{share:.0%} of the calls: {_line(self, pattern)}"))
                found.append(("break-even", breakeven_text(self.forecasts[pattern])))
        if self.run is not None:
            found.append(("predicted", f"{self.run:.2f}x for a run of {self.steps} steps"))
        found.append(("advice", _advice(self)))
        return found


def diagnose(
    model: str,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    profile: str | Path | Profile = "auto",
    *,
    gpu: str | None = None,
    steps: int = STEPS,
) -> Diagnosis:
    """What a profile would do to a run of a model; arguments as for `plan`.

    Raises:
        DitAccelError: an unknown name or a wrong value, with the nearest.
    """
    if gpu is not None and cost_table(gpu) is None:
        raise no_table(gpu)
    what = subject(model, height, width, frames)
    family = what.family if adapter_of(what.family) else None
    chosen = load_profile(profile, family)
    shares = _shares(what, chosen, steps)
    forecasts = {
        pattern: plan(what, pattern=pattern, gpu=gpu) for pattern in shares if pattern is not None
    }
    table = cost_table(gpu)
    run = None
    if table is not None:
        dense = table.dense_ms(1, what.heads, what.layout.length, what.head_dim)
        calls = what.layers * what.forwards * dense
        other = other_ms(table, what)
        attention = calls / (calls + other)
        gain = sum(
            share * min(1.0, (cast.sparse_ms or dense) / dense)
            for pattern, share in shares.items()
            for cast in ([forecasts[pattern]] if pattern is not None else [])
        )
        run = (calls + other) / (other + calls * (gain + shares.get(None, 0.0)))
    else:
        flops = what.layers * what.attention_flops
        attention = flops / (flops + 2 * what.token_weights * what.layout.length)
    return Diagnosis(what, chosen.name, steps, shares, forecasts, attention, table is not None, run)


def _shares(what: Subject, profile: Profile, steps: int) -> dict[Compute | None, float]:
    """Part of the self-attention calls of a run that each pattern serves; None is dense."""
    adapter = adapter_of(what.family)
    block, name = "blocks", "attn1"
    if adapter is not None:
        site = next(site for site in adapter.sites if site.kind == "self")
        block, name = site.blocks, site.attention
    sites = [
        Site(f"{block}.{layer}.{name}", layer, what.layers, "self") for layer in range(what.layers)
    ]
    policy = Policy(profile, sites)
    branches = ("cond", "uncond")[: what.forwards]
    counts: Counter[Any] = Counter(
        policy.decide(site, branch, step, steps).compute
        for site in sites
        for branch in branches
        for step in range(steps)
    )
    total = sum(counts.values())
    if not total:
        raise DitAccelError(f"steps: expected a whole number >= 1, got {steps}.")
    return {pattern: count / total for pattern, count in counts.most_common()}


def _line(seen: Diagnosis, pattern: Compute) -> str:
    cast = seen.forecasts[pattern]
    return f"launched {cast.launched:.0%}, waste {cast.waste - 1:.0%}; {cast.verdict}"


def _advice(seen: Diagnosis) -> str:
    """What holds the run back most."""
    sparse = [p for p in seen.shares if p is not None]
    if not sparse:
        return f"profile {seen.profile!r} runs no pattern: choose another one."
    if not any(seen.forecasts[p].gpu for p in sparse):
        return "there is no GPU here and none was named: --gpu tells what to expect of one."
    losing = [p for p in sparse if (seen.forecasts[p].speedup or math.inf) <= 1]
    if losing and len(losing) == len(sparse):
        return (
            "at this size dense attention is as fast: make the window narrower, or the picture "
            "larger; break-even keeps such calls dense."
        )
    if seen.attention < 0.4:
        return (
            "most of a step is not attention: the more pixels and frames, the more sparse "
            "attention gains."
        )
    if seen.shares.get(None, 0.0) > 0.35:
        return "much of the run is kept dense: let `steps` begin earlier, or fewer layers be dense."
    wasteful = [p.name for p in sparse if seen.forecasts[p].waste > 1.15]
    if wasteful:
        return f"the tile of {', '.join(wasteful)} wastes slots on this grid: leave tile = 'auto'."
    return "nothing stands out: a narrower window launches less."
