"""The token rules of partial blocks, compiled for Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from dit_accel.kernels.machine import interpreted
from dit_accel.kernels.token_rules import TOKEN_RULES

# The interpreter runs Python: a rule's operators work on its tensors as they are.
MASK_FUNCTIONS = {
    name: rule if interpreted() else triton.jit(rule) for name, rule in TOKEN_RULES.items()
}


@triton.jit
def load_params(at):
    """The MAX_PARAMS scalars of a rule; a rule's unused ones are never loaded."""
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3),
        tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7),
        tl.load(at + 8), tl.load(at + 9), tl.load(at + 10), tl.load(at + 11),
        tl.load(at + 12), tl.load(at + 13), tl.load(at + 14), tl.load(at + 15),
    )  # fmt: skip
