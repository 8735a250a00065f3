"""The kernel calls of a golden record: every pattern over layouts of every kind, as hashes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Any]
KINDS = ("boxes", "gather", "lengths")
GPU_BACKENDS = ("hopper", "triton")
GPU_DIMS = (64, 128)
CPU_BACKENDS = ("torch", "reference", "triton")
HALVES = (torch.float16, torch.bfloat16)
DIGITS = 12


@dataclass(frozen=True)
class Shape:
    """A call: its layout's arguments, and its heads; `valid` has a pair per sample."""

    grid: tuple[int, int, int]
    before: int = 0
    after: int = 0
    valid: tuple[tuple[int, int], ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    gpu: bool = False

    @property
    def batch(self) -> int:
        return len(self.valid or (None,))


SHAPES = {
    "ragged": Shape((4, 11, 18)),
    "before": Shape((4, 11, 14), before=37, heads=2, kv_heads=1, dim=32),
    "after": Shape((3, 12, 17), after=40, valid=((0, 40), (0, 11)), dim=48),
    "sequence": Shape((1, 1, 517), heads=3, kv_heads=3, dim=40),
    "small": Shape((3, 7, 9), after=13, valid=((0, 5), (0, 13)), heads=2, kv_heads=1, dim=32),
    "large": Shape((9, 24, 24), after=77, gpu=True),
}
"""`small` is the one that Triton's interpreter runs too, and other types; `large` is for GPUs."""

VARIANTS: dict[str, tuple[Params, ...]] = {
    "full": ({},),
    "sliding_tile": (
        {},
        {"window": {"tokens": [3, 6, 8]}},
        {"window": {"fraction": [0.6, 0.5, 0.4]}},
        {"window": {"tiles": [3, 3, 1]}, "tile": [2, 4, 8]},
    ),
    "neighborhood": (
        {},
        {"window": {"tokens": [3, 7, 8]}},
        {"window": {"tiles": [1, 1, 2]}},
        {"window": {"tokens": [1, 4, 4]}, "stride": [1, 2, 4]},
        {"window": {"tokens": [1, 3, 3]}, "dilation": [1, 2, 2]},
        {"window": {"tokens": [2, 5, 7]}, "causal": [True, False, False]},
    ),
    "attention_tile": ({}, {"references": {"fraction": 0.4}, "place": "first"}),
    "radial": ({}, {"decay": 0.2, "sink": False}),
    "disc": (
        {},
        {"radius": {"tokens": 5}, "frame_window": {"tokens": 3}},
        {"radius": {"fraction": 0.3}},
    ),
    "inward_window": ({}, {"base": {"tokens": [6, 9]}}, {"base": {"fraction": [0.5, 0.4]}}),
    "power_strided": (
        {},
        {"window": {"tokens": [1, 4, 4]}},
        {"window": {"fraction": [0.4, 0.3, 0.3]}, "sink": 1},
    ),
    "spatial_band": ({}, {"reach": {"tokens": 150}}, {"reach": {"fraction": 0.2}, "sink": False}),
    "temporal_band": ({}, {"reach": {"tokens": 150}}, {"reach": {"fraction": 0.2}, "sink": False}),
    "union": (
        {},
        {"union": ["radial", {"compute": "neighborhood", "window": {"tokens": [3, 5, 5]}}]},
        {
            "union": [
                {"compute": "neighborhood", "window": {"tokens": [1, 5, 5]}, "exact": True},
                {"compute": "temporal_band", "reach": {"tokens": 40}, "exact": True},
            ]
        },
    ),
}
"""Parameters of each pattern; those that can be exact are recorded exact as well."""

PER_HEAD = "per_head"
GROUPS: dict[str, Params] = {
    "0": {"compute": "sliding_tile", "window": {"fraction": [1.0, 0.5, 0.5]}},
    "-1": {"compute": "disc", "radius": {"tokens": 4}, "exact": True},
}


def about(gpu: bool) -> str:
    """What a record has of kernels."""
    each = (
        "Every pattern (its variants, exact too), unions and patterns by head, over layouts that "
        "are ragged, with text before, with padded text after in a batch of 2, a plain sequence "
        "and a small one, planned as boxes, gather and lengths, key heads grouped: launched and "
        "kept density, and sha256 of output and LSE on "
    )
    if gpu:
        return each + "hopper and triton in bfloat16, head_dim 64 and 128; a large layout as well."
    return each + (
        "torch in float32, and on reference (lengths); of the small layout on triton (interpreted, "
        "gather, exact where a pattern can be) and in float16 and bfloat16 on torch (lengths) too."
    )


def names(gpu: bool) -> list[str]:
    """<shape>/<rule>/<layout kind>."""
    shapes = [name for name, shape in SHAPES.items() if gpu or not shape.gpu]
    return [f"{shape}/{rule}/{kind}" for shape in shapes for rule in rules() for kind in KINDS]


@lru_cache(maxsize=1)
def rules() -> dict[str, Any]:
    """All patterns by a name that tells their parameters."""
    from dit_accel.kernels.patterns import PATTERNS, pattern

    found = {}
    for name, variants in VARIANTS.items():
        fields = {field.name for field in dataclasses.fields(PATTERNS[name])}
        for params in variants:
            exact = [{}, {"exact": True}] if "exact" in fields else [{}]
            for own in ({**params, **more} for more in exact):
                found[f"{name}{label(own)}"] = pattern(name, **own)
    return {**found, PER_HEAD: per_head()}


def label(params: Params) -> str:
    """The parameters without spaces or slashes: window.tokens=3,6,8."""
    parts = []
    for key, value in params.items():
        while isinstance(value, dict):
            ((inner, value),) = value.items()
            key = f"{key}.{inner}"
        if key == "union":
            value = [part if isinstance(part, str) else part["compute"] for part in value]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(key if value is True else f"{key}={text}")
    return f"({';'.join(parts)})" if parts else ""


def per_head() -> Any:
    """Patterns for single heads; the others see everything."""
    from dit_accel.kernels.patterns import pattern
    from dit_accel.kernels.patterns.composite import PerHead

    groups = []
    for heads, params in GROUPS.items():
        own = {key: value for key, value in params.items() if key != "compute"}
        groups.append((heads, pattern(params["compute"], **own)))
    return PerHead(tuple(groups))


def run(name: str, gpu: bool) -> dict[str, Any]:
    """The entry `name`: densities of the plan, hashes of each call over it."""
    from dit_accel.layout import TokenLayout

    shape_name, rule, kind = name.split("/")
    shape = SHAPES[shape_name]
    layout = TokenLayout(shape.grid, before=shape.before, after=shape.after, valid=shape.valid)
    device = torch.device("cuda" if gpu else "cpu")
    plan = rules()[rule].build(layout, device, heads=shape.heads, layout_kind=kind)
    calls = gpu_calls() if gpu else cpu_calls(shape_name, rule, kind)
    backends = GPU_BACKENDS if gpu else CPU_BACKENDS
    entry: dict[str, Any] = {
        "kept": rounded(plan.kept_density()),
        "launched": {each: rounded(plan.launched_density(each)) for each in backends},
    }
    for backend, dtype, dim in calls:
        q, k, v = tensors(shape, layout.length, dim or shape.dim, dtype, device)
        key = f"{backend}-{str(dtype).removeprefix('torch.')}" + (f"-d{dim}" if dim else "")
        entry[key] = hashes(q, k, v, plan, backend, again=gpu)
    return entry


def cpu_calls(shape: str, rule: str, kind: str) -> Iterator[tuple[str, torch.dtype, int]]:
    """(backend, type, head_dim or 0 for the shape's own)."""
    yield "torch", torch.float32, 0
    if kind == "lengths":
        yield "reference", torch.float32, 0  # slow: float64 over all pairs
    if shape == "small" and kind == "lengths":
        yield from (("torch", dtype, 0) for dtype in HALVES)
    if shape == "small" and kind == "gather" and getattr(rules()[rule], "exact", True):
        yield "triton", torch.float32, 0  # slow: interpreted


def gpu_calls() -> Iterator[tuple[str, torch.dtype, int]]:
    """Likewise."""
    for backend in GPU_BACKENDS:
        yield from ((backend, torch.bfloat16, dim) for dim in GPU_DIMS)


def tensors(
    shape: Shape, length: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a call, made on the CPU: the same numbers on every device."""
    generator = torch.Generator().manual_seed(length + dim)
    q, k, v = (
        torch.randn(shape.batch, length, heads, dim, generator=generator).to(device, dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return q, k, v


def hashes(q: Tensor, k: Tensor, v: Tensor, plan: Any, backend: str, again: bool) -> dict[str, Any]:
    """Hashes of output and LSE, or why the backend refuses.

    again: call it twice, and say so where the second result is another one.
    """
    from dit_accel import DitAccelError
    from dit_accel.kernels.block_sparse import block_sparse_attention

    found = []
    for _ in range(1 + again):
        try:
            out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
        except DitAccelError as error:
            return {"refused": str(error)}
        found.append({"out": digest(out), "lse": digest(lse)})
    return found[0] if found[0] == found[-1] else {**found[0], "unstable": True}


def digest(x: Tensor) -> str:
    """sha256 of a tensor's shape, type and bytes."""
    data = x.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{tuple(data.shape)} {data.dtype} ".encode())
    sha.update(data.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def rounded(value: Any) -> Any:
    """A float to 12 digits after the point; anything else as it is."""
    return round(value, DIGITS) if isinstance(value, float) else value
