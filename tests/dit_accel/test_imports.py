"""Imports go one way: what each part of the package may not know of, also inside functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRONT = ("cli", "compare", "planner", "bench")
FORBIDDEN = {
    "dit_accel/costs": ("kernels", "engine", "hosts", "pipelines", "models", "api", *FRONT),
    "dit_accel/models": ("kernels", "engine", "hosts", "api", *FRONT),
    "dit_accel/planner": ("cli", "compare", "bench"),
    "dit_accel/compare": ("cli", "planner", "bench"),
    "dit_accel/bench": ("cli", "compare", "planner"),
    "kernels": ("engine", "hosts", "pipelines", "models", "api", *FRONT),
    "pipelines": ("kernels", "engine", "hosts", "costs", "models", "api", *FRONT),
}


def imported(path: Path) -> Iterator[str]:
    """Modules of dit_accel that a file imports, without the package's name in front."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (n.removeprefix("dit_accel.") for n in names if n.startswith("dit_accel."))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN[folder]
    }
    assert not found


def test_costs_import_nothing_heavy() -> None:
    """Nor triton and diffusers: kernels and engine read prices."""
    heavy = {"diffusers", "transformers", "triton", "rich", "typer"}
    for path in (ROOT / "dit_accel" / "costs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in heavy, path
