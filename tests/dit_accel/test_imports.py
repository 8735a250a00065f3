"""Imports go one way and in no circle, those inside functions too, and only hosts know a host."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dit_accel

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("dit_accel", "kernels", "pipelines")
BOTTOM = "errors home layout"
FRONT = "catalog pipelines models provenance report video metrics costs kernels engine hosts api"
MAY = {
    "errors": "",
    "home": "",
    "report": "",
    "layout": "errors",
    "video": "errors",
    "metrics": "errors video",
    "provenance": "home",
    "costs": "errors layout",
    "kernels": "errors layout costs",
    "pipelines": "errors layout",
    "catalog": "pipelines",
    "models": f"{BOTTOM} pipelines catalog",
    "engine": f"{BOTTOM} report costs kernels",
    "hosts": f"{BOTTOM} report costs kernels engine pipelines",
    "api": "hosts",
    "methods": "api",
    "planner": f"{BOTTOM} {FRONT}",
    "dit_accel": "errors home report catalog engine api methods planner",
    "compare": f"{BOTTOM} {FRONT} dit_accel",
    "bench": f"{BOTTOM} {FRONT} dit_accel",
    "cli": f"{BOTTOM} {FRONT} dit_accel planner compare bench",
}
"""What each part of the package may import beside itself; "dit_accel" is its own __init__."""
HOST_LIBRARIES = {"diffusers", "transformers", "accelerate", "comfy"}
HOSTLESS = [*BOTTOM.split(), "report", "costs", "kernels", "engine", "pipelines", "catalog"]
HEAVY = HOST_LIBRARIES | {"torch", "triton", "rich", "typer"}
LIGHT = ["errors", "home", "layout", "pipelines", "catalog", "methods", "dit_accel"]


def imported(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import that runs, wherever it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module), tuple(alias.name for alias in node.names)
        else:
            yield from imported(node)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by the name that it is imported by."""
    found = {}
    for path in (path for top in TOPS for path in (ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = parts if parts[0] == "dit_accel" else ("dit_accel", *parts)
        found[".".join(part for part in own if part != "__init__")] = path
    return found


def trees() -> Iterator[tuple[str, ast.AST]]:
    for name, path in modules().items():
        yield name, ast.parse(path.read_text(encoding="utf-8"))


@cache
def graph() -> dict[str, set[str]]:
    """Of each module, those of the package that it imports; not the packages that they lie in."""
    known, found = modules().keys(), {}
    for name, tree in trees():
        edges: set[str] = set()
        for module, names in imported(tree):
            inner = {f"{module}.{each}" for each in names} & known
            edges |= inner
            if len(inner) < len(names) or not names:
                edges |= {module} & known
        found[name] = edges
    # Names of the package itself are looked up when somebody asks for them.
    found["dit_accel"] |= {f"dit_accel.{home}" for home in dit_accel._HOMES.values()}
    return found


def part(module: str) -> str:
    """The part of the package that a module belongs to: a row of `MAY`."""
    return module.removeprefix("dit_accel.").split(".")[0]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing of the rest, and those that nothing of the
    rest imports, are taken away, again and again."""
    left = {name: set(targets) for name, targets in edges.items()}
    while True:
        targets = {target for each in left.values() for target in each}
        done = {name for name in left if name not in targets or not left[name] & left.keys()}
        if not done:
            return sorted(left)
        left = {name: left[name] & left.keys() for name in left if name not in done}


def test_no_circle() -> None:
    edges = graph()
    assert len(edges) > 150
    assert "dit_accel.kernels.machine" in edges["dit_accel.kernels.backends"]
    assert circles(edges) == []


def test_a_circle_is_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(edges) == ["b", "c"]
    assert circles({"a": {"a"}}) == ["a"]


def test_parts_stand_in_order() -> None:
    """Each may import parts above it in the table alone."""
    rows = list(MAY)
    for number, (name, below) in enumerate(MAY.items()):
        assert not set(below.split()) - set(rows[:number]), name


@pytest.mark.parametrize("name", MAY)
def test_imports_go_one_way(name: str) -> None:
    allowed = {name, *MAY[name].split()}
    found = {
        f"{module}: {target}"
        for module, targets in graph().items()
        for target in targets
        if part(module) == name and part(target) not in allowed
    }
    assert not found


def test_every_part_has_a_row() -> None:
    assert {part(module) for module in modules()} <= MAY.keys()


@pytest.mark.parametrize(
    ("parts", "libraries"),
    [(HOSTLESS, HOST_LIBRARIES), (LIGHT, HEAVY), (["costs"], HEAVY - {"torch"})],
)
def test_some_parts_know_no_library_of(parts: list[str], libraries: set[str]) -> None:
    found = {
        f"{name}: {module}"
        for name, tree in trees()
        if part(name) in parts
        for module, _ in imported(tree)
        if module.split(".")[0] in libraries
    }
    assert not found
