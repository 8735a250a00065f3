"""What stands in for diffusers' and torch's attention functions inside rebound processors.

An eager call goes to the engine with the site of the processor that makes it; a compiled one
through the operator in `operator`. A processor that runs and makes no call that comes here is
counted for that: no site's attention is uncounted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_accel.engine.attend import attend, serve, unseen
from dit_accel.engine.call import Call, Moment, autocast_of
from dit_accel.hosts.diffusers import callers, reach
from dit_accel.hosts.diffusers.compiled import slots

if TYPE_CHECKING:
    from dit_accel.hosts.diffusers.attachment import BoundSite


class _Current(threading.local):
    """The site whose processor runs in this thread, when, and how many calls it has made."""

    bound: BoundSite | None = None
    moment: Moment | None = None
    calls: int = 0


class Caught(TorchFunctionMode):
    """Leads torch's attention function here, by whatever name or import code comes to it.

    It sees every torch function, which takes time: diffusers' own processors do without.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is reach.TORCH:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


_current = _Current()


def run_site(
    bound: BoundSite,
    stock: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a site's processor, or serve what it returned before where the policy reuses it."""
    moment = callers.moment_of(bound.attachment)
    if moment is None:
        return stock()

    def compute() -> tuple[Any, int]:
        output, calls = _inside(bound, moment, stock)
        if calls == 0:
            unseen(bound.site, moment, bound.session)
        return output, max(calls, 1)

    def dense() -> Any:
        return _inside(None, None, stock)[0]

    if moment is not bound.moment:
        return compute()[0]  # outside of a forward nothing is known that could be served
    inputs = (*args, *kwargs.values())
    return serve(bound.site, moment, bound.session, "output", inputs, compute, dense)


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Stands in for diffusers' function of that name: q, k, v are BSHD."""
    parallel = parallel_config is not None
    if torch.compiler.is_compiling():
        slots.seen = True
        return torch.ops.dit_accel.attend(
            query, key, value, attn_mask, slots.site, slots.token, dropout_p, is_causal, scale,
            enable_gqa, parallel, "bshd", autocast_of(query),
        )  # fmt: skip

    def dense() -> Tensor:
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

    return _attend(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, "bshd", parallel, dense)
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for torch's function of that name: q, k, v are BHSD."""
    if torch.compiler.is_compiling():
        slots.seen = True
        return torch.ops.dit_accel.attend(
            query, key, value, attn_mask, slots.site, slots.token, dropout_p, is_causal, scale,
            enable_gqa, False, "bhsd", autocast_of(query),
        )  # fmt: skip

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return _attend(
        Call(query, key, value, attn_mask, dropout_p, is_causal, scale, "bhsd", False, dense)
    )


def _inside(
    bound: BoundSite | None, moment: Moment | None, stock: Callable[[], Any]
) -> tuple[Any, int]:
    """The processor's output, and how many attention calls it made; without a site, stock ones."""
    outer = _current.bound, _current.moment, _current.calls
    _current.bound, _current.moment, _current.calls = bound, moment, 0
    try:
        return stock(), _current.calls
    finally:
        _current.bound, _current.moment, _current.calls = outer


def _attend(call: Call) -> Tensor:
    bound, moment = _current.bound, _current.moment
    if bound is None or moment is None:
        return call.dense()
    _current.calls += 1
    _current.bound = None  # what computes this call makes none of its own
    try:
        return attend(call, bound.site, moment, bound.session)
    finally:
        _current.bound = bound
