"""The oracle: right results pass, and the mistakes that kernels make do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dit_accel.bench import proof
from dit_accel.bench.cases import Case, make_inputs
from dit_accel.bench.plans import random_plan
from dit_accel.bench.proof import expected_dense, expected_rows, poisoned, prove
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.plan import BlockPlan, TokenMask, Visits, plan_of
from dit_accel.layout import TokenLayout

CPU = torch.device("cpu")
LAYOUT = TokenLayout((5, 12, 15), before=19)
CASE = Case("", "", LAYOUT, 3, 32)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(CASE, torch.float32, CPU)


@pytest.fixture(params=["whole", "sampled"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways: small calls are compared whole, large ones in samples."""
    if request.param == "sampled":
        monkeypatch.setattr(proof, "SMALL", 0)
    return request.param


def dense_softmax(inputs: Inputs, mask: torch.Tensor) -> torch.Tensor:
    """out [1, L, H, D] float64 for mask [H or 1, L, L], written out."""
    q, k, v = (x[0].double().movedim(1, 0) for x in inputs)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).movedim(0, 1)[None]


def visible(plan: BlockPlan) -> torch.Tensor:
    """bool [H, L, L] of a plan with full lists, from its tables, one block at a time."""
    length = plan.blocks.q_length
    mask = torch.zeros(plan.heads, length, length, dtype=torch.bool)
    sides = []
    for table in (plan.blocks.q, plan.blocks.k):
        order = torch.arange(length) if table.order is None else table.order.long()
        spans = zip(table.starts.tolist(), table.lengths[0].tolist(), strict=True)
        sides.append([order[start : start + n] for start, n in spans])
    for head in range(plan.heads):
        for block, queries in enumerate(sides[0]):
            for key in plan.visits.entries(0, head, block)[0].tolist():
                mask[head, queries[:, None], sides[1][key]] = True
    return mask


def plans() -> dict[str, Callable[[], BlockPlan]]:
    window = {"fraction": [0.6, 0.4, 0.4]}
    sliding = pattern("sliding_tile", window=window)
    return {
        "sliding": lambda: plan_for(LAYOUT, sliding, CPU),
        "random": lambda: random_plan(LAYOUT.length, 0.4, CPU, heads=3),
        "gather": lambda: random_plan(LAYOUT.length, 0.4, CPU, block_k=64),
    }


@pytest.mark.parametrize("name", plans())
def test_right_results_pass(name: str, size: str, inputs: Inputs) -> None:
    plan = plans()[name]()
    expected = expected_rows(*inputs, plan)
    truth = dense_softmax(inputs, visible(plan))
    for row in expected:
        torch.testing.assert_close(row.rows, truth[row.sample, row.tokens, row.head])
    assert {row.head for row in expected} == {0, 1, 2}
    result = prove(block_sparse_attention(*inputs, plan, backend="torch"), expected)
    assert result.ok and result.error < 1e-5


def test_partial_blocks(size: str, inputs: Inputs) -> None:
    """Query block i sees key block i through a token mask, and the next one in full."""
    blank = random_plan(LAYOUT.length, 0.2, CPU)
    count = blank.shape.q_blocks
    own = torch.arange(count, dtype=torch.int32)
    one = torch.ones(1, 1, count, dtype=torch.int32)
    index = torch.stack([(own + 1) % count, own], -1).flatten()
    lists = Visits((own * 2).view(1, 1, -1), one * 0, one, one * 2, index)
    coords = torch.stack([torch.arange(LAYOUT.length, dtype=torch.int32)] * 3, -1)
    plan = plan_of(blank.blocks, lists, TokenMask("box", (5, 5, 5), coords, coords)).validate()
    tokens = torch.arange(LAYOUT.length)
    near = (tokens[:, None] - tokens).abs() <= 5
    block = tokens // 128
    mask = near & (block[:, None] == block) | ((block[:, None] + 1) % count == block)
    expected = expected_rows(*inputs, plan)
    truth = dense_softmax(inputs, mask[None])
    for row in expected:
        torch.testing.assert_close(row.rows, truth[0, row.tokens, row.head])


def test_mistakes_are_found(size: str, inputs: Inputs) -> None:
    plan = random_plan(LAYOUT.length, 0.5, CPU)
    expected = expected_rows(*inputs, plan)
    right = block_sparse_attention(*inputs, plan, backend="torch")
    mask = visible(plan)

    def without(change: Callable[[torch.Tensor], None]) -> torch.Tensor:
        wrong = mask.clone()
        change(wrong)
        return dense_softmax(inputs, wrong).float()

    dropped = without(
        lambda m: m[0, :128, int(plan.visits.entries(0, 0, 0)[0][0]) * 128].fill_(False)
    )
    more = without(lambda m: m[0, -1].fill_(True))
    zeros_counted = right * 0.9
    unwritten = right.clone()
    unwritten[0, 700, 1] = torch.nan
    swapped = right[:, :, [1, 0, 2]]
    neighbour = right.clone()
    neighbour[0, -4:] = 0
    for name, wrong in {
        "a key dropped": dropped,
        "keys of other blocks": more,
        "padding counted": zeros_counted,
        "unwritten": unwritten,
        "heads swapped": swapped,
        "rows overwritten": neighbour,
    }.items():
        assert not prove(wrong, expected).ok, name
    assert "head" in prove(swapped, expected).why
    assert "NaN" in prove(unwritten, expected).why


def test_a_padded_slot_shows(inputs: Inputs) -> None:
    """A kernel that lets the zeros behind a short block into the softmax is far off."""
    q, k, v = inputs
    pad = torch.zeros(1, 5, 3, 32)
    expected = expected_dense(q, k, v)
    padded = (q, torch.cat([k, pad], 1), torch.cat([v, pad], 1))
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in padded))
    result = prove(out.transpose(1, 2), expected)
    assert not result.ok and result.error > 0.05
    good = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs))
    assert prove(good.transpose(1, 2), expected).ok


def test_poison_reaches_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    blank = torch.full_like
    monkeypatch.setattr(
        torch, "full_like", lambda x, value: filled.append(value) or blank(x, value)
    )
    like = torch.ones(3)
    assert torch.equal(poisoned(lambda: like, like), like)
    assert len(filled) == 1 and filled[0] != filled[0]
