"""The out folder: what is kept, what is refused, and what a full disk leaves."""

from __future__ import annotations

import csv
import errno
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_accel.compare import store as stores
from dit_accel.compare.results import Clip
from dit_accel.compare.store import Run, Store, heat_map, open_store, table, write_lossless
from dit_accel.errors import DitAccelError
from dit_accel.video import read_video

RUN = Run({"model": "m", "height": 34}, {"dense": "d", "fast": "f"}, ["p", "q"], [0], ["psnr"])


def noise(seed: int, frames: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 33, 50, 3), dtype=np.uint8)


def keep(store: Store, profile: str, prompt: str = "p", seed: int = 0) -> Clip:
    clip = Clip(prompt, store.prompt_id(prompt), seed, profile, denoise_s=[1.5])
    return store.keep(clip, noise(len(profile + prompt)), 8.0)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_finished_clips_are_found_again(tmp_path):
    store = open_store(tmp_path / "out", RUN)
    dense, fast = keep(store, "dense"), keep(store, "fast")
    assert dense.difference is None and fast.difference is not None
    assert names(tmp_path / "out") == [
        "clips/p000-s0-dense.json",
        "clips/p000-s0-fast.json",
        "dense/p000-s0-dense.mkv",
        "run.json",
        "videos/p000-s0-dense.mp4",
        "videos/p000-s0-fast.difference.mp4",
        "videos/p000-s0-fast.mp4",
    ]
    again = open_store(tmp_path / "out", RUN)
    assert again.finished("p", 0, "fast") == fast
    assert again.finished("q", 0, "fast") is None
    assert list(again.run.shape) == [5, 33, 50]
    assert len(read_video(tmp_path / "out" / fast.difference)) == 5


def test_failed_clips_are_made_again(tmp_path):
    store = open_store(tmp_path / "out", RUN)
    store.keep(Clip("p", 0, 0, "fast", status="failed", error="x"), None, 8.0)
    again = open_store(tmp_path / "out", RUN)
    assert again.clips["p000-s0-fast"].error == "x"
    assert again.finished("p", 0, "fast") is None


def test_profiles_whose_names_differ_in_signs_have_files_of_their_own(tmp_path):
    store = open_store(tmp_path / "out", RUN)
    keys = {store.key("p", 0, f"sliding_tile:window={w}") for w in ("1,1,1", "1.1,1", "11,1")}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ["other"]}, "prompts"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"profiles": {"dense": "d"}}, "profiles"),
        ({"metrics": ["ssim"]}, "metrics"),
    ],
)
def test_another_request_asks_for_resume_or_overwrite(tmp_path, change, words):
    store = open_store(tmp_path, RUN)
    keep(store, "dense")
    before = names(tmp_path)
    other = replace(RUN, **change)
    with pytest.raises(DitAccelError, match=f"{words}.*--resume.*--overwrite"):
        open_store(tmp_path, other)
    assert names(tmp_path) == before
    joined = open_store(tmp_path, other, resume=True)
    assert joined.finished("p", 0, "dense")
    assert joined.run.prompts[:2] == ["p", "q"] and joined.prompt_id("p") == 0
    for name, value in change.items():
        assert set(value) <= set(getattr(joined.run, name))
    assert set(joined.run.profiles) == {"dense", "fast"}
    # What was joined is the run from now on.
    open_store(tmp_path, joined.run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setting": {"model": "m", "height": 64}}, r"height \(34, now 64\)"),
        ({"profiles": {"dense": "d", "fast": "changed"}}, "'fast'"),
    ],
)
def test_clips_that_cannot_be_compared_are_never_mixed(tmp_path, change, words):
    keep(open_store(tmp_path, RUN), "dense")
    for resume in (False, True):
        with pytest.raises(DitAccelError, match=words):
            open_store(tmp_path, replace(RUN, **change), resume=resume)
    assert open_store(tmp_path, replace(RUN, **change), overwrite=True).clips == {}


def test_overwrite_removes_nothing_of_others(tmp_path):
    keep(open_store(tmp_path, RUN), "dense")
    (tmp_path / "notes.txt").write_text("mine")
    assert open_store(tmp_path, RUN, overwrite=True).clips == {}
    assert names(tmp_path) == ["notes.txt", "run.json"]
    with pytest.raises(DitAccelError, match="choose one"):
        open_store(tmp_path, RUN, resume=True, overwrite=True)


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(DitAccelError, match="not empty"):
            open_store(tmp_path / "mine", RUN, overwrite=overwrite)
    with pytest.raises(DitAccelError, match="is a file"):
        open_store(tmp_path / "file", RUN)
    assert (tmp_path / "mine" / "index.html").read_text() == "mine"


def test_a_full_disk_leaves_what_was_finished(tmp_path, monkeypatch):
    store = open_store(tmp_path, RUN)
    keep(store, "dense")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    free = stores.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: free._replace(free=2**20))
    with pytest.raises(DitAccelError, match="full. 1 finished clips are kept"):
        keep(store, "fast")
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)  # the last file of a clip
    with pytest.raises(DitAccelError, match="full"):
        keep(store, "fast")
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    again = open_store(tmp_path, RUN)
    assert again.finished("p", 0, "dense") and not again.finished("p", 0, "fast")
    assert keep(again, "fast").video is not None


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    store = open_store(tmp_path, RUN)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(stores, "write_video", refuse)
    with pytest.raises(PermissionError):
        keep(store, "dense")


@pytest.mark.parametrize("shape", [(5, 34, 50, 3), (1, 33, 51, 3)])
def test_dense_clips_come_back_to_the_bit(tmp_path, shape):
    video = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    write_lossless(video, tmp_path / "a.mkv", 8.0)
    assert np.array_equal(np.stack(read_video(tmp_path / "a.mkv")), video)


def test_broken_records_are_named(tmp_path):
    keep(open_store(tmp_path, RUN), "dense")
    (tmp_path / "clips" / "p000-s0-dense.json").write_text("{")
    with pytest.raises(DitAccelError, match="p000-s0-dense.json"):
        open_store(tmp_path, RUN)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(DitAccelError, match="run.json"):
        open_store(tmp_path, RUN)


def test_heat_maps_are_black_where_clips_agree():
    a = noise(1)
    assert not heat_map(a, a).any()
    b = np.where(a > 127, a - 100, a + 100).astype(np.uint8)
    assert (heat_map(a, b) == (255, 255, 220)).all()
    grey = np.full((2, 3, 4, 3), 100, np.uint8)
    levels = [int(heat_map(grey, grey + step).sum()) for step in (0, 8, 16, 32, 64, 100)]
    assert levels == sorted(levels) and levels[-1] == levels[-2]


def test_the_csv_has_a_row_a_clip(tmp_path):
    from dit_accel.compare.results import Environment, Metric, Results

    clips = [
        Clip(
            "p, q",
            0,
            1,
            "dense",
            denoise_s=[1.0, 3.0],
            metrics={"psnr": None},
            metrics_note={"psnr": "identical"},
        ),
        Clip("p, q", 0, 1, "fast", status="failed", error='said "no"\ntwice'),
    ]
    results = Results("m", 5, 8, 8, 4, 8.0, Environment(*["x"] * 11), [],
                      {"psnr": Metric("dB", "higher")}, clips)  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(table(results))))
    assert [row["profile"] for row in rows] == ["dense", "fast"]
    assert (rows[0]["denoise_s"], rows[0]["repeats"], rows[0]["psnr"]) == ("2.0", "2", "inf")
    assert rows[1]["error"] == 'said "no"\ntwice' and rows[1]["denoise_s"] == ""
    store = open_store(tmp_path, RUN)
    store.write_results(results)
    assert json.loads((tmp_path / "results.json").read_text())["clips"][0]["prompt"] == "p, q"
