"""Plans over layouts of several spans: all their valid keys are kept, all their rows are dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import Span, TokenLayout

VIDEO = Span("video", grid=(3, 9, 11))
EVEN = tuple(range(0, 140, 2))
LAYOUTS = {
    "reference video": (Span("text", 130), VIDEO, Span("video", grid=(1, 9, 11))),
    "texts with gaps": (Span("text", 20, valid=(5, 20)), Span("other", 7), VIDEO,
                        Span("text", 150, valid=(140, 3)), Span("other", 9)),
    "same mask": (Span("text", 140, tokens=(EVEN, EVEN)), VIDEO),
    "masks within each other": (VIDEO, Span("other", 5),
                                Span("text", 140, tokens=((3, 7, 9), (3, 4, 5, 7, 9)))),
    "mask and prefix": (Span("text", 9, valid=(2, 9)), Span("text", 6, tokens=((1,), (1, 5))),
                        VIDEO, Span("other", 3)),
    "nothing valid": (Span("text", 9, valid=(0, 4)), VIDEO),
}  # fmt: skip


def seen(layout: TokenLayout) -> torch.Tensor:
    """bool [samples, L]: valid keys."""
    samples = layout.samples or 1
    keys = torch.zeros(samples, layout.length, dtype=torch.bool)
    for sample in range(samples):
        keys[sample, layout.valid_tokens(sample)] = True
    return keys


@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["lengths", "gather", "boxes"])
@pytest.mark.parametrize("name", ["full", "sliding_tile", "disc"])
def test_other_spans_are_kept_and_dense(spans: Any, kind: Any, name: str) -> None:
    layout = TokenLayout.of_spans(*spans)
    options = {"exact": True, "radius": {"tokens": 3}} if name == "disc" else {}
    rule = pattern(name, **options)
    plan = plan_for(layout, rule, "cpu", layout_kind=kind).validate()
    keys = seen(layout)
    mask = dense_mask(plan, len(keys), 1)[:, 0]
    start, stop = layout.video_start, layout.video_start + layout.video_length
    alike = len({layout.sample(i) for i in range(layout.samples or 1)}) == 1
    assert plan.batch == (1 if alike else 2)
    for sample, valid in enumerate(keys):
        video = torch.zeros(layout.length, dtype=torch.bool)
        video[start:stop] = True
        assert torch.equal(mask[sample][~video], valid.expand(int((~video).sum()), -1))
        assert (mask[sample][start:stop][:, ~video] == valid[~video]).all()
        assert mask[sample][start:stop, start:stop].diagonal().all()
        if name == "disc":
            alone = dense_mask(plan_for(TokenLayout(layout.grid), rule, "cpu"), 1, 1)[0, 0]
            assert torch.equal(mask[sample][start:stop, start:stop], alone)


@pytest.mark.parametrize("spans", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["lengths", "gather", "boxes"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_full_plan_equals_dense(spans: Any, kind: Any, backend: str) -> None:
    layout = TokenLayout.of_spans(*spans)
    keys = seen(layout)
    q, k, v = (
        torch.randn(len(keys), layout.length, 2, 32, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    )
    plan = plan_for(layout, pattern("full"), "cpu", layout_kind=kind)
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=keys[:, None, None]
    ).transpose(1, 2)
    assert (out - dense).abs().max() < 1e-5


def test_masks_that_no_order_makes_prefixes() -> None:
    layout = TokenLayout.of_spans(Span("text", 9, tokens=((0, 2), (1, 2))), VIDEO)
    assert layout.obstacle == "text mask differs per sample and is no prefix"
    with pytest.raises(DitAccelError, match="text mask differs per sample"):
        plan_for(layout, pattern("full"), "cpu")
    for sample in range(2):
        plan_for(layout.sample(sample), pattern("full"), "cpu").validate()
