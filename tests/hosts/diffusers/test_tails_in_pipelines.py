"""Tails and the probe in the pipelines of all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile

HEAD = "[profile]\nbreakeven = false\n[[rule]]\n"


def run(tiny: Any, text: str) -> tuple[torch.Tensor, dict[str, Any]]:
    tiny.pipe.enable_sparse_attention(parse_profile(HEAD + text), strict=True)
    out = tiny.run()
    report = tiny.pipe.sparse_attention_report().to_dict()["self"]
    tiny.pipe.disable_sparse_attention()
    assert report["sparse"] == report["calls"] > 0
    return out, report


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox", "ltx_video", "flux"])
def test_a_tail_comes_closer_to_dense(build: Any, family: str) -> None:
    """At the same lists; with every block kept nothing is left for it."""
    tiny = build(family)
    stock = tiny.run()
    rule = "compute = 'probe_error'\ndensity = 0.3\n"
    dropped, without = run(tiny, rule)
    linear, with_tail = run(tiny, f"{rule}tail = 'linear'\n")
    assert away(linear, stock) < 0.6 * away(dropped, stock)
    assert with_tail["kept_density"] == pytest.approx(without["kept_density"], rel=0.05)
    assert 0 < with_tail["launched_density"] - without["launched_density"] < 0.1
    everything, _ = run(tiny, "compute = 'probe'\ndensity = 1.0\ntail = 'linear'\n")
    assert away(everything, stock) < 1e-5


def test_a_tail_under_a_window(tiny_wan: Any) -> None:
    stock = tiny_wan.run()
    rule = "compute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    dropped, _ = run(tiny_wan, rule)
    for tail in ("'linear'", "{kind = 'linear', slope = 'head', pool = 16, weights = 'count'}"):
        linear, report = run(tiny_wan, f"{rule}tail = {tail}\n")
        assert away(linear, stock) < away(dropped, stock)
        assert report["launched_density"] > report["kept_density"]


def test_the_report_names_the_tail(tiny_wan: Any) -> None:
    text = "compute = 'block_topk'\ntail = {kind = 'linear', pool = 64}\n"
    tiny_wan.pipe.enable_sparse_attention(parse_profile(HEAD + text), strict=True)
    tiny_wan.run()
    (plan,) = tiny_wan.pipe.sparse_attention_report().to_dict()["plans"]
    assert "tail = {kind = 'linear', slope = 'block', pool = 64" in plan["parameters"]


def test_overrides_set_a_tail(tiny_wan: Any) -> None:
    stock = tiny_wan.run()
    profile = parse_profile(HEAD + "compute = 'block_topk'\ndensity = 0.3\n")
    tiny_wan.pipe.enable_sparse_attention(profile, strict=True)
    dropped = tiny_wan.run()
    tiny_wan.pipe.enable_sparse_attention(profile, strict=True, overrides={"tail": "linear"})
    assert away(tiny_wan.run(), stock) < away(dropped, stock)
