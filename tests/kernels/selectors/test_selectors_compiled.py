"""The selection kernel's machine code for capability 9.0, compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [True, False])
def test_shared_memory_and_spills(tiled: bool, offline: Callable[..., Any]) -> None:
    """Shared memory is what the launcher reckons with; scores stay in registers, but a few."""
    triton = pytest.importorskip("triton")
    minor = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if (
        minor < (3, 6)
        or not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists()
    ):
        pytest.skip(f"triton {triton.__version__} lacks nvdisasm")
    script = Path(__file__).with_name("compile_selection.py")
    made = offline(script, "compile_selection", tiled=tiled)
    assert made["shared"] <= (2 * 16 * 1024 + 1024) * 4
    assert made["scratch"] <= 150
