"""The selection kernel compiled for a GPU: shared memory and spills."""

from __future__ import annotations

import re
from typing import Any

from disassembly import compiled, disassembled
from triton.compiler import ASTSource

from dit_accel.kernels.selectors.kernel import _select


def compile_selection(tiled: bool) -> dict[str, int]:
    """Bytes of shared memory, and scratch memory accesses of the machine code."""
    fixed = dict(
        D=128, STEP=16, ROWS=16 if tiled else 8, COLUMNS=1024 if tiled else 2048, TILED=tiled,
        BLOCK_Q=128, BLOCK_K=128, MASS=True, TALLY=True,
    )  # fmt: skip
    line = "stride_kd" if tiled else "stride_kn"
    fixed[line] = 1
    aligned = {"q_ptr", "k_ptr", "stride_kb", "stride_kh", "stride_kn", "stride_kd"} - {line}
    signature, attributes = {}, {}
    for place, name in enumerate(_select.arg_names):
        kinds = {"q_ptr": "*fp32", "k_ptr": "*fp32", "tally_ptr": "*i64"}
        kinds |= {"factor": "fp32", "mass": "fp32"}
        integers = "*i32" if name.endswith(("_ptr", "lengths")) else "i32"
        signature[name] = "constexpr" if name in fixed else kinds.get(name, integers)
        if name in aligned:
            attributes[place,] = [["tt.divisibility", 16]]
    constants: dict[Any, Any] = {(_select.arg_names.index(n),): v for n, v in fixed.items()}
    source = ASTSource(_select, signature, constants, attributes)
    kernel = compiled(source, num_warps=16, num_stages=2)
    scratch = len(re.findall(r"\b(?:STL|LDL)", disassembled(kernel)))
    return {"shared": kernel.metadata.shared, "scratch": scratch}
