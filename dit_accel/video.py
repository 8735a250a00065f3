"""Video in and out: frames to mp4, gif, png or a folder of png files, and back.

Nothing half-written is ever left behind: every writer works on a temporary name in the target's
own folder and renames it when it is complete.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dit_accel.errors import DitAccelError, nearest

if TYPE_CHECKING:
    import torch

    Frame = Image.Image | np.ndarray | torch.Tensor
    Frames = Sequence[Frame] | Frame

FORMATS = (".mp4", ".gif", ".png")
FRAME_NAME = "frame_{:05d}.png"
SHEET_FRAMES = 16


def to_uint8(frames: Frames) -> list[np.ndarray]:
    """Frames of any usual kind as a list of [H, W, 3] uint8 arrays.

    Takes PIL images, and arrays or tensors [T, H, W, C], [T, C, H, W] (or with a leading batch of
    one, or as a list of single frames), uint8 in [0, 255] or floating point in [0, 1]; gray and
    alpha are converted. Raises DitAccelError for frames of different sizes, for shapes that are
    no picture and for values that are not finite.
    """
    if isinstance(frames, Image.Image):
        frames = [frames]
    elif not isinstance(frames, (list, tuple)):
        array = _numpy(frames)
        if array.ndim == 5 and array.shape[0] == 1:
            array = array[0]
        frames = [array] if array.ndim == 3 else list(array)
    pictures = [_picture(frame) for frame in frames]
    if not pictures:
        raise DitAccelError("there are no frames to write")
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        found = ", ".join(f"{width}x{height}" for height, width, _ in sorted(sizes))
        raise DitAccelError(f"the frames of one video have one size, but these differ: {found}")
    return pictures


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _picture(frame: Any) -> np.ndarray:
    """One frame as [H, W, 3] uint8."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    array = _numpy(frame)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise DitAccelError(
            f"a frame is [H, W, C] or [C, H, W] with 1, 3 or 4 channels, not {list(array.shape)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise DitAccelError("the frames hold NaN or infinite values")
        array = (array.clip(0.0, 1.0) * 255.0).round()
    array = array.astype(np.uint8)
    return np.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array[..., :3])


def output_kind(path: str | os.PathLike[str]) -> str:
    """What `write_video` makes of this name: "mp4", "gif", "png" or "folder"."""
    target = Path(path)
    suffix = target.suffix.lower()
    if str(path).endswith(("/", os.sep)) or target.is_dir() or not suffix:
        return "folder"
    if suffix not in FORMATS:
        close = nearest(suffix, FORMATS) or ".mp4"
        raise DitAccelError(
            f"cannot write {suffix!r} files ({path}). Did you mean {target.stem}{close}? "
            f"Known: {', '.join(FORMATS)}, or a folder name (without a dot) for single frames."
        )
    return suffix[1:]


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Make sure, before heavy work, that a file or folder of this name can be written.

    Missing parent folders are fine (the writer makes them); nothing is left on the disk.
    Raises DitAccelError that says what is in the way.
    """
    target = Path(path)
    existing = target.absolute() if target.is_dir() else target.absolute().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise DitAccelError(f"cannot write {target}: {existing} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{existing} is not writable ({error.strerror or error})"
        raise DitAccelError(f"cannot write {target}: {reason}") from error
    return target


def check_output(path: str | os.PathLike[str]) -> Path:
    """`check_writable` for the name of a video: its suffix must be a known one too."""
    if output_kind(path) == "folder" and Path(path).is_file():
        raise DitAccelError(f"cannot write frames into {path}: it is a file, not a folder")
    return check_writable(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, moved there when the block ends well, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_video(frames: Frames, path: str | os.PathLike[str], fps: float = 16.0) -> Path:
    """Write frames as the suffix says: .mp4 (H.264, yuv420p), .gif, .png or a folder of png files.

    A .png of several frames is a contact sheet of up to 16 of them. H.264 in yuv420p needs even
    sizes: an odd last row or column is repeated, never scaled. `fps` is in frames per second.
    Returns the path; raises DitAccelError for a name or frames that cannot be written.
    """
    kind, target = output_kind(path), Path(path)
    if not fps > 0:
        raise DitAccelError(f"fps must be above 0, not {fps}")
    pictures = to_uint8(frames)
    if kind == "folder":
        _write_folder(pictures, target)
        return target
    with replacing(target) as temporary:
        if kind == "mp4":
            _write_mp4(pictures, temporary, fps)
        elif kind == "gif":
            images = [Image.fromarray(picture) for picture in pictures]
            images[0].save(
                temporary, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0
            )
        else:
            Image.fromarray(contact_sheet(pictures)).save(temporary)
    return target


def _write_mp4(pictures: list[np.ndarray], path: Path, fps: float) -> None:
    height, width, _ = pictures[0].shape
    even = ((0, height % 2), (0, width % 2), (0, 0))
    # Small videos without a tagged matrix are read as BT.601 by some players and as BT.709 by
    # others: convert to BT.709 and say so.
    colours = [f"-{key}" for key in ("colorspace", "color_primaries", "color_trc")]
    encode(
        (np.pad(picture, even, mode="edge") for picture in pictures),
        (width + width % 2, height + height % 2),
        path,
        fps,
        codec="libx264",
        output_params=[
            *("-vf", "scale=out_color_matrix=bt709:out_range=tv"),
            *(word for key in colours for word in (key, "bt709")),
            *("-crf", "14", "-movflags", "+faststart"),
        ],
    )


def encode(
    pictures: Iterable[np.ndarray], size: tuple[int, int], path: Path, fps: float, **options: Any
) -> None:
    """Write [H, W, 3] uint8 frames of a size (width, height) by ffmpeg.

    options: of `imageio_ffmpeg.write_frames`.
    """
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(
        str(path), size, fps=fps, quality=None, macro_block_size=1, **options
    )
    try:
        writer.send(None)
        for picture in pictures:
            writer.send(np.ascontiguousarray(picture))
    finally:
        writer.close()


def _write_folder(pictures: list[np.ndarray], folder: Path) -> None:
    """frame_00000.png ...; the frames of an earlier, longer video in the folder are removed."""
    names = [FRAME_NAME.format(index) for index in range(len(pictures))]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        for name, picture in zip(names, pictures, strict=True):
            Image.fromarray(picture).save(Path(temporary, name))
        folder.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(temporary, name), folder / name)
    for stale in folder.glob("frame_[0-9][0-9][0-9][0-9][0-9].png"):
        if stale.name not in names:
            stale.unlink()


def contact_sheet(frames: Frames, most: int = SHEET_FRAMES) -> np.ndarray:
    """Up to `most` evenly spaced frames in a near-square grid, [H, W, 3] uint8."""
    pictures = to_uint8(frames)
    count = min(most, len(pictures))
    chosen = [pictures[round(i * (len(pictures) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = math.ceil(math.sqrt(count))
    blank = np.full_like(chosen[0], 255)
    chosen += [blank] * (-count % columns)
    rows = [np.concatenate(chosen[i : i + columns], axis=1) for i in range(0, len(chosen), columns)]
    return np.concatenate(rows, axis=0)


def read_video(path: str | os.PathLike[str]) -> list[np.ndarray]:
    """The frames of an mp4, gif or png file, or of a folder of png files, [H, W, 3] uint8 each."""
    source = Path(path)
    if source.is_dir():
        return to_uint8([_open(file) for file in sorted(source.glob("*.png"))])
    if not source.is_file():
        raise DitAccelError(f"there is no video {source}")
    if source.suffix.lower() == ".png":
        return to_uint8([_open(source)])
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(source))
    try:
        width, height = next(reader)["size"]
        return [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    except (OSError, RuntimeError) as error:
        raise DitAccelError(f"cannot read {source} as a video") from error
    finally:
        reader.close()


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
