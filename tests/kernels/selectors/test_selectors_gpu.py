"""On a GPU only: what the device makes equals the host's lists; nothing waits; right attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.backends import eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.reference import dense_mask
from dit_accel.kernels.selectors import SELECTORS, Context, kernel, selector
from dit_accel.layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., Any]
LAYOUTS = [
    TokenLayout((9, 24, 24)),
    TokenLayout((5, 30, 45), before=226),
    TokenLayout((1, 64, 64), before=512),
    TokenLayout((7, 20, 31), after=256, valid=((0, 256), (0, 77))),
]
PARAMS: list[tuple[str, dict[str, Any]]] = [
    ("block_topk", {"density": 0.2}),
    ("block_topk", {"sinks": 1, "neighbours": True, "lists": "shared"}),
    ("block_topp", {"p": 0.7, "neighbours": True}),
]


def on_host(context: Context) -> Context:
    tensors = (x.cpu() for x in (context.q, context.k, context.v))
    tally = torch.zeros(2, dtype=torch.int64)
    return Context(*tensors, context.blocks.to("cpu"), context.scale, context.heads, tally)


def assert_equal_plans(made: Any, expected: Any) -> None:
    for one, two in zip(made.visits.rows(), expected.visits.rows(), strict=True):
        assert torch.equal(one.cpu(), two)
    assert torch.equal(made.visits.start.cpu(), expected.visits.start)
    assert torch.equal(made.visits.whole.cpu(), expected.visits.whole)


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("kind", ["boxes", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_the_host(
    tiled: bool, kind: str, layout: TokenLayout, call: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry by entry where scores are exact, ties included."""
    if not tiled:
        monkeypatch.setattr(kernel, "_TILED", 0)
    batch = len(layout.valid or (0,))
    for tile in ("auto", [1, 3, 9]):
        chosen_by = selector("block_topk", density=0.3, sinks=1, tile=tile)
        context, _ = call(chosen_by, layout, kind=kind, batch=batch, heads=4, kv_heads=2, dim=64)
        host = on_host(context)
        assert_equal_plans(chosen_by.select(context), chosen_by.select(host))
        assert torch.equal(context.tally.cpu(), host.tally)


@pytest.mark.parametrize(("name", "params"), PARAMS, ids=str)
def test_random_calls_differ_in_near_ties_alone(
    name: str, params: dict[str, Any], call: Make
) -> None:
    chosen_by = selector(name, **params)
    context, _ = call(chosen_by, LAYOUTS[3], batch=2, heads=8, dim=128, exact=False)
    made, expected = chosen_by.select(context), chosen_by.select(on_host(context))
    differ = (made.visits.count.cpu() != expected.visits.count).float().mean()
    assert differ < 1e-3
    again = chosen_by.select(context)
    for one, two in zip(made.visits.rows(), again.visits.rows(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", SELECTORS)
def test_nothing_waits(name: str, call: Make) -> None:
    """Not even the attention, after the first call of its kind."""
    chosen_by = selector(name, sinks=1)
    context, _ = call(chosen_by, LAYOUTS[3], batch=2, heads=4, dim=128, exact=False)
    half = Context(
        *(x.half() for x in (context.q, context.k, context.v)), context.blocks, context.scale,
        context.heads, context.tally,
    )  # fmt: skip
    plan = chosen_by.select(half)
    backends = [b for b in ("hopper", "triton") if not eligible(b, half.q, half.k, half.v, plan)]
    for backend in backends:
        block_sparse_attention(half.q, half.k, half.v, plan, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan = chosen_by.select(half)
        for backend in backends:
            block_sparse_attention(half.q, half.k, half.v, plan, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("kind", ["boxes", "gather"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "params"), PARAMS, ids=str)
def test_attention_of_the_selected_blocks(
    name: str, params: dict[str, Any], layout: TokenLayout, kind: str, backend: str,
    naive: Make, device: torch.device,
) -> None:  # fmt: skip
    batch, heads = len(layout.valid or (0,)), 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, layout.length, n, 128, generator=generator).to(device, torch.bfloat16)
        for n in (heads, 2, 2)
    )
    chosen_by = selector(name, **params)
    blocks = blocks_of(layout, chosen_by.tiling(layout, kind), device)  # type: ignore[arg-type]
    plan = chosen_by.select(Context(q, k, v, blocks, 128**-0.5, heads))
    plan.validate()
    if reason := eligible(backend, q, k, v, plan):
        pytest.skip(reason)
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    mask = dense_mask(plan.to("cpu"), batch, heads)
    expected, expected_lse = naive(q, k, v, mask)
    assert (out.double().cpu() - expected).abs().max() <= 1.6e-2
    assert (lse.double().cpu() - expected_lse).abs().max() <= 1e-3


def test_at_the_size_of_wan(device: torch.device) -> None:
    """Device and host agree on every list of two heads at 75,600 tokens; memory stays small."""
    layout = TokenLayout((21, 45, 80))
    chosen_by = selector("block_topk", density=0.15)
    blocks = blocks_of(layout, chosen_by.tiling(layout, "boxes"), device)
    generator = torch.Generator(device=device).manual_seed(0)
    q, k = (
        torch.randint(-1, 2, (1, layout.length, 2, 128), generator=generator, device=device)
        for _ in range(2)
    )
    # Equal tokens in a block: means, scores and ties are exact.
    for x in (q, k):
        order = blocks.q.order
        owner = torch.repeat_interleave(
            torch.arange(blocks.q.count, device=device), blocks.q.lengths[0].long()
        )
        rows = x[:, : blocks.q.count][:, owner]
        x[:, slice(None) if order is None else order.long()] = rows
    q, k = q.float(), k.float()
    context = Context(q, k, k, blocks, 0.125, 2)
    made = chosen_by.select(context)
    assert_equal_plans(made, chosen_by.select(on_host(context)))
