"""The warp that feeds the Hopper kernel: queries, keys and values into shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dit_accel.kernels.hopper import lists

# The name changed between Triton 3.6 and 3.9; the old one stays there and raises.
if "async_load" in tma.__all__:
    tma_load = tma.async_load
else:
    tma_load = tma.async_copy_global_to_shared

RUN = gl.constexpr(lists.RUN)
TOKEN = gl.constexpr(lists.RUN - 1)
SAMPLE = gl.constexpr(lists.SAMPLE)
HEAD = gl.constexpr(lists.HEAD)
START = gl.constexpr(lists.START)
CODE = gl.constexpr(lists.CODE)
LENGTH = gl.constexpr(lists.LENGTH)
TILES = gl.constexpr(lists.TILES)
BARE = gl.constexpr(lists.BARE)
UNDER_RULE = gl.constexpr(lists.PARTIAL)  # of a meta
# The feeder learns from hardware barriers that a buffer may be filled again: both groups (256
# threads) arrive without waiting, and the feeder's warp meets them. Arriving at a barrier in memory
# would cost the groups two more barriers each time, which the compiler puts around it.
FREE_QUERIES = gl.constexpr(8)  # two of them; Triton's own begin at 0
FREE_TILE = gl.constexpr(10)  # one for each stage


# What all three parts of the kernel compute from its arguments, the compiler computes once, at the
# entry, and keeps in registers or on the stack. So signs of steps are not asked for, and each part
# reads the program's number itself.
@gluon.jit
def wide(step):
    """A step of an array, which is not negative, as int64."""
    if step.dtype.primitive_bitwidth == 32:
        step = step.to(gl.uint32)
    return step.to(gl.int64)


@gluon.jit
def program():
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def arrive(barrier_id):
    gl.inline_asm_elementwise(
        "bar.arrive $1, 288; mov.b32 $0, $1;", "=r,r", [barrier_id], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _meet(barrier_id):
    gl.inline_asm_elementwise(
        "bar.sync $1, 288; mov.b32 $0, $1;", "=r,r", [barrier_id], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _copy(
    boxes, runs, outer, column, code, ready, target,
    BOX: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Start the copy of the block `code` into `target` [ROWS, WIDTH]; `ready` counts its bytes."""
    if BOXES and RUNS:
        if code >= RUN:
            tma_load(runs, [outer, code & TOKEN, column], ready, target.reshape([1, ROWS, WIDTH]))
        else:
            tma_load(
                boxes, [outer, (code >> 20) & 1023, (code >> 10) & 1023, code & 1023, column],
                ready, target.reshape([1, BOX[0], BOX[1], BOX[2], WIDTH]),
            )  # fmt: skip
    elif BOXES:
        tma_load(
            boxes, [outer, (code >> 20) & 1023, (code >> 10) & 1023, code & 1023, column],
            ready, target.reshape([1, BOX[0], BOX[1], BOX[2], WIDTH]),
        )  # fmt: skip
    else:
        tma_load(runs, [outer, code & TOKEN, column], ready, target.reshape([1, ROWS, WIDTH]))


@gluon.jit
def _copy_tile(
    boxes, runs, outer, column, first, second, ready, tiles, stage,
    BOX: gl.constexpr, D: gl.constexpr, KB: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile of 128 keys, which `ready` expects: one block, or two of 64.

    tiles: [stages, 128, D], or [stages * D / 64 * 2, 64, 64]: the same memory in pieces of 64
    columns (the width of a swizzled row) by 64 keys.
    """
    if KB == 128:
        _copy(boxes, runs, outer, column, first, ready, tiles.index(stage), BOX, 128, D, BOXES,
              RUNS)  # fmt: skip
    else:
        for c in gl.static_range(D // 64):
            chunk = (stage * (D // 64) + c) * 2
            _copy(boxes, runs, outer, column + c * 64, first, ready, tiles.index(chunk),
                  BOX, 64, 64, BOXES, RUNS)  # fmt: skip
            _copy(boxes, runs, outer, column + c * 64, second, ready, tiles.index(chunk + 1),
                  BOX, 64, 64, BOXES, RUNS)  # fmt: skip


@gluon.jit
def produce(
    q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_s, v_s,
    q_full, full, items, last, work, group, codes,
    q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
    D: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    Q_BOX: gl.constexpr, K_BOX: gl.constexpr, SPLIT: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    # Step t brings K of tile t and V of tile t - 1, which the groups' step t multiplies.
    work += program() * 2
    i = gl.load(work)
    tiles = gl.load(work + 1)
    item = items + i * 8
    follows = gl.load(item + START)
    at = follows
    entry = gl.load(codes + at)
    second = entry
    if KB == 64:
        second = gl.load(codes + at + 1)
    total = 0
    t = 0
    done = 0
    sample = 0
    kv = 0
    old_sample = 0
    old_kv = 0
    old_entry = 0  # not `entry`: a variable that starts as another's alias is not carried on
    old_second = 0
    for now in range(tiles):
        if t == total:  # the next item; its row of `items` came with where its list starts
            sample = gl.load(item + SAMPLE)
            head = gl.load(item + HEAD)
            code = gl.load(item + CODE)
            total = gl.load(item + TILES)
            half = code + SPLIT
            if BOXES and RUNS:
                half = gl.where(code >= RUN, code + 64, code + SPLIT)
            elif RUNS:
                half = code + 64
            side = done & 1
            if done >= 2:
                _meet(FREE_QUERIES + side)
            mbarrier.expect(q_full.index(side), 2 * 64 * D * 2)
            outer = sample * q_ob + head * q_oh
            _copy(q_boxes, q_runs, outer, head * q_ch, code, q_full.index(side),
                  q_s.index(side * 2), Q_BOX, 64, D, BOXES, RUNS)  # fmt: skip
            _copy(q_boxes, q_runs, outer, head * q_ch, half, q_full.index(side),
                  q_s.index(side * 2 + 1), Q_BOX, 64, D, BOXES, RUNS)  # fmt: skip
            done += 1  # noqa: SIM113
            kv = head // group
            at = follows
            i += 1
            item = items + gl.minimum(i, last) * 8
            follows = gl.load(item + START)
            t = 0
        t += 1
        # The next codes are on their way while this tile waits for its buffers.
        at += 128 // KB
        ahead = gl.where(t == total, follows, at)
        next_entry = gl.load(codes + ahead)
        next_second = next_entry
        if KB == 64:
            next_second = gl.load(codes + ahead + 1)
        stage = now % STAGES
        ready = full.index(stage)
        if now >= STAGES:
            _meet(FREE_TILE + stage)
        mbarrier.expect(ready, 128 * D * 2, pred=now == 0)
        mbarrier.expect(ready, 2 * 128 * D * 2, pred=now > 0)
        _copy_tile(k_boxes, k_runs, sample * k_ob + kv * k_oh, kv * k_ch, entry, second, ready,
                   k_s, stage, K_BOX, D, KB, BOXES, RUNS)  # fmt: skip
        if now > 0:
            _copy_tile(v_boxes, v_runs, old_sample * v_ob + old_kv * v_oh, old_kv * v_ch,
                       old_entry, old_second, ready, v_s, (now - 1) % (STAGES + 1), K_BOX, D, KB,
                       BOXES, RUNS)  # fmt: skip
        old_entry = entry
        old_second = second
        old_sample = sample
        old_kv = kv
        entry = next_entry
        second = next_second
    stage = tiles % STAGES
    if tiles >= STAGES:
        _meet(FREE_TILE + stage)
    mbarrier.expect(full.index(stage), 128 * D * 2)
    _copy_tile(v_boxes, v_runs, old_sample * v_ob + old_kv * v_oh, old_kv * v_ch, old_entry,
               old_second, full.index(stage), v_s, (tiles - 1) % (STAGES + 1), K_BOX, D, KB,
               BOXES, RUNS)  # fmt: skip
