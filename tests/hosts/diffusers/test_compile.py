"""Compiling: one graph serves every layer, branch and step, and the policy still rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile

PROFILE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "steps = [0.3, 1.0]\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 2}\n"
)


def graphs(tiny: Any, whole: bool) -> tuple[int, torch.Tensor]:
    """Number of graphs that a run compiles, and its output."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny.pipe.transformer
    if whole:
        tiny.pipe.transformer = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    output = tiny.run()
    tiny.pipe.transformer = model
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "whole"), [("wan", False), ("flux", False), ("wan", True), ("flux", True)]
)
def test_compiled_runs_follow_the_policy(build: Any, family: str, whole: bool) -> None:
    stock = 1 if whole else graphs(build(family), whole)[0]
    tiny = build(family)
    tiny.pipe.enable_sparse_attention(PROFILE)
    eager = tiny.run()
    receipt = tiny.pipe.sparse_attention_report().to_dict()
    count, compiled = graphs(tiny, whole)
    assert torch.allclose(compiled, eager, atol=1e-4)
    counted = tiny.pipe.sparse_attention_report().to_dict()
    for kind in ("self", "cross"):
        for key in ("calls", "sparse", "reused", "dense", "launched_density"):
            assert counted[kind][key] == receipt[kind][key], (kind, key)
    # Around a whole compiled model the hook that begins a forward is a small graph of its own.
    assert count == stock + whole


def test_the_operator_stays_out_of_cuda_graphs() -> None:
    """What a call does depends on the run; torch 2.9 and later can be told so."""
    import dit_accel.hosts.diffusers.operator  # noqa: F401

    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such tag")
    assert torch.Tag.cudagraph_unsafe in torch.ops.dit_accel.attend.default.tags
