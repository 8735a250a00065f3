"""The model families that are supported: one line each."""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.adapter import Adapter, class_names
from dit_accel.pipelines.cogvideox import COGVIDEOX
from dit_accel.pipelines.flux import FLUX
from dit_accel.pipelines.hunyuan_video import HUNYUAN_VIDEO
from dit_accel.pipelines.ltx_video import LTX_VIDEO
from dit_accel.pipelines.wan import WAN

ADAPTERS: tuple[Adapter, ...] = (WAN, HUNYUAN_VIDEO, COGVIDEOX, LTX_VIDEO, FLUX)


def adapter_for(transformer: Any) -> Adapter | None:
    """The adapter of a transformer, None where its family is not supported."""
    names = class_names(transformer)
    return next((a for a in ADAPTERS if names.intersection(a.transformers)), None)
