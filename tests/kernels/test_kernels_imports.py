"""The kernels' imports: no circle, not even through functions, and no model library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = "dit_accel.kernels"
BY_NAME = (f"{PACKAGE}.patterns.composite", f"{PACKAGE}.patterns")
"""A union reads its members' names in a function: the one edge that is not counted."""
HOSTS = {"diffusers", "transformers", "accelerate", "comfy"}


def module_of(path: Path) -> str:
    parts = path.relative_to(KERNELS).with_suffix("").parts
    return ".".join((PACKAGE, *(part for part in parts if part != "__init__")))


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


def graph() -> dict[str, set[str]]:
    """Of each module of the kernels, the modules of the kernels that it imports."""
    paths = {module_of(path): path for path in KERNELS.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        edges = set()
        for module, names in imported(ast.parse(path.read_text())):
            inner = {f"{module}.{n}" for n in names} & paths.keys()
            edges |= inner or ({module} & paths.keys())
        found[name] = {edge for edge in edges if (name, edge) != BY_NAME}
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing of the rest are taken away, again and again."""
    left = {name: set(targets) for name, targets in edges.items()}
    while done := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in done}
    return sorted(left)


def test_no_circle() -> None:
    edges = graph()
    assert len(edges) > 40 and f"{PACKAGE}.machine" in edges[f"{PACKAGE}.backends"]
    assert circles(edges) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_host_and_nothing_above() -> None:
    """Neither a model library nor the parts of the package that are built on the kernels."""
    for path in KERNELS.rglob("*.py"):
        for module, _ in imported(ast.parse(path.read_text())):
            top, *rest = module.split(".")
            assert top not in HOSTS, path
            if top == "dit_accel":
                assert rest and rest[0] in ("kernels", "errors", "layout", "costs"), (path, module)
