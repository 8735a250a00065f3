"""`bench step`: one denoising forward of a real configuration, dense and with a profile.

Amdahl's bound of a profile is the speed-up that the step would have if each attention call took
its dense time times its launched density (nothing for a reused one) and all else stayed as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import api
from dit_accel.bench.plans import sliding_tile
from dit_accel.bench.records import StepRow
from dit_accel.bench.step_models import build, family_of, inputs
from dit_accel.bench.step_parts import (
    DenseChoice,
    RunPosition,
    TimedSites,
    choose_dense,
    dense_attention,
)
from dit_accel.bench.timing import Timing, measure_wall, synchronize
from dit_accel.engine.profile import Profile, Rule
from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers.session import DiffusersSession
from dit_accel.kernels.backends import BACKENDS
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.preset import Preset, Size
from dit_accel.pipelines.registry import adapter_for

RUN_STEPS = 50
"""The timed forwards are consecutive steps from the middle of a run of that many, or more."""
REPEATS, SLOW_REPEATS, SLOW_MS = 10, 3, 3000.0
"""Timed forwards, and how many where one takes longer than that."""


@dataclass(frozen=True)
class StepOptions:
    """How to run the steps.

    profiles: loaded ones. densities: each means a profile with sliding_tile in every
        self-attention layer, its window nearest to that launched density.
    dense: a backend name of diffusers, None to take the fastest.
    compiler: of torch.compile.
    """

    device: torch.device
    dtype: torch.dtype
    profiles: tuple[Profile, ...] = ()
    densities: tuple[float, ...] = ()
    backend: str | None = None
    dense: str | None = None
    layers: int | None = None
    repeats: int | None = None
    compile: bool = False
    compiler: str = "inductor"


@dataclass
class Bench:
    """A built model, ready to run forwards."""

    model: nn.Module
    inputs: dict[str, Any]
    layout: TokenLayout
    options: StepOptions
    position: RunPosition
    output: Tensor | None = None

    def forward(self) -> Tensor:
        """One forward: the next step of the run."""
        self.position.advance()
        with torch.no_grad():
            self.output = self.model(**self.inputs)[0]
        return self.output

    def first(self) -> float:
        """Milliseconds of a forward that may compile, and that warms up."""
        return measure_wall(self.forward, self.options.device, 1, warmup=0).median_ms

    def timed(self, expected_ms: float) -> tuple[Timing, float | None]:
        """Time of a forward after a first one, and the peak memory in GiB."""
        device = self.options.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        repeats = self.options.repeats or (SLOW_REPEATS if expected_ms > SLOW_MS else REPEATS)
        timing = measure_wall(self.forward, device, repeats, warmup=0)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        return timing, peak


def step_rows(model: Preset, size: Size, options: StepOptions) -> Iterator[StepRow]:
    """The dense step, then each profile's."""
    made = build(model, options.device, options.dtype, options.layers)
    bench = _ready(model, made, size, options)
    config: Any = made.config
    shape = (1, bench.layout.length, config.num_attention_heads, config.attention_head_dim)
    masked = family_of(model).masks != "none"
    choice = choose_dense(made, shape, options.dtype, options.device, masked, options.dense)
    base = _base(model, size, bench, options, choice)
    with dense_attention(made, choice.name):
        attention, first = _dense_attention_ms(bench)
        if options.compile:
            torch._dynamo.utils.counters.clear()
            _compile(made, options.compiler)
            first = bench.first()
        timing, peak = bench.timed(first)
        reference = bench.output
        assert reference is not None
        total = sum(attention.values())
        note = _noted(_graph_breaks(options), _chosen(choice))
        dense = _timed_row(
            replace(base, what="dense", note=note), timing, first, peak, total,
            attention.get("self", 0.0),
        )  # fmt: skip
        yield dense
        for profile in _profiles(bench, options):
            try:
                yield _profile_row(bench, profile, base, dense, attention, reference)
            except (DitAccelError, RuntimeError) as error:
                note = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                yield replace(base, profile=profile.name, status="failed", note=note)


def _ready(model: Preset, made: nn.Module, size: Size, options: StepOptions) -> Bench:
    given = inputs(model, made, size, options.device, options.dtype)
    layout = family_of(model).layouts(made, given, {})["video"]
    assert not isinstance(layout, str), layout
    return Bench(made, given, layout, options, _position(options))


def _position(options: StepOptions) -> RunPosition:
    steps = max(RUN_STEPS, 4 * (options.repeats or 0))
    return RunPosition(steps, steps // 2)


def _profiles(bench: Bench, options: StepOptions) -> Iterator[Profile]:
    yield from options.profiles
    for density in options.densities:
        yield density_profile(bench.layout, density, options.device, options.backend)


def density_profile(
    layout: TokenLayout, density: float, device: torch.device, backend: str | None
) -> Profile:
    """sliding_tile in every self-attention layer, its window nearest to a launched density."""
    here = "torch" if device.type == "cpu" else "triton"
    if device.type == "cuda" and BACKENDS["hopper"].machine() is None:
        here = "hopper"
    name = backend or here
    pattern, _ = sliding_tile(layout, density, name, device)
    rule = Rule(attention="self", compute=pattern)
    return Profile(f"sliding_tile@{density:g}", rules=(rule,), breakeven=False)


def _profile_row(
    bench: Bench,
    profile: Profile,
    base: StepRow,
    dense: StepRow,
    attention: dict[str, float],
    reference: Tensor,
) -> StepRow:
    if bench.options.compile:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    with _recorded(bench, profile) as (session, sites):
        first = bench.first()
        session.report(reset=True)
        sites.restart()
        timing, peak = bench.timed(first)
        times = sites.milliseconds()
        report = session.report().to_dict()
    assert bench.output is not None
    change = float((bench.output - reference).float().norm() / reference.float().norm())
    forwards = timing.repeats
    per_forward = {kind: sum(values) / forwards for kind, values in times.items()}
    row = _timed_row(
        replace(base, profile=profile.name, note=_graph_breaks(bench.options)), timing, first, peak,
        sum(per_forward.values()), per_forward.get("self", 0.0),
    )  # fmt: skip
    own = report["self"]
    speedup = (dense.ms or 0.0) / timing.median_ms
    bound = amdahl_bound(dense.ms or 0.0, attention, report)
    return replace(
        row,
        backend=", ".join(own["backends"]),
        launched_density=own["launched_density"],
        kept_density=own["kept_density"],
        sparse=own["sparse"] / forwards,
        reused=(own["reused"] + report["cross"]["reused"]) / forwards,
        dense_calls=own["dense"] / forwards,
        reasons="; ".join(f"{why} ({n / forwards:g})" for why, n in own["dense_reasons"].items()),
        change=change,
        speedup=speedup,
        bound=bound,
        of_bound=speedup / bound,
        peak_over_dense=peak / dense.peak_gib if peak and dense.peak_gib else None,
    )


def amdahl_bound(step_ms: float, attention: dict[str, float], report: dict[str, Any]) -> float:
    """The speed-up of a step whose attention costs its density.

    attention: dense milliseconds of a forward's calls by kind. report: see `Report.to_dict`.
    """
    saved = 0.0
    for kind, spent in attention.items():
        calls = report[kind]
        if calls["calls"]:
            launched = (calls["launched_density"] or 0.0) * calls["sparse"] + calls["dense"]
            saved += spent * (1.0 - launched / calls["calls"])
    return step_ms / (step_ms - saved)


def _dense_attention_ms(bench: Bench) -> tuple[dict[str, float], float]:
    """Milliseconds of a dense eager forward's attention calls by kind, and of all of it.

    The calls of a kind are alike: their median, not the first ones' warm-up, tells their time.
    """
    with _recorded(bench, Profile("dense")) as (_, sites):
        whole = bench.first()
        times = sites.milliseconds()
    return {kind: median(values) * len(values) for kind, values in times.items()}, whole


@contextmanager
def _recorded(bench: Bench, profile: Profile) -> Iterator[tuple[DiffusersSession, TimedSites]]:
    """The model with a profile enabled, and what its attention calls take."""
    session = api.enable(bench.model, bench.position, profile, backend=bench.options.backend)
    sites = TimedSites()
    session.observers.append(sites)
    try:
        yield session, sites
    finally:
        api.disable(bench.model)
        synchronize(bench.options.device)
        gc.collect()


def _graph_breaks(options: StepOptions) -> str:
    """What compilation could not keep in one graph since the last reset, "" where nothing."""
    if not options.compile:
        return ""
    breaks = torch._dynamo.utils.counters["graph_break"]
    return f"{sum(breaks.values())} graph breaks" if breaks else ""


def _compile(model: Any, compiler: str) -> None:
    """Compile the repeated blocks, by diffusers' own list of them where it has one."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=compiler)
        return
    adapter = adapter_for(model)
    assert adapter is not None
    for name in dict.fromkeys(site.blocks for site in adapter.sites):
        for block in getattr(model, name, ()):
            block.compile(backend=compiler)


def _base(
    model: Preset, size: Size, bench: Bench, options: StepOptions, choice: DenseChoice
) -> StepRow:
    return StepRow(
        what="profile",
        model=model.name,
        mode="compiled" if options.compile else "eager",
        layers=sum(model.cut(options.layers).values()),
        layers_of=model.depth,
        height=size.height,
        width=size.width,
        frames=size.frames,
        tokens=bench.layout.length,
        dtype=str(options.dtype).removeprefix("torch."),
        dense_kernel=choice.name,
    )


def _timed_row(
    row: StepRow,
    timing: Timing,
    first: float,
    peak: float | None,
    attention: float,
    own: float,
) -> StepRow:
    return replace(
        row,
        **timing.columns(),
        first_ms=first,
        attention_ms=attention,
        self_attention_ms=own,
        attention_share=attention / timing.median_ms,
        peak_gib=peak,
    )


def _noted(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _chosen(choice: DenseChoice) -> str:
    times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(choice.times.items()))
    failed = "".join(f"; {name}: {why}" for name, why in choice.failed.items())
    return f"one call: {times}{failed}"
