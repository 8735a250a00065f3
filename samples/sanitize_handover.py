"""What a race detector says of Triton's hand-over of work to warps, with none of ours in it.

compute-sanitizer --tool racecheck python samples/sanitize_handover.py

A Gluon kernel whose groups of warps (4, 4 and 1, as in the Hopper backend) write different numbers
to different addresses of global memory and use no shared memory. Hazards reported here come from `warp_specialize` itself, which
tells waiting warps through shared memory what to run; `sanitize_kernels.py` shows the same ones at
the same two places (the kernel's entry and the call) for the Hopper backend.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _write(out, value, warps: gl.constexpr):
    at = gl.arange(0, warps * 32, layout=gl.BlockedLayout([1], [32], [warps], [0]))
    gl.store(out + at, at + value)


@gluon.jit
def handover(out, value):
    gl.warp_specialize(
        [
            (_write, (out, value, 4)),
            (_write, (out + 128, value + 1000, 4)),
            (_write, (out + 256, value + 2000, 1)),
        ],
        [4, 1],
        [240, 24],
    )


def main() -> int:
    """0 if all groups wrote what they should."""
    out = torch.zeros(288, dtype=torch.int32, device="cuda")
    handover[(2,)](out, 7, num_warps=4, maxnreg=168)
    parts = [torch.arange(n) + 7 + 1000 * i for i, n in enumerate((128, 128, 32))]
    expected = torch.cat(parts).to(out)
    right = torch.equal(out, expected)
    print(f"hand-over {'right' if right else 'WRONG'}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
