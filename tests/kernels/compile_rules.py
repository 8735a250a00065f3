"""Every token rule as a Triton function, compiled for a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from disassembly import compiled
from triton.compiler import ASTSource

from dit_accel.kernels.portable.masks import MASK_FUNCTIONS, load_params
from dit_accel.kernels.token_rules import TOKEN_RULES


@triton.jit
def kernel(coords, out, params, RULE: tl.constexpr):
    i = tl.arange(0, 16)
    t, h, w = tl.load(coords + i * 3), tl.load(coords + i * 3 + 1), tl.load(coords + i * 3 + 2)
    kept = RULE(
        t[:, None], h[:, None], w[:, None], t[None, :], h[None, :], w[None, :], load_params(params)
    )
    tl.store(out + i[:, None] * 16 + i[None, :], tl.where(kept, 1.0, 0.0))


def compile_rules() -> dict[str, bool]:
    """By name, whether there is machine code."""
    signature = {"coords": "*i32", "out": "*fp32", "params": "*i32", "RULE": "constexpr"}
    sources = {
        name: ASTSource(kernel, signature, {(3,): MASK_FUNCTIONS[name]}) for name in TOKEN_RULES
    }
    return {name: len(compiled(source).asm["ptx"]) > 0 for name, source in sources.items()}
