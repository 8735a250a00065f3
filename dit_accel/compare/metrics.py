"""What is measured on a clip: `--metrics`.

PSNR, SSIM and LPIPS are torchmetrics', against the dense clip of the same prompt and seed.
A metric that cannot run here is skipped with a reason, never silently.
"""

from __future__ import annotations

import math
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.compare import adherence, vbench
from dit_accel.compare.results import IDENTICAL, Metric
from dit_accel.errors import DitAccelError, unknown

Video = np.ndarray
"""[T, H, W, 3], uint8."""
Value = tuple[float | None, str | None]
"""The value, or None and why there is none."""
DEFAULT = ("psnr", "ssim", "lpips", "flicker", "adherence")
DOWNLOAD_S = 30.0
"""Patience with a server that does not answer."""
NO_DENSE = "there is no dense clip to compare with"


class Measure(ABC):
    """One metric; `missing` is asked once, before anything else."""

    metric: Metric

    def missing(self, demo: bool) -> str | None:
        """Why this metric cannot run here, or None. `demo`: whether the demo model is compared."""
        return None


class ClipMeasure(Measure):
    """A metric of one clip, most of them against its dense clip."""

    needs_dense: bool = True

    @abstractmethod
    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        """The metric of one clip."""


class FileMeasure(Measure):
    """A metric that is made from the files of all clips at once, after the last one."""

    @abstractmethod
    def values(self, videos: Sequence[Path]) -> list[Value]:
        """One value a file, in their order."""


class TorchMetric(ClipMeasure):
    """A metric of torchmetrics."""

    def missing(self, demo: bool) -> str | None:
        try:
            import torchmetrics.functional.image  # noqa: F401
        except Exception as error:  # a torchvision that does not fit torch raises many kinds
            return f"torchmetrics cannot be imported: {_first_line(error)}"
        return None


class Psnr(TorchMetric):
    """Peak signal-to-noise ratio over all frames together."""

    metric = Metric("dB", "higher")

    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        if np.array_equal(video, dense):
            return None, IDENTICAL
        found = peak_signal_noise_ratio(_tensor(video), _tensor(dense), data_range=255.0)
        return float(found), None


class Ssim(TorchMetric):
    """Structural similarity, mean over frames, channels and pixels (Gaussian window of 11)."""

    metric = Metric("", "higher")

    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        from torchmetrics.functional.image import structural_similarity_index_measure

        found = structural_similarity_index_measure(
            _tensor(video), _tensor(dense), data_range=255.0
        )
        assert isinstance(found, torch.Tensor)
        return float(found), None


class Lpips(TorchMetric):
    """Learned perceptual distance (AlexNet), mean over frames."""

    metric = Metric("", "lower")

    def __init__(self) -> None:
        self._model: Any = None

    def missing(self, demo: bool) -> str | None:
        if find_spec("torchvision") is None:
            return "LPIPS needs torchvision (pip install torchvision)"
        if (reason := super().missing(demo)) is not None:
            return reason
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_S)
        try:
            self._model = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
        except Exception as error:  # no network, no space
            return f"LPIPS's AlexNet weights cannot be had: {_first_line(error)}"
        finally:
            socket.setdefaulttimeout(patience)
        return None

    @torch.no_grad()
    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        frames = [
            self._model(_tensor(a[None]) / 255, _tensor(b[None]) / 255)
            for a, b in zip(video, dense, strict=True)
        ]
        self._model.reset()
        return float(torch.stack(frames).mean()), None


class Flicker(ClipMeasure):
    """What changes back and forth: see `flicker`."""

    metric = Metric("levels", "lower")
    needs_dense = False

    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        found = flicker(video)
        return found, None if found is not None else "flicker needs 3 frames"


class Adherence(ClipMeasure):
    """Share of the demo prompt's attributes that the demo's own checker sees in the clip."""

    metric = Metric("", "higher")
    needs_dense = False

    def missing(self, demo: bool) -> str | None:
        if not demo:
            return "adherence is checked by image analysis of the demo model's scenes only"
        return adherence.missing()

    def value(self, video: Video, dense: Video, prompt: str) -> Value:
        return adherence.adherence(video, prompt)


class VBench(FileMeasure):
    """Mean of some of VBench's dimensions, by its own command."""

    metric = Metric("", "higher")

    def missing(self, demo: bool) -> str | None:
        return vbench.missing()

    def values(self, videos: Sequence[Path]) -> list[Value]:
        return vbench.scores(videos)


METRICS: dict[str, type[Measure]] = {
    "psnr": Psnr,
    "ssim": Ssim,
    "lpips": Lpips,
    "flicker": Flicker,
    "adherence": Adherence,
    "vbench": VBench,
}


@dataclass(frozen=True)
class Measures:
    """The chosen metrics: those that run, and all of them with the reasons of the others."""

    running: dict[str, Measure]
    metrics: dict[str, Metric]

    def of(
        self, video: Video, dense: Video | None, prompt: str
    ) -> tuple[dict[str, float | None], dict[str, str]]:
        """(values, notes) of a clip; `dense` is the clip that it is paired with."""
        values: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        note: str | None
        for name, measure in self.running.items():
            if not isinstance(measure, ClipMeasure):
                continue
            if dense is None and measure.needs_dense:
                value, note = None, NO_DENSE
            else:
                value, note = measure.value(video, video if dense is None else dense, prompt)
            if value is not None and not math.isfinite(value):
                value, note = None, "not a finite number"
            values[name] = value
            if note is not None:
                notes[name] = note
        return values, notes


def check_metrics(names: Sequence[str]) -> list[str]:
    """The names, each once; raises DitAccelError for an unknown one (with the nearest)."""
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    return list(dict.fromkeys(names))


def choose_metrics(names: Sequence[str], demo: bool = False) -> Measures:
    """The metrics of these names, ready to run; what cannot run here says why."""
    running: dict[str, Measure] = {}
    metrics: dict[str, Metric] = {}
    for name in check_metrics(names):
        measure = METRICS[name]()
        reason = measure.missing(demo)
        metrics[name] = replace(measure.metric, skipped=reason)
        if reason is None:
            running[name] = measure
    return Measures(running, metrics)


def flicker(video: Video) -> float | None:
    """Mean of |x[t] - (x[t-1] + x[t+1]) / 2| over pixels, channels and inner frames, in levels.

    Motion at a steady speed over a smooth picture adds little to it, a frame that differs from
    both of its neighbours much. Of 255 levels; None for fewer than three frames.
    """
    if len(video) < 3:
        return None
    x = video.astype(np.float32)
    return float(np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean())


def same_shape(video: Video, dense: Video) -> None:
    """Raise where two videos cannot be compared frame by frame."""
    if video.shape != dense.shape:
        raise DitAccelError(
            f"clips to compare have one shape, not {list(video.shape)} and {list(dense.shape)}."
        )


def _tensor(video: Video) -> torch.Tensor:
    """[T, 3, H, W] float32 in [0, 255]."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
