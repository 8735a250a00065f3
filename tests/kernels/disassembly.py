"""A kernel for compute capability 9.0, without a GPU, and its machine code as text."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


def compiled(source: Any, **options: Any) -> Any:
    """What Triton makes of a source."""
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def disassembled(kernel: Any) -> str:
    """By the disassembler that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
