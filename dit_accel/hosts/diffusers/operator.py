"""The operator that stands for an attention call in compiled graphs.

It is opaque: step, branch and policy are read when it runs, and the site comes as a tensor, so that
one graph serves every layer and step. A graph is run with autocast off: what it was traced under
comes as an argument, and holds again while the operator runs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch import Tensor

from dit_accel.engine.attend import attend, serve, unseen
from dit_accel.engine.call import Call
from dit_accel.hosts.diffusers import callers
from dit_accel.hosts.diffusers.compiled import object_of
from dit_accel.kernels.block_sparse import Layout

if TYPE_CHECKING:
    from dit_accel.hosts.diffusers.attachment import BoundSite


# What it does depends on the run, which a captured graph would not follow. torch 2.9 asks for it.
TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("dit_accel::attend", mutates_args=(), tags=TAGS)
def _attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor,
    token: Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    parallel: bool,
    layout: str,
    autocast: torch.dtype | None,
) -> Tensor:
    kind, attachment = query.device.type, object_of(index).attachment
    try:
        with nullcontext() if autocast is None else torch.autocast(kind, autocast):
            return _attend(
                query, key, value, mask, index, dropout, causal, scale, gqa, parallel, layout
            )
    except BaseException:
        callers.end_attention(attachment, failed=True)
        raise


@_attend_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    autocast = rest[-1]
    kept = autocast is None or query.dtype == torch.float64  # which autocast leaves alone
    shape = (*query.shape[:-1], value.shape[-1])
    return query.new_empty(shape, dtype=query.dtype if kept else autocast)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    parallel: bool,
    layout: str,
) -> Tensor:
    bound: BoundSite = object_of(index)
    processor: Any = bound.module.processor

    def dense() -> Tensor:
        if layout == "bhsd":
            return F.scaled_dot_product_attention(
                query, key, value, mask, dropout, causal, scale=scale, enable_gqa=gqa
            )
        return attention_dispatch.dispatch_attention_fn(
            query,
            key,
            value,
            mask,
            dropout,
            causal,
            scale,
            gqa,
            backend=getattr(processor, "_attention_backend", None),
            parallel_config=processor._parallel_config if parallel else None,
        )

    moment = callers.moment_of(bound.attachment)
    if moment is None:
        return dense().contiguous()
    order: Layout = "bhsd" if layout == "bhsd" else "bshd"
    call = Call(query, key, value, mask, dropout, causal, scale, order, parallel, dense)

    def compute() -> tuple[Tensor, int]:
        return attend(call, bound.site, moment, bound.session), 1

    if moment is not bound.moment:
        return compute()[0].contiguous()  # outside of a forward
    # A site may make several calls (image keys beside text keys), told apart by their lengths.
    what = f"output of {call.lengths}"
    output = serve(bound.site, moment, bound.session, what, call.bshd(), compute, dense)
    if bound is bound.attachment.sites[-1]:
        callers.end_attention(bound.attachment, failed=False)
    if bound.session.decide(bound.site, moment).reuse is not None:
        # What is kept: the graph may write over what an operator returns.
        return output.clone(memory_format=torch.contiguous_format)
    return output.contiguous()


@torch.library.custom_op("dit_accel::unseen", mutates_args=(), tags=TAGS)
def _unseen_op(output: Tensor, index: Tensor, token: Tensor) -> Tensor:
    """Counts that a site's processor has run without an attention call; a copy of its output."""
    bound: BoundSite = object_of(index)
    moment = callers.moment_of(bound.attachment)
    if moment is not None:
        unseen(bound.site, moment, bound.session)
    return output.clone()


@_unseen_op.register_fake
def _(output: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(output)
