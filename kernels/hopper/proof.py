"""The Hopper kernel's self-test: small cases against the portable kernel, at first use.

Gluon is experimental, and a compiler that miscompiles gives NaN or wrong numbers without a word.
"""

from __future__ import annotations

import itertools
import warnings
from functools import lru_cache

import torch

from dit_accel.kernels.blocks import BlockForm
from dit_accel.kernels.hopper.launch import hopper_attention
from dit_accel.kernels.patterns.sliding_tile import SlidingTile
from dit_accel.kernels.portable.forward import triton_attention
from dit_accel.layout import TokenLayout

LIMIT = 2e-2
PROGRAMS = 5
DIMS = (64, 128)
KINDS: tuple[BlockForm, ...] = ("boxes", "gather")


@lru_cache(maxsize=1)
def broken() -> str | None:
    """Why the kernel is not to be trusted here: it does not compile, or a small case is wrong."""
    try:
        return prove()
    except Exception as error:  # compilers fail in many ways
        return f"its self-test failed: {type(error).__name__}: {error}"


def prove() -> str | None:
    """None if every case agrees, else which one does not (and a warning, once)."""
    layout = TokenLayout((3, 13, 20), after=70)
    pattern = SlidingTile({"tiles": [1, 3, 3]}, [2, 8, 8])
    for dim, kind in itertools.product(DIMS, KINDS):
        plan = pattern.build(layout, "cuda", layout_kind=kind)
        generator = torch.Generator("cuda").manual_seed(dim)
        q, k, v = (
            torch.randn(
                1, layout.length, 2, dim, generator=generator, device="cuda", dtype=torch.bfloat16
            )
            for _ in range(3)
        )
        # A program then has several query blocks, one after the other.
        out, lse = hopper_attention(q, k, v, plan, dim**-0.5, return_lse=True, programs=PROGRAMS)
        wanted, wanted_lse = triton_attention(q, k, v, plan, dim**-0.5, return_lse=True)
        assert lse is not None and wanted_lse is not None
        apart = (out.float() - wanted.float()).abs().max() / wanted.float().abs().max()
        worst = torch.maximum(apart, (lse - wanted_lse).abs().max()).item()
        if not worst <= LIMIT:  # NaN too
            reason = f"its self-test ({kind}, head_dim {dim}) is off by {worst:.1e}"
            warnings.warn(f"dit_accel: backend hopper is not used: {reason}.", stacklevel=2)
            return reason
    return None
