"""Selectors against their rules by enumeration, in torch and in Triton."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.computes import COMPUTES
from dit_accel.kernels.selectors import SELECTORS, Selector, kernel, select, selector
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
TEXT = TokenLayout((3, 9, 12), before=9, after=150, valid=((9, 150), (0, 70)))
VIDEO = TokenLayout((5, 9, 12))
NEAR = 1e-5


def chosen(
    selector: Selector, context: Any, members: Any, rules: Any, sample: int, head: int
) -> Any:
    """(scores, forced) of the rows of one list."""
    layout = TokenLayout(context.blocks.grid)
    shared = selector.lists == "shared"
    heads = list(range(context.heads)) if shared else [head]
    forced = rules.forced(layout, context.blocks.tiling, selector.sinks, selector.neighbours)
    return rules.scores(context, members, sample, heads), forced


def check(
    selector: Selector, context: Any, members: Any, rules: Any, keep: Callable[..., Any]
) -> None:
    """Every list of a plan, entry by entry, its counts, bounds and the tally.

    keep: (scores of a row, its forced blocks, valid tokens of the blocks) -> blocks that it keeps.
    """
    plan = selector.select(context).validate()
    blocks, block = context.blocks, context.blocks.block_k
    made, lists = rules.lists(plan), 1 if selector.lists == "shared" else context.heads
    batch, first = len(context.q), blocks.first_video
    text = {j for j, video in enumerate(members.video) if not video}
    everything = set(range(len(members.video)))
    slots = pairs = longest = 0
    whole = plan.visits.whole.tolist()
    assert len(made) == batch and len(made[0]) == lists == plan.heads
    for sample, head in itertools.product(range(batch), range(lists)):
        scores, forced = chosen(selector, context, members, rules, sample, head)
        valid = members.valid[sample % len(members.valid)]
        for i, video in enumerate(members.video):
            kept = everything
            if video:
                row = keep(scores[i - first], forced[i - first], valid[first:][: len(scores)])
                kept = text | {first + j for j in row}
            expected = rules.ordered(kept, members, sample, block)
            assert made[sample][head][i] == expected, (sample, head, i)
            assert whole[sample][head][i] == sum(valid[j] == block for j in expected)
            slots += len(expected) * block * block * context.heads // lists
            keys = sum(valid[j] for j in expected)
            pairs += keys * len(members.tokens[i]) * context.heads // lists
            if video:
                longest = max(longest, len(expected))
    assert context.tally.tolist() == [slots, pairs]
    assert plan.shape == selector.shape(blocks, batch, context.heads)
    assert plan.shape.most == selector.most(blocks) >= longest
    assert plan.shape.entries == len(plan.visits.index)
    assert plan.shape.online and torch.equal(plan.visits.full, plan.visits.count)
    density = slots / (batch * context.heads * context.q.shape[1] ** 2)
    expected_density = selector.expected(blocks)
    if plan.shape.even:
        assert density == pytest.approx(expected_density)
    else:
        assert density <= expected_density * (1 + 1e-9)


def top_k(density: float) -> Callable[..., set[int]]:
    """The highest scores, forced blocks first, of equal scores the lower number."""

    def keep(scores: list[float], forced: set[int], valid: list[int]) -> set[int]:
        m = max(1, round(density * len(scores)))
        order = sorted(range(len(scores)), key=lambda j: (j not in forced, -scores[j], j))
        return set(order[:m]) | forced

    return keep


CASES: list[tuple[dict[str, Any], TokenLayout, dict[str, Any]]] = [
    ({}, VIDEO, {"kind": "boxes", "heads": 3}),
    ({"density": 0.4, "sinks": 1}, TEXT, {"kind": "boxes", "batch": 2, "kv_heads": 1}),
    ({"neighbours": True, "density": 0.5}, VIDEO, {"kind": "gather", "heads": 1, "dim": 40}),
    ({"density": 0.5, "sinks": 1, "tile": [2, 4, 8]}, VIDEO, {"heads": 1}),
    ({"lists": "shared", "density": 0.3}, TEXT, {"batch": 2, "heads": 4, "kv_heads": 2}),
    ({"density": 1e-3}, TEXT, {"kind": "lengths", "batch": 2, "heads": 1}),
    ({"density": 1e-3, "neighbours": True, "sinks": 1}, TEXT, {"batch": 2, "heads": 1}),
    ({"density": 1.0}, TEXT, {"kind": "gather", "batch": 2, "heads": 1}),
    ({}, TokenLayout((1, 1, 1)), {"heads": 1}),
    ({}, TokenLayout((1, 3, 5), before=2), {"heads": 1, "kind": "gather"}),
    ({"tile": [1, 3, 4], "neighbours": True}, TokenLayout((2, 9, 9)), {"heads": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("params", "layout", "how"), CASES, ids=str)
def test_top_k(
    params: dict[str, Any],
    layout: TokenLayout,
    how: dict[str, Any],
    way: str,
    call: Make,
    rules: Any,
) -> None:
    chosen_by = selector("block_topk", **params)
    context, members = call(chosen_by, layout, **how)
    check(chosen_by, context, members, rules, top_k(params.get("density", 0.25)))


def test_straddling_blocks_have_neighbours(way: str, call: Make, rules: Any) -> None:
    layout = TokenLayout((9, 12, 12))
    chosen_by = selector("block_topk", neighbours=True, sinks=1, density=0.6)
    context, members = call(chosen_by, layout, kind="gather", heads=1)
    assert context.blocks.tiling.straddles
    check(chosen_by, context, members, rules, top_k(0.6))


def test_rows_of_many_blocks(
    way: str, call: Make, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What long rows take: chunks in torch, and in Triton few rows and transposed means."""
    monkeypatch.setattr(select, "_CHUNK", 20)
    monkeypatch.setattr(kernel, "_TILED", 0)
    monkeypatch.setattr(kernel, "_HELD", 64)
    chosen_by = selector("block_topk", density=0.4, tile=[1, 9, 8])
    context, members = call(chosen_by, TEXT, batch=2, heads=2, kv_heads=1)
    check(chosen_by, context, members, rules, top_k(0.4))


def assert_top_p(
    scores: list[float], forced: set[int], valid: list[int], got: set[int], p: float, most: int
) -> None:
    """The smallest set of highest probabilities that reach p, where nothing is nearly equal."""
    logits = [s + math.log(n) for s, n in zip(scores, valid, strict=True)]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    share = [w / sum(weights) for w in weights]
    free = [j for j in got if j not in forced]
    assert forced <= got and len(got) <= max(most, len(forced))
    lowest = min((logits[j] for j in free), default=math.inf)
    highest = max((logits[j] for j in range(len(logits)) if j not in got), default=-math.inf)
    assert highest <= lowest + NEAR
    mass = sum(share[j] for j in got)
    assert mass >= p - NEAR or len(got) == max(most, len(forced))
    if free:
        assert mass - min(share[j] for j in free) < p + NEAR


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("params", "layout", "how"),
    [
        ({"max_density": 1.0, "p": 0.7}, TEXT, {"batch": 2, "kv_heads": 1}),
        ({"sinks": 1, "p": 0.5}, VIDEO, {"kind": "gather"}),
        ({"neighbours": True, "tile": [2, 4, 6], "max_density": 0.7}, VIDEO, {"heads": 1}),
        ({"lists": "shared", "p": 0.6, "max_density": 0.3}, TEXT, {"batch": 2, "heads": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_top_p(
    params: dict[str, Any], layout: TokenLayout, how: dict[str, Any], exact: bool, way: str,
    call: Make, rules: Any,
) -> None:  # fmt: skip
    chosen_by = selector("block_topp", **params)
    context, members = call(chosen_by, layout, exact=exact, scale=0.5, **how)
    plan = chosen_by.select(context).validate()
    made, first = rules.lists(plan), context.blocks.first_video
    most = max(1, round(chosen_by.max_density * context.blocks.video_blocks))
    for sample, head in itertools.product(range(len(made)), range(len(made[0]))):
        scores, forced = chosen(chosen_by, context, members, rules, sample, head)
        valid = members.valid[sample % len(members.valid)]
        for i, row in enumerate(forced):
            listed = made[sample][head][first + i]
            video = {j - first for j in listed if members.video[j]}
            assert listed == rules.ordered(set(listed), members, sample, context.blocks.block_k)
            text = [j for j, kind in enumerate(members.video) if not kind and valid[j]]
            assert sorted(set(listed) - {first + j for j in video}) == text
            lengths = valid[first : first + len(scores)]
            assert_top_p(scores[i], row, lengths, video, chosen_by.p, most)
            assert len(listed) <= plan.shape.most


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.75, 1.0])
def test_top_p_of_equal_probabilities(p: float, way: str, call: Make, rules: Any) -> None:
    """Of n equal ones ceil(p n): the own block, then the first ones."""
    chosen_by = selector("block_topp", p=p, max_density=1.0, tile=[1, 8, 16])
    context, members = call(chosen_by, TokenLayout((8, 8, 16)), heads=1)
    context.k.zero_()

    def keep(scores: list[float], forced: set[int], valid: list[int]) -> set[int]:
        order = sorted(range(len(scores)), key=lambda j: (j not in forced, j))
        return set(order[: math.ceil(p * len(scores))])

    check(chosen_by, context, members, rules, keep)


def test_top_p_of_1_keeps_what_weighs_nothing(way: str, call: Make, rules: Any) -> None:
    chosen_by = selector("block_topp", p=1.0, max_density=1.0)
    context, members = call(chosen_by, VIDEO, heads=1, scale=1000.0)
    check(chosen_by, context, members, rules, lambda scores, forced, valid: set(range(len(scores))))


def test_random_scores(way: str, call: Make, rules: Any) -> None:
    """Rows differ from the rule only where scores are equal to rounding."""
    chosen_by = selector("block_topk", density=0.4, tile=[3, 4, 4])
    context, members = call(chosen_by, TEXT, batch=2, exact=False)
    made, first = rules.lists(chosen_by.select(context)), context.blocks.first_video
    for head in range(2):
        scores, forced = chosen(chosen_by, context, members, rules, 1, head)
        for i, row in enumerate(scores):
            listed = {j - first for j in made[1][head][first + i] if members.video[j]}
            assert len(listed) == round(0.4 * len(row)) and forced[i] <= listed
            lowest = min(row[j] for j in listed - forced[i])
            assert max(row[j] for j in range(len(row)) if j not in listed) <= lowest + NEAR


@pytest.mark.parametrize("name", SELECTORS)
def test_same_bits_twice(name: str, way: str, call: Make) -> None:
    chosen_by = selector(name, neighbours=True)
    context, _ = call(chosen_by, TEXT, batch=2, exact=False)
    one, two = (chosen_by.select(context).visits for _ in range(2))
    for a, b in zip(
        (one.start, one.whole, one.count), (two.start, two.whole, two.count), strict=True
    ):
        assert torch.equal(a, b)
    for a, b in zip(one.rows(), two.rows(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", SELECTORS)
def test_keeping_all_equals_dense(
    name: str, backend: str, call: Make, naive: Make, device: torch.device
) -> None:
    full = {"p": 1.0, "max_density": 1.0} if name == "block_topp" else {"density": 1.0}
    chosen_by = selector(name, **full)
    layout = TokenLayout((2, 8, 10), before=5, after=6, valid=((5, 6), (2, 0)))
    context, _ = call(chosen_by, layout, kind="gather", batch=2, heads=2, kv_heads=1, exact=False)
    plan = chosen_by.select(context)
    out = block_sparse_attention(context.q, context.k, context.v, plan, backend=backend)
    mask = torch.zeros(2, 1, layout.length, layout.length, dtype=torch.bool)
    for sample, (before, after) in enumerate(layout.valid or ()):
        mask[sample, 0, :, :before] = True
        mask[sample, 0, :, 5 : 165 + after] = True
    expected, _ = naive(context.q, context.k, context.v, mask)
    assert (out.double().cpu() - expected).abs().max() < 5e-6


def test_selected_blocks_are_what_is_computed(
    call: Make, naive: Make, rules: Any, device: torch.device
) -> None:
    chosen_by = selector("block_topk", density=0.4)
    context, members = call(chosen_by, TEXT, batch=2, heads=2, exact=False)
    plan = chosen_by.select(context)
    mask = torch.zeros(2, 2, TEXT.length, TEXT.length, dtype=torch.bool)
    for (sample, heads), head in itertools.product(enumerate(rules.lists(plan)), range(2)):
        before, after = (TEXT.valid or ())[sample]
        for i, listed in enumerate(heads[head]):
            for j in listed:
                mask[sample, head, torch.tensor(members.tokens[i])[:, None], members.tokens[j]] = 1
        mask[sample, :, :, before:9] = False
        mask[sample, :, :, 9 + TEXT.video_length + after :] = False
    expected, _ = naive(context.q, context.k, context.v, mask)
    out = block_sparse_attention(context.q, context.k, context.v, plan)
    assert (out.double().cpu() - expected).abs().max() < 5e-6


def test_nothing_is_read_back(call: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call with its blocks; what Triton's launcher does is tested on a GPU."""
    for name in SELECTORS:
        chosen_by = selector(name, sinks=1)
        context, _ = call(chosen_by, TEXT, batch=2, exact=False)
        chosen_by.select(context)
        chosen_by.shape(context.blocks, 2, 2)

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("a tensor is read on the host")

        with monkeypatch.context() as patch:
            names = (
                "item",
                "tolist",
                "cpu",
                "numpy",
                "__bool__",
                "__int__",
                "__float__",
                "nonzero",
            )
            for method in (*names, "__index__"):
                patch.setattr(torch.Tensor, method, refuse)
            chosen_by.select(context)
            chosen_by.expected(context.blocks)
            chosen_by.most(context.blocks)


def test_other_batches_and_heads(call: Make) -> None:
    """What is kept with the blocks is told apart by batch, heads and parameters."""
    chosen_by = selector("block_topk")
    big, _ = call(chosen_by, VIDEO, batch=3, heads=2)
    small = replace(big, q=big.q[:1, :, :1], k=big.k[:1, :, :1], v=big.v[:1, :, :1], heads=1)
    assert chosen_by.select(big).visits.count.shape[:2] == (3, 2)
    assert chosen_by.select(small).visits.count.shape[:2] == (1, 1)
    assert chosen_by.select(replace(small, tally=None)).shape.most == 2
    assert selector("block_topk", density=0.5).select(small).shape.most == 4


def test_registry() -> None:
    assert set(SELECTORS) <= set(COMPUTES)
    for name, cls in SELECTORS.items():
        assert cls.name == name and cls.online
        assert all(each.help for each in cls.parameters())
        assert hash(selector(name)) == hash(selector(name))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("block_topk", {"density": 0.0}, "density"),
        ("block_topk", {"density": 1.5}, "nearest legal value is 1"),
        ("block_topk", {"lists": "all"}, "lists"),
        ("block_topk", {"sinks": -1}, "sinks"),
        ("block_topp", {"p": 0}, "p:"),
        ("block_topp", {"max_density": 2}, "max_density"),
        ("block_topp", {"tile": [8, 8, 8]}, "tile"),
        ("block_topk", {"p": 0.9}, "parameter of block_topk"),
        ("block_top", {}, "Did you mean"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        selector(name, **params)


def test_too_many_entries(call: Make) -> None:
    chosen_by = selector("block_topk")
    context, _ = call(chosen_by, VIDEO)
    with pytest.raises(DitAccelError, match="lower the density or the batch"):
        chosen_by.shape(context.blocks, 1 << 20, 1 << 10)
