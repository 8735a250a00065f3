"""Profiles of several patterns, in a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile
from dit_accel.errors import DitAccelError

HEAD = "[profile]\nbreakeven = false\n"
SLIDING = "compute = 'sliding_tile', window = {tiles = [1, 1, 1]}, tile = [2, 3, 3]"
ALONE = (
    HEAD
    + "[[rule]]\n"
    + SLIDING.replace(", ", "\n")
    .replace("[1\n1\n1]", "[1, 1, 1]")
    .replace("[2\n3\n3]", "[2, 3, 3]")
)


def run(tiny: Any, text: str) -> torch.Tensor:
    tiny.pipe.enable_sparse_attention(parse_profile(text), strict=True)
    return tiny.run()


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_heads_and_unions_run(build: Any, family: str) -> None:
    tiny = build(family)
    stock = tiny.run()
    alone = run(tiny, ALONE)
    assert not torch.equal(alone, stock)
    same = f"[[rule]]\nheads = {{'0-1' = {{{SLIDING}}}}}\n"
    assert torch.equal(run(tiny, HEAD + same), alone)
    union = f"[[rule]]\nunion = [{{{SLIDING}}}, {{{SLIDING}}}]\n"
    assert torch.equal(run(tiny, HEAD + union), alone)
    first = run(tiny, HEAD + f"[[rule]]\nheads = {{'0' = {{{SLIDING}}}}}\n")
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["sparse"] == report["self"]["calls"] > 0
    assert not torch.equal(first, alone) and not torch.equal(first, stock)
    everything = HEAD + "[[rule]]\ncompute = 'full'\n[[rule]]\nheads = '-1'\ncompute = 'dense'\n"
    assert (run(tiny, everything) - stock).abs().max() <= 1e-4 * stock.abs().max()


def test_heads_that_do_not_exist(tiny_wan: Any) -> None:
    with pytest.raises(DitAccelError, match="'2-5' is not within the 2 heads"):
        run(tiny_wan, HEAD + "[[rule]]\nheads = '2-5'\ncompute = 'disc'\n")
