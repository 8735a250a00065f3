"""The data of a comparison: through JSON and back, and the summary by its definitions."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace

import pytest

from dit_accel.compare.results import (
    IDENTICAL,
    Clip,
    Environment,
    Metric,
    ProfileInfo,
    Results,
    Spread,
    summarise,
    worst,
)
from dit_accel.errors import DitAccelError


def make_results() -> Results:
    environment = Environment(*["x"] * 11)
    clips = []
    for prompt_id in range(3):
        for profile, slow, psnr in (("dense", 4.0, None), ("fast", 2.0, 30.0 + prompt_id)):
            clips.append(
                Clip(
                    prompt=f'prompt {prompt_id}, "quoted" – é',
                    prompt_id=prompt_id,
                    seed=7,
                    profile=profile,
                    denoise_s=[slow + 0.1 * prompt_id, slow + 0.2],
                    attention_s=slow / 2,
                    launched_density=1.0 if profile == "dense" else 0.3 + 0.1 * prompt_id,
                    metrics={"psnr": psnr, "ssim": 1.0},
                    metrics_note={} if psnr else {"psnr": IDENTICAL},
                    density_map=[[None, 0.5], [1.0, 0.25]],
                    error_map=[[0.0, None]],
                    layer_names=["a", "b"],
                    calls={"sparse": 3, "dense: profile": 1},
                )
            )
    clips.append(Clip("p", 3, 7, "fast", status="failed", error="RuntimeError: no"))
    return Results(
        model="m",
        frames=5,
        height=16,
        width=32,
        steps=4,
        fps=8.0,
        environment=environment,
        profiles=[
            ProfileInfo("dense", "dense", "stock"),
            ProfileInfo("fast", "profile", "[profile]"),
            ProfileInfo("cache-dit", "external", "a cache", "not installed"),
        ],
        metrics={"psnr": Metric("dB", "higher"), "ssim": Metric("", "higher", "why not")},
        clips=clips,
        warmup_steps=2,
    )


def test_json_gives_back_the_same_results():
    results = make_results()
    text = results.to_json()
    assert Results.from_json(text) == results
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["clips"][1]["metrics"]["psnr"] == 30.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 99}', "nonsense"])
def test_other_text_is_refused(text):
    with pytest.raises(DitAccelError):
        Results.from_json(text)


def test_speed_up_is_paired_by_prompt_and_repeat():
    results = make_results()
    dense, fast, skipped = summarise(results)
    ratios = [
        (4.0 + 0.1 * p) / (2.0 + 0.1 * p) if repeat == 0 else 4.2 / 2.2
        for p in range(3)
        for repeat in range(2)
    ]
    assert fast.speedup.median == pytest.approx(statistics.median(ratios))
    assert fast.speedup.low == pytest.approx(min(ratios))
    assert fast.speedup.high == pytest.approx(max(ratios))
    assert fast.attention_speedup == Spread(2.0, 2.0, 2.0)
    assert dense.speedup == Spread(1.0, 1.0, 1.0)
    assert (fast.clips, fast.failed) == (3, 1)
    assert skipped.skipped == "not installed" and skipped.speedup is None and skipped.clips == 0


def test_metrics_density_and_worst_clip():
    results = make_results()
    dense, fast, _ = summarise(results)
    assert fast.metrics["psnr"] == Spread(31.0, 30.0, 32.0)
    assert worst(fast.metrics["psnr"], results.metrics["psnr"]) == 30.0
    assert worst(Spread(1, 0, 3), Metric("", "lower")) == 3
    assert dense.metrics["psnr"].median == math.inf
    assert fast.density.median == pytest.approx(0.4)
    assert dense.memory_bytes is None


@pytest.mark.parametrize(
    ("calls", "cross", "kind", "name", "dense"),
    [
        ({"dense: below break-even": 8}, {}, "profile", "fast", True),
        ({"dense: profile": 8}, {"dense: profile": 8}, "profile", "fast", True),
        ({"dense: profile": 8, "sparse": 1}, {}, "profile", "fast", False),
        ({"dense: profile": 8, "reused": 1}, {}, "profile", "fast", False),
        ({"dense: profile": 8}, {"reused": 4}, "profile", "fast", False),
        ({}, {}, "profile", "fast", False),
        ({}, {}, "external", "fast", False),
        ({"dense: profile": 8}, {}, "profile", "dense again", False),
    ],
)
def test_what_never_ran_sparse_ran_dense(calls, cross, kind, name, dense):
    results = make_results()
    clips = [
        replace(clip, profile=name, calls=calls, cross_calls=cross)
        for clip in results.clips
        if clip.profile == "fast"
    ]
    profiles = [ProfileInfo(name, kind, "")]
    (row,) = summarise(replace(results, clips=clips, profiles=profiles))
    assert row.ran_dense is dense
    assert row.calls == {outcome: 3 * count for outcome, count in calls.items()}
    assert not summarise(results)[0].ran_dense


def test_without_a_dense_partner_there_is_no_ratio():
    results = make_results()
    alone = replace(results, clips=[c for c in results.clips if c.profile == "fast"])
    rows = summarise(alone)
    assert rows[1].speedup is None and rows[1].denoise_s is not None
