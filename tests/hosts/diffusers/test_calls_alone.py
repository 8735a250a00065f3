"""Calls outside of a transformer's forward, hidden calls, second calls: counted, or refused."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dit_accel
from dit_accel import DitAccelError, StrictError
from dit_accel.engine.profile import Profile, parse_profile

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "[[rule]]\nreuse = {every = 2}\nlayers = '0'\n"
)
PLAIN = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
)
REASON = "outside of the transformer's forward"


class Grabbed(Exception):
    """Ends a run at the first forward."""


def arguments(tiny: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the pipeline calls its transformer with."""
    seen: list[Any] = []

    def grab(model: Any, args: Any, kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Grabbed

    hook = tiny.pipe.transformer.register_forward_pre_hook(grab, with_kwargs=True)
    with pytest.raises(Grabbed):
        tiny.run()
    hook.remove()
    return seen[0]


def sites(tiny: Any) -> int:
    cross = 2 * tiny.cross_sites if "image" in tiny.inputs else tiny.cross_sites
    return tiny.self_sites + cross


def kinds(session: Any) -> tuple[int, dict[str, int]]:
    report = session.report().kinds
    reasons = report["self"]["dense_reasons"]
    return report["self"]["calls"] + report["cross"]["calls"], reasons


@pytest.mark.parametrize("profile", [SPARSE, Profile("dense")], ids=["sparse", "dense"])
def test_a_forward_that_is_called_directly_is_counted(tiny: Any, profile: Any) -> None:
    args, kwargs = arguments(tiny)
    model = tiny.pipe.transformer
    with torch.no_grad():
        (stock, *_) = model.forward(*args, **copy.copy(kwargs))
        session = dit_accel.enable(model, profile=profile, steps=4)
        for times in (1, 2):
            (output, *_) = model.forward(*args, **kwargs)
            assert torch.equal(output, stock)  # dense, and nothing is served
            calls, reasons = kinds(session)
            assert calls == times * sites(tiny)
            (reason,) = reasons
            assert REASON in reason if profile is SPARSE else reason == "profile"
        model(*args, **kwargs)
        report = session.report()
        assert report.steps == 4 and report.kinds["self"]["calls"] == tiny.self_sites
        model.forward(*args, **kwargs)  # in a run that goes on it counts there
        assert session.report().kinds["self"]["calls"] == 2 * tiny.self_sites


def test_strict_names_a_forward_that_is_called_directly(tiny: Any) -> None:
    args, kwargs = arguments(tiny)
    tiny.pipe.enable_sparse_attention(PLAIN, strict=True)
    with torch.no_grad(), pytest.raises(StrictError, match=REASON):
        tiny.pipe.transformer.forward(*args, **kwargs)
    tiny.run()  # and goes on as if nothing had been
    assert tiny.pipe.sparse_attention_report().kinds["self"]["sparse"] > 0


def test_a_block_and_an_attention_module_alone_are_counted(tiny: Any) -> None:
    model = tiny.pipe.transformer
    name = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    block = getattr(model, name)[1]
    attention = next(n for n in ("attn", "attn1") if hasattr(block, n))
    seen: dict[str, Any] = {}

    def keep(what: str) -> Any:
        return lambda module, args, kwargs: seen.setdefault(what, (module, args, kwargs)) and None

    modules = {"block": block, "attention": getattr(block, attention)}
    hooks = [m.register_forward_pre_hook(keep(n), with_kwargs=True) for n, m in modules.items()]
    tiny.run(num_inference_steps=1)
    for hook in hooks:
        hook.remove()

    def outputs(what: str) -> list[torch.Tensor]:
        module, args, kwargs = seen[what]
        with torch.no_grad():
            out = module(*args, **kwargs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    stock = {what: outputs(what) for what in seen}
    tiny.pipe.enable_sparse_attention(SPARSE)
    for what in seen:
        assert all(map(torch.equal, outputs(what), stock[what]))
    report = tiny.pipe.sparse_attention_report()
    assert report.kinds["self"]["calls"] == 2 == report.kinds["self"]["dense"]
    tiny.pipe.enable_sparse_attention(PLAIN, strict=True)
    for what in seen:
        with pytest.raises(StrictError, match=REASON):
            outputs(what)


def test_an_attention_module_alone_before_and_after_runs(build: Any) -> None:
    """It neither takes from what a run keeps nor changes the pipeline's receipt."""
    tiny = build("wan")
    attention = tiny.pipe.transformer.blocks[0].attn2
    x, text = torch.randn(1, 9, 64), torch.randn(1, 5, 64)
    stock = attention(x, text)
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run()
    before = tiny.pipe.sparse_attention_report().kinds
    assert torch.equal(attention(x, text), stock)
    assert tiny.pipe.sparse_attention_report().kinds == before
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(attention(x, text), stock)


@pytest.mark.slow
def test_compiled_parts_alone_are_counted(build: Any) -> None:
    tiny = build("wan")
    args, kwargs = arguments(tiny)
    model = tiny.pipe.transformer
    x, text = torch.randn(1, 9, 64), torch.randn(1, 5, 64)
    with torch.no_grad():
        part, whole = model.blocks[0].attn2(x, text), model.forward(*args, **kwargs)[0]
        session = dit_accel.enable(model, profile=SPARSE, steps=4)
        torch._dynamo.reset()
        alone = torch.compile(model.blocks[0].attn2, backend="eager", fullgraph=True)
        forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        assert torch.allclose(alone(x, text), part, atol=1e-6)
        assert kinds(session)[0] == 1
        assert torch.allclose(forward(*args, **kwargs)[0], whole, atol=1e-5)
        calls, (reason,) = kinds(session)
        assert calls == 1 + 6 and REASON in reason


class Hidden:
    """A processor whose attention nobody can see, though it names torch's function."""

    _attention_backend = _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def usual(self) -> Any:
        return F.scaled_dot_product_attention

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["wan", "ltx_video"])
def test_a_processor_that_makes_no_known_call_is_counted(
    build: Any, family: str, compiled: bool
) -> None:
    tiny = build(family)
    model = tiny.pipe.transformer
    blocks = model.blocks if family == "wan" else model.transformer_blocks
    for block in (blocks[0], blocks[2]):
        block.attn1.processor = Hidden(block.attn1.processor)
    if compiled:
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    stock = tiny.run(num_inference_steps=2)
    tiny.pipe.enable_sparse_attention(Profile("dense"), strict=True)
    assert torch.equal(tiny.run(num_inference_steps=2), stock)
    kind = tiny.pipe.sparse_attention_report().kinds["self"]
    assert kind["calls"] == kind["dense"] == 2 * tiny.branches * tiny.self_sites
    (named,) = [reason for reason in kind["dense_reasons"] if reason != "profile"]
    assert "no attention call" in named
    assert kind["dense_reasons"][named] == 2 * tiny.branches * 2
    tiny.pipe.enable_sparse_attention(PLAIN, strict=True)
    with pytest.raises(StrictError, match="no attention call"):
        tiny.run()


CALLS = """
import torch
class Own:
    _attention_backend = _parallel_config = None
    def __call__(self, attn, hidden_states, *unused, **also_unused):
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for to in (attn.to_q, attn.to_k, attn.to_v))
        {call}
        return attn.to_out[0](out.transpose(1, 2).flatten(2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "out = torch.nn.functional.scaled_dot_product_attention(q, k, v)",
        "import torch.nn.functional as G; out = G.scaled_dot_product_attention(q, k, v)",
    ],
)
def test_own_processors_in_compiled_blocks(build: Any, call: str) -> None:
    module = sys.modules.setdefault("users_compiled", ModuleType("users_compiled"))
    exec(CALLS.format(call=call), module.__dict__)
    tiny = build("wan")
    for block in tiny.pipe.transformer.blocks:
        block.attn1.processor = module.Own()  # type: ignore[attr-defined]
    torch._dynamo.reset()
    tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    stock = tiny.run(num_inference_steps=2)
    tiny.pipe.enable_sparse_attention(Profile("dense"), strict=True)
    assert torch.equal(tiny.run(num_inference_steps=2), stock)
    kind = tiny.pipe.sparse_attention_report().kinds["self"]
    assert kind["calls"] == kind["dense"] == 2 * tiny.branches * tiny.self_sites
    tiny.pipe.enable_sparse_attention(PLAIN, strict=True)
    if "import" in call:  # a graph cannot be made of a call that is bound by no name
        assert not any("profile" in reason for reason in kind["dense_reasons"])
        with pytest.raises(StrictError, match="no attention call"):
            tiny.run()
        return
    assert not torch.equal(tiny.run(num_inference_steps=2), stock)
    kind = tiny.pipe.sparse_attention_report().kinds["self"]
    assert kind["calls"] == kind["sparse"] == 2 * tiny.branches * tiny.self_sites


@pytest.mark.slow
def test_what_is_exchanged_in_a_compiled_model_is_named(build: Any) -> None:
    """A whole compiled model makes its graph before it is asked what it has: never silently."""
    tiny = build("wan")
    args, kwargs = arguments(tiny)
    model = tiny.pipe.transformer
    session = dit_accel.enable(model, profile=PLAIN, steps=4)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        fast(*args, **kwargs)
        assert session.report().kinds["self"]["sparse"] == 3
        stock = type(model.blocks[1].attn1.processor)._dit_accel_base  # type: ignore[attr-defined]
        model.blocks[1].attn1.processor = stock()
        with pytest.raises(DitAccelError, match="exchanged in a compiled transformer"):
            fast(*args, **kwargs)
        session = dit_accel.enable(model, profile=PLAIN, steps=4)
        fast(*args, **kwargs)
        assert session.report().kinds["self"]["sparse"] == 3


class Bare(nn.Module):
    """An attention module without a processor."""

    def forward(self, x: torch.Tensor, *unused: Any, **also: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("enabled", [False, True])
def test_modules_that_cannot_be_attached_to_are_refused(tiny: Any, enabled: bool) -> None:
    """Named when enabled, or at the next call; disabling still restores what was there."""
    stock = tiny.run(num_inference_steps=1)
    if enabled:
        tiny.pipe.enable_sparse_attention(PLAIN)
    for blocks in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(tiny.pipe.transformer, blocks, ()):
            name = next(n for n in ("attn", "attn1") if hasattr(block, n))
            whole = getattr(block, name)
            setattr(block, name, Bare())
            with pytest.raises(DitAccelError, match=rf"\.{name} is a Bare.*no attention processor"):
                tiny.run() if enabled else tiny.pipe.enable_sparse_attention(PLAIN)
            setattr(block, name, whole)
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(num_inference_steps=1), stock)


class Whole(nn.Module):
    """A block of somebody's own, whose attention is in its forward."""

    def forward(self, x: torch.Tensor, *unused: Any, **also: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_blocks_and_models_that_are_unknown_are_refused(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(PLAIN)
    tiny.pipe.transformer.blocks[1] = Whole()
    with pytest.raises(DitAccelError, match="attn1 is a Whole"):
        tiny.run()
    tiny.pipe.disable_sparse_attention()
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(PLAIN)
    tiny.pipe.transformer = Whole()
    with pytest.raises(DitAccelError, match="transformer was exchanged for a Whole"):
        tiny.run()


def test_a_block_without_attention_has_none_to_count(build: Any) -> None:
    """`nn.Identity` calls no attention: such a site is none."""
    tiny = build("wan")

    class Nothing(nn.Identity):
        def forward(self, x: torch.Tensor, *unused: Any) -> torch.Tensor:
            return x

    Nothing.__name__ = "Identity"
    tiny.pipe.transformer.blocks[1].attn1 = Nothing()
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(Profile("dense"))
    assert torch.equal(tiny.run(), stock)
    assert tiny.pipe.sparse_attention_report().kinds["self"]["calls"] == 2 * 6


def image_adapter(tiny: Any) -> dict[str, Any]:
    """Flux with an IP-Adapter of four tokens; the arguments of a call with it."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model = tiny.pipe.transformer
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.processor = FluxIPAdapterAttnProcessor(64, 32, num_tokens=(4,), scale=[0.7])
    model.encoder_hid_proj = lambda embeds: embeds
    return {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}


class Second:
    """A processor of one's own that also attends to a few keys of its own."""

    _attention_backend = _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        output = self.stock(attn, hidden_states, *args, **kwargs)
        keys = hidden_states[:, :5]
        rows = [x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (hidden_states, keys, keys)]
        extra = F.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(2)
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra


@pytest.mark.parametrize("profile", [PLAIN, SPARSE], ids=["sparse", "reuse"])
def test_an_image_adapter_is_no_unplanned_call(build: Any, profile: Any) -> None:
    tiny = build("flux")
    call = image_adapter(tiny)
    stock = tiny.run(**call)
    tiny.pipe.enable_sparse_attention(Profile("dense"), strict=True)
    assert torch.equal(tiny.run(**call), stock)
    tiny.pipe.enable_sparse_attention(profile, strict=True)
    assert not torch.equal(tiny.run(**call), stock)
    report = tiny.pipe.sparse_attention_report().to_dict()
    if profile is PLAIN:
        assert report["self"]["sparse"] == report["self"]["calls"] == 4 * 3
        assert report["cross"]["calls"] == report["cross"]["dense"] == 2 * 3
    total = sum(report[kind]["calls"] for kind in ("self", "cross"))
    assert total == (4 + 2) * 3


def test_second_calls_of_every_family_count_as_cross_attention(tiny: Any) -> None:
    model = tiny.pipe.transformer
    block = (model.blocks if hasattr(model, "blocks") else model.transformer_blocks)[1]
    attention = next(getattr(block, n) for n in ("attn", "attn1") if hasattr(block, n))
    attention.processor = Second(attention.processor)
    stock = tiny.run()
    runs = sum(1 for name in ("transformer", "transformer_2") if tiny.pipe.components.get(name))
    tiny.pipe.enable_sparse_attention(Profile("dense"), strict=True)
    assert torch.equal(tiny.run(), stock)
    before = tiny.pipe.sparse_attention_report().kinds
    tiny.pipe.enable_sparse_attention(PLAIN, strict=True)
    tiny.run()
    kinds = tiny.pipe.sparse_attention_report().kinds
    assert kinds["self"]["sparse"] == kinds["self"]["calls"]
    assert kinds["cross"]["calls"] == before["cross"]["calls"]
    if runs == 1 and not tiny.cross_sites:
        assert kinds["self"]["calls"] == tiny.self_sites * tiny.branches * tiny.steps
        assert kinds["cross"]["calls"] == tiny.branches * tiny.steps
