"""The operator that stands for an attention call in compiled graphs.

It is opaque: step, branch and policy are read when it runs, and the site comes as a tensor, so that
one graph serves every layer and step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from dit_accel.attention import Call, run, signature_of
from dit_accel.broadcast import Entry
from dit_accel.compiled import thing
from dit_accel.kernels.block_sparse import Layout
from dit_accel.state import Site


@torch.library.custom_op("dit_accel::attend", mutates_args=())
def _attend_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    index: torch.Tensor,
    token: torch.Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    layout: str,
) -> torch.Tensor:
    site: Site = thing(index)
    processor: Any = site.module.processor

    def dense() -> torch.Tensor:
        if layout == "bhsd":
            return F.scaled_dot_product_attention(
                query, key, value, mask, dropout, causal, scale=scale
            )
        return attention_dispatch.dispatch_attention_fn(
            query,
            key,
            value,
            mask,
            dropout,
            causal,
            scale,
            backend=getattr(processor, "_attention_backend", None),
        )

    order: Layout = "bhsd" if layout == "bhsd" else "bshd"
    call = Call(query, key, value, mask, dropout, causal, scale, order, False, dense)
    state, forward = site.state, site.state.forward
    if forward is None:
        return dense().contiguous()
    output = _run_or_serve(call, site).contiguous()
    # The end of a compiled forward is not seen: it is not before the end of its last attention.
    state.recorder.forward_ended()
    return output


def _run_or_serve(call: Call, site: Site) -> torch.Tensor:
    state, forward = site.state, site.state.forward
    assert forward is not None
    reuse = state.decide(site).reuse
    if reuse is None:
        return run(call, site)
    # A site may make several calls (image keys beside text keys), told apart by their lengths.
    key = (site.key.expert, f"{site.key.name}:{call.lengths}", forward.branch)
    signature = signature_of((call.query, call.key, call.value))
    prompt = forward.prompt
    entry = state.cache.serve(key, reuse, forward.step, forward.steps, signature, prompt)
    if entry is not None:
        state.recorder.count(site.key, forward.step, "reused")
        return entry.output.clone()
    output = run(call, site)
    state.cache.store(key, Entry(output.clone(), forward.step, 1, signature, prompt))
    return output


@_attend_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    index: torch.Tensor,
    token: torch.Tensor,
    dropout: float,
    causal: bool,
    scale: float | None,
    layout: str,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
