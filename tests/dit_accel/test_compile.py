"""Compiling the blocks: one graph serves every layer, branch and step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.profile import parse_profile

PROFILE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "steps = [0.3, 1.0]\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 2}\n"
)


@pytest.mark.slow
def test_regional_compile_runs_the_same_policy(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(PROFILE)
    eager = tiny.run()
    receipt = tiny.pipe.sparse_attention_report().to_dict()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled = tiny.run()
    assert torch.allclose(compiled, eager, atol=1e-4)
    counted = tiny.pipe.sparse_attention_report().to_dict()
    for kind in ("self", "cross"):
        for key in ("calls", "sparse", "reused", "dense", "launched_density"):
            assert counted[kind][key] == receipt[kind][key], (kind, key)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
