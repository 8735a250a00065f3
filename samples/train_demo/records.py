"""What a run leaves behind: machine and versions, result files, and parts that can be carried."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch

PART_BYTES = 15_000_000
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "numpy")


def machine() -> dict:
    """GPU or CPU, and the versions that matter."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The checkout's commit, from the variable DEMO_COMMIT where there is no git."""
    if named := os.environ.get("DEMO_COMMIT"):
        return named
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def write_json(path: Path, content: dict) -> None:
    """Write `content` with stable formatting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def pack(name: str, files: Iterable[tuple[Path, str]], folder: Path) -> None:
    """Write files (path, name inside) as one tar, cut into `name.tar.0`, `.1`, ... in folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, inside in files:
            tar.add(path, inside)
    data = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(data), PART_BYTES):
        (folder / f"{name}.tar.{i // PART_BYTES}").write_bytes(data[i : i + PART_BYTES])


def unpack(name: str, parts: Path, folder: Path) -> None:
    """Undo `pack`: extract `name.tar.*` of `parts` into folder."""
    paths = sorted(parts.glob(f"{name}.tar.*"), key=lambda p: int(p.suffix[1:]))
    data = b"".join(p.read_bytes() for p in paths)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")
