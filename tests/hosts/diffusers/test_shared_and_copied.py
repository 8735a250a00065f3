"""Pipelines that share transformers or are copies of enabled ones, on every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import DitAccelError
from dit_accel.engine.profile import parse_profile
from dit_accel.hosts.diffusers.attachment import attachment_of

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
)


def calls(tiny: Any) -> tuple[int, int, int]:
    report = tiny.pipe.sparse_attention_report()
    return report.steps, report.kinds["self"]["calls"], report.kinds["self"]["sparse"]


@pytest.mark.parametrize("first", ["one", "two"])
@pytest.mark.parametrize("shared", ["transformer", "transformer_2"])
def test_one_expert_of_two_is_shared(build: Any, shared: str, first: str) -> None:
    """The one-expert pipeline names it `transformer`, whatever the other one calls it: whichever
    is enabled first, both run sparse with a schedule of their own, and disabling one leaves the
    other's experts."""
    two, one = build("wan_two_experts"), build("wan")
    one.pipe.transformer = getattr(two.pipe, shared)
    stock = one.run(), two.run()
    for tiny in (one, two) if first == "one" else (two, one):
        tiny.pipe.enable_sparse_attention(SPARSE)
    for _ in range(2):
        one.run()
        assert calls(one) == (3, 18, 18)
        two.run()
        assert calls(two) == (6, 36, 36)
    one.pipe.disable_sparse_attention()
    assert torch.equal(one.run(), stock[0])
    assert attachment_of(two.pipe.transformer) or attachment_of(two.pipe.transformer_2)
    two.run()
    assert calls(two)[1] == 36 or shared == "transformer"
    two.pipe.disable_sparse_attention()
    assert torch.equal(two.run(), stock[1])


def test_a_loop_of_an_expert_leaves_the_other_one(build: Any) -> None:
    two = build("wan_two_experts")
    two.pipe.enable_sparse_attention(SPARSE)
    dit_accel.enable(two.pipe.transformer, profile="dense", steps=4)
    assert attachment_of(two.pipe.transformer_2) is not None
    two.run()
    _, whole, sparse = calls(two)
    assert whole == 36 and 0 < sparse < 36
    dit_accel.disable(two.pipe.transformer)
    assert attachment_of(two.pipe.transformer_2) is not None


def test_a_deep_copy_is_a_stock_pipeline(tiny: Any) -> None:
    tiny.steps = 1
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(SPARSE)
    sparse = tiny.run()
    before = calls(tiny)
    copied = copy.deepcopy(tiny)
    for ask in ("sparse_attention_report", "sparse_attention_warmup"):
        size = (80, 112, 17) if ask.endswith("warmup") else ()
        with pytest.raises(DitAccelError, match="not enabled"):
            getattr(copied.pipe, ask)(*size)
    assert torch.equal(copied.run(), stock)
    copied.pipe.disable_sparse_attention()
    assert calls(tiny) == before
    copied.pipe.enable_sparse_attention(SPARSE)
    assert torch.equal(copied.run(), sparse)
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(), stock) and torch.equal(copied.run(), sparse)


@pytest.mark.parametrize("how", ["copy", "from_pipe"])
def test_a_copy_that_shares_the_transformer_has_runs_of_its_own(tiny: Any, how: str) -> None:
    tiny.steps = 1
    tiny.pipe.enable_sparse_attention(SPARSE)
    sparse = tiny.run()
    before = calls(tiny)
    other = copy.copy(tiny)
    other.pipe = copy.copy(tiny.pipe) if how == "copy" else type(tiny.pipe).from_pipe(tiny.pipe)
    other.pipe.set_progress_bar_config(disable=True)
    other.pipe.sparse_attention_warmup(80, 112, 17)
    assert torch.equal(other.run(), sparse)
    assert calls(other) == before
    other.pipe.disable_sparse_attention()
    assert not torch.equal(other.run(), sparse)
    assert torch.equal(tiny.run(), sparse) and calls(tiny) == before


def test_copied_parts_are_stock(tiny: Any) -> None:
    """A transformer, a block and an attention module, copied out of an enabled model."""
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run(num_inference_steps=1)
    model = tiny.pipe.transformer
    block = (model.blocks if hasattr(model, "blocks") else model.transformer_blocks)[0]
    attention = next(getattr(block, n) for n in ("attn", "attn1") if hasattr(block, n))
    for part in (model, block, attention, attention.processor):
        copied = copy.deepcopy(part)
        modules = copied.modules() if isinstance(copied, torch.nn.Module) else [copied]
        for module in modules:
            for each in (module, getattr(module, "processor", None)):
                assert not hasattr(type(each), "_dit_accel_base")
                assert getattr(each, "_dit_accel_site", None) is None
