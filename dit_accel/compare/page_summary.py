"""The page's summary, its plots of time against quality and its table of times."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from dit_accel.compare import charts
from dit_accel.compare.numbers import MISSING, decimals, number, plural, seconds, unit_of_bytes
from dit_accel.compare.page_words import (
    EXPLAINED,
    anchor,
    measured,
    metric_digits,
    title_of,
    with_unit,
)
from dit_accel.compare.results import (
    DENSE,
    IDENTICAL,
    Clip,
    Metric,
    Results,
    Row,
    Spread,
    dense_clips,
    done,
    ratio,
    ratios,
    worst,
)
from dit_accel.compare.tables import why_dense

TOWARDS = {"higher": "higher is better", "lower": "lower is better"}


@dataclass(frozen=True)
class Link:
    """A clip on the page: the group's anchor and the profile to show there."""

    anchor: str
    profile: str
    text: str


@dataclass(frozen=True)
class Cell:
    """A median with its smallest and largest value; `link` is the clip of the worst one."""

    main: str
    low: str | None = None
    high: str | None = None
    link: Link | None = None
    worst_is_low: bool = True


@dataclass(frozen=True)
class Column:
    """A column of the summary: its title, its unit and the sentence that explains it."""

    title: str
    unit: str
    text: str


@dataclass(frozen=True)
class SummaryRow:
    """One profile. `unrated` stands in the place of ratios and metrics, and says why."""

    name: str
    kind: str
    note: str
    cells: list[Cell]
    unrated: str = ""


@dataclass(frozen=True)
class TimeRow:
    """Where one profile's time goes; `bars` are percentages of the slowest profile's clip."""

    name: str
    cells: list[str]
    bars: dict[str, float]


@dataclass(frozen=True)
class Plot:
    """Time against one metric."""

    metric: str
    title: str
    unit: str
    better: str
    chart: charts.Scatter
    texts: dict[str, str]
    digits: int
    axis_digits: int
    front: list[str]


def facts(results: Results) -> list[str]:
    """The line under the page's title."""
    prompts = len({clip.prompt_id for clip in results.clips})
    seeds = len({clip.seed for clip in results.clips})
    length = f"{plural(results.frames, 'frame')} of {results.width}×{results.height}"
    video = [f"{length}, {results.fps:g} frames per second"] if results.frames else []
    return [
        results.model,
        *video,
        plural(results.steps, "step"),
        f"{plural(prompts, 'prompt')} × {plural(seeds, 'seed')}",
        results.environment.device,
        results.environment.date,
    ]


def columns(results: Results, rows: Sequence[Row]) -> list[Column]:
    """The columns of the summary after the profile's name."""
    found = [
        Column("Speed-up", "", "dense denoising time over this profile’s, on the same clip"),
        Column("Attention speed-up", "", "the same for the time inside attention calls"),
    ]
    for name, metric in measured(results):
        sentence = EXPLAINED.get(name, "")
        text = f"{sentence}; {TOWARDS[metric.better]}" if sentence else TOWARDS[metric.better]
        found.append(Column(title_of(name), metric.unit, text))
    computed = "share of the attention matrix that was computed, mean over calls; 1 is dense"
    found.append(Column("Density", "", computed))
    found.append(
        Column("Memory", _memory_unit(rows)[0], "peak memory on the GPU; not measured on a CPU")
    )
    return found


def _memory_unit(rows: Sequence[Row]) -> tuple[str, int]:
    """The unit of the memory column and its bytes; nothing was measured on a CPU."""
    used = [row.memory_bytes.high for row in rows if row.memory_bytes]
    return unit_of_bytes(used) if used else ("", 1)


def summary(results: Results, rows: Sequence[Row]) -> list[SummaryRow]:
    """The summary's rows: the profiles that ran, in their order."""
    ran = [row for row in rows if row.skipped is None]
    dense = dense_clips(results)
    memory = _memory_unit(rows)[1]
    table = []
    for row in ran:
        clips = done(results, row.profile)
        pairs = [(dense[key], c) for c in clips if (key := (c.prompt_id, c.seed)) in dense]
        speed = _slowest(pairs, lambda a, b: min(ratios(a, b), default=None))
        attention = _slowest(pairs, lambda a, b: ratio(a.attention_s, b.attention_s))
        is_dense = row.profile == DENSE
        cells = [
            Cell("1×") if is_dense else _ratio_cell(row.speedup, speed),
            Cell("1×") if is_dense else _ratio_cell(row.attention_speedup, attention),
            *(_metric_cell(results, row, clips, *each) for each in measured(results)),
        ]
        costs = [_cell(row.density, decimals([1.0])), _memory_cell(row.memory_bytes, memory)]
        note = f"{row.clips} of {plural(row.clips + row.failed, 'clip')}" if row.failed else ""
        if row.ran_dense:
            table.append(SummaryRow(row.profile, row.kind, note, costs, why_dense(row)))
        else:
            table.append(SummaryRow(row.profile, row.kind, note, [*cells, *costs]))
    return table


def _metric_cell(
    results: Results, row: Row, clips: Sequence[Clip], name: str, metric: Metric
) -> Cell:
    spread = row.metrics[name]
    if spread is None:
        return Cell(MISSING)
    lowest = metric.better == "higher"
    target = worst(spread, metric)
    found = [clip for clip in clips if clip.value(name) == target]
    link = _link(found[0]) if found else None
    return _cell(spread, metric_digits(results, name), "", link, worst_is_low=lowest)


def _ratio_cell(spread: Spread | None, link: Link | None) -> Cell:
    return _cell(spread, 2, "×", link)


def _memory_cell(spread: Spread | None, size: int) -> Cell:
    if spread is None:
        return Cell(MISSING)
    scaled = Spread(spread.median / size, spread.low / size, spread.high / size)
    return _cell(scaled, decimals([scaled.high]))


def _cell(
    spread: Spread | None,
    digits: int,
    unit: str = "",
    link: Link | None = None,
    worst_is_low: bool = True,
) -> Cell:
    if spread is None:
        return Cell(MISSING)
    main = with_unit(spread.median, digits, unit)
    low, high = number(spread.low, digits), number(spread.high, digits)
    if low == high:
        return Cell(main)
    return Cell(main, low, high, link, worst_is_low)


def _slowest(
    pairs: Sequence[tuple[Clip, Clip]], faster: Callable[[Clip, Clip], float | None]
) -> Link | None:
    """The clip that is least faster than its dense one."""
    found = [(each, i) for i, pair in enumerate(pairs) if (each := faster(*pair)) is not None]
    return _link(pairs[min(found)[1]][1]) if found else None


def _link(clip: Clip) -> Link:
    text = f"show the clip: {clip.prompt}, seed {clip.seed}, {clip.profile}"
    return Link(anchor(clip.prompt_id, clip.seed), clip.profile, text)


def gaps(results: Results) -> list[str]:
    """Which metrics have no value for some finished clips, and why, most clips first."""
    found: Counter[tuple[str, str]] = Counter()
    for clip in results.clips:
        for name, note in clip.metrics_note.items():
            if note != IDENTICAL and clip.status == "done":
                found[title_of(name), note] += 1
    return [
        f"{title} has no value for {plural(count, 'clip')}: {note}"
        for (title, note), count in found.most_common()
    ]


TIME_COLUMNS = (
    ("Text encoding", "once a clip"),
    ("Denoising", "all steps"),
    ("of which attention", "the attention calls, without projections"),
    ("Decoding", "the autoencoder"),
    ("First call", "the warm-up of a profile, in no other time"),
    ("of which compiling", "kernels that the first call compiled"),
)


def times(results: Results) -> list[TimeRow]:
    """Median seconds of a clip by stage; the first call is the longest one of the profile."""
    stages: dict[str, tuple[float, float, float | None, float]] = {}
    firsts: dict[str, tuple[float, float]] = {}
    for info in results.profiles:
        clips = done(results, info.name)
        if not clips:
            continue
        attention = [clip.attention_s for clip in clips if clip.attention_s is not None]
        stages[info.name] = (
            median(clip.encode_s for clip in clips),
            median([time for clip in clips for time in clip.denoise_s] or [0.0]),
            median(attention) if attention else None,
            median(clip.decode_s for clip in clips),
        )
        first = max(clips, key=lambda clip: clip.first_call_s)
        firsts[info.name] = (first.first_call_s, first.compile_s)
    longest = max((e + d + v for e, d, _, v in stages.values()), default=0.0) or 1.0
    rows = []
    for name, (encode, denoise, inside, decode) in stages.items():
        share = 100 / longest
        rest = denoise - (inside or 0.0)
        bars = {"attention": (inside or 0.0) * share, "rest": rest * share}
        bars["ends"] = (encode + decode) * share
        cells = [seconds(each) for each in (encode, denoise, inside, decode, *firsts[name])]
        rows.append(TimeRow(name, cells, bars))
    return rows


def plots(results: Results, rows: Sequence[Row]) -> list[Plot]:
    """One plot per metric that at least one profile besides dense has; those that are rated."""
    found = []
    for name, metric in measured(results):
        samples = [
            charts.Sample(row.profile, row.kind, row.denoise_s, quality)
            for row in rows
            if row.denoise_s is not None
            and not row.ran_dense
            and (quality := row.metrics[name]) is not None
        ]
        if not any(sample.name != DENSE for sample in samples):
            continue
        digits = metric_digits(results, name)
        chart = charts.scatter(samples, metric.better)
        front = [point.sample for point in chart.points if point.on_front]
        front.sort(key=lambda sample: sample.time.median)
        found.append(
            Plot(
                metric=name,
                title=title_of(name),
                unit=metric.unit,
                better=metric.better,
                chart=chart,
                texts={s.name: _point_text(s, name, metric.unit, digits) for s in samples},
                digits=digits,
                axis_digits=_axis_digits([tick.value for tick in chart.y_ticks]),
                front=[sample.name for sample in front],
            )
        )
    return found


def _axis_digits(values: Sequence[float]) -> int:
    """As few digits as tell all the ticks of an axis exactly."""
    exact = (
        d for d in range(8) if all(math.isclose(round(v, d), v, abs_tol=1e-12) for v in values)
    )
    return next(exact, 8)


def _point_text(sample: charts.Sample, metric: str, unit: str, digits: int) -> str:
    time, quality = sample.time, sample.quality
    text = f"{sample.name}: {seconds(time.median)}"
    if time.low != time.high:
        text += f" ({seconds(time.low)} to {seconds(time.high)})"
    text += f", {title_of(metric)} {with_unit(quality.median, digits, unit)}"
    if number(quality.low, digits) != number(quality.high, digits):
        text += f" ({number(quality.low, digits)} to {number(quality.high, digits)})"
    return text


def environment(results: Results) -> list[tuple[str, str]]:
    """Titles and texts of the environment, without the command."""
    found = results.environment
    rows = [
        ("Device", found.device),
        ("Processor", found.cpu),
        ("Threads", found.threads),
        ("Dense kernel", found.dense_kernel),
        ("dit_accel", found.dit_accel),
        ("Commit", found.commit),
        ("PyTorch", found.torch),
        ("Triton", found.triton),
        ("diffusers", found.diffusers),
        ("Date", found.date),
    ]
    return [(title, text or MISSING) for title, text in rows]
