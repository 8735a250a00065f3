"""The families on a GPU: the Triton kernel under real processors, timed by events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAMILIES = ("wan", "wan_two_experts", "hunyuan_video", "cogvideox", "ltx_video", "flux")


def profile(window: str, tile: str = "tile = [2, 3, 3]") -> Any:
    return parse_profile(
        "[profile]\nbreakeven = false\n"
        f"[[rule]]\ncompute = 'sliding_tile'\nwindow = {window}\n{tile}\n"
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_covering_windows_equal_dense(tiny: Any) -> None:
    tiny.to("cuda")
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(profile("{fraction = [1.0, 1.0, 1.0]}"), strict=True)
    assert gap(tiny.run(), stock) < 1e-4
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["backends"] == {"triton": report["self"]["calls"]}
    assert report["time"]["denoising_s"] > report["time"]["attention_s"] > 0
    assert report["time"]["compile_s"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_triton_is_as_near_to_float32_as_torch_is(build: Any, family: str) -> None:
    """The same profile in bfloat16 by both backends, each against float32."""
    narrow = profile("{tiles = [3, 1, 1]}", "tile = 'auto'")
    exact = build(family).to("cuda", torch.float32)
    exact.pipe.enable_sparse_attention(narrow, backend="torch", strict=True)
    truth = exact.run()
    half = build(family).to("cuda", torch.bfloat16)
    errors = {}
    for backend in ("triton", "torch"):
        half.pipe.enable_sparse_attention(narrow, backend=backend, strict=True)
        errors[backend] = gap(half.run(), truth)
    assert errors["triton"] < 1.5 * errors["torch"] + 2e-3


def test_warmup_leaves_no_compilation_to_the_run(tiny_wan: Any) -> None:
    tiny_wan.to("cuda")
    tiny_wan.pipe.enable_sparse_attention(profile("{tiles = [1, 1, 1]}"))
    tiny_wan.pipe.sparse_attention_warmup(80, 112, 17)
    tiny_wan.run()
    assert tiny_wan.pipe.sparse_attention_report().time["compile_s"] == 0
