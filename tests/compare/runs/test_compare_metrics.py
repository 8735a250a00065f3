"""Metrics against their definitions, written again here."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_accel.compare import adherence, vbench
from dit_accel.compare.metrics import NO_DENSE, check_metrics, choose_metrics, flicker
from dit_accel.compare.results import IDENTICAL
from dit_accel.errors import DitAccelError


def videos(frames: int = 4, height: int = 20, width: int = 27) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    ramp = np.linspace(20, 220, width)[None, None, :, None] * np.ones((frames, height, 1, 3))
    first = (ramp + random.normal(0, 12, ramp.shape)).clip(0, 255).astype(np.uint8)
    second = (ramp + random.normal(0, 20, ramp.shape)).clip(0, 255).astype(np.uint8)
    return first, second


def naive_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One channel of one frame by the paper: Gaussian window 11, sigma 1.5, mirrored edges."""
    axis = np.arange(11) - 5
    window = np.exp(-(axis**2) / (2 * 1.5**2))
    window = np.outer(window, window) / np.outer(window, window).sum()

    def blur(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, 5, mode="reflect")
        out = np.zeros_like(x)
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                out[i, j] = (padded[i : i + 11, j : j + 11] * window).sum()
        return out

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = a.astype(float), b.astype(float)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    table = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(table.mean())


def test_psnr_and_ssim_are_their_definitions():
    video, dense = videos()
    measures = choose_metrics(["psnr", "ssim"])
    values, notes = measures.of(video, dense, "a")
    error = np.mean((video.astype(float) - dense.astype(float)) ** 2)
    assert values["psnr"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    expected = np.mean(
        [
            naive_ssim(a[..., c], b[..., c])
            for a, b in zip(video, dense, strict=True)
            for c in range(3)
        ]
    )
    assert values["ssim"] == pytest.approx(expected, abs=2e-3)
    assert notes == {}


def test_identical_clips_and_clips_without_dense():
    video, _ = videos()
    measures = choose_metrics(["psnr", "ssim", "flicker"])
    values, notes = measures.of(video, video.copy(), "a")
    assert values["psnr"] is None and notes == {"psnr": IDENTICAL}
    assert values["ssim"] == pytest.approx(1.0)
    values, notes = measures.of(video, None, "a")
    assert values["psnr"] is None and notes["psnr"] == NO_DENSE and values["flicker"] is not None


def test_flicker_by_enumeration():
    video, _ = videos(5, 3, 4)
    total, count = 0.0, 0
    for t in range(1, 4):
        for y in range(3):
            for x in range(4):
                for c in range(3):
                    near = (int(video[t - 1, y, x, c]) + int(video[t + 1, y, x, c])) / 2
                    total, count = total + abs(video[t, y, x, c] - near), count + 1
    assert flicker(video) == pytest.approx(total / count, rel=1e-5)
    steady = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.full((5, 3, 4, 3), 9, np.uint8)
    assert flicker(steady) == 0.0
    assert flicker(video[:2]) is None


def test_unknown_metrics_name_the_nearest():
    with pytest.raises(DitAccelError, match="'psnr'"):
        check_metrics(["ssim", "pnsr"])
    assert check_metrics(["ssim", "psnr", "ssim"]) == ["ssim", "psnr"]


def test_what_cannot_run_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("dit_accel.compare.metrics.find_spec", lambda name: None)
    measures = choose_metrics(["lpips", "vbench", "adherence", "flicker"], demo=False)
    assert list(measures.running) == ["flicker"]
    skipped = {name: metric.skipped for name, metric in measures.metrics.items()}
    assert "torchvision" in skipped["lpips"]
    assert "vbench" in skipped["vbench"] and "demo" in skipped["adherence"]
    assert skipped["flicker"] is None


def test_lpips_without_weights_is_skipped(monkeypatch):
    import torchmetrics.image.lpip as lpip

    def refuse(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("dit_accel.compare.metrics.find_spec", lambda name: object())
    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", refuse)
    reason = choose_metrics(["lpips"]).metrics["lpips"].skipped
    assert reason is not None and reason.endswith("no route to host")


def test_adherence_is_the_share_of_attributes_seen():
    sys.path.insert(0, str(Path(__file__).parents[3] / "samples" / "train_demo"))
    try:
        import random

        from captions import caption
        from render import render, to_uint8
        from scenes import sample_simple
    finally:
        sys.path.pop(0)
    rng = random.Random(5)
    scenes = [sample_simple(rng) for _ in range(4)]
    clips = to_uint8(render(scenes, 17, 96, 96)).numpy()
    found = [adherence.adherence(c, caption(s)) for c, s in zip(clips, scenes, strict=True)]
    assert found == [(1.0, None)] * 4
    words = caption(scenes[0]).split()
    turned = {"left": "right", "right": "left", "up": "down", "down": "up"}
    wrong = " ".join(turned.get(word, word) for word in words)
    assert adherence.adherence(clips[0], wrong) == (0.75, None)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a cat walks on the grass", "language"),
        ("a red circle moves left behind a pillar over a plain gray background", "pillar"),
        ("a red circle moves left and a blue star moves up over a black background", "and"),
        ("a red circle moves left over a black background while the camera pans up", "pans"),
    ],
)
def test_prompts_that_the_checker_is_not_made_for(prompt, why):
    value, note = adherence.adherence(np.zeros((5, 32, 32, 3), np.uint8), prompt)
    assert value is None and why in note


FAKE = """#!{python}
import json, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
dimension = options["--dimension"]
assert sys.argv[1] == "evaluate" and options["--mode"] == "custom_input"
if dimension == "aesthetic_quality":
    print("urlopen error: no route to host", file=sys.stderr)
    sys.exit(0)
videos = sorted(pathlib.Path(options["--videos_path"]).glob("*.mp4"), reverse=True)
scale = 100 if dimension == "imaging_quality" else 1
score = lambda video: scale * (0.4 + 0.1 * int(video.stem))
rows = [{{"video_path": str(v), "video_results": score(v)}} for v in videos]
out = pathlib.Path(options["--output_path"])
out.mkdir(parents=True)
(out / "results_eval_results.json").write_text(json.dumps({{dimension: [0.5, rows]}}))
"""


def test_vbench_scores_come_from_its_own_command(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "vbench"
    command.parent.mkdir()
    command.write_text(FAKE.format(python=sys.executable))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    clips = []
    for index in range(2):
        clips.append(tmp_path / f"clip{index}.mp4")
        clips[-1].write_bytes(b"video")
    assert vbench.missing() is None
    scores = vbench.scores(clips)
    assert [value for value, _ in scores] == pytest.approx([0.4, 0.5])
    assert all("aesthetic_quality: urlopen error: no route to host" in note for _, note in scores)
    json.dumps(scores)
