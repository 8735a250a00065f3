"""Parts of `bench step`: the best dense attention of diffusers, timed sites, a place in a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.bench.timing import measure
from dit_accel.engine.ledger import Observation, Span, milliseconds
from dit_accel.errors import DitAccelError

TORCH_KERNELS: dict[str, list[SDPBackend]] = {
    "native": [],
    "_native_cudnn": [SDPBackend.CUDNN_ATTENTION],
    "_native_flash": [SDPBackend.FLASH_ATTENTION],
    "_native_efficient": [SDPBackend.EFFICIENT_ATTENTION],
}
"""Attention backends of diffusers that are torch's own; [] leaves the choice to torch."""
PACKAGE_KERNELS = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "xformers": "xformers",
}
"""Those of packages, with the module that must be there."""


@dataclass(frozen=True)
class DenseChoice:
    """The dense backend of diffusers that a model runs with, and what the others took.

    times: milliseconds of one self-attention call. failed: why a backend cannot run it.
    """

    name: str
    times: dict[str, float]
    failed: dict[str, str]


def choose_dense(
    model: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    masked: bool,
    wanted: str | None = None,
) -> DenseChoice:
    """Time one self-attention call [B, S, H, D] of the model with each backend; take the fastest.

    masked: with the mask of valid keys that the model passes. wanted: only this one.
    Raises DitAccelError where none can run.
    """
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    mask = torch.ones(1, 1, 1, shape[1], dtype=torch.bool, device=device) if masked else None
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    names = [*TORCH_KERNELS]
    if dispatches(model):
        names += [name for name, module in PACKAGE_KERNELS.items() if find_spec(module)]
    if device.type == "cpu":
        names = ["native"]
    for name in [wanted] if wanted else names:

        def call(name: str = name) -> Tensor:
            return _attend(model, q, k, v, mask, name)

        try:
            times[name] = measure(call, device, 3, 1).median_ms
        except Exception as error:  # each library refuses in its own way
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if not times:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise DitAccelError(f"no dense attention can run here: {reasons}")
    return DenseChoice(min(times, key=lambda name: times[name]), times, failed)


def dispatches(model: nn.Module) -> bool:
    """Whether the model's attention goes through diffusers' backends, not straight to torch."""
    processors = getattr(model, "attn_processors", {}).values()
    modules = (getattr(module, "processor", None) for module in model.modules())
    return any(hasattr(p, "_attention_backend") for p in (*processors, *modules))


def _attend(
    model: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, name: str
) -> Tensor:
    from diffusers.models import attention_dispatch as diffusers_attention

    if dispatches(model):
        backend = diffusers_attention.AttentionBackendName(name)
        diffusers_attention._check_attention_backend_requirements(backend)
        out: Tensor = diffusers_attention.dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=backend
        )
        return out
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    with torch_kernels(name):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def torch_kernels(name: str) -> AbstractContextManager[Any]:
    """Torch's attention restricted to what `name` of TORCH_KERNELS means."""
    kernels = TORCH_KERNELS.get(name)
    return sdpa_kernel(kernels) if kernels else nullcontext()


@contextmanager
def dense_attention(model: Any, name: str) -> Iterator[None]:
    """The model's dense attention is that of backend `name`, by diffusers' own switch."""
    if not dispatches(model):
        with torch_kernels(name):
            yield
        return
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()[0]
    model.set_attention_backend(name)
    try:
        yield
    finally:
        model.reset_attention_backend()
        registry.set_active_backend(before)


class RunPosition:
    """Stands for a scheduler in the middle of a run: each forward is the next step.

    steps: of the run; first: the step that it starts with.
    """

    begin_index = 0

    def __init__(self, steps: int, first: int) -> None:
        self.timesteps = list(range(steps, 0, -1))
        self.step_index = first - 1

    def advance(self) -> None:
        """The next forward is one step later."""
        self.step_index += 1


class TimedSites:
    """An observer that keeps the time of each attention call by its kind, self or cross."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []

    def __call__(self, seen: Observation) -> None:
        if seen.span is not None:
            self._spans.append((seen.site.kind, seen.span))

    def restart(self) -> None:
        """Forget the calls so far."""
        self._spans.clear()

    def milliseconds(self) -> dict[str, list[float]]:
        """Times of the calls so far, by kind; waits for them."""
        times: dict[str, list[float]] = defaultdict(list)
        for kind, span in self._spans:
            times[kind].append(milliseconds(span))
        return times
