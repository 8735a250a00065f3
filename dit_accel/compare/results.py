"""What a comparison measured: plain data that survives JSON, and its summary per profile.

`Results` is all that the page needs. Times are in seconds, memory in bytes, densities and
relative errors are fractions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from dit_accel.errors import DitAccelError

SCHEMA = 1
"""Version of the JSON layout."""
DENSE = "dense"
"""Name of the profile that every other one is paired with."""
AGAIN = "dense again"
"""Name of a second dense one, which shows how far measurements of the same thing lie apart."""
IDENTICAL = "identical"
"""Note of a metric that has no finite value because both videos are the same (PSNR)."""


@dataclass(frozen=True)
class Environment:
    """What the numbers were measured with; every field is a text for people."""

    command: str
    commit: str
    device: str
    cpu: str
    threads: str
    torch: str
    triton: str
    diffusers: str
    dit_accel: str
    dense_kernel: str
    date: str


@dataclass(frozen=True)
class ProfileInfo:
    """One way to run the model.

    Args:
        name: as it stands in the tables; "dense" is the reference.
        kind: "dense", "profile" (ours) or "external" (another project's method).
        text: the profile in TOML, or a sentence about an external method.
        skipped: why it did not run at all; None where it ran.
    """

    name: str
    kind: Literal["dense", "profile", "external"]
    text: str
    skipped: str | None = None


@dataclass(frozen=True)
class Metric:
    """A measure of a clip: its unit ("" for none), which way is better, and why it was skipped."""

    unit: str
    better: Literal["higher", "lower"]
    skipped: str | None = None


@dataclass(frozen=True)
class Clip:
    """One (prompt, seed, profile) triple.

    Args:
        prompt_id: number of the prompt in its file, from 0.
        status: "failed" clips have `error` and no measurements.
        video, difference: paths relative to the out folder (mp4); `difference` is the heat map of
            the absolute difference to the dense clip, None for dense.
        denoise_s: timed repeats of the denoising loop, without text encoding and decoding.
        first_call_s: denoising of the profile's first call in this process (the warm-up of at
            most `warmup_steps` steps), with whatever it compiles; it is in no other time.
        compile_s: the part of it that the report calls compilation.
        encode_s, decode_s: text encoding and autoencoder, medians of the repeats; 0 where the
            pipeline has none.
        attention_s: time in attention calls, median of the repeats; None for external methods.
        peak_memory_bytes: peak of the GPU's memory while denoising, None on a CPU.
        launched_density: mean over all self-attention calls: launched density of a sparse one,
            1 for a dense one, 0 for a reused one. None for external methods.
        kept_density: the same with the token pairs that entered the softmax.
        metrics: by name; None where there is no finite value, `metrics_note` then says why.
        density_map: [layers][steps] of the launched density of self-attention, None where a layer
            made no call at that step; empty for external methods.
        error_map: [layers][steps], relative L2 error of a layer's attention output against dense
            attention on the same inputs; empty where it was not measured.
        layer_names: the rows of both maps.
        calls, cross_calls: self- and cross-attention calls by outcome: "sparse", "reused",
            "dense: <reason>".
    """

    prompt: str
    prompt_id: int
    seed: int
    profile: str
    status: Literal["done", "failed"] = "done"
    error: str | None = None
    video: str | None = None
    difference: str | None = None
    denoise_s: list[float] = field(default_factory=list)
    first_call_s: float = 0.0
    compile_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    attention_s: float | None = None
    peak_memory_bytes: int | None = None
    launched_density: float | None = None
    kept_density: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    metrics_note: dict[str, str] = field(default_factory=dict)
    density_map: list[list[float | None]] = field(default_factory=list)
    error_map: list[list[float | None]] = field(default_factory=list)
    layer_names: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    cross_calls: dict[str, int] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """The metric, `inf` where the videos are identical and the metric has no finite value."""
        if self.metrics_note.get(metric) == IDENTICAL:
            return math.inf
        return self.metrics.get(metric)


@dataclass(frozen=True)
class Results:
    """A whole comparison; `height` and `width` in pixels, `fps` in frames per second."""

    model: str
    frames: int
    height: int
    width: int
    steps: int
    fps: float
    environment: Environment
    profiles: list[ProfileInfo]
    metrics: dict[str, Metric]
    clips: list[Clip]
    warmup_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, finite numbers only, with the version of its layout."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The inverse of `to_json`; raises DitAccelError for text that is no results file."""
        try:
            data = json.loads(text)
            if data.pop("schema", None) != SCHEMA:
                raise DitAccelError(f"expected results of layout {SCHEMA}; compare again.")
            data["environment"] = Environment(**data["environment"])
            data["profiles"] = [ProfileInfo(**each) for each in data["profiles"]]
            data["metrics"] = {name: Metric(**each) for name, each in data["metrics"].items()}
            data["clips"] = [Clip(**each) for each in data["clips"]]
            return cls(**data)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DitAccelError(f"no results of a comparison: {error}") from error


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values (`inf` is possible for PSNR)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of the values that are there; None where there are none."""
        found = [value for value in values if value is not None]
        return cls(statistics.median(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class Row:
    """One profile over all clips.

    Args:
        clips, failed: how many clips were finished, and how many failed.
        speedup: denoising of dense over denoising of this profile, over all pairs of the same
            prompt, seed and repeat; None where dense did not finish.
        attention_speedup: the same for the attention calls, one pair a clip.
        denoise_s, attention_s: seconds of a clip.
        metrics: by name; the worst clip is `low` where higher is better, else `high`.
        density, kept: launched and kept density.
        memory_bytes: peak memory.
        calls: self-attention calls of all clips by outcome, see `Clip`.
        ran_dense: a profile of ours that ran nothing sparse and reused nothing: its clips are dense
            ones, and its ratios and metrics tell of noise alone, so that it is not to be rated.
    """

    profile: str
    kind: str
    skipped: str | None
    clips: int
    failed: int
    speedup: Spread | None
    attention_speedup: Spread | None
    denoise_s: Spread | None
    attention_s: Spread | None
    metrics: dict[str, Spread | None]
    density: Spread | None
    kept: Spread | None
    memory_bytes: Spread | None
    calls: dict[str, int]
    ran_dense: bool


def summarise(results: Results) -> list[Row]:
    """One row per profile, in the profiles' order."""
    dense = dense_clips(results)
    return [_row(info, results, dense) for info in results.profiles]


def worst(spread: Spread, metric: Metric) -> float:
    """The worst clip's value."""
    return spread.low if metric.better == "higher" else spread.high


def done(results: Results, profile: str) -> list[Clip]:
    """The profile's finished clips."""
    return [c for c in results.clips if c.profile == profile and c.status == "done"]


def dense_clips(results: Results) -> dict[tuple[int, int], Clip]:
    """The finished dense clips by prompt and seed."""
    return {(clip.prompt_id, clip.seed): clip for clip in done(results, DENSE)}


def ratios(dense: Clip, other: Clip) -> list[float]:
    """Denoising time of dense over another clip's, over the repeats that ran side by side."""
    return [a / b for a, b in zip(dense.denoise_s, other.denoise_s, strict=False) if b > 0]


def _row(info: ProfileInfo, results: Results, dense: dict[tuple[int, int], Clip]) -> Row:
    clips = done(results, info.name)
    pairs = [(dense[key], c) for c in clips if (key := (c.prompt_id, c.seed)) in dense]
    failed = [c for c in results.clips if c.profile == info.name and c.status == "failed"]
    calls = outcomes(clip.calls for clip in clips)
    ours = info.kind == "profile" and info.name != AGAIN
    seen = {*calls, *outcomes(clip.cross_calls for clip in clips)}
    return Row(
        profile=info.name,
        kind=info.kind,
        skipped=info.skipped,
        clips=len(clips),
        failed=len(failed),
        speedup=Spread.of(ratio for pair in pairs for ratio in ratios(*pair)),
        attention_speedup=Spread.of(ratio(a.attention_s, b.attention_s) for a, b in pairs),
        denoise_s=Spread.of(time for clip in clips for time in clip.denoise_s),
        attention_s=Spread.of(clip.attention_s for clip in clips),
        metrics={name: Spread.of(c.value(name) for c in clips) for name in results.metrics},
        density=Spread.of(clip.launched_density for clip in clips),
        kept=Spread.of(clip.kept_density for clip in clips),
        memory_bytes=Spread.of(clip.peak_memory_bytes for clip in clips),
        calls=calls,
        ran_dense=ours and bool(calls) and not seen & {"sparse", "reused"},
    )


def outcomes(calls: Iterable[dict[str, int]]) -> dict[str, int]:
    """Calls by outcome over several clips, the commonest first."""
    total: Counter[str] = Counter()
    for each in calls:
        total.update(each)
    return {outcome: count for outcome, count in total.most_common() if count}


def ratio(dense: float | None, other: float | None) -> float | None:
    """One time over another; None where either is not there."""
    return dense / other if dense is not None and other else None
