"""What the page's tables and clips say: every number as text, every worst case with its clip."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from dit_accel.compare import charts
from dit_accel.compare.embed import Videos
from dit_accel.compare.numbers import MISSING, decimals, number, plural, seconds, unit_of_bytes
from dit_accel.compare.results import (
    DENSE,
    Clip,
    Metric,
    ProfileInfo,
    Results,
    Row,
    Spread,
    worst,
)

TITLES = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "flicker": "Flicker",
    "adherence": "Adherence",
    "vbench": "VBench",
}
EXPLAINED = {
    "psnr": "peak signal-to-noise ratio to the dense clip; ∞ means the same pixels",
    "ssim": "structural similarity to the dense clip; 1 means the same",
    "lpips": "perceptual distance to the dense clip; 0 means the same",
    "adherence": "how much of the prompt the clip shows, judged on the clip alone",
}
AGAINST_DENSE = ("psnr", "ssim", "lpips")
"""Metrics whose value for the dense clip itself says nothing."""
DIFFERENCE_TEXT = "absolute difference"
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
    """A column of the summary: its title and the sentence that explains it."""

    title: str
    text: str


@dataclass(frozen=True)
class SummaryRow:
    name: str
    kind: str
    note: str
    cells: list[Cell]


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


@dataclass(frozen=True)
class Shown:
    """One profile's clip within its group; `missing` says why there is no video."""

    profile: str
    video: str | None
    difference: str | None
    time: str
    figures: list[str]
    missing: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Group:
    """The clips of one prompt and seed, dense first."""

    anchor: str
    number: int
    prompt: str
    seed: int
    shown: list[Shown]


@dataclass(frozen=True)
class ProfileMaps:
    """A profile's maps over its finished clips, and what became of its attention calls."""

    info: ProfileInfo
    density: charts.HeatMap | None
    error: charts.HeatMap | None
    layers: list[str]
    calls: list[tuple[str, int, float]]
    densities: str


def anchor(prompt_id: int, seed: int) -> str:
    return f"clip-{prompt_id}-{seed}"


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " ").capitalize())


def facts(results: Results) -> list[str]:
    """The line under the page's title."""
    prompts = len({clip.prompt_id for clip in results.clips})
    seeds = len({clip.seed for clip in results.clips})
    size = f"{results.width}×{results.height}"
    return [
        results.model,
        f"{plural(results.frames, 'frame')} of {size}, {results.fps:g} frames per second",
        plural(results.steps, "step"),
        f"{plural(prompts, 'prompt')} × {plural(seeds, 'seed')}",
        results.environment.device,
        results.environment.date,
    ]


def columns(results: Results) -> list[Column]:
    """The columns of the summary after the profile's name."""
    found = [
        Column("Speed-up", "dense denoising time over this profile's, on the same clip"),
        Column("Attention speed-up", "the same for the time inside attention calls"),
    ]
    for name, metric in _measured(results):
        sentence = EXPLAINED.get(name, "")
        text = f"{sentence}; {TOWARDS[metric.better]}" if sentence else TOWARDS[metric.better]
        found.append(Column(title_of(name), text))
    found.append(
        Column("Density", "share of the attention matrix that was computed, mean over calls")
    )
    found.append(Column("Memory", "peak memory on the GPU"))
    return found


def _measured(results: Results) -> list[tuple[str, Metric]]:
    return [(name, metric) for name, metric in results.metrics.items() if metric.skipped is None]


def summary(results: Results, rows: Sequence[Row]) -> list[SummaryRow]:
    """The summary's rows: the profiles that ran, in their order."""
    ran = [row for row in rows if row.skipped is None]
    dense = _dense_clips(results)
    memory = unit_of_bytes(row.memory_bytes.high for row in ran if row.memory_bytes)
    table = []
    for row in ran:
        clips = _done(results, row.profile)
        speed = _worst_link(clips, lambda clip: _low(speedup(dense, clip)), lowest=True)
        attention = _worst_link(clips, lambda clip: _attention(dense, clip), lowest=True)
        is_dense = row.profile == DENSE
        cells = [
            Cell("1×") if is_dense else _ratio_cell(row.speedup, speed),
            Cell("1×") if is_dense else _ratio_cell(row.attention_speedup, attention),
        ]
        for name, metric in _measured(results):
            cells.append(_metric_cell(results, row, clips, name, metric))
        cells.append(_cell(row.density, decimals([1.0])))
        cells.append(_memory_cell(row.memory_bytes, memory))
        note = f"{row.clips} of {plural(row.clips + row.failed, 'clip')}"
        table.append(SummaryRow(row.profile, row.kind, note if row.failed else "", cells))
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
    return _cell(spread, _metric_digits(results, name), metric.unit, link, worst_is_low=lowest)


def _ratio_cell(spread: Spread | None, link: Link | None) -> Cell:
    return _cell(spread, 2, "×", link)


def _memory_cell(spread: Spread | None, unit: tuple[str, int]) -> Cell:
    name, size = unit
    if spread is None:
        return Cell(MISSING)
    scaled = Spread(spread.median / size, spread.low / size, spread.high / size)
    return _cell(scaled, decimals([scaled.high]), name)


def _cell(
    spread: Spread | None,
    digits: int,
    unit: str = "",
    link: Link | None = None,
    worst_is_low: bool = True,
) -> Cell:
    if spread is None:
        return Cell(MISSING)
    main = _with_unit(spread.median, digits, unit)
    low, high = number(spread.low, digits), number(spread.high, digits)
    if low == high:
        return Cell(main)
    return Cell(main, low, high, link, worst_is_low)


def _with_unit(value: float | None, digits: int, unit: str) -> str:
    text = number(value, digits)
    if value is None or not unit or math.isinf(value):
        return text
    return f"{text}{unit}" if unit in ("×", "%") else f"{text} {unit}"


def _metric_digits(results: Results, name: str) -> int:
    return decimals(clip.metrics.get(name) for clip in results.clips)


def _done(results: Results, profile: str) -> list[Clip]:
    return [c for c in results.clips if c.profile == profile and c.status == "done"]


Dense = dict[tuple[int, int], Clip]


def _dense_clips(results: Results) -> Dense:
    return {(clip.prompt_id, clip.seed): clip for clip in _done(results, DENSE)}


def speedup(dense: Dense, clip: Clip) -> Spread | None:
    """Dense denoising time over this clip's, over the repeats that ran side by side."""
    pair = dense.get((clip.prompt_id, clip.seed))
    if pair is None:
        return None
    times = zip(pair.denoise_s, clip.denoise_s, strict=False)
    return Spread.of(before / after for before, after in times if after > 0)


def _attention(dense: Dense, clip: Clip) -> float | None:
    pair = dense.get((clip.prompt_id, clip.seed))
    if pair is None or pair.attention_s is None or not clip.attention_s:
        return None
    return pair.attention_s / clip.attention_s


def _low(spread: Spread | None) -> float | None:
    return spread.low if spread else None


def _worst_link(
    clips: Sequence[Clip], value: Callable[[Clip], float | None], lowest: bool
) -> Link | None:
    found = [(each, i) for i, clip in enumerate(clips) if (each := value(clip)) is not None]
    if not found:
        return None
    return _link(clips[(min(found) if lowest else max(found))[1]])


def _link(clip: Clip) -> Link:
    text = f"show the clip: {clip.prompt}, seed {clip.seed}, {clip.profile}"
    return Link(anchor(clip.prompt_id, clip.seed), clip.profile, text)


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
        clips = _done(results, info.name)
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
    """One plot per metric that at least one profile besides dense has."""
    found = []
    for name, metric in _measured(results):
        samples = [
            charts.Sample(row.profile, row.kind, row.denoise_s, quality)
            for row in rows
            if row.denoise_s is not None and (quality := row.metrics[name]) is not None
        ]
        if not any(sample.name != DENSE for sample in samples):
            continue
        digits = _metric_digits(results, name)
        chart = charts.scatter(samples, metric.better)
        front = [point.sample.name for point in chart.points if point.on_front]
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
                front=sorted(front, key=lambda each: _time_of(samples, each)),
            )
        )
    return found


def _axis_digits(values: Sequence[float]) -> int:
    """As few digits as tell all the ticks of an axis exactly."""
    exact = (
        d for d in range(8) if all(math.isclose(round(v, d), v, abs_tol=1e-12) for v in values)
    )
    return next(exact, 8)


def _time_of(samples: Iterable[charts.Sample], name: str) -> float:
    return next(sample.time.median for sample in samples if sample.name == name)


def _point_text(sample: charts.Sample, metric: str, unit: str, digits: int) -> str:
    time, quality = sample.time, sample.quality
    text = f"{sample.name}: {seconds(time.median)}"
    if time.low != time.high:
        text += f" ({seconds(time.low)} to {seconds(time.high)})"
    text += f", {title_of(metric)} {_with_unit(quality.median, digits, unit)}"
    if number(quality.low, digits) != number(quality.high, digits):
        text += f" ({number(quality.low, digits)} to {number(quality.high, digits)})"
    return text


def groups(results: Results, videos: Videos) -> list[Group]:
    """The clips by prompt and seed, each with every profile that ran anywhere."""
    ran = {clip.profile for clip in results.clips}
    names = [info.name for info in results.profiles if info.name in ran]
    dense = _dense_clips(results)
    by_key: dict[tuple[int, int], dict[str, Clip]] = {}
    for clip in results.clips:
        by_key.setdefault((clip.prompt_id, clip.seed), {})[clip.profile] = clip
    found = []
    for index, ((prompt_id, seed), clips) in enumerate(sorted(by_key.items()), start=1):
        prompt = next(iter(clips.values())).prompt
        shown = [_shown(results, videos, dense, name, clips.get(name)) for name in names]
        found.append(Group(anchor(prompt_id, seed), index, prompt, seed, shown))
    return found


def _shown(results: Results, videos: Videos, dense: Dense, name: str, clip: Clip | None) -> Shown:
    if clip is None:
        return Shown(name, None, None, "", [], "not run")
    if clip.status == "failed":
        return Shown(name, None, None, "", [], "failed", clip.error or "no message")
    video = videos.id_of(clip.video)
    return Shown(
        name,
        video,
        videos.id_of(clip.difference),
        _time_text(dense, clip),
        _figures(results, clip),
        None if video else "no video",
    )


def _time_text(dense: Dense, clip: Clip) -> str:
    """The speed-up, or where there is none to tell the seconds."""
    ratio = speedup(dense, clip) if clip.profile != DENSE else None
    if ratio is not None:
        return f"{number(ratio.median, 2)}×"
    return seconds(median(clip.denoise_s)) if clip.denoise_s else ""


def _figures(results: Results, clip: Clip) -> list[str]:
    """The numbers above a clip: its metrics and its density; dense is not told its own twin."""
    texts = []
    for name, metric in _measured(results):
        value = clip.value(name)
        if value is not None and not (clip.profile == DENSE and name in AGAINST_DENSE):
            text = _with_unit(value, _metric_digits(results, name), metric.unit)
            texts.append(f"{title_of(name)} {text}")
    if clip.launched_density is not None and clip.profile != DENSE:
        texts.append(f"Density {number(clip.launched_density, 3)}")
    return texts


def choices(results: Results) -> list[str]:
    """The profiles that the clips can be compared with."""
    ran = {clip.profile for clip in results.clips}
    return [info.name for info in results.profiles if info.name in ran and info.name != DENSE]


def error_scale(results: Results) -> float:
    """Where the colours of every error map end: the largest mean error of a cell; 0 for none."""
    maps = [
        charts.mean_map([c.error_map for c in _done(results, p.name)]) for p in results.profiles
    ]
    return max((v for each in maps for row in each for v in row if v is not None), default=0.0)


def maps(results: Results) -> list[ProfileMaps]:
    """The maps of every profile that has one; dense, which is 1 everywhere, is left out."""
    top = error_scale(results)
    found = []
    for info in results.profiles:
        clips = _done(results, info.name)
        density = charts.mean_map([clip.density_map for clip in clips])
        error = charts.mean_map([clip.error_map for clip in clips])
        if info.name == DENSE or not (density or error):
            continue
        names = next((clip.layer_names for clip in clips if clip.layer_names), [])
        count = max(len(density), len(error))
        found.append(
            ProfileMaps(
                info,
                charts.heat_map(density, 1.0),
                charts.heat_map(error, top),
                names if len(names) == count else [f"layer {row}" for row in range(count)],
                _calls(clips),
                _densities(clips),
            )
        )
    return found


def _calls(clips: Sequence[Clip]) -> list[tuple[str, int, float]]:
    """Outcome, calls and share, the commonest first."""
    total: Counter[str] = Counter()
    for clip in clips:
        total.update(clip.calls)
    count = sum(total.values())
    return [(name, calls, calls / count) for name, calls in total.most_common() if calls]


def _densities(clips: Sequence[Clip]) -> str:
    launched = Spread.of(clip.launched_density for clip in clips)
    kept = Spread.of(clip.kept_density for clip in clips)
    if launched is None:
        return ""
    text = f"launched {launched.median:.3f}"
    return text if kept is None else f"{text}, kept {kept.median:.3f}"


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
