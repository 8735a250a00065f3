"""The page's maps over layers and steps, and what became of every attention call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_accel.compare import charts
from dit_accel.compare.numbers import plural
from dit_accel.compare.results import DENSE, Clip, ProfileInfo, Results, Spread, done, outcomes


@dataclass(frozen=True)
class ProfileMaps:
    """A profile's maps over its finished clips, and what became of its attention calls."""

    info: ProfileInfo
    density: charts.HeatMap | None
    error: charts.HeatMap | None
    error_clips: str
    layers: list[str]
    calls: list[tuple[str, int, float]]
    densities: str


def error_scale(results: Results) -> float:
    """Where the colours of every error map end: the largest mean error of a cell; 0 for none."""
    maps = [charts.mean_map([c.error_map for c in done(results, p.name)]) for p in results.profiles]
    return max((v for each in maps for row in each for v in row if v is not None), default=0.0)


def maps(results: Results) -> list[ProfileMaps]:
    """The maps of every profile that has one; dense, which is 1 everywhere, is left out."""
    top = error_scale(results)
    found = []
    for info in results.profiles:
        clips = done(results, info.name)
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
                plural(sum(bool(clip.error_map) for clip in clips), "clip"),
                names if len(names) == count else [f"layer {row}" for row in range(count)],
                _calls(clips),
                _densities(clips),
            )
        )
    return found


def _calls(clips: Sequence[Clip]) -> list[tuple[str, int, float]]:
    """Outcome, calls and share, the commonest first."""
    total = outcomes(clip.calls for clip in clips)
    count = sum(total.values())
    return [(name, calls, calls / count) for name, calls in total.items()]


def _densities(clips: Sequence[Clip]) -> str:
    launched = Spread.of(clip.launched_density for clip in clips)
    kept = Spread.of(clip.kept_density for clip in clips)
    if launched is None:
        return ""
    text = f"launched {launched.median:.3f}"
    return text if kept is None else f"{text}, kept {kept.median:.3f}"
