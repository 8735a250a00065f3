"""The clock of one pipeline call: text encoding, denoising and decoding apart, and peak memory.

The same clock times every method, ours and others', from outside: it needs nothing enabled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_accel.engine.ledger import mark, milliseconds


@dataclass
class Phases:
    """Seconds of one call, and the GPU's peak memory while it denoises, in bytes (CPU: None)."""

    encode_s: float = 0.0
    decode_s: float = 0.0
    peak_memory_bytes: int | None = None
    _device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _begin: Any = None
    _end: Any = None

    @property
    def denoise_s(self) -> float:
        """From the start of the first transformer forward to the end of the last one."""
        if self._begin is None or self._end is None:
            return 0.0
        return milliseconds((self._begin, self._end)) / 1e3

    def forward_started(self, *_: Any) -> None:
        if self._begin is None:
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._begin = mark(self._device)

    def forward_ended(self, *_: Any) -> None:
        self._end = mark(self._device)
        if self._device.type == "cuda":
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self._device)


@contextmanager
def timed(pipe: Any, device: torch.device) -> Iterator[Phases]:
    """Time the call of a pipeline that happens inside the block."""
    phases = Phases(_device=device)
    with ExitStack() as stack:
        for model in transformers(pipe):
            # First of all hooks and last of all hooks, so that theirs are timed too.
            first = model.register_forward_pre_hook(phases.forward_started, prepend=True)
            last = model.register_forward_hook(phases.forward_ended)
            stack.callback(first.remove)
            stack.callback(last.remove)
        for owner, name, phase in _phases_of(pipe):
            stack.enter_context(_timing(owner, name, phases, phase, device))
        _settle(device)
        yield phases
        _settle(device)


def device_of(pipe: Any) -> torch.device:
    """Where a pipeline computes, also while its weights wait elsewhere."""
    return torch.device(getattr(pipe, "_execution_device", None) or pipe.device)


def dtype_of(pipe: Any) -> torch.dtype:
    """What the transformers compute in; float32 for a pipeline without any."""
    parameters = (p for model in transformers(pipe) for p in model.parameters())
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def transformers(pipe: Any) -> list[nn.Module]:
    """The models that denoise: every component whose name begins with `transformer`."""
    found = [m for name, m in pipe.components.items() if name.startswith("transformer")]
    return [model for model in found if isinstance(model, nn.Module)]


def _phases_of(pipe: Any) -> Iterator[tuple[Any, str, str]]:
    if hasattr(pipe, "encode_prompt"):
        yield pipe, "encode_prompt", "encode_s"
    if getattr(pipe, "vae", None) is not None:
        yield pipe.vae, "decode", "decode_s"


@contextmanager
def _timing(
    owner: Any, name: str, phases: Phases, phase: str, device: torch.device
) -> Iterator[None]:
    """Add the seconds of `owner.name` to a phase while the block runs."""
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        _settle(device)
        begin = time.perf_counter()
        output = method(*args, **kwargs)
        _settle(device)
        setattr(phases, phase, getattr(phases, phase) + time.perf_counter() - begin)
        return output

    own = owner.__dict__.get(name)
    owner.__dict__[name] = call
    try:
        yield
    finally:
        if own is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = own


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
