"""sliding_tile and full: their plans against masks enumerated from the rule itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import PATTERNS, pattern, plan_for
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout

LAYOUTS = [
    TokenLayout((7, 11, 13)),
    TokenLayout((3, 5, 7), before=20, after=5, valid=((3, 5), (20, 0))),
    TokenLayout((1, 9, 30), before=130),
    TokenLayout((4, 1, 9), after=3),
    TokenLayout((5, 8, 6), after=9, valid=((0, 0), (0, 4))),
]
PARAMETERS = [
    {},
    {"window": {"tiles": [1, 3, 2]}, "tile": [2, 3, 4]},
    {"window": {"tokens": [3, 5, 6]}, "tile": [2, 2, 3]},
    {"window": {"fraction": [0.6, 0.4, 0.4]}},
    {"window": {"fraction": [1.0, 0.3, 0.5]}, "tile": [1, 4, 4]},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_plan_is_the_papers_mask(
    layout: TokenLayout, parameters: dict, sliding_mask: Callable[..., torch.Tensor]
) -> None:
    rule = SlidingTile(**parameters)
    plan = plan_for(layout, rule, "cpu").validate()
    parts = rule.tiling(layout, "lengths").parts
    window = [rule.window.tiles(a, layout.grid[a], len(parts[a])) for a in range(3)]
    expected = sliding_mask(parts, window, layout.before, layout.after, layout.valid)
    batch = len(expected)
    assert torch.equal(dense_mask(plan, batch, 1), expected)
    assert plan.kept_density() == pytest.approx(expected.double().mean().item())
    assert plan.launched_density("torch") == pytest.approx(plan.kept_density())
    assert plan.launched_density("triton") >= plan.kept_density()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_covering_windows_equal_dense(
    layout: TokenLayout, qkv: Callable[..., tuple[torch.Tensor, ...]], device: torch.device
) -> None:
    batch = len(layout.valid or ((0, 0),))
    q, k, v = qkv(layout.length, batch=batch)
    keys = dense_mask(plan_for(layout, pattern("full"), "cpu"), batch, 1)[:, :, :1].to(device)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=keys
    ).transpose(1, 2)
    for rule in (pattern("full"), SlidingTile({"fraction": [1.0, 1.0, 1.0]})):
        out = block_sparse_attention(q, k, v, plan_for(layout, rule, device))
        assert ((out - dense).abs().max() / dense.abs().max()) < 1e-5


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_every_pattern_builds_hashes_and_is_cached(name: str) -> None:
    rule, layout = pattern(name), TokenLayout((3, 9, 10), before=5)
    assert rule == pattern(name) and hash(rule) == hash(pattern(name))
    plan = plan_for(layout, rule, "cpu").validate()
    assert plan_for(layout, pattern(name), torch.device("cpu")) is plan
    assert 0 < plan.kept_density() <= plan.launched_density("torch") <= 1


def test_samples_that_are_alike_share_their_lists() -> None:
    alike = TokenLayout((3, 4, 5), after=9, valid=((0, 4), (0, 4), (0, 4)))
    assert plan_for(alike, pattern("full"), "cpu").batch == 1
    assert plan_for(replace(alike, valid=((0, 4), (0, 5))), pattern("full"), "cpu").batch == 2


def test_unknown_names() -> None:
    with pytest.raises(DitAccelError, match="sliding_tile"):
        pattern("sliding_tiles")
    with pytest.raises(DitAccelError, match="window"):
        pattern("sliding_tile", windows={"tiles": [1, 1, 1]})


def test_short_sequences_are_one_block() -> None:
    for length in (1, 63, 64, 65, 127, 128, 129):
        plan = plan_for(TokenLayout((1, 1, length)), pattern("full"), "cpu").validate()
        assert plan.blocks.q.count == -(-length // 128)
        assert plan.blocks.q.lengths.sum() == length


def test_big_grids_plan_quickly() -> None:
    """Nothing in planning grows with tokens x tokens."""
    layout = TokenLayout((33, 45, 80), after=256, valid=((0, 200),))
    start = time.perf_counter()
    plan = SlidingTile({"fraction": [0.6, 0.35, 0.35]}).build(layout, "cpu")
    assert plan.launched_density("torch") < 0.2
    assert time.perf_counter() - start < 10
