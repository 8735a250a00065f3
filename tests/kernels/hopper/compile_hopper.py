"""Variants of the Hopper kernel compiled for sm_90: what can be told of them without the GPU."""

from __future__ import annotations

import re
from typing import Any

import torch
from disassembly import compiled, disassembled
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from dit_accel.kernels.hopper.forward import forward
from dit_accel.kernels.hopper.launch import CONFIGS, RULES, _layout, _split, halved
from dit_accel.kernels.hopper.online_kernel import emit_item

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compile_variant(
    D: int, KB: int, BOXES: bool, RUNS: bool, rule: str | None, dtype: str, other: str | None = None
) -> dict[str, Any]:
    """Shared memory, spills and waits of the machine code, barriers that the compiler chose."""
    names = [parameter.name for parameter in forward.params]
    box = (2, 8, 8)
    q_box = halved(box)
    k_box = box if KB == 128 else q_box
    config = CONFIGS[D]
    constants: dict[str, Any] = {
        "D": D, "KB": KB, "STAGES": config.stages, "Q_BOX": q_box, "K_BOX": k_box,
        "SPLIT": _split(box), "BOXES": BOXES, "RUNS": RUNS, "PARTIAL": rule is not None,
        "RULE": RULES[rule or "box"], "OTHER": RULES[other] if other else None,
        "REGISTERS": config.registers, "FEEDER": config.feeder,
    }  # fmt: skip
    signature = {name: "constexpr" if name in constants else "i32" for name in names}
    width = D if KB == 128 else 64
    blocks = {"q": (q_box, 64, D), "k": (k_box, KB, width)}
    blocks |= {"v": blocks["k"]}
    for name, (tile, rows, columns) in blocks.items():
        for there, kind, shape in (
            (BOXES, "boxes", [1, *tile, columns]),
            (RUNS, "runs", [1, rows, columns]),
        ):
            layout = _layout(tuple(shape), DTYPES[dtype])
            signature[f"{name}_{kind}"] = (
                f"tensordesc<{dtype}{shape},{layout!r}>" if there else "constexpr"
            )
            if not there:
                constants[f"{name}_{kind}"] = None
    pointers = dict.fromkeys(("items", "work", "codes", "metas", "rule_params"), "*i32")
    signature |= pointers | {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "scale": "fp32"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = GluonASTSource(
        forward, signature, {(names.index(k),): v for k, v in constants.items()}, attributes
    )
    kernel = compiled(source, num_warps=4, maxnreg=168)
    code = disassembled(kernel)
    waits = [m.group(1) for m in re.finditer(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)]
    body = code.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1].split("WARPGROUP.DEPBAR")[0]
    return {
        "shared": kernel.metadata.shared,
        "products": code.count("HGMMA"),
        "waits": len(waits),
        "scratch": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "maxima_beside_a_product": body.count("FMNMX"),
        "barriers": [int(n) for n in re.findall(r"bar(?:rier)?\.sync\s+(\d+)", kernel.asm["ptx"])],
    }


def compile_lists(together: int, even: bool) -> dict[str, Any]:
    """Scratch accesses and registers of the kernel that makes the lists of online plans."""
    names = [parameter.name for parameter in emit_item.params]
    constants = {"TOGETHER": together, "BLOCK": 128, "EVEN": even}
    first, last = names.index("starts"), names.index("work")
    signature = {
        name: "constexpr" if name in constants else "*i32" if first <= i <= last else "i32"
        for i, name in enumerate(names)
    }
    source = ASTSource(emit_item, signature, {(names.index(k),): v for k, v in constants.items()})
    code = disassembled(compiled(source, num_warps=1))
    return {
        "scratch": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "registers": max(int(n) for n in re.findall(r"\bR(\d+)\b", code)),
    }
