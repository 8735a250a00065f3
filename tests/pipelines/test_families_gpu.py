"""The families on a GPU: the Triton kernel under real processors, timed by events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.profile import parse_profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def profile(window: str, tile: str = "tile = [2, 3, 3]") -> Any:
    return parse_profile(
        "[profile]\nbreakeven = false\n"
        f"[[rule]]\ncompute = 'sliding_tile'\nwindow = {window}\n{tile}\n"
    )


def test_covering_windows_equal_dense(tiny: Any) -> None:
    tiny.pipe.to("cuda")
    stock = tiny.run().double()
    tiny.pipe.enable_sparse_attention(profile("{fraction = [1.0, 1.0, 1.0]}"), strict=True)
    kept = tiny.run().double()
    assert float((kept - stock).norm() / stock.norm()) < 1e-4
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["backends"] == {"triton": report["self"]["calls"]}
    assert report["time"]["denoising_s"] > report["time"]["attention_s"] > 0
    assert report["time"]["compile_s"] > 0


def test_triton_equals_torch_in_bfloat16(tiny: Any) -> None:
    tiny.pipe.to("cuda", torch.bfloat16)
    changes = {
        name: value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)
        for name, value in tiny.inputs.items()
        if isinstance(value, torch.Tensor)
    }
    outputs = {}
    for backend in ("triton", "torch"):
        tiny.pipe.enable_sparse_attention(
            profile("{tiles = [3, 1, 1]}", "tile = 'auto'"), backend=backend, strict=True
        )
        outputs[backend] = tiny.run(**changes).double()
        assert torch.isfinite(outputs[backend]).all()
    gap = (outputs["triton"] - outputs["torch"]).norm() / outputs["torch"].norm()
    assert float(gap) < 3e-2


def test_warmup_leaves_no_compilation_to_the_run(tiny_wan: Any) -> None:
    tiny_wan.pipe.to("cuda")
    tiny_wan.pipe.enable_sparse_attention(profile("{tiles = [1, 1, 1]}"))
    tiny_wan.pipe.sparse_attention_warmup(80, 112, 17)
    tiny_wan.run()
    assert tiny_wan.pipe.sparse_attention_report().time["compile_s"] == 0
