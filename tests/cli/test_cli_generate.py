"""`dit-accel generate` from prompt to file with a tiny random model."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_accel.video import read_video

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--height", 32, "--width", 48, "--frames", 5, "--steps", 2, "--device", "cpu")


@pytest.mark.parametrize(
    ("out", "frames"), [("x.mp4", 5), ("x.gif", 5), ("frames", 5), ("x.png", 1)]
)
def test_formats(cli, tiny_wan: Path, out: str, frames: int):
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL, "--out", out)
    assert code == 0, text
    assert "self-attention" in text and "Denoising" in text
    assert f"Wrote {out} (5 frames, 48x32, 16 fps)" in text
    made = read_video(out)
    assert len(made) == frames and os.listdir() == [out]
    assert made[0].shape == ((32, 48, 3) if frames > 1 else (2 * 32, 3 * 48, 3))


def test_report_and_default_name(cli, tiny_wan: Path):
    args = ("--model", tiny_wan, *SMALL, "--profile", "dense", "--seed", 3, "--report", "r.json")
    code, text = cli("generate", "A red circle, moves left!", *args)
    assert code == 0, text
    assert sorted(os.listdir()) == ["a-red-circle-moves-left-3.mp4", "r.json"]
    data = json.loads(Path("r.json").read_text())
    assert data["run"]["seed"] == 3 and data["run"]["num_frames"] == 5
    assert data["run"]["pipeline"] == "WanPipeline" and data["run"]["dtype"] == "float32"
    report = data["report"]
    assert report["profile"] == "dense" and report["steps"] == 2
    assert report["self"]["calls"] == report["self"]["dense"] == 2 * 2 * 2  # steps, layers, CFG


def test_sizes_are_rounded_with_a_warning(cli, tiny_wan: Path):
    args = ("--height", 32, "--width", 32, "--frames", 4, "--steps", 1, "--out", "x.gif")
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *args)
    assert code == 0, text
    assert "warning: WanPipeline makes 4n+1 frames: 4 becomes 5." in text
    assert len(read_video("x.gif")) == 5


def test_same_seed_same_video(cli, tiny_wan: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = (*SMALL, "--seed", seed, "--guidance-scale", 2, "--out", name)
        assert cli("generate", "a red circle", "--model", tiny_wan, *args)[0] == 0
    a, b, c = (Path(n, "frame_00000.png").read_bytes() for n in "abc")
    assert a == b != c


def test_strict_says_why(cli, tiny_wan: Path):
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL, "--strict")
    assert code == 2 and "break-even" in text and os.listdir() == []


def test_a_run_that_stays_dense_says_so(cli, tiny_wan: Path):
    told = "no self-attention ran sparse: below break-even. At this size dense attention is as fast"
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL)
    assert code == 0 and f"warning: {told}" in text
    code, text = cli("generate", "a", "--model", tiny_wan, *SMALL, "--profile", "dense")
    assert code == 0 and "ran sparse" not in text


def test_a_profile_file_runs_sparse(cli, tiny_wan: Path, tmp_path: Path):
    profile = tmp_path / "mine.toml"
    profile.write_text(
        '[profile]\nname = "mine"\nbreakeven = false\n'
        '[[rule]]\ncompute = "sliding_tile"\nwindow = {tokens = [1, 3, 3]}\n'
    )
    args = ("--profile", profile, "--strict", "--report", "r.json")
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL, *args)
    assert code == 0, text
    report = json.loads(Path("r.json").read_text())["report"]
    assert report["self"]["sparse"] == report["self"]["calls"] == 8
    assert "no self-attention ran sparse" not in text


def test_failures_end_with_one_line(cli, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch):
    from dit_accel.cli import runtime

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the roof is on fire")

    monkeypatch.setattr(runtime, "load", fail)
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL)
    assert code == 1 and "RuntimeError: the roof is on fire" in text and "Traceback" not in text
    monkeypatch.setenv("DIT_ACCEL_DEBUG", "1")
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL)
    assert code == 1 and "roof" not in text  # the exception itself passed through


def test_broken_weights(cli, tiny_wan: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_wan, tmp_path / "broken")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    code, text = cli("generate", "a red circle", "--model", folder, *SMALL)
    assert code == 2 and f"Cannot load {folder}" in text


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_while_denoising(tiny_wan: Path, tmp_path: Path):
    import pty

    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "dit_accel.cli", "generate", "a red circle"]
    command += ["--model", str(tiny_wan), "--height", "32", "--width", "32", "--frames", "5"]
    command += ["--steps", "100000", "--out", "x.mp4", "--device", "cpu"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        stdout=terminal,
        stderr=terminal,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(terminal)
    try:
        seen = _read_until(master, b"/100000", seconds=60)
        process.send_signal(signal.SIGINT)
        seen += _read_until(master, b"nothing was written", seconds=20)
        assert process.wait(timeout=20) == 130, seen
    finally:
        process.kill()
        os.close(master)
    assert b"Traceback" not in seen and os.listdir(tmp_path) == []


def _read_until(master: int, words: bytes, seconds: float) -> bytes:
    """What a terminal shows until some words, or its end."""
    seen, deadline = b"", time.monotonic() + seconds
    while words not in seen and time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 0.5)
        try:
            seen += os.read(master, 4096) if ready else b""
        except OSError:  # the other side has closed
            break
    return seen


def test_ctrl_c_while_writing(cli, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch):
    from dit_accel import video

    def interrupted(pictures: object, path: Path, fps: float) -> None:
        path.write_bytes(b"half a video")
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_write_mp4", interrupted)
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *SMALL, "--out", "x.mp4")
    assert code == 130 and "nothing was written" in text and os.listdir() == []


def test_a_cached_hub_model_needs_no_network(cli, tiny_wan: Path, tmp_path: Path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny-wan"
    shutil.copytree(tiny_wan, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, text = cli("generate", "a red circle", "--model", "someone/tiny-wan", *SMALL)
    assert code == 0, text
    assert os.listdir() == ["a-red-circle-0.mp4"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["none", "model", "sequential", "group"])
def test_on_a_gpu(cli, tiny_wan: Path, offload: str):
    sizes = ("--height", 32, "--width", 48, "--frames", 5, "--steps", 2, "--report", "r.json")
    args = ("--device", "cuda", "--offload", offload, "--out", "x.mp4")
    code, text = cli("generate", "a red circle", "--model", tiny_wan, *sizes, *args)
    assert code == 0, text
    run = json.loads(Path("r.json").read_text())["run"]
    assert (run["dtype"], run["device"], run["offload"]) == ("bfloat16", "cuda", offload)
    assert len(read_video("x.mp4")) == 5
