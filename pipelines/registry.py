"""The model families that are supported, one line each, and the models that go by a name."""

from __future__ import annotations

from typing import Any

from dit_accel.pipelines.adapter import Adapter, class_names
from dit_accel.pipelines.cogvideox import COGVIDEOX
from dit_accel.pipelines.flux import FLUX
from dit_accel.pipelines.hunyuan_video import HUNYUAN_VIDEO
from dit_accel.pipelines.ltx_video import LTX_VIDEO
from dit_accel.pipelines.mochi import MOCHI
from dit_accel.pipelines.preset import Preset
from dit_accel.pipelines.wan import WAN

ADAPTERS: tuple[Adapter, ...] = (WAN, HUNYUAN_VIDEO, COGVIDEOX, LTX_VIDEO, FLUX)
PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (*(p for a in ADAPTERS for p in a.presets), MOCHI)
}
ALIASES = {alias: name for name, preset in PRESETS.items() for alias in preset.aliases}


def adapter_of(family: str) -> Adapter | None:
    """The adapter of a family, None where it is not supported."""
    return next((a for a in ADAPTERS if a.family == family), None)


def adapter_for(transformer: Any) -> Adapter | None:
    """The adapter of a transformer, None where its family is not supported."""
    names = class_names(transformer)
    return next((a for a in ADAPTERS if names.intersection(a.transformers)), None)
