"""What a run does, as it does it: counts, densities and times of every attention call.

Counts that only the device knows stay there, in a row of numbers per site and step that selectors
add to; they are read once, when the report is asked for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_accel.engine.call import Call, Moment, Site
from dit_accel.report import Report

if TYPE_CHECKING:
    from dit_accel.engine.policy import Decision
    from dit_accel.engine.route import PlanRow, Route

Outcome = Literal["sparse", "reused", "dense"]
Span = tuple[Any, Any]
"""Two marks: CUDA events, or seconds of the host's clock."""
ROWS = 256
"""Device rows that are made at a time."""


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
        """As a row of the report: densities are means over the calls that ran sparse."""
        return {
            "calls": self.calls,
            "sparse": self.sparse,
            "reused": self.reused,
            "dense": self.dense,
            "launched_density": self.launched / self.sparse if self.sparse else None,
            "kept_density": self.kept / self.sparse if self.sparse else None,
        }


@dataclass(frozen=True)
class Observation:
    """What an observer of a session sees of each call, after it.

    call: None where a whole site's output was served. route: None where the call ran no plan.
    dense: what stock attention gives instead of `output` (an attention call's result, or a site's
        output where that was served), computed on request and not counted.
    span: marks of the call's time, None where nothing was computed.
    """

    site: Site
    moment: Moment
    decision: Decision
    outcome: Outcome
    output: Any
    dense: Callable[[], Any]
    call: Call | None = None
    route: Route | None = None
    span: Span | None = None


Observer = Callable[[Observation], None]


class _Row(NamedTuple):
    """Device counts of calls of `pairs` token pairs each: launched and kept ones, int64 [2].

    padded: whether blocks were computed with all their slots; else kept pairs are launched ones.
    """

    numbers: Tensor
    pairs: int
    padded: bool


class Ledger:
    """The counts of one run; `report` may be asked at any time."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps
        self.compile_s = 0.0
        self._tallies: dict[tuple[Site, int], Tally] = {}
        self._rows: dict[tuple[Site, int, int], _Row] = {}
        self._free: list[Tensor] = []
        self._reasons: dict[str, Counter[str]] = {}
        self._backends: dict[str, Counter[str]] = {}
        self._plans: Counter[PlanRow] = Counter()
        self._attention: list[Span] = []
        self._device = torch.device("cpu")
        self._begin: Any = None
        self._end: Any = None

    def forward_started(self, device: torch.device) -> None:
        """The run's time begins with its first forward."""
        if self._begin is None:
            self._device, self._begin = device, mark(device)

    def forward_ended(self) -> None:
        """... and ends with its last one."""
        self._end = mark(self._device)

    @contextmanager
    def compilation(self, device: torch.device) -> Iterator[None]:
        """Time a call that compiles its kernel, apart from the run."""
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.compile_s += time.perf_counter() - begin

    def timed(self, begin: Any, end: Any) -> None:
        """An attention call ran between two marks."""
        self._attention.append((begin, end))

    def count(
        self, site: Site, step: int, outcome: Outcome, *, reason: str = "", calls: int = 1
    ) -> Tally:
        """Record `calls` attention calls of a site."""
        key = site, step
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        tally.calls += calls
        setattr(tally, outcome, getattr(tally, outcome) + calls)
        if reason:
            self._reasons.setdefault(site.kind, Counter())[reason] += calls
        return tally

    def count_sparse(self, site: Site, step: int, route: Route) -> None:
        """Record a call that ran a route's plan; the device counts those that it does not know."""
        tally = self.count(site, step, "sparse")
        self._backends.setdefault(site.kind, Counter())[route.backend] += 1
        self._plans[route.row] += 1
        tally.launched += route.known
        if route.plan is not None:
            tally.kept += route.kept

    def device_row(
        self, site: Site, step: int, pairs: int, device: torch.device, padded: bool = True
    ) -> Tensor:
        """int64 [2] on the device, to which a call adds its launched and its kept token pairs.

        pairs: all pairs of the call, over its samples and heads. padded: see `_Row`.
        """
        row = self._rows.get((site, step, pairs))
        if row is None:
            if not self._free or self._free[-1].device != device:
                made = torch.zeros(ROWS, 2, dtype=torch.int64, device=device)
                self._free = list(made.unbind())
            row = self._rows[site, step, pairs] = _Row(self._free.pop(), pairs, padded)
        return row.numbers

    def cells(self) -> dict[tuple[Site, int], Tally]:
        """The tallies by site and step, with what the device has counted; waits for it."""
        # Copies, since the run may go on in another thread.
        cells: dict[tuple[Site, int], Tally] = {}
        for key, tally in list(self._tallies.items()):
            cells[key] = Tally()
            cells[key] += tally
        for (site, step, pairs), row in list(self._rows.items()):
            launched, kept = row.numbers.tolist()
            cell = cells.setdefault((site, step), Tally())  # none where its first call has failed
            cell.launched += (launched if row.padded else kept) / pairs
            cell.kept += kept / pairs
        return cells

    def report(self, profile: str, family: str, model: str, cache: dict[str, int | None]) -> Report:
        """The receipt of the run so far: the only place that waits for the device."""
        over = self._begin is not None and self._end is not None
        denoising = milliseconds((self._begin, self._end)) / 1e3 if over else 0.0
        attention = sum(map(milliseconds, list(self._attention))) / 1e3
        cells = self.cells()
        return Report(
            profile=profile,
            family=family,
            model=model,
            steps=self.steps,
            kinds={kind: self._kind(kind, cells) for kind in ("self", "cross")},
            per_layer=[
                {"site": site_name(site), "layer": site.layer, "kind": site.kind, **t.counts()}
                for site, t in _summed(cells, lambda site, step: site)
            ],
            per_step=[
                {"step": step, **t.counts()}
                for step, t in sorted(
                    _summed(cells, lambda site, step: step if site.kind == "self" else None)
                )
            ],
            time={
                "denoising_s": denoising,
                "attention_s": attention,
                "attention_share": attention / denoising if denoising else None,
                "compile_s": self.compile_s,
            },
            cache=cache,
            plans=[{**asdict(row), "calls": calls} for row, calls in list(self._plans.items())],
        )

    def _kind(self, kind: str, cells: dict[tuple[Site, int], Tally]) -> dict[str, Any]:
        return {
            **total_of(kind, cells).counts(),
            "dense_reasons": dict(self._reasons.get(kind, {})),
            "backends": dict(self._backends.get(kind, {})),
        }


def mark(device: torch.device) -> Any:
    """A point in time: an event in the device's queue, or the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(_stream(device))
    return event


_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The current stream of a device; torch makes an object of it at each question."""
    index = torch._C._cuda_getDevice() if device.index is None else device.index
    key = index, torch._C._cuda_getCurrentRawStream(index)
    found = _streams.get(key)
    if found is None:
        found = _streams[key] = torch.cuda.current_stream(device)
    return found


def milliseconds(span: Span) -> float:
    """Between two marks; waits for the second one."""
    begin, end = span
    if isinstance(begin, float):
        return float(end - begin) * 1e3
    end.synchronize()
    return float(begin.elapsed_time(end))


def site_name(site: Site) -> str:
    """Its name, with its expert where that is not the usual one."""
    return site.name if site.expert == "transformer" else f"{site.expert}.{site.name}"


def total_of(kind: str, cells: dict[tuple[Site, int], Tally]) -> Tally:
    """All cells of the sites of a kind together."""
    return dict(_summed(cells, lambda site, step: site.kind)).get(kind, Tally())


def _summed(
    cells: dict[tuple[Site, int], Tally], group: Callable[[Site, int], Any]
) -> Iterable[tuple[Any, Tally]]:
    sums: dict[Any, Tally] = {}
    for (site, step), tally in cells.items():
        key = group(site, step)
        if key is not None:
            total = sums.setdefault(key, Tally())
            total += tally
    return sums.items()
