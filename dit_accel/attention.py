"""The one entry of every attention call: decide, plan, run, count.

Eager calls come here with the site of the processor that makes them, compiled ones through the
operator in `dit_accel.operator`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from dit_accel.breakeven import effort, pays
from dit_accel.broadcast import Entry, tensors_of
from dit_accel.compiled import slots
from dit_accel.errors import StrictError
from dit_accel.kernels.backends import BACKENDS, choose, eligible, layout_kind, moves_tokens
from dit_accel.kernels.block_sparse import Layout, check_call
from dit_accel.kernels.patterns import Pattern, plan_for
from dit_accel.kernels.patterns.base import kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.planner.receipt import PlannedCall
from dit_accel.profile import Reuse
from dit_accel.state import RunState, Site

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
COMPILED = ("hopper", "triton", "flex", "fa4")
"""Backends whose first call of a variant compiles it."""
BREAK_EVEN = "below break-even"
PROFILE = "profile"
CHOICES = 128
"""How many choices of a plan and a backend a pipeline keeps; `plan_for` keeps as many plans."""


@dataclass
class Call:
    """One attention call as the processor makes it; q, k, v are BSHD or BHSD by `layout`.

    `dense` runs it exactly as stock would.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    layout: Layout
    parallel: bool
    dense: Callable[[], torch.Tensor]

    def bshd(self) -> Tensors:
        """Query, key and value as [batch, tokens, heads, head_dim] views."""
        tensors = (self.query, self.key, self.value)
        if self.layout == "bshd":
            return tensors
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        return query, key, value

    @property
    def flops(self) -> float:
        """Floating-point operations of the dense call."""
        dim = self.query.shape[-1]
        rows = self.query.numel() // max(1, dim)
        return 2.0 * rows * self.lengths[1] * (dim + self.value.shape[-1])

    @property
    def lengths(self) -> tuple[int, int]:
        """(query tokens, key tokens)."""
        axis = 1 if self.layout == "bshd" else 2
        return self.query.shape[axis], self.key.shape[axis]


class _Current(threading.local):
    site: Site | None = None
    calls: int = 0


current = _Current()


def run_site(
    site: Site, compute: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a site's processor, or serve what it returned before where the policy reuses it."""
    reuse = site.state.decide(site).reuse
    if reuse is None:
        return _inside(site, compute)[0]
    inputs = (*args, *kwargs.values())
    return reused(site, reuse, site.key.name, inputs, lambda: _inside(site, compute))


def reused(
    site: Site,
    reuse: Reuse,
    name: str,
    inputs: tuple[Any, ...],
    compute: Callable[[], tuple[Any, int]],
) -> Any:
    """The output kept under `name`, or else what `compute` returns, which is then kept.

    Args:
        inputs: their shapes, types and devices must equal those of the kept output.
        compute: returns an output and how many attention calls it made.
    """
    state, forward = site.state, site.state.forward
    assert forward is not None
    key = (site.key.expert, name, forward.branch)
    signature = tuple(
        (tuple(x.shape), x.dtype, x.device) for x in inputs if isinstance(x, torch.Tensor)
    )
    prompt = forward.prompt
    entry = state.cache.serve(key, reuse, forward.step, forward.steps, signature, prompt)
    if entry is not None:
        state.recorder.count(site.key, forward.step, "reused", calls=entry.calls)
        return entry.output
    output, calls = compute()
    if not any(tensor.requires_grad for tensor in tensors_of(output)):
        state.cache.store(key, Entry(output, forward.step, calls, signature, prompt))
    return output


def dispatch_attention_fn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> torch.Tensor:
    """Stands in for diffusers' function of that name: q, k, v are BSHD."""

    def dense() -> torch.Tensor:
        return attention_dispatch.dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            attention_kwargs,
            backend=backend,
            parallel_config=parallel_config,
        )

    parallel = parallel_config is not None
    if torch.compiler.is_compiling():
        return _compiled_call(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, parallel, "bshd"
        )
    return _attend(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, "bshd", parallel, dense)
    )


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Stands in for torch's function of that name: q, k, v are BHSD."""

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if torch.compiler.is_compiling():
        return _compiled_call(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False, "bhsd"
        )
    return _attend(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, "bhsd", False, dense)
    )


def _inside(site: Site, compute: Callable[[], Any]) -> tuple[Any, int]:
    """The processor's output, and how many attention calls it made."""
    outer = current.site, current.calls
    current.site, current.calls = site, 0
    try:
        return compute(), current.calls
    finally:
        current.site, current.calls = outer


def _attend(call: Call) -> torch.Tensor:
    site = current.site
    if site is None or site.state.forward is None:
        return call.dense()
    current.calls += 1
    return run(call, site)


def run(call: Call, site: Site) -> torch.Tensor:
    """Decide, plan, run and count one call of a site during a forward."""
    state, forward = site.state, site.state.forward
    assert forward is not None
    pattern = state.decide(site).compute
    if pattern is None:
        return _dense(call, site, PROFILE)
    if (reason := _obstacle(call, site)) is not None:
        return _unplanned(call, site, reason)
    layout = forward.layout
    assert layout is not None
    tensors = call.bshd()
    plan, backend, reason = planned(state, layout, pattern, tensors)
    if reason is not None:
        return _unplanned(call, site, f"backend {backend}: {reason}")
    launched = plan.launched_density(backend)
    if state.policy.profile.breakeven and not pays(
        backend, call.query.device.type, call.flops, launched
    ):
        return _unplanned(call, site, BREAK_EVEN)
    output = launch(state, *tensors, plan, backend, call.scale)
    state.recorder.count(
        site.key,
        forward.step,
        "sparse",
        backend=backend,
        launched=launched,
        kept=plan.kept_density(),
    )
    batch, _, heads, dim = tensors[0].shape
    who = PlannedCall(backend, batch, heads, dim, moves_tokens(backend, plan))
    state.recorder.planned(pattern, layout, plan, who)
    return output if call.layout == "bshd" else output.transpose(1, 2)


def planned(
    state: RunState, layout: TokenLayout, pattern: Pattern, bshd: Tensors
) -> tuple[BlockPlan, str, str | None]:
    """The plan of a call, the backend that shall run it, and why that one cannot (or None).

    Chosen once for calls that are alike in all that a choice looks at, and kept: a step makes the
    same few calls in every layer. Tensors are not kept.
    """
    key = (layout, pattern, state.settings.backend, *map(_seen, bshd))
    chosen = state.choices.pop(key, None)
    if chosen is None:
        chosen = _choose(state.settings.backend, layout, pattern, bshd)
        if len(state.choices) >= CHOICES:
            del state.choices[next(iter(state.choices))]
    state.choices[key] = chosen  # the latest used is last
    return chosen


def _seen(x: torch.Tensor) -> tuple[Any, ...]:
    """All that a choice looks at in a tensor; bulk copies begin at multiples of 16 bytes."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _choose(
    wanted: str | None, layout: TokenLayout, pattern: Pattern, bshd: Tensors
) -> tuple[BlockPlan, str, str | None]:
    """See `planned`.

    Boxes that hardware copies may fit a grid badly: then tiles of any shape are the cheaper plan,
    although their tokens must be moved, or gathered by a slower kernel.
    """
    device, heads = bshd[0].device, bshd[0].shape[2]
    kind = layout_kind(*bshd, wanted)
    plan = plan_for(layout, pattern, device, heads, kind)
    backend = wanted or choose(*bshd, plan)
    if wanted is None and kind == "boxes":
        other = plan_for(layout, pattern, device, heads, kind_for(device))
        rival = choose(*bshd, other)
        if effort(rival, device.type, other) < effort(backend, device.type, plan):
            plan, backend = other, rival
    reason = eligible(backend, *bshd, plan)
    if reason is None:
        check_call(*bshd, plan)
    return plan, backend, reason


def launch(
    state: RunState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: BlockPlan,
    backend: str,
    scale: float | None = None,
) -> torch.Tensor:
    """Run a choice of `planned` under the clock; a call that compiles its kernel is timed apart."""
    shape = plan.shape
    variant = (backend, query.dtype, query.shape[-1], shape.block_q, shape.block_k, shape.kinds)
    first = backend in COMPILED and variant not in state.warm
    state.warm.add(variant)
    timer = state.recorder.compilation if first else state.recorder.attention
    with timer(query.device):
        # What `block_sparse_attention` would check, `planned` has.
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return BACKENDS[backend].forward(query, key, value, plan, scale, False, None)[0]


def _obstacle(call: Call, site: Site) -> str | None:
    """Why this call cannot run a pattern, None where it can."""
    forward = site.state.forward
    assert forward is not None
    if forward.layout is None:
        return f"layout: {forward.why}"
    if call.lengths != (forward.layout.length, forward.layout.length):
        return "layout: not the video's own attention"
    if call.mask is not None and site.masks != "key_padding":
        return "attention mask"
    if call.dropout or call.causal:
        return "dropout" if call.dropout else "causal"
    if call.parallel:
        return "context parallel"
    tensors = (call.query, call.key, call.value)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are needed"
    return None


def _unplanned(call: Call, site: Site, reason: str) -> torch.Tensor:
    strict = site.state.settings.strict
    if strict is True or (strict == "except-breakeven" and reason != BREAK_EVEN):
        raise StrictError(
            f"strict: {site.key.name} would run dense although the profile plans a pattern: "
            f"{reason}."
        )
    return _dense(call, site, reason)


def _dense(call: Call, site: Site, reason: str) -> torch.Tensor:
    state, forward = site.state, site.state.forward
    assert forward is not None
    with state.recorder.attention(call.query.device):
        output = call.dense()
    state.recorder.count(site.key, forward.step, "dense", reason=reason)
    return output


def _compiled_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    parallel: bool,
    layout: str,
) -> torch.Tensor:
    where = (slots.site, slots.token)
    return torch.ops.dit_accel.attend(
        query, key, value, mask, *where, dropout, causal, scale, gqa, parallel, layout
    )
