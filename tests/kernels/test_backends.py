"""Backends: who can run what, why not, and life without Triton."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels import backends, machine
from dit_accel.kernels.backends import BACKENDS, available, choose, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention

Make = Callable[..., Any]


def test_portable_ones_run_here() -> None:
    reasons = available()
    assert reasons.keys() == BACKENDS.keys()
    assert all(reasons[name] is None for name in ("triton", "torch", "reference"))


def test_first_eligible(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([40], [40])
    assert choose(*qkv(40), plan) == ("triton" if torch.cuda.is_available() else "torch")


def test_reasons(qkv: Make, random_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = random_plan([20], [20], block=32)
    q, k, v = qkv(20)
    assert "blocks of 32 x 32" in str(eligible("triton", q, k, v, plan))
    assert eligible("torch", q, k, v, plan) is None
    assert "float64" in str(eligible("torch", q.double(), k, v, plan))
    assert "head_dim 320" in str(eligible("triton", q.repeat(1, 1, 1, 5), k, v, plan))
    with pytest.raises(DitAccelError, match="torch"):
        eligible("tourch", q, k, v, plan)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    assert "CUDA" in str(eligible("triton", q.cpu(), k.cpu(), v.cpu(), plan))
    monkeypatch.setattr(machine, "triton_missing", lambda: "triton is not installed")
    assert available()["triton"] == "triton is not installed"


def test_a_shape_says_enough(qkv: Make, random_plan: Make) -> None:
    """What a call may run on is known before its plan is made."""
    plan, _ = random_plan([40, 128], [40], partial=(1, 1, 1))
    call = qkv(168, 40)
    assert choose(*call, plan.shape) == choose(*call, plan)
    for name, backend in BACKENDS.items():
        assert eligible(name, *call, plan.shape) == eligible(name, *call, plan)
        assert backend.name == name and backend.forms
        assert backend.moves(plan.shape) == (name == "hopper")
    assert {name for name, backend in BACKENDS.items() if backend.compiles} == {
        "hopper", "triton", "fa4", "flex",
    }  # fmt: skip


def test_online_plans(qkv: Make, random_plan: Make) -> None:
    """Libraries' kernels take static plans; the others tell no difference."""
    plan, _ = random_plan([40], [40])
    online = replace(plan, shape=replace(plan.shape, online=True), known=None)
    for name, backend in BACKENDS.items():
        reason = eligible(name, *qkv(40), online)
        if backend.online:
            assert reason == eligible(name, *qkv(40), plan)
        else:
            assert name in ("fa4", "flex") and "made from q and k" in str(reason)
    expected = block_sparse_attention(*qkv(40), plan, backend="triton")
    assert torch.equal(block_sparse_attention(*qkv(40), online, backend="triton"), expected)


def test_without_triton() -> None:
    """Everything but the triton backend imports and runs where Triton is not installed."""
    script = """
import sys
sys.modules["triton"] = None
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
from dit_accel.kernels.backends import available
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.layout import TokenLayout
plan = plan_for(TokenLayout((3, 4, 5)), pattern("sliding_tile"), "cpu")
q = torch.ones(1, 60, 1, 32)
assert torch.allclose(block_sparse_attention(q, q, q, plan), q)
assert available()["triton"] == "triton is not installed", available()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
