"""Wrong profiles are refused when they are enabled, or at the first call of a size, and say why."""

from __future__ import annotations

from typing import Any

import pytest

import dit_accel
from dit_accel import DitAccelError
from dit_accel.engine.profile import parse_profile

WAN, LTX, COG, FLUX = "wan", "ltx_video", "cogvideox", "flux"
DISC = "compute = 'disc'"
RULE = "compute = 'sliding_tile'"

# (model, a rule, words of the error): the models have 2 heads, 3 layers (4 of Flux).
AT_ENABLE = [
    (WAN, f"{DISC}\nheads = '2'", "'2' is not within the 2 heads of this model; the last one is 1"),
    (WAN, f"{DISC}\nheads = '0-2'", "the last one is 1"),
    (WAN, f"{DISC}\nheads = '-3'", "the last one is 1"),
    (WAN, f"{DISC}\nheads = '1-0'", "is not within the 2 heads"),
    (WAN, f"{DISC}\nheads = '0,1,7'", "'7' is not within"),
    (WAN, f"{DISC}\nheads = '0.6-0.7'", "selects none of the model's 2 heads; .* '0-1'"),
    (WAN, f"{DISC}\nheads = '0.9-0.1'", "selects none"),
    (WAN, "heads = {'5' = {compute = 'disc'}}", "'5' is not within"),
    (WAN, "heads = {'0' = {compute = 'full'}, '0-5' = 'dense'}", "'0-5' is not within"),
    (FLUX, f"{DISC}\nheads = '2-3'", "the last one is 1"),
    (LTX, f"{DISC}\nheads = '12'", "the last one is 1"),
    (COG, f"{DISC}\nheads = '0-29'", "the last one is 1"),
    (WAN, f"{DISC}\nlayers = '3'", "layers '3' selects none of the model's 3 layers"),
    (WAN, f"{DISC}\nlayers = '7-9'", "selects none of the model's 3 layers"),
    (WAN, f"{DISC}\nlayers = '2-1'", "selects none"),
    (WAN, f"{DISC}\nlayers = '-4'", "selects none"),
    (WAN, f"{DISC}\nlayers = '0.8-0.9'", "selects none"),
    (WAN, f"{DISC}\nlayers = 'blocks.9.attn1'", "selects none .* Did you mean 'blocks"),
    (WAN, f"{DISC}\nlayers = [0, 9]", "layers '9' selects none"),
    (FLUX, f"{DISC}\nlayers = '4'", "selects none of the model's 4 layers"),
    (LTX, f"{DISC}\nlayers = '28-'", "layers '28-' selects none"),
    (LTX, f"{DISC}\nbranch = 'uncond'", "'uncond' never occurs.* nearest legal value is 'any'"),
    (LTX, f"{DISC}\nbranch = 'cond'", "'cond' never occurs"),
    (COG, f"{DISC}\nbranch = 'uncond'", "'uncond' never occurs"),
    (COG, "branch = 'cond'\nreuse = {every = 2}", "'cond' never occurs"),
    (WAN, f"{DISC}\nbranch = 'negative'", "unknown branch"),
    (WAN, f"{DISC}\nexpert = 'transformer_3'", "Did you mean 'transformer_2'"),
    (
        WAN,
        "union = [{compute = 'disc', exact = true}, {compute = 'radial', exact = true}, "
        "{compute = 'neighborhood', exact = true}]",
        "at most 2 rules, not of 3",
    ),
    (
        WAN,
        "heads = {'0' = {compute = 'disc', exact = true}, "
        "'1' = {compute = 'radial', exact = true}}",
        "heads differ \\(disc, radial\\)",
    ),
    (WAN, f"compute = 'block_topk'\n[[rule]]\n{DISC}\nheads = '0'", "chooses for all heads of a"),
    (WAN, f"{RULE}\nwindow = {{tiles = [0, 3, 3]}}", "nearest legal value is 1"),
    (WAN, f"{RULE}\nwindow = {{fraction = [2, 1, 1]}}", "nearest legal value is 1.0|whole numbers"),
    (WAN, f"{RULE}\nwindow = {{tokens = [1, 1]}}", "three"),
    (WAN, f"{RULE}\nwindow = 3", "window"),
    (WAN, f"{RULE}\ntile = [8, 8, 8]", "near legal value is"),
    (WAN, f"{RULE}\ntile = [0, 8, 8]", "tile: expected"),
    (WAN, f"{RULE}\ntile = 'big'", "tile: expected"),
    (WAN, "compute = 'radial'\ndecay = 0", "decay: expected a number"),
    (WAN, "compute = 'radial'\ndecay = 17", "nearest legal value is 16"),
    (WAN, "compute = 'radial'\ndecay = nan", "decay: expected a number"),
    (WAN, "compute = 'radial'\nsink = 1", "sink: expected true or false"),
    (WAN, "compute = 'neighborhood'\ndilation = [0, 1, 1]", "no dilation is"),
    (WAN, "compute = 'neighborhood'\ncausal = 2", "causal: expected"),
    (
        WAN,
        "compute = 'neighborhood'\nwindow = {tokens = [1, 3, 3]}\nstride = [1, 5, 1]",
        "nearest legal value is 3",
    ),
    (WAN, "compute = 'block_topk'\ndensity = 0", "density: expected a number"),
    (WAN, "compute = 'block_topk'\ndensity = 1.5", "nearest legal value is 1"),
    (WAN, "compute = 'block_topp'\np = 2", "p: expected a number"),
    (WAN, "compute = 'disk'", "Did you mean 'disc'"),
    (WAN, f"{DISC}\nraduis = 3", "Did you mean 'radius'"),
    (WAN, f"{DISC}\nsteps = [0, 2]", "steps in .* fractions"),
    (WAN, f"{DISC}\nsteps = [0.5, 0.5]", "steps in .* fractions"),
    (WAN, "reuse = {every = 0}", "whole number >= 1"),
    (WAN, "reuse = {every = 1.5}", "whole number >= 1"),
    (WAN, "reuse = {every = 2, max_age = 2}", "fraction of the run"),
    (WAN, "reuse = {every = 2, what = 'input'}", "unknown reuse.what"),
    (WAN, f"attention = 'cross'\n{DISC}", "cross-attention"),
    (WAN, f"{DISC}\ntail = 'linaer'", "unknown tail"),
    (WAN, "union = ['block_topk']", "union: expected patterns"),
]
AT_FIRST_CALL = [
    (
        "compute = 'neighborhood'\nwindow = {tokens = [1, 5, 7]}\ndilation = [1, 2, 1]",
        "2 x 5; the nearest legal dilation is 1",
    ),
    (
        "compute = 'neighborhood'\nwindow = {tokens = [2, 1, 1]}\ndilation = [3, 1, 1]",
        "expected dilation x window <= 5 tokens along t",
    ),
    (
        "steps = [0.9, 1.0]\nunion = ['disc', {compute = 'neighborhood', window = {tokens = "
        "[1, 1, 2]}, dilation = [1, 1, 9]}]",
        "nearest legal dilation is 3",
    ),
    (
        "steps = [0.9, 1.0]\nbranch = 'uncond'\nlayers = '-1'\ncompute = 'neighborhood'\n"
        "window = {tokens = [2, 1, 1]}\ndilation = [4, 1, 1]",
        "along t.* nearest legal dilation is 2",
    ),
]


def test_there_are_sixty() -> None:
    assert len(AT_ENABLE) + len(AT_FIRST_CALL) >= 60


_made: dict[str, Any] = {}


@pytest.fixture
def models(build: Any) -> dict[str, Any]:
    """Made once: what is refused leaves nothing behind."""
    for name in (WAN, LTX, COG, FLUX):
        if name not in _made:
            _made[name] = build(name)
    return _made


@pytest.mark.parametrize(("model", "rule", "words"), AT_ENABLE)
def test_refused_when_enabled(model: str, rule: str, words: str, models: dict[str, Any]) -> None:
    with pytest.raises(DitAccelError, match=words) as caught:
        models[model].pipe.enable_sparse_attention(parse_profile(f"[[rule]]\n{rule}\n"))
    assert len(str(caught.value)) < 1000
    with pytest.raises(DitAccelError, match="not enabled"):
        models[model].pipe.sparse_attention_report()


@pytest.mark.parametrize(("rule", "words"), AT_FIRST_CALL)
def test_refused_before_the_first_step(rule: str, words: str, build: Any) -> None:
    """Also where the rule would only hold in the last steps, and after calls of a legal size."""
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(parse_profile(f"[[rule]]\n{rule}\n"))
    steps: list[int] = []
    tiny.pipe.transformer.blocks[0].register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(DitAccelError, match=words):
        tiny.run()
    assert not steps


def test_a_loop_may_name_its_branches(build: Any) -> None:
    """Only pipelines are known to run both branches at once."""
    model = build(LTX).pipe.transformer
    profile = parse_profile(f"[[rule]]\n{DISC}\nbranch = 'uncond'\n")
    dit_accel.enable(model, profile=profile, steps=3)
    with pytest.raises(DitAccelError, match="never occurs"):
        dit_accel.enable(model, profile=profile, steps=3, branches=["cond_uncond"])
