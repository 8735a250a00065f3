"""VBench's scores by its own command, `vbench`, in whatever environment that is installed.

It pins versions of its libraries that diffusers does not run with, so it lives apart: install it
in an environment of its own and put its `vbench` on the PATH.
Source: VBench (arXiv 2311.17982), its command's custom_input mode.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

DIMENSIONS = ("subject_consistency", "motion_smoothness", "aesthetic_quality", "imaging_quality")
"""Of those that take videos of any prompt: higher is better, weights of a few hundred MB."""


def missing() -> str | None:
    """Why VBench cannot run, or None."""
    if shutil.which("vbench") is None:
        return (
            "there is no `vbench` command: install VBench in an environment of its own (it pins "
            "other versions of transformers and numpy) and put its command on the PATH"
        )
    return None


def scores(videos: Sequence[Path]) -> list[tuple[float | None, str | None]]:
    """The mean over `DIMENSIONS` for every video in [0, 1], or None and the reason.

    A dimension whose weights cannot be downloaded is left out of every video's mean and named.
    """
    with tempfile.TemporaryDirectory(prefix="vbench-") as folder:
        inputs = Path(folder, "videos")
        inputs.mkdir()
        for index, video in enumerate(videos):
            shutil.copyfile(video, inputs / f"{index:05d}.mp4")
        found: dict[str, dict[int, float]] = {}
        failed: dict[str, str] = {}
        for dimension in DIMENSIONS:
            result = _run(dimension, inputs, Path(folder, dimension))
            if isinstance(result, str):
                failed[dimension] = result
            else:
                found[dimension] = result
    note = "; ".join(f"without {name}: {why}" for name, why in failed.items()) or None
    return [_mean([table.get(i) for table in found.values()], note) for i in range(len(videos))]


def _mean(values: list[float | None], note: str | None) -> tuple[float | None, str | None]:
    present = [value for value in values if value is not None]
    if not present:
        return None, note or "VBench gave no score for this clip"
    return sum(present) / len(present), note


def _run(dimension: str, inputs: Path, out: Path) -> dict[int, float] | str:
    """Scores by video number, or why there are none."""
    command = ["vbench", "evaluate", "--mode", "custom_input", "--dimension", dimension]
    command += ["--videos_path", str(inputs), "--output_path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    files = sorted(out.glob("*_eval_results.json"))
    if not files:  # its exit code is 0 even when the evaluation fails
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"`vbench` ended with code {done.returncode}"
    _, videos = json.loads(files[-1].read_text(encoding="utf-8"))[dimension]
    return {int(Path(v["video_path"]).stem): _unit(float(v["video_results"])) for v in videos}


def _unit(score: float) -> float:
    """In [0, 1]: some releases give imaging quality in percent."""
    return score / 100 if score > 1 else score
