"""What makes one function a rule for torch, Triton and Gluon alike."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.kernels.plan import TokenMask
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES

OPERATORS = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr,
    ast.Name, ast.Load, ast.Store, ast.Constant, ast.Subscript, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_RULES)
def test_rules_are_operators_alone(name: str) -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(TOKEN_RULES[name])))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef) and function.name == name
    arguments = [arg.arg for arg in function.args.args]
    assert arguments == ["qt", "qh", "qw", "kt", "kh", "kw", "p"]
    assert not function.args.defaults and ast.get_docstring(function)
    for node in ast.walk(tree):
        assert isinstance(node, OPERATORS), ast.dump(node)
        if isinstance(node, ast.Subscript):
            assert isinstance(node.value, ast.Name) and node.value.id == "p"
            assert isinstance(node.slice, ast.Constant) and 0 <= node.slice.value < MAX_PARAMS


def test_box_by_hand() -> None:
    coords = torch.tensor([[0, 0, 0], [1, 2, 3], [1, 0, 4], [5, 5, 5]], dtype=torch.int32)
    mask = TokenMask("box", (1, 2, 3), coords, coords)
    tokens = torch.arange(4)
    near = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert mask.allowed(tokens, tokens).int().tolist() == near
    assert mask.packed.tolist() == [1, 2, 3] + [0] * (MAX_PARAMS - 3)
    assert mask.packed.dtype == torch.int32


def test_two_rules_keep_what_either_keeps() -> None:
    coords = torch.tensor([[0, 0, 0], [1, 2, 3], [1, 0, 4], [5, 5, 5]], dtype=torch.int32)
    mask = TokenMask("box", (0, 0, 4), coords, coords, ("frames", (1, 9, 0)))
    tokens = torch.arange(4)
    near = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert mask.allowed(tokens, tokens).int().tolist() == near
    assert mask.packed.tolist() == [0, 0, 4, *[0] * 13, 1, 9, *[0] * 14]
    assert mask.label == "box+frames" and mask.to("cpu").other == mask.other


PARAMS = {
    "box": (3, 4, 9),
    "sliding_tile": (3, 0, 4, 3, 2, 2, 5, 3, 4, 0, 3, 3),
    "neighborhood": (12, 9, 2, 1, 0, 12, 4, 1, 2, 0, 12, 9, 3, 1, 1),
    "frames": (3, 12, 0),
    "radial": (12, 1, *(width * 4096 + split - 1 for width, split in
                        [(99, 1), (40, 2), (9, 4)] + 9 * [(9, 8)])),
    "disc": (20, 3),
    "band": (144, 12, 1, 300, 20),
    "power_strided": (3, 0, 1, 2, 2, 1, 4, 0, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKEN_RULES)
def test_numpy_and_torch_agree(name: str) -> None:
    """Plans bound the rules with numpy on the host."""
    numbers = np.random.default_rng(0).integers(0, 12, (6, 99), dtype=np.int32)
    params = PARAMS[name]
    one = TOKEN_RULES[name](*numbers, params)
    other = TOKEN_RULES[name](*torch.from_numpy(numbers), params)
    assert one.dtype == bool and other.dtype == torch.bool
    assert np.array_equal(one, other.numpy()) and len(set(one.tolist())) == 2


def test_rules_compile_for_a_gpu(offline: Callable[..., Any]) -> None:
    """Without a GPU, for compute capability 9.0."""
    pytest.importorskip("triton")
    made = offline(Path(__file__).with_name("compile_rules.py"), "compile_rules")
    assert made == dict.fromkeys(TOKEN_RULES, True)
