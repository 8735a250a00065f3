"""What really happened in a denoising run: counts, densities and times of every attention call."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch

from dit_accel.kernels.patterns import Pattern
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.planner.receipt import PlannedCall, plan_lines, plan_row
from dit_accel.policy import SiteKey

Outcome = Literal["sparse", "reused", "dense"]


@dataclass
class Tally:
    """Counts of calls; densities are sums over the sparse ones."""

    calls: int = 0
    sparse: int = 0
    reused: int = 0
    dense: int = 0
    launched: float = 0.0
    kept: float = 0.0

    def __iadd__(self, other: Tally) -> Tally:
        for name in ("calls", "sparse", "reused", "dense", "launched", "kept"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def counts(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "sparse": self.sparse,
            "reused": self.reused,
            "dense": self.dense,
            "launched_density": self.launched / self.sparse if self.sparse else None,
            "kept_density": self.kept / self.sparse if self.sparse else None,
        }


@dataclass(frozen=True)
class Report:
    """The receipt of the last denoising run of a pipeline; `str()` gives a table.

    Densities are means over the calls that ran sparse: launched counts the tiles that the kernel
    computed, kept the token pairs that entered the softmax, each over all pairs of the call.
    `dense_reasons` tells planned ("profile") from unplanned dense calls. Times are in seconds;
    `attention_s` is the attention calls alone, without projections. `compile_s` is the first
    calls of kernels, which compile them; it is not part of `attention_s`. `plans` has a row for
    each pattern that ran: how the video was cut, and what the planner predicts of a call.
    """

    profile: str
    family: str
    model: str
    steps: int
    kinds: dict[str, dict[str, Any]]
    per_layer: list[dict[str, Any]]
    per_step: list[dict[str, Any]]
    time: dict[str, float | None]
    cache: dict[str, int | None]
    plans: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the keys `profile`, `self`, `cross`, `per_layer`, `per_step`, ..."""
        data = asdict(self)
        return {**{k: v for k, v in data.items() if k != "kinds"}, **data["kinds"]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        if not self.steps:
            return f"dit_accel: profile {self.profile!r} is enabled; the pipeline has not run yet."
        lines = [
            f"dit_accel: profile {self.profile!r} ({self.family}) on {self.model}, "
            f"{self.steps} step{'s' * (self.steps != 1)}"
        ]
        for kind, title in (("self", "self-attention"), ("cross", "cross-attention")):
            if self.kinds[kind]["calls"]:
                lines += _kind_lines(title, self.kinds[kind])
        for first, *rest in dict.fromkeys(tuple(plan_lines(row)) for row in self.plans):
            lines += [f"  {'plan':<17}{first}", *(f"  {'':<17}{line}" for line in rest)]
        lines += [f"  {'time':<17}{_time_line(self.time)}"]
        if self.cache["peak_bytes"] or self.cache["refused"]:
            lines += [f"  {'cache':<17}{_cache_line(self.cache)}"]
        header = f"{'calls':>7}{'sparse':>8}{'reused':>8}{'dense':>7}{'density':>9}"
        for title, rows, label in (
            ("layers (self)", [r for r in self.per_layer if r["kind"] == "self"], "layer"),
            ("steps (self)", self.per_step, "step"),
        ):
            lines += ["", f"  {title:<17}{header}"]
            lines += [f"  {name:<17}{_count_line(row)}" for name, row in _folded(rows, label)]
        return "\n".join(lines)


@dataclass
class Recorder:
    """Collects what a run does; `report()` may be asked at any time."""

    profile: str = ""
    family: str = ""
    model: str = ""
    cache_limit: int | None = None
    steps: int = 0
    compile_s: float = 0.0
    _tallies: dict[tuple[SiteKey, int], Tally] = field(default_factory=dict)
    _reasons: dict[str, Counter[str]] = field(default_factory=dict)
    _backends: dict[str, Counter[str]] = field(default_factory=dict)
    _plans: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _attention: _Stopwatch = field(default_factory=lambda: _Stopwatch())
    _run: _Span = field(default_factory=lambda: _Span())

    def start(self, steps: int) -> None:
        """Forget the last run; a run of `steps` steps begins."""
        self.steps = steps
        self.compile_s = 0.0
        self._tallies, self._reasons, self._backends, self._plans = {}, {}, {}, {}
        self._attention, self._run = _Stopwatch(), _Span()

    def forward_started(self, device: torch.device) -> None:
        self._run.open(device)

    def forward_ended(self) -> None:
        self._run.close()

    @contextmanager
    def attention(self, device: torch.device) -> Iterator[None]:
        """Time one attention call."""
        begin = _mark(device)
        yield
        self._attention.add(begin, _mark(device))

    @contextmanager
    def compilation(self, device: torch.device) -> Iterator[None]:
        """Time a call that compiles its kernel, apart from the run."""
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.compile_s += time.perf_counter() - begin

    def count(
        self,
        site: SiteKey,
        step: int,
        outcome: Outcome,
        *,
        reason: str = "",
        backend: str = "",
        launched: float = 0.0,
        kept: float = 0.0,
        calls: int = 1,
    ) -> None:
        """Record `calls` attention calls of a site; densities are per call, in [0, 1]."""
        tally = self._tallies.setdefault((site, step), Tally())
        tally.calls += calls
        setattr(tally, outcome, getattr(tally, outcome) + calls)
        tally.launched += launched * calls
        tally.kept += kept * calls
        if reason:
            self._reasons.setdefault(site.kind, Counter())[reason] += calls
        if backend:
            self._backends.setdefault(site.kind, Counter())[backend] += calls

    def planned(
        self, pattern: Pattern, layout: TokenLayout, plan: BlockPlan, call: PlannedCall
    ) -> None:
        """Record that a call ran a pattern's plan."""
        key = pattern, layout, plan, call
        self._plans[key] = self._plans.get(key, 0) + 1

    def report(self, cache_peak: int = 0, cache_refused: int = 0) -> Report:
        denoising, attention = self._run.seconds(), self._attention.seconds()
        return Report(
            profile=self.profile,
            family=self.family,
            model=self.model,
            steps=self.steps,
            kinds={kind: self._kind(kind) for kind in ("self", "cross")},
            per_layer=[
                {"site": _site_name(site), "layer": site.layer, "kind": site.kind, **t.counts()}
                for site, t in self._summed(lambda site, step: site)
            ],
            per_step=[
                {"step": step, **t.counts()}
                for step, t in sorted(
                    self._summed(lambda site, step: step if site.kind == "self" else None)
                )
            ],
            time={
                "denoising_s": denoising,
                "attention_s": attention,
                "attention_share": attention / denoising if denoising else None,
                "compile_s": self.compile_s,
            },
            cache={
                "peak_bytes": cache_peak,
                "limit_bytes": self.cache_limit,
                "refused": cache_refused,
            },
            plans=[
                plan_row(pattern, layout, plan, call, calls)
                for (pattern, layout, plan, call), calls in self._plans.items()
            ],
        )

    def _kind(self, kind: str) -> dict[str, Any]:
        total = Tally()
        for (site, _), tally in self._tallies.items():
            if site.kind == kind:
                total += tally
        return {
            **total.counts(),
            "dense_reasons": dict(self._reasons.get(kind, {})),
            "backends": dict(self._backends.get(kind, {})),
        }

    def _summed(self, group: Any) -> Iterable[tuple[Any, Tally]]:
        sums: dict[Any, Tally] = {}
        for (site, step), tally in self._tallies.items():
            key = group(site, step)
            if key is not None:
                total = sums.setdefault(key, Tally())
                total += tally
        return sums.items()


class _Stopwatch:
    """Sum of measured intervals; CUDA events are read only when the sum is asked."""

    def __init__(self) -> None:
        self._total = 0.0
        self._pending: list[tuple[Any, Any]] = []

    def add(self, begin: Any, end: Any) -> None:
        if isinstance(begin, float):
            self._total += end - begin
        else:
            self._pending.append((begin, end))

    def seconds(self) -> float:
        if self._pending:
            self._pending[-1][1].synchronize()
            self._total += sum(a.elapsed_time(b) for a, b in self._pending) / 1e3
            self._pending.clear()
        return self._total


class _Span:
    """From the first `open` to the last `close`."""

    def __init__(self) -> None:
        self._begin: Any = None
        self._end: Any = None
        self._device = torch.device("cpu")

    def open(self, device: torch.device) -> None:
        if self._begin is None:
            self._device = device
            self._begin = _mark(device)

    def close(self) -> None:
        self._end = _mark(self._device)

    def seconds(self) -> float:
        if self._begin is None or self._end is None:
            return 0.0
        if isinstance(self._begin, float):
            return float(self._end - self._begin)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _site_name(site: SiteKey) -> str:
    return site.name if site.expert == "transformer" else f"{site.expert}.{site.name}"


def _kind_lines(title: str, kind: dict[str, Any]) -> list[str]:
    calls = kind["calls"]
    parts = [
        f"{kind[name]} {name} ({kind[name] / calls:.0%})"
        for name in ("sparse", "reused", "dense")
        if kind[name]
    ]
    lines = [f"  {title:<17}{calls} calls: {', '.join(parts)}"]
    if kind["sparse"]:
        by = ", ".join(f"{name} {n}" for name, n in kind["backends"].items())
        lines.append(
            f"  {'':<17}launched density {kind['launched_density']:.3f}, "
            f"kept {kind['kept_density']:.3f}; backend: {by}"
        )
    if kind["dense"]:
        reasons = ", ".join(f"{why} ({n})" for why, n in sorted(kind["dense_reasons"].items()))
        lines.append(f"  {'':<17}dense because: {reasons}")
    return lines


def _time_line(times: dict[str, float | None]) -> str:
    share = f" ({times['attention_share']:.0%})" if times["attention_share"] is not None else ""
    line = f"denoising {times['denoising_s']:.2f} s, attention {times['attention_s']:.2f} s{share}"
    return line + (f", compilation {times['compile_s']:.2f} s" if times["compile_s"] else "")


def _cache_line(cache: dict[str, int | None]) -> str:
    limit = cache["limit_bytes"]
    line = f"peak {(cache['peak_bytes'] or 0) / 2**20:.1f} MiB"
    line += f" of {limit / 2**20:.1f} MiB allowed" if limit is not None else ", no limit"
    return line + (f"; {cache['refused']} outputs did not fit" if cache["refused"] else "")


def _count_line(row: dict[str, Any]) -> str:
    density = row["launched_density"]
    shown = "-" if density is None else f"{density:.3f}"
    return f"{row['calls']:>7}{row['sparse']:>8}{row['reused']:>8}{row['dense']:>7}{shown:>9}"


def _folded(rows: list[dict[str, Any]], label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with equal counts, next to each other, become one."""

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        expert = row.get("site", "").split(".")[0] if label == "layer" else ""
        return expert, row["calls"], row["sparse"], row["reused"], row["dense"], _count_line(row)

    for _, group in groupby(rows, key=same):
        members = list(group)
        first, last = members[0][label], members[-1][label]
        name = f"{first}" if first == last else f"{first}-{last}"
        yield name, members[0]
