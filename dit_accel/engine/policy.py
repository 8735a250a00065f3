"""What each attention site does at each step, resolved from a profile."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dit_accel.engine.call import Site
from dit_accel.engine.profile import WARMUP_FREE_STEPS, Profile, Reuse, Rule, RuleCompute
from dit_accel.errors import DitAccelError, nearest
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.geometry.limits import check_blocks
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns import Pattern
from dit_accel.kernels.patterns.composite import PerHead, select_heads
from dit_accel.kernels.patterns.full import Full
from dit_accel.kernels.tails import Drop, Tail
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class Decision:
    """What one call does: a compute (None for dense) times a tail, times a reuse.

    tail: what stands for the keys that the compute does not visit.
    """

    compute: Compute | None = None
    reuse: Reuse | None = None
    tail: Tail = Drop()


class Policy:
    """Resolves a profile for the sites of one pipeline.

    branches: the CFG branches that the host names, None where that is not known before it runs.

    Raises:
        DitAccelError: what no call of these sites can run: layers, heads, a branch that there is
            not, computes that do not go together. What depends on a size is `admit`'s.
    """

    def __init__(
        self, profile: Profile, sites: Sequence[Site], branches: Sequence[str] | None = None
    ) -> None:
        self.profile = profile
        self._sites = sites
        self._short = profile.without_warmup() if profile.drop_short_warmup else profile
        self._decisions: dict[tuple[Site, str, float, bool], Decision] = {}
        self._computes: dict[Compute, Compute] = {}
        self._tails: dict[Tail, Tail] = {}
        self._admitted: set[tuple[TokenLayout, LayoutKind]] = set()
        for number, rule in enumerate(profile.rules, 1):
            try:
                _check_selection(rule, sites)
                _check_branch(rule, branches)
                _check_heads(rule, sites)
            except DitAccelError as error:
                raise DitAccelError(f"rule {number} of {profile.name!r}: {error}") from error
        for compute, _ in self.computes():
            if isinstance(compute, Pattern):
                compute.check()

    def decide(self, site: Site, branch: str, step: int, steps: int) -> Decision:
        """The decision for a call at step `step` (from 0) of `steps`.

        Args:
            branch: the CFG branch's name, as the pipeline calls it.
        """
        short = steps <= WARMUP_FREE_STEPS
        key = (site, branch, step / steps, short)
        made = self._decisions.get(key)
        if made is None:
            rules = (self._short if short else self.profile).rules
            made = _resolve(rules, site, branch_class(branch), step / steps)
            if made.compute is not None:
                # Equal ones are one object: routes are found by it.
                compute = self._computes.setdefault(made.compute, made.compute)
                tail = self._tails.setdefault(made.tail, made.tail)
                made = replace(made, compute=compute, tail=tail)
            self._decisions[key] = made
        return made

    def reuses(self, site: Site) -> bool:
        """Whether the site keeps its output in some step and branch."""
        return any(
            _resolve(self.profile.rules, site, branch, rule.steps[0]).reuse is not None
            for rule in self.profile.rules
            for branch in ("any", "cond", "uncond")
        )

    def admit(self, layout: TokenLayout, kind: LayoutKind) -> None:
        """DitAccelError where a compute cannot run on calls of this size, before any of them runs.

        Layouts that no plan can be made for have their `obstacle` counted instead.
        """
        if (layout, kind) in self._admitted:
            return
        for compute, _ in self.computes():
            if compute.obstacle(layout) is not None:
                continue
            check_blocks(compute.tiling(layout, kind))
            if isinstance(compute, Pattern):
                compute.check(layout, kind, max((s.heads for s in self._sites), default=0) or None)
        self._admitted.add((layout, kind))

    def computes(self) -> list[tuple[Compute, Tail]]:
        """Every compute that the profile can run, with its tail, once each."""
        found: dict[tuple[Compute, Tail], None] = {}
        for rules in (self.profile.rules, self._short.rules):
            starts = {0.0, *(rule.steps[0] for rule in rules)}
            for site, branch, start in itertools.product(
                self._sites, ("any", "cond", "uncond"), sorted(starts)
            ):
                made = _resolve(rules, site, branch, start)
                if made.compute is not None:
                    found[made.compute, made.tail] = None
        return list(found)


def branch_class(name: str) -> str:
    """ "cond", "uncond" or "any" for a CFG branch as diffusers' pipelines name them."""
    if name in ("cond", "pred_cond"):
        return "cond"
    if name == "pred_uncond" or name.split("_")[0] == "uncond":
        return "uncond"
    return "any"


def selects(layers: str, site: Site) -> bool:
    """Whether a `layers` value ("all", "0-9,-1", "0.0-0.5", site names) selects a site."""
    return any(_part_selects(part.strip(), site) for part in layers.split(","))


def _part_selects(part: str, site: Site) -> bool:
    if part == "all":
        return True
    if re.fullmatch(r"-?\d+", part):
        return _index(part, site) == site.layer
    if match := re.fullmatch(r"(-?\d+)-(-?\d+)", part):
        first, last = (_index(group, site) for group in match.groups())
        return first <= site.layer <= last
    if match := re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", part):
        first_part, last_part = (float(g) for g in match.groups())
        return first_part <= site.layer / site.layers < last_part
    return fnmatch.fnmatchcase(site.name, part)


def _index(text: str, site: Site) -> int:
    return int(text) + (site.layers if text.startswith("-") else 0)


def _resolve(rules: Sequence[Rule], site: Site, branch: str, progress: float) -> Decision:
    compute: Compute | None = None
    reuse: Reuse | None = None
    tail: Tail = Drop()
    for rule in rules:
        if (
            rule.attention != site.kind
            or rule.expert not in ("any", site.expert)
            or rule.branch not in ("any", branch)
            or not (rule.steps[0] <= progress < rule.steps[1])
            or not selects(rule.layers, site)
        ):
            continue
        if rule.compute is not None:
            compute = _for_heads(compute, rule.heads, rule.compute)
        for heads, own in rule.per_head:
            compute = _for_heads(compute, heads, own)
        if rule.reuse is not None:
            reuse = rule.reuse if rule.reuse.every > 1 else None
        if rule.tail is not None:
            tail = rule.tail
    return Decision(compute, reuse, tail)


def _for_heads(before: Compute | None, heads: str, compute: RuleCompute) -> Compute | None:
    """What a site runs when `heads` get `compute` and the others keep what was before."""
    new = None if compute == "dense" else compute
    if heads == "all" or (before is None and new is None):
        return new
    first, rest = new or Full(), before or Full()
    for each in (first, rest):
        if not isinstance(each, Pattern):
            raise DitAccelError(
                f"heads {heads!r}: {each.name!r} chooses for all heads of a site at once; give "
                "single heads another compute over a pattern only."
            )
    assert isinstance(first, Pattern) and isinstance(rest, Pattern)
    if isinstance(rest, PerHead):
        return rest.over(heads, first)
    return PerHead(((heads, first),), rest)


def _check_branch(rule: Rule, branches: Sequence[str] | None) -> None:
    if branches is None or rule.branch == "any":
        return
    classes = sorted({branch_class(name) for name in branches})
    if rule.branch not in classes:
        raise DitAccelError(
            f"branch: {rule.branch!r} never occurs, as pipelines of this model run both branches "
            "in one batch; the nearest legal value is 'any'."
        )


def _check_heads(rule: Rule, sites: Sequence[Site]) -> None:
    """Every group of heads exists, and has a head, on every site that the rule selects."""
    able = {
        site.heads
        for site in sites
        if site.heads and site.kind == rule.attention and selects(rule.layers, site)
    }
    for text in (rule.heads, *(heads for heads, _ in rule.per_head)):
        for heads in sorted(able):
            if not select_heads(text, heads):
                raise DitAccelError(
                    f"heads: {text!r} selects none of the model's {heads} heads; the nearest "
                    f"legal value is '0-{heads - 1}'."
                )


def _check_selection(rule: Rule, sites: Sequence[Site]) -> None:
    able = [s for s in sites if s.kind == rule.attention and rule.expert in ("any", s.expert)]
    if not able:
        # A profile for a family may speak of cross-attention or of a second expert where a
        # member of the family has none.
        return
    for part in (p.strip() for p in rule.layers.split(",")):
        if not any(_part_selects(part, site) for site in able):
            close = nearest(part, [s.name for s in able])
            hint = f" Did you mean {close!r}?" if close else ""
            raise DitAccelError(
                f"layers {part!r} selects none of the model's {able[0].layers} layers "
                f"({rule.attention}-attention sites {able[0].name!r} to {able[-1].name!r}).{hint}"
            )
