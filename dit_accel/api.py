"""Enabling and disabling sparse attention: what `dit_accel` and its pipelines' methods call."""

from __future__ import annotations

from dit_accel.hosts.diffusers.enabling import (
    disable,
    disable_pipeline,
    enable,
    enable_pipeline,
    session_of,
    warmup,
)

__all__ = ["disable", "disable_pipeline", "enable", "enable_pipeline", "session_of", "warmup"]
