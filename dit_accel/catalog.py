"""The supported models, for tables: imports neither torch nor diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.pipelines.registry import ADAPTERS


@dataclass(frozen=True)
class ModelInfo:
    """A supported model family, for tables."""

    family: str
    pipeline_classes: tuple[str, ...]
    transformer_classes: tuple[str, ...]
    text: str
    notes: str


def families() -> list[str]:
    """Names of the supported model families."""
    return [adapter.family for adapter in ADAPTERS]


def supported_models() -> list[ModelInfo]:
    """Every supported model family with its classes."""
    return [
        ModelInfo(a.family, a.pipelines, a.transformers, a.text, f"valid text: {a.text_valid}")
        for a in ADAPTERS
    ]
