"""The page's clips: prompt by prompt, every profile's video with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dit_accel.compare.embed import Videos
from dit_accel.compare.numbers import number, seconds
from dit_accel.compare.page_words import (
    AGAINST_DENSE,
    Dense,
    anchor,
    measured,
    metric_digits,
    speedup,
    title_of,
    with_unit,
)
from dit_accel.compare.results import DENSE, Clip, Results, Row, dense_clips
from dit_accel.compare.store import HEAT_LEVELS

DIFFERENCE_TEXT = f"black: the same; brightest: {HEAT_LEVELS} of 255 levels apart, or more"


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


def groups(results: Results, rows: Sequence[Row], videos: Videos) -> list[Group]:
    """The clips by prompt and seed, each with every profile that ran anywhere."""
    ran = {clip.profile for clip in results.clips}
    names = [info.name for info in results.profiles if info.name in ran]
    dense, unrated = dense_clips(results), _unrated(rows)
    by_key: dict[tuple[int, int], dict[str, Clip]] = {}
    for clip in results.clips:
        by_key.setdefault((clip.prompt_id, clip.seed), {})[clip.profile] = clip
    found = []
    for index, ((prompt_id, seed), clips) in enumerate(sorted(by_key.items()), start=1):
        prompt = next(iter(clips.values())).prompt
        shown = [
            _shown(results, videos, dense, name, clips.get(name), name not in unrated)
            for name in names
        ]
        found.append(Group(anchor(prompt_id, seed), index, prompt, seed, shown))
    return found


def _unrated(rows: Sequence[Row]) -> set[str]:
    return {row.profile for row in rows if row.ran_dense}


def _shown(
    results: Results, videos: Videos, dense: Dense, name: str, clip: Clip | None, rated: bool
) -> Shown:
    if clip is None:
        return Shown(name, None, None, "", [], "not run")
    if clip.status == "failed":
        return Shown(name, None, None, "", [], "failed", clip.error or "no message")
    video = videos.id_of(clip.video)
    return Shown(
        name,
        video,
        videos.id_of(clip.difference),
        _time_text(dense, clip) if rated else "ran dense",
        _figures(results, clip) if rated else [],
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
    for name, metric in measured(results):
        value = clip.value(name)
        if value is not None and not (clip.profile == DENSE and name in AGAINST_DENSE):
            text = with_unit(value, metric_digits(results, name), metric.unit)
            texts.append(f"{title_of(name)} {text}")
    if clip.launched_density is not None and clip.profile != DENSE:
        texts.append(f"Density {number(clip.launched_density, 3)}")
    return texts


def choices(results: Results, rows: Sequence[Row]) -> list[str]:
    """The profiles that the clips can be compared with; those that ran dense come last."""
    ran = {clip.profile for clip in results.clips} - {DENSE}
    names = [info.name for info in results.profiles if info.name in ran]
    last = _unrated(rows)
    return sorted(names, key=lambda name: name in last)
