from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel import video
from dit_accel.errors import DitAccelError
from dit_accel.metrics import psnr


def clip(height: int = 48, width: int = 64, frames: int = 5) -> np.ndarray:
    """A smooth float clip [T, H, W, 3] with a moving saturated square."""
    result = np.zeros((frames, height, width, 3), np.float32)
    result[..., 2] = np.linspace(0.2, 0.8, width)
    for index in range(frames):
        result[index, 10:26, 4 + 6 * index : 20 + 6 * index] = (1.0, 0.0, 0.0)
    return result


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a[None],
        lambda a: list(a),
        lambda a: (a * 255).round().astype(np.uint8),
        lambda a: [Image.fromarray((f * 255).round().astype(np.uint8)) for f in a],
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(0, 3, 1, 2),
        lambda a: [torch.from_numpy(f).permute(2, 0, 1) for f in a],
        lambda a: np.concatenate([a, np.ones_like(a[..., :1])], axis=-1),
    ],
    ids=["array", "batch", "list", "uint8", "pil", "tensor", "channels-first", "tensors", "rgba"],
)
def test_every_kind_of_frames_is_read_alike(convert):
    frames = video.to_uint8(convert(clip()))
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3) and frames[0].dtype == np.uint8
    assert psnr(frames, clip()) == float("inf")


def test_gray_bfloat16_and_single_pictures():
    assert video.to_uint8(torch.full((2, 8, 8, 1), 0.5, dtype=torch.bfloat16))[1][0, 0, 2] == 128
    assert len(video.to_uint8(Image.new("L", (8, 6)))) == 1
    assert video.to_uint8(np.zeros((6, 8, 3)))[0].shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        (np.zeros((2, 8, 8, 5)), "1, 3 or 4 channels"),
        (np.full((1, 8, 8, 3), np.nan), "NaN"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 10, 3))], "10x8"),
    ],
)
def test_frames_that_are_no_video(frames, message):
    with pytest.raises(DitAccelError, match=message):
        video.to_uint8(frames)


def test_mp4_keeps_colours_and_leaves_nothing_else(tmp_path: Path):
    path = video.write_video(clip(), tmp_path / "deep" / "x.mp4", fps=8)
    assert psnr(video.read_video(path), clip()) > 30
    assert os.listdir(path.parent) == ["x.mp4"]


def test_odd_sizes_are_padded_not_scaled(tmp_path: Path):
    frames = video.read_video(video.write_video(clip(47, 63), tmp_path / "x.mp4"))
    assert frames[0].shape == (48, 64, 3)
    assert psnr([f[:47, :63] for f in frames], clip(47, 63)) > 30


def test_gif_png_and_folder(tmp_path: Path):
    assert len(video.read_video(video.write_video(clip(), tmp_path / "x.gif"))) == 5
    single = video.read_video(video.write_video(clip(frames=1), tmp_path / "one.png"))
    assert psnr(single, clip(frames=1)) == float("inf")
    sheet = video.read_video(video.write_video(clip(), tmp_path / "sheet.png"))
    assert sheet[0].shape == (2 * 48, 3 * 64, 3)
    for count in (5, 3):  # the second, shorter clip leaves no frame of the first
        folder = video.write_video(clip(frames=count), tmp_path / "frames")
        assert len(os.listdir(folder)) == count
        assert psnr(video.read_video(folder), clip(frames=count)) == float("inf")
    assert sorted(os.listdir(tmp_path)) == ["frames", "one.png", "sheet.png", "x.gif"]


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png", "frames"])
def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch, name: str):
    target = video.write_video(clip(), tmp_path / name)
    before = psnr(video.read_video(target), clip()) if name != "x.png" else None
    real = os.replace

    def interrupt(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.write_video(1 - clip(), target)
    monkeypatch.setattr(os, "replace", real)
    assert os.listdir(tmp_path) == [name]
    if before is not None:
        assert psnr(video.read_video(target), clip()) == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.mp4", "mp4"), ("a.GIF", "gif"), ("b/a.png", "png"), ("new", "folder"), ("a.b/", "folder")],
)
def test_output_kind(name: str, kind: str):
    assert video.output_kind(name) == kind


def test_unknown_suffix_names_the_nearest():
    with pytest.raises(DitAccelError, match=r"Did you mean clip\.mp4\?.*\.gif"):
        video.check_output("clip.mp5")


def test_check_output_creates_nothing(tmp_path: Path):
    video.check_output(tmp_path / "new" / "deep" / "x.mp4")
    assert os.listdir(tmp_path) == []


def test_outputs_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DitAccelError, match="is a file, not a folder"):
        video.check_output(tmp_path / "file" / "x.mp4")
    with pytest.raises(DitAccelError, match="is a file, not a folder"):
        video.check_output(tmp_path / "file")
    if Path("/proc").is_dir():
        with pytest.raises(DitAccelError, match="not writable"):
            video.check_output("/proc/x.mp4")


def test_bad_fps_and_missing_videos(tmp_path: Path):
    with pytest.raises(DitAccelError, match="fps"):
        video.write_video(clip(), tmp_path / "x.mp4", fps=0)
    with pytest.raises(DitAccelError, match="no video"):
        video.read_video(tmp_path / "x.mp4")
    (tmp_path / "y.mp4").write_text("not a video")
    with pytest.raises(DitAccelError, match="cannot read"):
        video.read_video(tmp_path / "y.mp4")
