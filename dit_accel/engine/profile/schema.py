"""What a profile is: rules that say which attention site runs what, and when."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_accel.kernels.compute import Compute
from dit_accel.kernels.patterns.composite import Union
from dit_accel.kernels.tails import Tail

GENERIC = "generic"
WARMUP_FREE_STEPS = 8
"""At this many denoising steps and fewer, `auto` spends none of them on a dense warm-up."""

RuleCompute = Compute | Literal["dense"]


@dataclass(frozen=True)
class Reuse:
    """Serve a site's last output instead of computing it.

    every: the output is computed in one of `every` successive calls of the site and branch.
    what: what is kept; "output" is the attention module's output (as in Pyramid Attention
        Broadcast, arXiv 2408.12588).
    max_age: oldest output that may be served, as a fraction of the denoising run.
    """

    every: int
    what: str = "output"
    max_age: float | None = None


@dataclass(frozen=True)
class Rule:
    """One `[[rule]]`: a selection of calls, and the keys that it sets for them.

    `compute`, `tail` and `reuse` are None where the rule leaves them as earlier rules set them.
    `compute` is for the query heads `heads`; the others keep what earlier rules gave. `per_head`
    then gives single groups of heads a compute of their own.
    """

    attention: str = "self"
    layers: str = "all"
    expert: str = "any"
    branch: str = "any"
    steps: tuple[float, float] = (0.0, 1.0)
    compute: RuleCompute | None = None
    reuse: Reuse | None = None
    heads: str = "all"
    per_head: tuple[tuple[str, RuleCompute], ...] = ()
    tail: Tail | None = None

    @property
    def sparse(self) -> bool:
        """Whether the rule runs a pattern or a selector, on any head."""
        return bool(self.computes)

    @property
    def computes(self) -> list[Compute]:
        """The patterns and selectors that the rule runs, also as part of a union."""
        named = [self.compute, *(compute for _, compute in self.per_head)]
        found = [compute for compute in named if isinstance(compute, Compute)]
        return found + [part for each in found if isinstance(each, Union) for part in each.union]

    def includes(self, other: Rule) -> bool:
        """Whether this rule selects at least what `other` does, whatever the steps.

        True is certain; False may also mean that only the model's layers could tell.
        """
        mine, theirs = ((r.heads, tuple(heads for heads, _ in r.per_head)) for r in (self, other))
        return (
            self.attention == other.attention
            and self.layers in ("all", other.layers)
            and self.expert in ("any", other.expert)
            and self.branch in ("any", other.branch)
            and mine in (("all", ()), theirs)
        )


@dataclass(frozen=True)
class Profile:
    """A policy for a model family; see `load_profile`.

    breakeven: run a call dense where the planned compute would not pay on this machine.
    tuned: the `[tuned]` table that the tuner wrote, empty in a profile written by hand.
    drop_short_warmup: run `without_warmup` at WARMUP_FREE_STEPS denoising steps and fewer.
    """

    name: str
    family: str = GENERIC
    description: str = ""
    rules: tuple[Rule, ...] = ()
    breakeven: bool = True
    tuned: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    drop_short_warmup: bool = False

    def without_warmup(self) -> Profile:
        """The same profile without dense steps before the first sparse ones.

        What a selection of calls runs in its earliest sparse steps, it runs from step 0 on; later
        steps stay as they are.
        """
        return dataclasses.replace(self, rules=tuple(self._without_warmup()))

    def _without_warmup(self) -> Iterator[Rule]:
        sparse = [rule for rule in self.rules if rule.sparse]
        for rule in self.rules:
            start, end = rule.steps
            if rule.compute == "dense" and start == 0.0 and end < 1.0:
                yield dataclasses.replace(rule, compute=None, heads="all")
            elif rule.sparse and not any(r.steps[0] < start and r.includes(rule) for r in sparse):
                yield dataclasses.replace(rule, steps=(0.0, end))
            else:
                yield rule
