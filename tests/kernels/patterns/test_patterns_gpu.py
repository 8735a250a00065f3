"""On a GPU only: every pattern against the oracle there, and how fast plans are made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.backends import BACKENDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import PATTERNS, Pattern, pattern, plan_for
from dit_accel.kernels.patterns.base import Rules
from dit_accel.kernels.patterns.composite import PerHead
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., Any]


def variants() -> dict[str, Pattern]:
    found: dict[str, Pattern] = {}
    for name, kind in PATTERNS.items():
        found[name] = pattern(name)
        if issubclass(kind, Rules):
            found[f"{name} exact"] = pattern(name, exact=True)
    found["causal"] = pattern("neighborhood", window={"tokens": [3, 6, 5]}, causal=True)
    found["dilated"] = pattern(
        "neighborhood", window={"tokens": [2, 3, 4]}, dilation=[2, 3, 3], exact=True
    )
    masked = [found["dilated"], pattern("disc", radius={"tokens": 3}, exact=True)]
    found["union of two rules"] = pattern("union", union=masked)
    groups = (("0", pattern("radial")), ("1-2", pattern("disc", exact=True)))
    found["per head"] = PerHead(groups, pattern("sliding_tile"))
    return found


@pytest.mark.parametrize("kind", ["gather", "boxes"])
@pytest.mark.parametrize("label", variants())
def test_patterns_match_the_oracle(
    label: str, kind: Any, device: torch.device, qkv: Make, assert_right: Make
) -> None:
    layout = TokenLayout((7, 11, 13), before=20, after=130, valid=((20, 130), (3, 64)))
    rule, heads = variants()[label], 4
    plan = plan_for(layout, rule, device, heads, kind).validate()
    mask = dense_mask(plan_for(layout, rule, "cpu", heads, kind), 2, heads)
    q, k, v = qkv(layout.length, batch=2, heads=heads, dim=64, dtype=torch.bfloat16)
    ran = 0
    for backend in BACKENDS:
        if backend == "reference" or eligible(backend, q, k, v, plan) is not None:
            continue
        result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        assert_right(result, q, k, v, mask)
        ran += 1
    assert ran


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("kind", ["gather", "boxes"])
def test_plans_are_made_in_30_ms(name: str, kind: Any, device: torch.device) -> None:
    """At 75,600 tokens, once the GPU's own kernels are loaded."""
    rule = pattern(name)
    for grid in [(20, 44, 80), (20, 45, 78), (19, 45, 80)]:
        rule.build(TokenLayout(grid), device, layout_kind=kind)
    taken = []
    for after in (0, 1, 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        rule.build(TokenLayout((21, 45, 80), after=after), device, layout_kind=kind)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    assert min(taken) < 0.030, taken
