"""The selection kernel's machine code for capability 9.0, compiled without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dit_accel.kernels.selectors.kernel import _select

tiled = sys.argv[1] == "True"
fixed = dict(
    D=128, STEP=16, ROWS=16 if tiled else 8, COLUMNS=1024 if tiled else 2048, TILED=tiled,
    BLOCK_Q=128, BLOCK_K=128, MASS=True, TALLY=True,
)
fixed["stride_kd" if tiled else "stride_kn"] = 1
signature, attributes = {}, {}
for place, name in enumerate(_select.arg_names):
    kinds = {"q_ptr": "*fp32", "k_ptr": "*fp32", "tally_ptr": "*i64"}
    kinds |= {"factor": "fp32", "mass": "fp32"}
    integers = "*i32" if name.endswith(("_ptr", "lengths")) else "i32"
    signature[name] = "constexpr" if name in fixed else kinds.get(name, integers)
    if name in ("q_ptr", "k_ptr", "stride_kb", "stride_kh", "stride_kn" if tiled else "stride_kd"):
        attributes[place,] = [["tt.divisibility", 16]]
constants = {(_select.arg_names.index(name),): value for name, value in fixed.items()}
kernel = triton.compile(
    ASTSource(_select, signature, constants, attributes),
    target=GPUTarget("cuda", 90, 32), options=dict(num_warps=16, num_stages=2),
)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    Path(file.name).write_bytes(kernel.asm["cubin"])
    code = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
scratch = len(re.findall(r"\b(?:STL|LDL)", code))
print(json.dumps({"shared": kernel.metadata.shared, "scratch": scratch}))
"""


@pytest.mark.parametrize("tiled", [True, False])
def test_shared_memory_and_spills(tiled: bool, tmp_path: Path) -> None:
    """Shared memory is what the launcher reckons with; scores stay in registers, but a few."""
    triton = pytest.importorskip("triton")
    minor = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if (
        minor < (3, 6)
        or not (Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm").exists()
    ):
        pytest.skip(f"triton {triton.__version__} lacks nvdisasm")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiled)], capture_output=True, text=True, env=environment,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    made = json.loads(result.stdout.splitlines()[-1])
    assert made["shared"] <= (2 * 16 * 1024 + 1024) * 4
    assert made["scratch"] <= 150
