"""The portable kernel's machine code for capability 9.0, compiled without a GPU.

A product whose accumulators are touched while it runs is waited for at once: then waits are as
many as products, and the kernel loses a third of its speed without being wrong.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dit_accel.kernels.portable.forward import _forward
from dit_accel.kernels.portable.masks import MASK_FUNCTIONS
from dit_accel.kernels.portable.steps import TUNED

config = TUNED["sm90", 128, 2][0]
fixed = dict(
    D=128, DP=128, BM=config.block_m, BN=config.block_n, Q_SPLITS=128 // config.block_m,
    K_SPLITS=128 // config.block_n, Q_ORDER=False, K_ORDER=False, HAS_WHOLE=True, HAS_SHORT=False,
    HAS_PARTIAL=False, HAS_POOLED=False, TMA=config.tma, NEGATIVE=False,
    MASK_FN=MASK_FUNCTIONS["box"], OTHER_FN=None,
)
numbers = ("heads", "group", "n_queries", "full_width", "partial_width", "pooled_width")
signature, attributes = {}, {}
for place, name in enumerate(_forward.arg_names):
    token_stride = name.startswith("stride_") and len(name.split("_")[1]) in (2, 3)
    if token_stride and name.endswith("d"):
        fixed[name] = 1
    if name in fixed:
        signature[name] = "constexpr"
    elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "pooled_key", "pooled_value"):
        signature[name] = "*bf16"
    elif name in ("lse_ptr", "log_count"):
        signature[name] = "*fp32"
    elif name in ("k_desc", "v_desc"):
        signature[name] = f"tensordesc<bf16[1,{config.block_n},1,128]>"
    elif name == "scale":
        signature[name] = "fp32"
    elif name in numbers or name.startswith("stride_"):
        signature[name] = "i32"
    else:
        signature[name] = "*i32"
    if signature[name].startswith("*") or (token_stride and name not in fixed):
        attributes[place,] = [["tt.divisibility", 16]]
constants = {(_forward.arg_names.index(name),): value for name, value in fixed.items()}
kernel = triton.compile(
    ASTSource(_forward, signature, constants, attributes),
    target=GPUTarget("cuda", 90, 32),
    options=dict(num_warps=config.warps, num_stages=config.stages),
)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    Path(file.name).write_bytes(kernel.asm["cubin"])
    code = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
print(json.dumps({"shared": kernel.metadata.shared, "code": code}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Shared memory in bytes and SASS of the first step for head_dim 128."""
    triton = pytest.importorskip("triton")
    minor = tuple(int(part) for part in triton.__version__.split(".")[:2])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if minor < (3, 6) or not tool.exists():
        pytest.skip(f"triton {triton.__version__} lacks offline descriptors or nvdisasm")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_products_run_beside_other_work(compiled: dict[str, Any]) -> None:
    code = compiled["code"]
    products = len(re.findall(r"\bHGMMA", code))
    waits = len(re.findall(r"WARPGROUP\.DEPBAR", code))
    assert products >= 12 and waits <= products // 3


def test_keys_and_values_come_by_bulk_copies(compiled: dict[str, Any]) -> None:
    assert len(re.findall(r"\bUTMALDG", compiled["code"])) >= 2
    assert compiled["shared"] <= 113 << 10  # two programs on a multiprocessor


def test_the_loop_spills_next_to_nothing(compiled: dict[str, Any]) -> None:
    """Between the labels of the innermost loop that multiplies."""
    lines = compiled["code"].splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for stop, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], stop) < stop:
            body = "\n".join(lines[labels[target[1]] : stop])
            if "HGMMA" in body:
                loops.append(body)
    innermost = min(loops, key=len)
    assert len(re.findall(r"\bSTL", innermost)) <= 2
    assert len(re.findall(r"\bLDL", innermost)) <= 8
