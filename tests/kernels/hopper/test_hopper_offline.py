"""The Hopper kernel compiled for its GPU where there is none: memory, spills, overlap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel.kernels.machine import HOPPER_TRITON

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("its bounds are those of the assembler in Triton's wheels", allow_module_level=True)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) not in HOPPER_TRITON:
    pytest.skip("Gluon of this Triton is not known", allow_module_level=True)

SHARED_LIMIT = 232_448
FREE_QUERIES = 8  # the kernel's own first hardware barrier; the compiler's lie below
SCRIPT = Path(__file__).with_name("compile_hopper.py")
FULL = {"KB": 128, "BOXES": True, "RUNS": True, "rule": None, "dtype": "bf16"}
# A variant, and how many scratch memory accesses it may have. Those that have any keep numbers of
# their rules there, in masked tiles. A variant with a rule has all the code of the same without.
VARIANTS = [
    ({"D": 128}, 0),
    ({"D": 128, "BOXES": False}, 0),
    ({"D": 64, "KB": 64, "dtype": "fp16"}, 0),
    ({"D": 128, "rule": "box"}, 0),
    ({"D": 128, "KB": 64, "rule": "disc"}, 0),
    ({"D": 64, "rule": "box"}, 0),
    ({"D": 128, "RUNS": False, "rule": "neighborhood"}, 0),
    ({"D": 128, "rule": "neighborhood"}, 100),
    ({"D": 128, "rule": "box", "other": "disc"}, 60),
]


@pytest.mark.parametrize(("together", "even"), [(1, True), (1, False), (2, False)])
def test_lists_of_online_plans(together: int, even: bool, offline: Callable[..., Any]) -> None:
    made = offline(SCRIPT, "compile_lists", together=together, even=even)
    assert made["scratch"] == 0 and made["registers"] <= 128


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "scratch"), VARIANTS, ids=str)
def test_variant(variant: dict[str, Any], scratch: int, offline: Callable[..., Any]) -> None:
    made = offline(SCRIPT, "compile_variant", **(FULL | variant))
    assert made["shared"] <= SHARED_LIMIT
    assert made["scratch"] <= scratch
    # Each group waits once for the first scores, twice in the loop, once at the end: more would
    # mean that the assembler has made the products run one after another.
    assert made["waits"] == 8
    # 64 scores a thread in two rows: their maxima must stand before the end of the product beside
    # them.
    assert made["maxima_beside_a_product"] >= 62
    assert max(made["barriers"]) < FREE_QUERIES
