"""The out folder: what is finished is kept, clip by clip, and found again.

    run.json                what was asked for
    clips/<key>.json        one finished (or failed) clip each: `results.Clip`
    videos/<key>.mp4        the clip, and <key>.difference.mp4, its heat map
    dense/<key>.mkv         dense clips without loss, to measure later clips against
    results.json, results.csv, index.html

Every file is written under another name and renamed, so that a full disk or an interruption
leaves what was finished as it was. Nothing is deleted unless `overwrite` is asked for, and then
only files of these names.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.compare.results import DENSE, Clip, Results
from dit_accel.errors import DitAccelError
from dit_accel.video import encode, read_video, replacing, write_video

RUN = "run.json"
FOLDERS = ("clips", "videos", "dense")
FILES = (RUN, "results.json", "results.csv", "index.html")
SPARE_BYTES = 2**20
HEAT_LEVELS = 64
"""Difference, of 255 levels, that the heat map shows in its brightest colour."""


@dataclass(frozen=True)
class Run:
    """What a comparison was asked for.

    Args:
        setting: what every clip depends on: model, sizes, steps, data type, device, ...
        profiles: text of every profile, by name.
        prompts: in their order; clips name them by number.
        seeds, metrics: as asked for.
        shape: frames, height and width of the clips; None before the first one.
    """

    setting: Mapping[str, Any]
    profiles: Mapping[str, str]
    prompts: Sequence[str]
    seeds: Sequence[int]
    metrics: Sequence[str]
    shape: Sequence[int] | None = None


@dataclass
class Store:
    """An opened out folder; `run` holds everything asked for so far."""

    folder: Path
    run: Run
    clips: dict[str, Clip] = field(default_factory=dict)

    def finished(self, prompt: str, seed: int, profile: str) -> Clip | None:
        """The finished clip of a triple, None where it is still to be made."""
        clip = self.clips.get(self.key(prompt, seed, profile))
        return clip if clip is not None and clip.status == "done" else None

    def key(self, prompt: str, seed: int, profile: str) -> str:
        """The file name of a triple."""
        slug = re.sub(r"[^a-z0-9]+", "-", profile.lower()).strip("-")[:32]
        # Names that differ only in signs, such as windows of 1.0 and 10, stay apart.
        short = hashlib.sha256(profile.encode()).hexdigest()[:6]
        name = slug if slug == profile else f"{slug}-{short}"
        return f"p{self.prompt_id(prompt):03d}-s{seed}-{name}"

    def prompt_id(self, prompt: str) -> int:
        return list(self.run.prompts).index(prompt)

    def keep(self, clip: Clip, video: np.ndarray | None, fps: float) -> Clip:
        """Write a clip with its files; returns it with their paths.

        video: [T, H, W, 3] uint8; None for a clip that failed.
        """
        key = self.key(clip.prompt, clip.seed, clip.profile)
        with self._writing():
            if video is not None:
                self._check_room(video)
                self._note_shape(video)
                clip = dataclasses.replace(clip, video=f"videos/{key}.mp4")
                write_video(list(video), self.folder / str(clip.video), fps)
                if clip.profile == DENSE:
                    write_lossless(video, self.folder / "dense" / f"{key}.mkv", fps)
                elif (dense := self.dense_video(clip.prompt, clip.seed)) is not None:
                    clip = dataclasses.replace(clip, difference=f"videos/{key}.difference.mp4")
                    heat = list(heat_map(video, dense))
                    write_video(heat, self.folder / str(clip.difference), fps)
            self._write(f"clips/{key}.json", _json(dataclasses.asdict(clip)))
        self.clips[key] = clip
        return clip

    def update(self, clip: Clip) -> None:
        """Write a clip's record anew (its files stay)."""
        key = self.key(clip.prompt, clip.seed, clip.profile)
        with self._writing():
            self._write(f"clips/{key}.json", _json(dataclasses.asdict(clip)))
        self.clips[key] = clip

    def dense_video(self, prompt: str, seed: int) -> np.ndarray | None:
        """The dense clip of a pair without loss, [T, H, W, 3] uint8; None where there is none."""
        path = self.folder / "dense" / f"{self.key(prompt, seed, DENSE)}.mkv"
        return np.stack(read_video(path)) if path.is_file() else None

    def read_results(self) -> Results | None:
        """What `write_results` wrote, None where it did not."""
        path = self.folder / "results.json"
        return Results.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_results(self, results: Results) -> None:
        """results.json and results.csv."""
        with self._writing():
            self._write("results.json", results.to_json() + "\n")
            self._write("results.csv", table(results))

    def _note_shape(self, video: np.ndarray) -> None:
        if self.run.shape is None:
            self.run = dataclasses.replace(self.run, shape=list(video.shape[:3]))
            self._write(RUN, _json(dataclasses.asdict(self.run)))

    def _check_room(self, video: np.ndarray) -> None:
        """Raise before a clip is begun whose files might not fit: a writer may cut them short."""
        if shutil.disk_usage(self.folder).free < 2 * video.nbytes + SPARE_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full disk into a message that says what is safe."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if not full and shutil.disk_usage(self.folder).free > SPARE_BYTES:
                raise
            done = sum(clip.status == "done" for clip in self.clips.values())
            raise DitAccelError(
                f"the disk of {self.folder} is full. {done} finished clips are kept there and can "
                "be read; make room and run the same command again to go on."
            ) from error


def open_store(folder: Path, run: Run, *, resume: bool = False, overwrite: bool = False) -> Store:
    """The out folder of a run, new or with what was finished before.

    A folder with the results of this very run goes on where it stopped. With `resume`, one whose
    clips were made in the same setting goes on too, with other prompts, seeds, profiles or metrics.

    Raises:
        DitAccelError: the folder holds a different run's results or other files; it cannot be
            written.
    """
    if resume and overwrite:
        raise DitAccelError("--resume keeps what is there and --overwrite does not: choose one.")
    before = _read_run(folder)
    if before is None:
        _refuse_other_files(folder)
    elif overwrite:
        _clear(folder)
        before = None
    else:
        run = _joined(before, run, folder, resume)
    store = Store(folder, run)
    with _creating(folder):
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        if before is not None:
            store.clips = _read_clips(folder)
        store._write(RUN, _json(dataclasses.asdict(run)))
    return store


def _read_run(folder: Path) -> Run | None:
    path = folder / RUN
    if not path.is_file():
        return None
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DitAccelError(
            f"{path} cannot be read ({error}): choose another --out folder."
        ) from error


def _refuse_other_files(folder: Path) -> None:
    if folder.is_file():
        raise DitAccelError(f"--out {folder} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise DitAccelError(
            f"--out {folder} is not empty and holds no comparison: give a new or an empty folder."
        )


def _joined(before: Run, run: Run, folder: Path, resume: bool) -> Run:
    """Both runs in one; DitAccelError where they do not go together or were not asked to."""
    fixed = _differences(before.setting, run.setting)
    shared = set(before.profiles) & set(run.profiles)
    fixed += [f"profile {n!r}" for n in sorted(shared) if before.profiles[n] != run.profiles[n]]
    if fixed:
        raise DitAccelError(
            f"--out {folder} holds a run with another {_listed(fixed)}: its clips cannot be "
            "compared with these. Use --overwrite to replace it, or another --out folder."
        )
    asked = [
        name
        for name in ("profiles", "prompts", "seeds", "metrics")
        if list(getattr(before, name)) != list(getattr(run, name))
    ]
    if asked and not resume:
        raise DitAccelError(
            f"--out {folder} holds a different run's results (other {_listed(asked)}). Use "
            "--resume to add to it, --overwrite to replace it, or another --out folder."
        )
    return dataclasses.replace(
        run,
        shape=before.shape,
        profiles={**before.profiles, **run.profiles},
        prompts=list(dict.fromkeys([*before.prompts, *run.prompts])),
        seeds=list(dict.fromkeys([*before.seeds, *run.seeds])),
        metrics=list(dict.fromkeys([*before.metrics, *run.metrics])),
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    plain = json.loads(json.dumps(now))
    names = [*before, *(name for name in plain if name not in before)]
    return [
        f"{name} ({before.get(name)}, now {plain.get(name)})"
        for name in names
        if before.get(name) != plain.get(name)
    ]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _read_clips(folder: Path) -> dict[str, Clip]:
    clips = {}
    for path in sorted((folder / "clips").glob("*.json")):
        try:
            clips[path.stem] = Clip(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DitAccelError(
                f"{path} cannot be read ({error}): remove it, and the clip is made again."
            ) from error
    return clips


def _clear(folder: Path) -> None:
    """Remove what a comparison wrote, and nothing else."""
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _creating(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DitAccelError(f"--out {folder} cannot be written: {error.strerror}.") from error


def heat_map(video: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Absolute difference of two videos [T, H, W, 3] uint8, in colours from black to white.

    The mean over colour channels; `HEAT_LEVELS` and above are white, in every clip alike.
    """
    apart = np.abs(video.astype(np.int16) - dense.astype(np.int16)).mean(-1)
    share = np.clip(apart / HEAT_LEVELS, 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, [colour[c] for colour in _HEAT]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


_HEAT = ((0, 0, 0), (70, 15, 110), (190, 45, 80), (250, 140, 30), (255, 255, 220))


def write_lossless(video: np.ndarray, path: Path, fps: float) -> None:
    """Write [T, H, W, 3] uint8 frames so that `read_video` gives the same bytes (FFV1)."""
    height, width = video.shape[1:3]
    with replacing(path) as temporary:
        encode(video, (width, height), temporary, fps, codec="ffv1", pix_fmt_out="bgr0")


def table(results: Results) -> str:
    """results.csv: one row a clip."""
    names = list(results.metrics)
    plain = [
        "prompt_id", "prompt", "seed", "profile", "status", "error", "launched_density",
        "kept_density", "attention_s", "encode_s", "decode_s", "first_call_s", "compile_s",
        "peak_memory_bytes", "video",
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plain, "denoise_s", "repeats", *names])
    for clip in results.clips:
        row = [getattr(clip, name) for name in plain]
        times = [float(np.median(clip.denoise_s)) if clip.denoise_s else None, len(clip.denoise_s)]
        writer.writerow([*row, *times, *(clip.value(name) for name in names)])
    return out.getvalue()


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"
