"""What a race detector says of Triton's hand-over of work to warps, with little of ours in it.

compute-sanitizer --tool racecheck python samples/tools/sanitize_handover.py

Two Gluon kernels whose groups of warps (4, 4 and 1, as in the Hopper backend) write different
numbers to different addresses of global memory. The first uses no shared memory; in the second the
single warp signals the others through one memory barrier. What is reported for them, at the
kernel's entry and at `warp_specialize`, belongs to the hand-over, which tells waiting warps through
shared memory what to run; `sanitize_kernels.py` shows it for the Hopper backend as well.
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _write(out, value, warps: gl.constexpr):
    at = gl.arange(0, warps * 32, layout=gl.BlockedLayout([1], [32], [warps], [0]))
    gl.store(out + at, at + value)


@gluon.jit
def _write_and_signal(out, value, ready):
    _write(out, value, 1)
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _wait_and_write(out, value, ready):
    mbarrier.wait(ready, 0)
    _write(out, value, 4)


@gluon.jit
def plain(out, value):
    gl.warp_specialize(
        [
            (_write, (out, value, 4)),
            (_write, (out + 128, value + 1000, 4)),
            (_write, (out + 256, value + 2000, 1)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def signalled(out, value):
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_wait_and_write, (out, value, ready)),
            (_wait_and_write, (out + 128, value + 1000, ready)),
            (_write_and_signal, (out + 256, value + 2000, ready)),
        ],
        [4, 1],
        [240, 24],
    )


def main() -> int:
    """0 if all groups wrote what they should."""
    parts = [torch.arange(n) + 7 + 1000 * i for i, n in enumerate((128, 128, 32))]
    expected = torch.cat(parts).to("cuda", torch.int32)
    wrong = 0
    for name, kernel in (("plain", plain), ("signalled", signalled)):
        out = torch.zeros_like(expected)
        kernel[(264,)](out, 7, num_warps=4, maxnreg=168)
        right = torch.equal(out, expected)
        print(f"{name} {'right' if right else 'WRONG'}", flush=True)
        wrong += not right
    return wrong


if __name__ == "__main__":
    sys.exit(main())
