"""Videos inside a page: as they are while they are small together, else recompressed to fit."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dit_accel.compare.results import Clip

PAGE_BYTES = 160 * 1024 * 1024
"""Video bytes that a page may hold: what browsers still open without trouble."""
WIDEST = 854
"""Width in pixels of a recompressed video, at most."""


@dataclass(frozen=True)
class Videos:
    """The videos of a page, by the paths that the clips know them by.

    `limit` is the bytes that each may have, None while all fit as they are.
    """

    files: dict[str, Path]
    limit: int | None

    @classmethod
    def of(cls, clips: Iterable[Clip], out: Path, most: int = PAGE_BYTES) -> Videos:
        """The files that exist among the clips' videos and differences."""
        names = [name for clip in clips for name in (clip.video, clip.difference) if name]
        files = {name: path for name in names if (path := Path(out) / name).is_file()}
        total = sum(path.stat().st_size for path in files.values())
        return cls(files, most // len(files) if total > most else None)

    def id_of(self, name: str | None) -> str | None:
        """The element's id on the page; None for a video that is not there."""
        return f"video-{list(self.files).index(name)}" if name in self.files else None

    @property
    def encoded(self) -> Iterator[tuple[str, str]]:
        """Id and base64 text of each video, one at a time."""
        for index, path in enumerate(self.files.values()):
            data = path.read_bytes()
            if self.limit is not None and len(data) > self.limit:
                data = recompressed(path, self.limit)
            yield f"video-{index}", base64.b64encode(data).decode("ascii")


def recompressed(path: Path, limit: int) -> bytes:
    """The video in about `limit` bytes, at most `WIDEST` pixels wide, with the same frames."""
    import imageio_ffmpeg

    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    _, duration = imageio_ffmpeg.count_frames_and_secs(str(path))
    rate = str(max(int(limit * 8 * 0.95 / max(duration, 0.1)), 20_000))
    with TemporaryDirectory() as folder:
        smaller = Path(folder, "smaller.mp4")
        command = [
            *(ffmpeg, "-v", "error", "-i", str(path), "-an"),
            *("-vf", f"scale='min({WIDEST},iw)':-2", "-c:v", "libx264", "-pix_fmt", "yuv420p"),
            *("-b:v", rate, "-maxrate", rate, "-bufsize", rate, "-movflags", "+faststart"),
            str(smaller),
        ]
        subprocess.run(command, check=True, capture_output=True)
        return smaller.read_bytes()
