"""The operator that stands for an attention call in compiled graphs.

It is opaque: step, branch and policy are read when it runs, and the site comes as a tensor, so that
one graph serves every layer and step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from dit_accel.attention import Call, reused, run
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
    gqa: bool,
    parallel: bool,
    layout: str,
) -> torch.Tensor:
    site: Site = thing(index)
    processor: Any = site.module.processor

    def dense() -> torch.Tensor:
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

    order: Layout = "bhsd" if layout == "bhsd" else "bshd"
    call = Call(query, key, value, mask, dropout, causal, scale, order, parallel, dense)
    if site.state.forward is None:
        return dense().contiguous()
    output = _run_or_serve(call, site).contiguous()
    # The end of a compiled forward is not seen: it is not before the end of its last attention.
    site.state.recorder.forward_ended()
    return output


def _run_or_serve(call: Call, site: Site) -> torch.Tensor:
    reuse = site.state.decide(site).reuse
    if reuse is None:
        return run(call, site)
    # A site may make several calls (image keys beside text keys), told apart by their lengths.
    name = f"{site.key.name}:{call.lengths}"
    kept: torch.Tensor = reused(site, reuse, name, call.bshd(), lambda: (run(call, site), 1))
    return kept.clone()  # the graph may write over what an operator returns


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
    gqa: bool,
    parallel: bool,
    layout: str,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
