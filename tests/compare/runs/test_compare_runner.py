"""Whole comparisons of a small pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.compare.api import compare
from dit_accel.compare.external import EXTERNALS
from dit_accel.compare.results import DENSE, Results, summarise
from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers.attachment import attachment_of
from dit_accel.metrics import psnr

PROMPTS = ["a red circle moves left", "a circle moves"]
METRICS = ["psnr", "ssim", "flicker"]


class Calls:
    """Notes every call of a pipeline, and lets chosen ones fail."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, int, str]] = []
        self.fail: Any = lambda number: False
        stock = type(pipe).__call__

        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            enabled = attachment_of(pipe.transformer)
            name = enabled.session.policy.profile.name if enabled else "stock"
            steps, seed = kwargs["num_inference_steps"], kwargs["generator"].initial_seed()
            self.seen.append((kwargs["prompt"], seed, steps, name))
            if self.fail(len(self.seen)):
                raise RuntimeError("out of luck")
            return stock(pipe, *args, **kwargs)

        call.__signature__ = __import__("inspect").signature(stock)
        monkeypatch.setattr(type(pipe), "__call__", call)


class Listener:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.said: list[str] = []

    def steps(self, total: int) -> None:
        self.total = total

    def at(self, text: str) -> None: ...

    def step(self) -> None:
        self.done += 1

    def say(self, text: str) -> None:
        self.said.append(text)


def clip_of(results: Results, profile: str, prompt_id: int = 0, seed: int = 0) -> Any:
    (clip,) = [
        c for c in results.clips
        if (c.profile, c.prompt_id, c.seed) == (profile, prompt_id, seed)
    ]  # fmt: skip
    return clip


def test_dense_against_dense_is_the_same_clip_at_the_same_speed(pipe, call, tmp_path):
    results = compare(
        pipe, PROMPTS[:1], tmp_path, ["dense", "dense"], metrics=METRICS, repeats=5, **call
    )
    _, again = summarise(results)
    assert again.profile == "dense again"
    assert again.metrics["psnr"].median == np.inf
    assert again.metrics["ssim"].median == pytest.approx(1.0)
    assert again.speedup.low * 0.8 <= 1.0 <= again.speedup.high * 1.25
    assert len(clip_of(results, "dense again").denoise_s) == 5
    assert (tmp_path / "index.html").stat().st_size > 10_000


def test_clips_are_what_the_pipeline_makes_with_the_profile(pipe, call, sparse, tmp_path, generate):
    results = compare(
        pipe, PROMPTS, tmp_path, [sparse], seeds=[3], metrics=METRICS, breakeven=False, **call
    )
    assert "_dit_accel_session" not in pipe.transformer.__dict__
    dense = generate(pipe, PROMPTS[1], 3)
    from dit_accel.compare.specs import load_spec

    pipe.enable_sparse_attention(load_spec(sparse, breakeven=False).profile)
    fast = generate(pipe, PROMPTS[1], 3)
    report = pipe.sparse_attention_report().to_dict()["self"]
    clip = clip_of(results, sparse, 1, 3)
    assert clip.metrics["psnr"] == pytest.approx(psnr(list(fast), list(dense)), abs=1e-3)
    assert clip.calls == {"sparse": report["sparse"], "dense: profile": report["dense"]}
    shares = (report["sparse"] * report["launched_density"] + report["dense"]) / report["calls"]
    assert clip.launched_density == pytest.approx(shares) and clip.launched_density < 0.6
    assert (
        clip.density_map
        == [
            [1.0, pytest.approx(report["launched_density"])]
            + [pytest.approx(report["launched_density"])]
        ]
        * 2
    )
    assert clip.layer_names == ["blocks.0.attn1", "blocks.1.attn1"]
    assert (results.frames, results.height, results.width, results.steps) == (9, 64, 64, 3)
    dense_clip = clip_of(results, DENSE, 1, 3)
    assert dense_clip.launched_density == 1.0 and dense_clip.attention_s < dense_clip.denoise_s[0]


def test_methods_take_turns_after_a_warm_up_of_their_own(pipe, call, sparse, tmp_path, monkeypatch):
    calls, listener = Calls(pipe, monkeypatch), Listener()
    arguments = {**call, "num_inference_steps": 5}
    results = compare(
        pipe, PROMPTS[:1], tmp_path, [sparse], seeds=[1, 2], metrics=["flicker"], repeats=2,
        watcher=listener, **arguments,
    )  # fmt: skip
    order = [(seed, steps, name) for _, seed, steps, name in calls.seen]
    turn = [(1, 5, "dense"), (1, 5, sparse)]
    probe = [(1, 5, sparse)]
    warm = [(1, 4, "dense"), turn[0], (1, 4, sparse), turn[1]]
    assert order == warm + turn + probe + [(2, *rest) for _, *rest in turn * 2]
    assert listener.done == listener.total == sum(steps for _, steps, _ in order)
    assert (
        clip_of(results, sparse, seed=1).error_map
        and not clip_of(results, sparse, seed=2).error_map
    )
    assert results.warmup_steps == 4 and clip_of(results, DENSE, seed=2).first_call_s > 0


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    pipe, call, sparse, tmp_path, monkeypatch
):
    calls = Calls(pipe, monkeypatch)
    options = {"metrics": ["psnr"], "repeats": 1, "breakeven": False, **call}
    calls.fail = lambda number: number == 7
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(pipe, PROMPTS, tmp_path, [sparse], **options)
    kept = Results.from_json((tmp_path / "results.json").read_text())
    assert [(c.prompt_id, c.profile) for c in kept.clips] == [(0, DENSE), (0, sparse)]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "clips").iterdir()}
    calls.seen.clear()
    calls.fail = lambda number: False
    results = compare(pipe, PROMPTS, tmp_path, [sparse], **options)
    assert {prompt for prompt, *_ in calls.seen} == {PROMPTS[1]}
    assert len(results.clips) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    calls.seen.clear()
    assert compare(pipe, PROMPTS, tmp_path, [sparse], **options).clips == results.clips
    assert calls.seen == []


def test_one_more_profile_is_measured_against_the_kept_dense_clip(pipe, call, tmp_path, sparse):
    options = {"metrics": ["psnr"], "repeats": 1, "breakeven": False, **call}
    compare(pipe, PROMPTS[:1], tmp_path, ["dense"], **options)
    with pytest.raises(DitAccelError, match="--resume"):
        compare(pipe, PROMPTS[:1], tmp_path, ["dense", sparse], **options)
    more = compare(pipe, PROMPTS[:1], tmp_path, ["dense", sparse], resume=True, **options)
    whole = compare(pipe, PROMPTS[:1], tmp_path / "whole", ["dense", sparse], **options)
    assert clip_of(more, sparse).metrics == clip_of(whole, sparse).metrics


def test_keep_going_records_what_failed(pipe, call, sparse, tmp_path, monkeypatch):
    calls, listener = Calls(pipe, monkeypatch), Listener()
    calls.fail = lambda number: number == 2  # the first timed dense run
    results = compare(
        pipe, PROMPTS, tmp_path, [sparse], metrics=METRICS, repeats=1, breakeven=False,
        keep_going=True, watcher=listener, **call,
    )  # fmt: skip
    failed = clip_of(results, DENSE)
    assert (failed.status, failed.error) == ("failed", "RuntimeError: out of luck")
    assert any("out of luck" in line for line in listener.said)
    alone = clip_of(results, sparse)
    assert alone.status == "done" and alone.metrics["psnr"] is None
    assert "no dense clip" in alone.metrics_note["psnr"] and alone.metrics["flicker"] is not None
    assert summarise(results)[1].failed == 0 and summarise(results)[0].failed == 1
    assert clip_of(results, sparse, 1).metrics["psnr"] is not None
    assert "out of luck" in (tmp_path / "index.html").read_text()


def test_other_methods_run_and_leave_nothing_behind(pipe, call, tmp_path, generate, monkeypatch):
    monkeypatch.setattr("dit_accel.compare.external.find_spec", lambda name: None)
    before = generate(pipe)
    names = ["diffusers-pab", "diffusers-first-block:threshold=5.0", "diffusers-magcache",
             "diffusers-fastercache", "diffusers-taylorseer", "cache-dit"]  # fmt: skip
    listener = Listener()
    results = compare(
        pipe, PROMPTS[:1], tmp_path, ["dense"], names, metrics=["psnr"], repeats=1,
        watcher=listener, **call,
    )  # fmt: skip
    assert np.array_equal(generate(pipe), before)
    skipped = {info.name: info.skipped for info in results.profiles if info.skipped}
    assert list(skipped) == ["cache-dit"] and "not installed" in skipped["cache-dit"]
    assert any("cache-dit" in line for line in listener.said)
    done = {clip.profile: clip for clip in results.clips}
    assert set(done) == {DENSE, *names[:-1]}
    # A threshold this high serves every step from the first one's blocks.
    assert done[names[1]].metrics["psnr"] is not None
    assert done[names[1]].launched_density is None and done[names[1]].attention_s is None


def test_a_method_that_fails_is_listed_with_the_reason(pipe, call, tmp_path, monkeypatch):
    def broken(pipe: Any, parameters: dict[str, Any]) -> Any:
        raise IndexError("tuple index out of range")

    from dataclasses import replace

    monkeypatch.setitem(
        EXTERNALS, "diffusers-pab", replace(EXTERNALS["diffusers-pab"], enabled=broken)
    )
    results = compare(
        pipe, PROMPTS[:1], tmp_path, ["dense"], ["diffusers-pab"], metrics=[], repeats=1, **call
    )
    (info,) = [info for info in results.profiles if info.kind == "external"]
    assert "IndexError: tuple index out of range" in info.skipped
    assert [clip.profile for clip in results.clips] == [DENSE]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profiles": ["balancd"]}, "'balanced'"),
        ({"against": ["diffuser-pab"]}, "'diffusers-pab'"),
        ({"against": ["diffusers-first-block:treshold=1.0"]}, "'threshold'"),
        ({"metrics": ["pnsr"]}, "'psnr'"),
        ({"repeats": 0}, "repeats"),
        ({"profiles": ["fast", "fast"]}, "'fast'"),
        ({"seeds": []}, "seed"),
    ],
)
def test_requests_that_make_no_sense(pipe, call, tmp_path, options, words):
    with pytest.raises(DitAccelError, match=words):
        compare(pipe, PROMPTS, tmp_path / "out", **{"metrics": ["psnr"], **options}, **call)


def test_a_picture_model_is_compared_too(build, tmp_path):
    tiny = build("flux")
    embeds = dict(tiny.inputs)
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    tiny.pipe.vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    stock = type(tiny.pipe).__call__

    class Prompted(type(tiny.pipe)):
        """A pipeline whose every prompt means the same embeddings."""

        def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
            return stock(self, **{**embeds, **kwargs})

    Prompted.__call__.__signature__ = __import__("inspect").signature(stock)
    tiny.pipe.__class__ = Prompted
    results = compare(
        tiny.pipe, ["any"], tmp_path, ["sliding_tile:window=1,1,1,tile=1,4,4"], metrics=METRICS,
        breakeven=False, repeats=1, num_inference_steps=2,
    )  # fmt: skip
    assert results.frames == 1 and len(results.clips) == 2
    assert clip_of(results, "sliding_tile:window=1,1,1,tile=1,4,4").launched_density < 0.9
    assert clip_of(results, DENSE).metrics["flicker"] is None
