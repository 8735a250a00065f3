"""Unusual but legal uses: own loops, shared and copied models, failures half way."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import DitAccelError, Profile
from dit_accel.engine.profile import Rule, parse_profile, with_overrides
from dit_accel.kernels.patterns import pattern

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 3}\n"
)


def loop(model: Any, prompts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """A denoising loop without branch names; each step runs its prompts in turn."""
    latents = torch.randn(1, 16, 5, 10, 14, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        for step, texts in enumerate(prompts):
            time = torch.tensor([900.0 - 200 * step])
            outputs.append([model(latents, time, text, return_dict=False)[0] for text in texts])
            latents = latents - 0.1 * outputs[-1][-1]
    return [output for step in outputs for output in step]


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return torch.randn(1, 8, 16, generator=noise), torch.randn(1, 8, 16, generator=noise)


def test_unnamed_branches_never_serve_each_other(build: Any) -> None:
    """Guidance in the first step alone: the single call of later steps is another branch."""
    model = build("wan").pipe.transformer
    cond, uncond = texts()
    session = dit_accel.enable(model, profile=SPARSE, steps=4)
    loop(model, [[uncond, cond], [cond], [cond], [cond]])
    assert session.report().kinds["cross"]["reused"] == 3 * 2  # of step 1, in steps 2 and 3


def test_another_prompt_gets_nothing_of_the_last_one(build: Any) -> None:
    model = build("wan").pipe.transformer
    one, two = texts()
    dit_accel.enable(model, profile=SPARSE, steps=4)
    clean = loop(model, [[two]])[0]
    loop(model, [[one]])
    assert torch.equal(loop(model, [[two]])[0], clean)


def test_a_replaced_pipeline_keeps_its_schedule(build: Any) -> None:
    tiny = build("flux")
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.pipe = type(tiny.pipe)(**tiny.pipe.components)
    tiny.pipe.set_progress_bar_config(disable=True)
    gc.collect()
    tiny.run()
    assert tiny.pipe.sparse_attention_report().steps == 3


def test_pipelines_that_share_a_transformer(build: Any) -> None:
    first, second = build("flux"), build("flux")
    second.pipe.transformer = first.pipe.transformer
    first.pipe.enable_sparse_attention(SPARSE)
    second.pipe.enable_sparse_attention(SPARSE)
    for tiny, steps in ((first, 5), (second, 4), (first, 3)):
        tiny.run(num_inference_steps=steps)
        report = tiny.pipe.sparse_attention_report()
        assert report.steps == steps
        assert report.kinds["self"]["sparse"] == report.kinds["self"]["calls"] == 4 * steps


def test_a_deep_copy_is_stock(build: Any) -> None:
    tiny, other = build("wan"), build("wan")
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(SPARSE)
    sparse = tiny.run()
    other.pipe.transformer = copied = copy.deepcopy(tiny.pipe.transformer)
    dit_accel.disable(copied)
    assert torch.equal(other.run(), stock)
    assert torch.equal(tiny.run(), sparse)
    assert tiny.pipe.sparse_attention_report().kinds["self"]["calls"] == 18


def test_pickling_says_what_to_do(tiny_wan: Any, tmp_path: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(SPARSE)
    with pytest.raises(DitAccelError, match="disable_sparse_attention"):
        torch.save(tiny_wan.pipe.transformer, tmp_path / "model.pt")


def test_a_failing_enable_changes_nothing(build: Any) -> None:
    class Unknown:
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return hidden_states

    tiny = build("wan")
    tiny.pipe.transformer.blocks[2].attn1.processor = Unknown()
    classes = [type(b.attn1.processor) for b in tiny.pipe.transformer.blocks]
    with pytest.raises(DitAccelError, match="Unknown"):
        tiny.pipe.enable_sparse_attention(SPARSE)
    assert [type(b.attn1.processor) for b in tiny.pipe.transformer.blocks] == classes


def test_the_second_expert_gets_the_whole_cache(build: Any) -> None:
    tiny = build("wan_two_experts")
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run()
    peak = tiny.pipe.sparse_attention_report().cache["peak_bytes"]
    free = tiny.pipe.sparse_attention_report().kinds["cross"]["reused"]
    tiny.pipe.enable_sparse_attention(SPARSE, cache_limit=peak)
    tiny.run()
    report = tiny.pipe.sparse_attention_report()
    assert report.kinds["cross"]["reused"] == free and report.cache["refused"] == 0


def test_training_runs_dense_and_keeps_no_graph(build: Any) -> None:
    model = build("wan").pipe.transformer
    session = dit_accel.enable(model, profile=SPARSE, steps=2)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn1.to_v.requires_grad_(True)
    latents, text = torch.randn(1, 16, 5, 10, 14), texts()[0]
    for time in (900.0, 500.0):
        model(latents, torch.tensor([time]), text, return_dict=False)[0].sum().backward()
    reasons = session.report().kinds["self"]["dense_reasons"]
    assert reasons == {"gradients are needed": 6}


def test_overrides_of_a_profile_made_in_python() -> None:
    narrow = pattern("sliding_tile", window={"tiles": [1, 1, 1]})
    made = Profile("made", rules=(Rule(compute=narrow, layers="0-1"),))
    assert with_overrides(made, {"breakeven": False}).rules == made.rules
    wide = with_overrides(made, {"window": {"tiles": [3, 3, 3]}}).rules[0]
    assert wide.compute == pattern("sliding_tile") and wide.layers == "0-1"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.enable_sparse_attention(strict=1), "strict"),
        (lambda pipe: pipe.enable_sparse_attention(cache_limit=True), "cache_limit"),
        (lambda pipe: pipe.enable_sparse_attention(overrides=[1]), "overrides"),
        (lambda pipe: pipe.enable_sparse_attention(Profile("x", family="flux")), "family wan"),
        (lambda pipe: dit_accel.enable(pipe), "method enable_sparse_attention"),
        (lambda pipe: dit_accel.enable(pipe.transformer, steps=0), "steps"),
        (lambda pipe: parse_profile("[profile]\nfamily = 'wann'\n"), "Did you mean 'wan'"),
        (
            lambda pipe: pipe.enable_sparse_attention(
                "balanced", overrides={"window": {"tiles": [float("nan"), 3, 3]}}
            ),
            "window",
        ),
    ],
)
def test_wrong_values_are_named(tiny_wan: Any, call: Any, message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        call(tiny_wan.pipe)
