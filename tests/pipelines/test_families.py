"""Promises that hold for every family: bit-exact when dense, exact when all is kept, restorable."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel import Profile, StrictError, load_profile
from dit_accel.engine.profile import parse_profile

ALL = {"fraction": [1.0, 1.0, 1.0]}


def profile(body: str) -> Profile:
    return parse_profile(f"[profile]\nname = 'test'\nbreakeven = false\n{body}")


def tiles(window: str) -> Profile:
    return profile(f"[[rule]]\ncompute = 'sliding_tile'\nwindow = {window}\ntile = [2, 3, 3]\n")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_dense_profile_is_bit_identical(tiny: Any) -> None:
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention("dense")
    assert torch.equal(tiny.run(), stock)
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["dense"] == report["self"]["calls"] > 0
    assert report["self"]["dense_reasons"] == {"profile": report["self"]["calls"]}


def test_windows_that_cover_everything_equal_dense(tiny: Any) -> None:
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(tiles("{fraction = [1.0, 1.0, 1.0]}"), strict=True)
    assert relative(tiny.run(), stock) < 1e-5
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["sparse"] == report["self"]["calls"]


def test_disable_restores_stock_bits(tiny: Any) -> None:
    stock = tiny.run()
    classes = processor_classes(tiny)
    tiny.pipe.enable_sparse_attention(tiles("{tiles = [1, 1, 1]}"))
    assert not torch.equal(tiny.run(), stock)
    tiny.pipe.disable_sparse_attention()
    assert processor_classes(tiny) == classes
    assert torch.equal(tiny.run(), stock)
    for model in transformers(tiny):
        leftovers = [
            (name, key)
            for name, module in model.named_modules()
            for holder in (module, getattr(module, "processor", None))
            for key in getattr(holder, "__dict__", {})
            if "dit_accel" in key
        ]
        assert leftovers == []
        assert "cache_context" not in model.__dict__
        assert not model._forward_pre_hooks and not model._forward_hooks


def test_report_counts_every_self_attention_call(tiny: Any) -> None:
    tiny.pipe.enable_sparse_attention(tiles("{tiles = [1, 1, 1]}"), strict=True)
    tiny.run()
    report = tiny.pipe.sparse_attention_report().to_dict()
    expected = tiny.self_sites * tiny.branches * tiny.steps
    assert report["self"]["calls"] == report["self"]["sparse"] == expected
    assert 0 < report["self"]["kept_density"] <= report["self"]["launched_density"] < 1
    assert len(report["per_step"]) == report["steps"] == tiny.steps
    cross = tiny.cross_sites * tiny.branches * tiny.steps
    assert report["cross"]["calls"] in (cross, 2 * cross)  # image keys make a second call


def test_same_bits_run_after_run(tiny: Any) -> None:
    tiny.pipe.enable_sparse_attention(tiles("{tiles = [3, 1, 1]}"))
    assert torch.equal(tiny.run(), tiny.run())


def test_shipped_profiles_run(tiny: Any) -> None:
    family = tiny.pipe.enable_sparse_attention().sparse_attention_report().family
    for name in ("quality", "balanced", "fast"):
        shipped = load_profile(name, family)
        assert shipped.family == family and shipped.name == name
        tiny.pipe.enable_sparse_attention(name)
        assert torch.isfinite(tiny.run()).all()


def test_strict_names_the_reason(tiny: Any) -> None:
    body = "[profile]\nname = 'test'\n[[rule]]\ncompute = 'sliding_tile'\n"
    tiny.pipe.enable_sparse_attention(parse_profile(body), strict=True)
    with pytest.raises(StrictError, match="below break-even"):
        tiny.run()
    tiny.pipe.enable_sparse_attention(parse_profile(body), strict="except-breakeven")
    tiny.run()
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["dense_reasons"] == {"below break-even": report["self"]["calls"]}


def transformers(tiny: Any) -> list[torch.nn.Module]:
    names = ("transformer", "transformer_2")
    found = [tiny.pipe.components.get(name) for name in names]
    return [model for model in found if model is not None]


def processor_classes(tiny: Any) -> list[type]:
    return [
        type(module.processor)
        for model in transformers(tiny)
        for module in model.modules()
        if hasattr(module, "processor")
    ]
