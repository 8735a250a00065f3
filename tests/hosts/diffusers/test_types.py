"""Calls whose tensors differ in type, and autocast: what stock gives, counted with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_accel import StrictError
from dit_accel.engine.attend import attend
from dit_accel.engine.call import Call, Moment, Row, Site
from dit_accel.engine.policy import Policy
from dit_accel.engine.profile import parse_profile
from dit_accel.engine.run import Run
from dit_accel.engine.session import Session, Settings
from dit_accel.layout import TokenLayout

HEAD = "[profile]\nbreakeven = false\n"
ALL = parse_profile(
    f"{HEAD}[[rule]]\ncompute = 'sliding_tile'\nwindow = {{fraction = [1.0, 1.0, 1.0]}}\n"
    "tile = [2, 3, 3]\n"
)
ONLINE = parse_profile(f"{HEAD}[[rule]]\ncompute = 'block_topk'\ndensity = 0.4\ntile = [1, 3, 3]\n")
MIXED = "mixed types (float32, float32, bfloat16)"


def run(tiny: Any, autocast: torch.dtype | None = torch.bfloat16, how: str = "eager") -> Tensor:
    """Two steps, compiled or not."""
    model = tiny.pipe.transformer
    torch._dynamo.reset()
    if how == "regional":
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    elif how == "whole":
        tiny.pipe.transformer = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output: Tensor = tiny.run(num_inference_steps=2)
        return output
    finally:  # eager again
        tiny.pipe.transformer = model
        for module in model.modules():
            module._compiled_call_impl = None


def report(tiny: Any) -> dict[str, Any]:
    counts: dict[str, Any] = tiny.pipe.sparse_attention_report().to_dict()["self"]
    return counts


def test_autocast_gives_what_stock_gives(tiny: Any) -> None:
    """Every family, weights in float32: dense bits, and a plan that keeps all is near dense."""
    stock = run(tiny)
    tiny.pipe.enable_sparse_attention("dense")
    assert torch.equal(run(tiny), stock)
    tiny.pipe.enable_sparse_attention(ALL)
    kept, counts = run(tiny), report(tiny)
    assert kept.dtype == stock.dtype
    assert (kept.float() - stock.float()).norm() < 0.05 * stock.float().norm()
    assert counts["sparse"] + counts["dense"] == counts["calls"] > 0
    assert counts["dense_reasons"] in ({}, {MIXED: counts["calls"]})


@pytest.mark.parametrize("profile", [ALL, ONLINE], ids=["static", "online"])
def test_strict_names_the_types(build: Any, profile: Any) -> None:
    tiny = build("hunyuan_video")
    tiny.pipe.enable_sparse_attention(profile, strict=True)
    run(tiny, None)
    assert report(tiny)["sparse"] == report(tiny)["calls"]
    with pytest.raises(StrictError, match="mixed types .float32, float32, bfloat16"):
        run(tiny)
    run(tiny, None)


class InFloat(nn.Module):
    """A norm of the user's own that computes and returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float(), x.shape[-1:])


def float_norms(tiny: Any) -> Any:
    """Half weights and values beside queries and keys in float32."""
    tiny.to("cpu", torch.bfloat16)
    for name, module in tiny.pipe.transformer.named_modules():
        if name.endswith((".attn", ".attn1")):
            module.norm_q, module.norm_k = InFloat(), InFloat()
    return tiny


@pytest.mark.parametrize("family", ["flux", "hunyuan_video"])
def test_float_queries_beside_half_values(build: Any, family: str) -> None:
    """Autocast joins them as in stock; without it stock refuses them, and so do we."""
    tiny = float_norms(build(family))
    stock = run(tiny)
    with pytest.raises(RuntimeError, match="same dtype"):
        run(tiny, None)
    for profile, reason in (("dense", "profile"), (ALL, MIXED)):
        tiny.pipe.enable_sparse_attention(profile)
        assert torch.equal(run(tiny), stock)
        assert report(tiny)["dense_reasons"] == {reason: report(tiny)["calls"]}
        with pytest.raises(RuntimeError, match="same dtype"):
            run(tiny, None)
    tiny.pipe.enable_sparse_attention(ALL, strict=True)
    with pytest.raises(StrictError, match="mixed types"):
        run(tiny)


@pytest.mark.slow
def test_float_queries_beside_half_values_compiled(build: Any) -> None:
    tiny = float_norms(build("wan"))
    stock = run(tiny, how="regional")
    tiny.pipe.enable_sparse_attention(ALL)
    assert torch.equal(run(tiny, how="regional"), stock)
    assert report(tiny)["dense_reasons"] == {MIXED: report(tiny)["calls"]}
    tiny.pipe.enable_sparse_attention(ALL, strict=True)
    with pytest.raises(StrictError, match="mixed types"):
        run(tiny, how="regional")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), [("hunyuan_video", "regional"), ("flux", "regional")])
def test_compiled_under_autocast(build: Any, family: str, how: str) -> None:
    """A graph runs with autocast off: the operator has to bring it back, and to say its type."""
    tiny = build(family)
    mixed = family == "hunyuan_video"
    stock = run(tiny, torch.bfloat16, how) if mixed else None
    tiny.pipe.enable_sparse_attention(ONLINE)
    eager, counted = run(tiny), report(tiny)
    compiled = run(tiny, torch.bfloat16, how)
    assert torch.equal(compiled, eager if stock is None else stock)
    assert bool(counted["dense_reasons"]) == mixed
    for key in ("calls", "sparse", "dense_reasons", "launched_density"):
        assert report(tiny)[key] == counted[key]


LAYOUT = TokenLayout((3, 4, 5))
SITE = Site("blocks.0.attn", 0, 1, "self")


def one_call(profile: Any, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Any]:
    """An attention call (BSHD) under the engine alone, and the counts."""

    def stock() -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2)

    run = Run(1)
    moment = Moment(run, "transformer", 0, 1, (Row(""),), {"video": LAYOUT})
    call = Call(q, k, v, None, 0.0, False, None, "bshd", False, stock)
    session = Session(Policy(profile, [SITE]), Settings(**how))
    return attend(call, SITE, moment, session), run.report("p", "f", "m").to_dict()["self"]


def tensors(*types: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(0)
    shape = 1, LAYOUT.length, 2, 32
    q, k, v = (torch.randn(shape, generator=noise).to(dtype) for dtype in types)
    return q, k, v


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "types", [(torch.float32,) * 3, (torch.float16,) * 3, (torch.bfloat16,) * 3]
)
def test_calls_that_autocast_would_cast(types: Any, autocast: torch.dtype) -> None:
    q, k, v = tensors(*types)
    with torch.autocast("cpu", autocast):
        rows = (x.transpose(1, 2) for x in (q, k, v))
        wanted = nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2)
        output, counts = one_call(ALL, q, k, v)
    assert output.dtype == wanted.dtype == autocast
    if types[0] == autocast:
        assert counts["sparse"] == 1
        return
    names = [str(dtype).removeprefix("torch.") for dtype in (types[0], autocast)]
    assert torch.equal(output, wanted)
    assert counts["dense_reasons"] == {f"autocast from {names[0]} to {names[1]}": 1}
    with torch.autocast("cpu", autocast), pytest.raises(StrictError, match="autocast from"):
        one_call(ALL, q, k, v, strict=True)


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
)
def test_any_two_types_run_dense(types: Any) -> None:
    q, k, v = tensors(*types)
    with torch.autocast("cpu", torch.bfloat16):
        rows = (x.transpose(1, 2) for x in (q, k, v))
        wanted = nn.functional.scaled_dot_product_attention(*rows).transpose(1, 2)
        output, counts = one_call(ONLINE, q, k, v)
        with pytest.raises(StrictError, match="mixed types"):
            one_call(ONLINE, q, k, v, strict="except-breakeven")
    assert torch.equal(output, wanted)
    (reason,) = counts["dense_reasons"]
    assert reason == f"mixed types ({', '.join(str(t).removeprefix('torch.') for t in types)})"


def test_autocast_has_no_say_in_a_selection() -> None:
    """A plan chosen under autocast is the one chosen without it."""
    q, k, v = tensors(*(torch.bfloat16,) * 3)
    alone, _ = one_call(ONLINE, q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        under, counts = one_call(ONLINE, q, k, v)
    assert torch.equal(under, alone) and counts["sparse"] == 1
