"""No attention call is uncounted, whatever was exchanged and however it is called.

Calls are counted from outside by a mode around torch's function, to which diffusers' dispatch comes
on a CPU, and the right outputs are those of a pipeline that was never enabled.
"""

from __future__ import annotations

import copy
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dit_accel.engine.profile import Profile, parse_profile

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
)
DENSE = Profile("dense")


class Outside(TorchFunctionMode):
    """Counts torch's attention calls in transformers, but for those of HunyuanVideo's refiner,
    which are the text's own and left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is F.scaled_dot_product_attention:
            codes = list(callers())
            refiner = any("TokenRefiner" in code.co_qualname for code in codes)
            self.calls += not refiner and any(
                "/diffusers/models/transformers/" in code.co_filename for code in codes
            )
        return function(*args, **(kwargs or {}))


def callers() -> Iterator[CodeType]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back  # type: ignore[assignment]


def blocks_of(model: Any) -> list[nn.ModuleList]:
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    return [getattr(model, name) for name in names if hasattr(model, name)]


def attentions(block: nn.Module) -> list[str]:
    return [name for name in ("attn", "attn1", "attn2") if hasattr(block, name)]


class Holder(nn.Module):
    """Somebody's wrapper around a module, as for checkpointing or sharding."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("held"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.held(*args, **kwargs)


class Shy(Holder):
    """One that shows nothing of what it holds."""

    __getattr__ = nn.Module.__getattr__


USER = {
    "full name": "return torch.nn.functional.scaled_dot_product_attention(*rows)",
    "by name": "return attention(*rows)",
    "inside": "import torch.nn.functional as ops\nreturn ops.scaled_dot_product_attention(*rows)",
    "from inside": (
        "from torch.nn.functional import scaled_dot_product_attention as mine\nreturn mine(*rows)"
    ),
    "helper": "return other.helped(*rows)",
    "dispatch inside": (
        "from diffusers.models.attention_dispatch import dispatch_attention_fn\n"
        "q, k, v = (x.transpose(1, 2) for x in rows[:3])\n"
        "return dispatch_attention_fn(q, k, v, *rows[3:]).transpose(1, 2)"
    ),
}
"""How a user's own processor comes to an attention function; `rows` are BHSD, and the mask."""


source = cache(inspect.getsource)


def own_processor(stock: type, how: str) -> type:
    """A stock processor's text as a class of a user's own module."""
    module = sys.modules.setdefault("users_module", ModuleType("users_module"))
    other = sys.modules.setdefault("users_other_module", ModuleType("users_other_module"))
    exec(
        "import torch.nn.functional as f\n"
        "def helped(*rows): return f.scaled_dot_product_attention(*rows)",
        other.__dict__,
    )
    names = dict(vars(sys.modules[stock.__module__]), __name__=module.__name__, other=other)
    for name in ("F", "dispatch_attention_fn", stock.__name__):
        names.pop(name, None)
    names["attention"] = F.scaled_dot_product_attention
    body = textwrap.indent(USER[how], "    ")
    exec(f"def bhsd(*rows):\n{body}", names)
    exec(
        "def mine(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **unused):\n"
        "    rows = [x.transpose(1, 2) for x in (query, key, value)]\n"
        "    return bhsd(*rows, attn_mask).transpose(1, 2)\n"
        "def turned(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):\n"
        "    return bhsd(query, key, value, attn_mask)\n",
        names,
    )
    text = source(stock).replace("dispatch_attention_fn(", "mine(")
    exec(
        text.replace("F.scaled_dot_product_attention(", "turned(").replace(
            'hasattr(F, "scaled_dot_product_attention")', "True"
        ),
        names,
    )
    made: type = names[stock.__name__]
    module.__dict__.update({k: v for k, v in names.items() if not k.startswith("__")})
    return made


def derived(stock: type) -> type:
    class Derived(stock):  # type: ignore[misc]
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(attn, *args, **kwargs)

    return Derived


def give(model: Any, spare: Any, make: Callable[[type], type]) -> None:
    """Every attention module of the last blocks gets a processor of a class made from stock's."""
    for mine, other in zip(blocks_of(model), blocks_of(spare), strict=True):
        for name in attentions(other[0]):
            stock = type(getattr(other[0], name).processor)
            getattr(mine[-1], name).processor = make(stock)()


def each_list(model: Any, spare: Any, change: Callable[[nn.ModuleList, nn.ModuleList], None]):
    for mine, other in zip(blocks_of(model), blocks_of(spare), strict=True):
        change(mine, other)


def change_attention(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    for name in attentions(mine[0]):
        setattr(mine[0], name, getattr(other[1], name))


def change_block(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine[1] = other[0]


def turn_blocks(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine[0], mine[1] = mine[1], mine[0]


def tie_blocks(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine[0] = mine[1]


def hold_block(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine[0] = Holder(mine[0])


def hide_block(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine[1] = Shy(mine[1])


def add_block(mine: nn.ModuleList, other: nn.ModuleList) -> None:
    mine.append(copy.deepcopy(other[0]))


EXCHANGES: dict[str, Callable[[Any, Any], None]] = {
    "attention": lambda model, spare: each_list(model, spare, change_attention),
    "block": lambda model, spare: each_list(model, spare, change_block),
    "order of blocks": lambda model, spare: each_list(model, spare, turn_blocks),
    "same block twice": lambda model, spare: each_list(model, spare, tie_blocks),
    "held block": lambda model, spare: each_list(model, spare, hold_block),
    "hidden block": lambda model, spare: each_list(model, spare, hide_block),
    "one more block": lambda model, spare: each_list(model, spare, add_block),
    "processor": lambda model, spare: give(model, spare, lambda stock: stock),
    "derived processor": lambda model, spare: give(model, spare, derived),
    **{
        f"own processor, {how}": lambda model, spare, how=how: give(
            model, spare, lambda stock: own_processor(stock, how)
        )
        for how in USER
    },
}  # fmt: skip
FEW = {"attention", "block", "held block", "hidden block", "derived processor"} | {
    "own processor, full name",
    "own processor, inside",
}
COMPONENTS = ("transformer", "transformer_2")


def shorten(tiny: Any) -> None:
    """The runs are many: two latent frames will do."""
    if "num_frames" in tiny.inputs:
        tiny.inputs["num_frames"] = 9 if tiny.inputs["num_frames"] == 33 else 5


def check(tiny: Any, stock: Any, what: str, profile: Any) -> None:
    """One run of both: as many calls as stock makes, and its bits where they are dense."""
    steps = 2 if tiny.pipe.components.get("transformer_2") is not None else 1
    with Outside() as outside:
        wanted = stock.run(num_inference_steps=steps)
    output = tiny.run(num_inference_steps=steps)
    kinds = tiny.pipe.sparse_attention_report().kinds
    assert kinds["self"]["calls"] + kinds["cross"]["calls"] == outside.calls > 0, what
    if profile is DENSE:
        assert torch.equal(output, wanted), what
        assert set(kinds["self"]["dense_reasons"]) == {"profile"}, what
    else:
        assert kinds["self"]["sparse"] == kinds["self"]["calls"], what


@pytest.mark.parametrize("profile", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_every_exchange_is_followed(tiny: Any, profile: Any) -> None:
    """One after the other on one pipeline, and on one that is stock."""
    shorten(tiny)
    stock, spares = copy.deepcopy(tiny), [copy.deepcopy(tiny.pipe.components) for _ in range(2)]
    tiny.pipe.enable_sparse_attention(profile, strict=True)
    check(tiny, stock, "nothing", profile)
    shown = [*EXCHANGES] if profile is DENSE else ["block", "held block", "own processor, inside"]
    if "image" in tiny.inputs or spares[0].get("transformer_2") is not None:
        shown = [what for what in shown if what in FEW]  # the others run on Wan's first pipeline
    for what in shown:
        for each, parts in zip((tiny, stock), spares, strict=True):
            for name in COMPONENTS:
                if parts.get(name) is not None:
                    EXCHANGES[what](getattr(each.pipe, name), copy.deepcopy(parts[name]))
        check(tiny, stock, what, profile)
    for what in ("component", "held component", "scheduler"):
        for each, parts in zip((tiny, stock), spares, strict=True):
            for name in [name for name in COMPONENTS if parts.get(name) is not None]:
                new = Holder(parts[name]) if what == "held component" else parts[name]
                setattr(each.pipe, name, new)
            if what == "scheduler":
                scheduler = each.pipe.scheduler
                each.pipe.scheduler = type(scheduler).from_config(scheduler.config)
        check(tiny, stock, what, profile)
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(num_inference_steps=1), stock.run(num_inference_steps=1))


@pytest.mark.parametrize("what", ["block", "own processor, inside"])
def test_an_exchange_in_the_middle_of_a_run(tiny: Any, what: str) -> None:
    shorten(tiny)
    stock, spares = copy.deepcopy(tiny), [copy.deepcopy(tiny.pipe.transformer) for _ in range(2)]
    tiny.pipe.enable_sparse_attention(DENSE, strict=True)

    def changed(spare: Any) -> Callable[..., Any]:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
            if step == 0:
                EXCHANGES[what](pipe.transformer, spare)
            return kwargs

        return callback

    with Outside() as outside:
        wanted = stock.run(callback_on_step_end=changed(spares[0]), num_inference_steps=2)
    output = tiny.run(callback_on_step_end=changed(spares[1]), num_inference_steps=2)
    assert torch.equal(output, wanted)
    kinds = tiny.pipe.sparse_attention_report().kinds
    assert sum(kind["calls"] for kind in kinds.values()) == outside.calls
