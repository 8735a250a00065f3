"""The block-sparse forward kernel of Hopper GPUs (capability 9.0), in Triton's Gluon.

A persistent grid: each program takes query blocks of 128 rows from a work list. One warp feeds
tiles of 128 keys through shared memory with bulk tensor copies; two groups of four warps hold 64
query rows each. With tile scores S_t = q k_t^T, a group issues S_t, then acc += P_(t-1) v_(t-1),
and computes the online softmax of S_t (see triton_forward) while that product runs.

Nothing is permuted: a block is a box (bt, bh, bw) of the raster video, read as a rank-5 box of
[outer, T, H, W, inner] and clipped at the grid's edges by the copy engine, or a run of consecutive
tokens. A key tile is one block of 128 keys or two gathered blocks of 64.

Each entry of a list is a code: t << 20 | h << 10 | w, the first token of a box; RUN | token, the
first token of a run; -1, no block. A list has the entries without a mask first, then those whose
scores are masked: clipped boxes, short runs, and blocks under a token rule.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# The names changed between Triton 3.6 and 3.9; the old ones stay there and raise.
if "async_load" in tma.__all__:
    tma_load, tma_store = tma.async_load, tma.async_store
else:
    tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def _reinterpreted(memory, shape: gl.constexpr, layout: gl.constexpr):
        return memory.reinterpret(memory.dtype, shape, layout)

else:

    @gluon.jit
    def _reinterpreted(memory, shape: gl.constexpr, layout: gl.constexpr):
        return memory._reinterpret(memory.dtype, shape, layout)


RUN = gl.constexpr(1 << 30)
TOKEN = gl.constexpr((1 << 30) - 1)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _load_params(at):
    return (
        gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7),
        gl.load(at + 8), gl.load(at + 9), gl.load(at + 10), gl.load(at + 11),
        gl.load(at + 12), gl.load(at + 13), gl.load(at + 14), gl.load(at + 15),
    )  # fmt: skip


@gluon.jit
def _item(at):
    """(sample, head, row of the lists, code, tokens, tiles, tiles without a mask) of a query block.

    Loaded one item ahead, so that nobody waits for it.
    """
    return (
        gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 4),
        gl.load(at + 5), gl.load(at + 6),
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
    """Start the copies of a tile of 128 keys: one block, or two of 64 below each other.

    tiles: [stages, 128, D], or [stages * D / 64 * 2, 64, 64]: the same memory in pieces of 64
    columns (the width of a swizzled row) by 64 keys.
    """
    mbarrier.expect(ready, 128 * D * 2)
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
def _produce(
    q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_s, v_s,
    q_full, q_free, k_full, k_free, v_full, v_free, items, n_items, group, codes, width,
    q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
    D: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    Q_BOX: gl.constexpr, K_BOX: gl.constexpr, SPLIT: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    tile = 0
    done = 0
    for i in range(gl.program_id(0), n_items, gl.num_programs(0)):
        sample, head, place, code, length, total, bare = _item(items + i * 8)
        at = codes + place.to(gl.int64) * width
        entry = gl.load(at)
        second = entry
        if KB == 64:
            second = gl.load(at + 1)
        half = code + SPLIT
        if BOXES and RUNS:
            half = gl.where(code >= RUN, code + 64, code + SPLIT)
        elif RUNS:
            half = code + 64
        side = done & 1
        mbarrier.wait(q_free.index(side), ((done >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(side), 2 * 64 * D * 2)
        outer = sample * q_ob + head * q_oh
        _copy(q_boxes, q_runs, outer, head * q_ch, code, q_full.index(side), q_s.index(side * 2),
              Q_BOX, 64, D, BOXES, RUNS)  # fmt: skip
        _copy(q_boxes, q_runs, outer, head * q_ch, half, q_full.index(side),
              q_s.index(side * 2 + 1), Q_BOX, 64, D, BOXES, RUNS)  # fmt: skip
        done += 1  # noqa: SIM113
        kv = head // group
        k_outer = sample * k_ob + kv * k_oh
        v_outer = sample * v_ob + kv * v_oh
        k_column = kv * k_ch
        v_column = kv * v_ch
        for t in range(total):
            # The next codes are on their way while this tile waits for its buffers.
            after = at + gl.minimum(t + 1, total - 1) * (128 // KB)
            next_entry = gl.load(after)
            next_second = next_entry
            if KB == 64:
                next_second = gl.load(after + 1)
            stage = tile % STAGES
            phase = ((tile // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            _copy_tile(k_boxes, k_runs, k_outer, k_column, entry, second, k_full.index(stage),
                       k_s, stage, K_BOX, D, KB, BOXES, RUNS)  # fmt: skip
            if STAGES < 3:
                mbarrier.wait(v_free.index(stage), phase)
            _copy_tile(v_boxes, v_runs, v_outer, v_column, entry, second, v_full.index(stage),
                       v_s, stage, K_BOX, D, KB, BOXES, RUNS)  # fmt: skip
            entry = next_entry
            second = next_second
            tile += 1


@gluon.jit
def _masked(
    s, codes, metas, rows, grid_t, grid_h, grid_w, rule_params,
    KB: gl.constexpr, Q_BOX: gl.constexpr, BOX: gl.constexpr, LAYOUT: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, PARTIAL: gl.constexpr, RULE: gl.constexpr,
    OTHER: gl.constexpr,
):  # fmt: skip
    """Scores [64, 128] of one tile with -inf where a pair does not count.

    rows: code of the group's first query; codes, metas: where the entries of the tile lie.
    """
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    code = gl.load(codes)
    meta = gl.load(metas)
    if KB == 64:
        code = gl.where(column < 64, code, gl.load(codes + 1))
        meta = gl.where(column < 64, meta, gl.load(metas + 1))
        column = column % 64
    if BOXES:
        kt = ((code >> 20) & 1023) + column // (BOX[1] * BOX[2])
        kh = ((code >> 10) & 1023) + column // BOX[2] % BOX[1]
        kw = (code & 1023) + column % BOX[2]
        inside = (kt < grid_t) & (kh < grid_h) & (kw < grid_w)
    if RUNS:
        present = column < (meta & 255)
        if BOXES:
            inside = gl.where(code >= RUN, present, inside)
        else:
            inside = present
    inside = inside & (code >= 0)
    keep = gl.expand_dims(inside, 0)
    if PARTIAL:
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        qt = ((rows >> 20) & 1023) + row // (Q_BOX[1] * Q_BOX[2])
        qh = ((rows >> 10) & 1023) + row // Q_BOX[2] % Q_BOX[1]
        qw = (rows & 1023) + row % Q_BOX[2]
        kept = RULE(
            gl.expand_dims(qt, 1), gl.expand_dims(qh, 1), gl.expand_dims(qw, 1),
            gl.expand_dims(kt, 0), gl.expand_dims(kh, 0), gl.expand_dims(kw, 0),
            _load_params(rule_params),
        )  # fmt: skip
        if OTHER is not None:
            kept = kept | OTHER(
                gl.expand_dims(qt, 1), gl.expand_dims(qh, 1), gl.expand_dims(qw, 1),
                gl.expand_dims(kt, 0), gl.expand_dims(kh, 0), gl.expand_dims(kw, 0),
                _load_params(rule_params + 16),
            )  # fmt: skip
        if KB == 64:
            keep = keep & (kept | gl.expand_dims((meta & 256) == 0, 0))
        else:
            keep = keep & (kept | ((meta & 256) == 0))
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def _pinned(x):
    """x, computed before anything that has effects and comes later in the program."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def _softmax(s, top, sums, scale):
    """One online step, base 2: (p, new maximum, new sum, factor of what came before)."""
    new = gl.maximum(top, gl.max(s, axis=1) * scale)
    # Rows that have seen no key yet: subtract 0, so that -inf - -inf never happens.
    base = gl.where(new == float("-inf"), 0.0, new)
    alpha = gl.exp2(top - base)
    p = gl.exp2(s * scale - gl.expand_dims(base, 1))
    return p, new, sums * alpha + gl.sum(p, axis=1), alpha


@gluon.jit
def _finish(
    acc, top, sums, sample, head, code, length, o_boxes, o_runs, o_s, out_ptr, lse_ptr,
    o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h, grid_w, video,
    D: gl.constexpr, Q_BOX: gl.constexpr, SPLIT: gl.constexpr, HALF: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """Store out = acc / sums and LSE = (top + log2 sums) ln 2 of this group's 64 rows."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    start = code + HALF * SPLIT
    whole = code < 0
    if BOXES:
        row_t = ((start >> 20) & 1023) + row // (Q_BOX[1] * Q_BOX[2])
        row_h = ((start >> 10) & 1023) + row // Q_BOX[2] % Q_BOX[1]
        row_w = (start & 1023) + row % Q_BOX[2]
        token = video + (row_t * grid_h + row_h) * grid_w + row_w
        held = (row_t < grid_t) & (row_h < grid_h) & (row_w < grid_w)
        whole = code < RUN
    if RUNS:
        run_token = (code & TOKEN) + HALF * 64 + row
        run_held = row < length - HALF * 64
        if BOXES:
            token = gl.where(code >= RUN, run_token, token)
            held = gl.where(code >= RUN, run_held, held)
        else:
            token = run_token
            held = run_held
        whole = whole | (length == 128)
    seen = sums > 0
    sums = gl.where(sums == 0, 1.0, sums)  # NaN stays
    lse = gl.where(seen | (sums != sums), (top + gl.log2(sums)) * LN_2, float("-inf"))
    out = (acc * gl.expand_dims(gl.convert_layout(1.0 / sums, gl.SliceLayout(1, O_L)), 1)).to(
        o_s.dtype
    )
    if whole:
        tma.store_wait(0)
        barrier()
        o_s.store(out)
        fence_async_shared()
        outer = sample * o_ob + head * o_oh
        column = head * o_ch
        if BOXES and RUNS:
            if code >= RUN:
                tma_store(o_runs, [outer, (code & TOKEN) + HALF * 64, column],
                          o_s.reshape([1, 64, D]))  # fmt: skip
            else:
                tma_store(
                    o_boxes,
                    [outer, (start >> 20) & 1023, (start >> 10) & 1023, start & 1023, column],
                    o_s.reshape([1, Q_BOX[0], Q_BOX[1], Q_BOX[2], D]),
                )
        elif BOXES:
            tma_store(
                o_boxes,
                [outer, (start >> 20) & 1023, (start >> 10) & 1023, start & 1023, column],
                o_s.reshape([1, Q_BOX[0], Q_BOX[1], Q_BOX[2], D]),
            )
        else:
            tma_store(o_runs, [outer, (code & TOKEN) + HALF * 64, column],
                      o_s.reshape([1, 64, D]))  # fmt: skip
    else:  # a short run must not touch its neighbour
        rows = gl.convert_layout(token, gl.SliceLayout(1, O_L)).to(gl.int64)
        mask = gl.convert_layout(held, gl.SliceLayout(1, O_L))
        dims = gl.arange(0, D, layout=gl.SliceLayout(0, O_L))
        base = out_ptr + sample.to(gl.int64) * o_sb + head.to(gl.int64) * o_sh
        at = base + gl.expand_dims(rows * o_ss, 1) + gl.expand_dims(dims, 0)
        gl.store(at, out, mask=gl.expand_dims(mask, 1))
    line = lse_ptr + sample.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h
    gl.store(line + token, lse, mask=held)


@gluon.jit
def _consume(
    o_boxes, o_runs, q_s, o_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free,
    out_ptr, lse_ptr, items, n_items, work, codes, metas, width,
    o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h, grid_w, video,
    rule_params, scale,
    D: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    Q_BOX: gl.constexpr, K_BOX: gl.constexpr, SPLIT: gl.constexpr, HALF: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, PARTIAL: gl.constexpr, RULE: gl.constexpr,
    OTHER: gl.constexpr,
):  # fmt: skip
    """One loop over the key tiles of all items: an item's last product runs under the next one's
    first softmax, and its rows are stored there."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    R_L: gl.constexpr = gl.SliceLayout(1, S_L)
    dtype: gl.constexpr = k_s.dtype
    zero = gl.zeros([64, 128], gl.float32, S_L)
    acc = gl.zeros([64, D], gl.float32, O_L)
    top = gl.full([64], float("-inf"), gl.float32, R_L)
    sums = gl.full([64], 0.0, gl.float32, R_L)
    tiles = gl.load(work + gl.program_id(0))
    i = gl.program_id(0)
    sample, head, place, code, length, total, bare = _item(items + i * 8)
    i += gl.num_programs(0)
    sample_, head_, place_, code_, length_, total_, bare_ = _item(
        items + gl.minimum(i, n_items - 1) * 8
    )
    at = place.to(gl.int64) * width
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_s.index(HALF), k_s.index(0).permute((1, 0)), zero, use_acc=False,
                      is_async=True)  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    if STAGES < 3:
        mbarrier.arrive(k_free.index(0), count=1)
    if bare == 0:
        s = _masked(s, codes + at, metas + at, code + HALF * SPLIT, grid_t, grid_h, grid_w,
                    rule_params, KB, Q_BOX, K_BOX, S_L, BOXES, RUNS, PARTIAL, RULE,
                    OTHER)  # fmt: skip
    p, top, sums, alpha = _softmax(s, top, sums, scale)
    mbarrier.wait(k_full.index(1), 0, pred=tiles > 1)
    w = gl.convert_layout(p.to(dtype), P_L)
    t = 1
    for now in range(1, tiles):
        first = t == total
        old_sample = sample
        old_head = head
        old_code = code
        old_length = length
        if first:
            mbarrier.arrive(q_free.index(done & 1), count=1)
            done += 1
            sample = sample_
            head = head_
            code = code_
            length = length_
            total = total_
            bare = bare_
            at = place_.to(gl.int64) * width
            i += gl.num_programs(0)
            sample_, head_, place_, code_, length_, total_, bare_ = _item(
                items + gl.minimum(i, n_items - 1) * 8
            )
            t = 0
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
        stage = now % STAGES
        before = (now - 1) % STAGES
        q = q_s.index((done & 1) * 2 + HALF)
        s = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False,
                          is_async=True)  # fmt: skip
        mbarrier.wait(v_full.index(before), ((now - 1) // STAGES) & 1)
        acc = warpgroup_mma(w, v_s.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        if STAGES < 3:  # else a stage is freed at once, with fewer barriers
            mbarrier.arrive(k_free.index(stage), count=1)
        if t >= bare:
            entry = at + t * (128 // KB)
            s = _masked(s, codes + entry, metas + entry, code + HALF * SPLIT, grid_t, grid_h,
                        grid_w, rule_params, KB, Q_BOX, K_BOX, S_L, BOXES, RUNS, PARTIAL,
                        RULE, OTHER)  # fmt: skip
        old_top = top
        old_sums = sums
        p, top, sums, alpha = _softmax(
            s, gl.where(first, float("-inf"), top), gl.where(first, 0.0, sums), scale
        )
        # Between p and the product's end stands a wait that branches: without it the assembler
        # moves the latter ahead of the exponentials, and they no longer run beside the product.
        p = _pinned(p)
        after = now + 1
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1, pred=after < tiles)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if STAGES < 3:
            mbarrier.arrive(v_free.index(before), count=1)
        else:
            mbarrier.arrive(k_free.index(before), count=1)
        if first:
            _finish(
                acc, old_top, old_sums, old_sample, old_head, old_code, old_length, o_boxes,
                o_runs, o_s, out_ptr, lse_ptr, o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h,
                grid_t, grid_h, grid_w, video, D, Q_BOX, SPLIT, HALF, BOXES, RUNS, S_L, O_L,
            )  # fmt: skip
            acc = gl.zeros([64, D], gl.float32, O_L)
        else:
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, O_L)), 1)
        w = gl.convert_layout(p.to(dtype), P_L)
        t += 1
    stage = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((tiles - 1) // STAGES) & 1)
    acc = warpgroup_mma(w, v_s.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _finish(
        acc, top, sums, sample, head, code, length, o_boxes, o_runs, o_s, out_ptr, lse_ptr,
        o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h, grid_w, video,
        D, Q_BOX, SPLIT, HALF, BOXES, RUNS, S_L, O_L,
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "n_items", "group", "width", "lse_b", "lse_h", "grid_t", "grid_h", "grid_w", "video",
        "q_ob", "q_oh", "q_ch", "k_ob", "k_oh", "k_ch", "v_ob", "v_oh", "v_ch",
        "o_ob", "o_oh", "o_ch", "o_sb", "o_ss", "o_sh",
    ]
)  # fmt: skip
def forward(
    q_boxes, k_boxes, v_boxes, o_boxes, q_runs, k_runs, v_runs, o_runs, out_ptr, lse_ptr,
    items, work, codes, metas, rule_params, n_items, group, width, lse_b, lse_h,
    q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch, o_ob, o_oh, o_ch, o_sb, o_ss, o_sh,
    grid_t, grid_h, grid_w, video, scale,
    D: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    Q_BOX: gl.constexpr, K_BOX: gl.constexpr, SPLIT: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, PARTIAL: gl.constexpr, RULE: gl.constexpr,
    REGISTERS: gl.constexpr, FEEDER: gl.constexpr, OTHER: gl.constexpr = None,
):  # fmt: skip
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    PIECE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, D], dtype)
    HALF_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [4, 64, D], HALF_TILE)
    o_s = gl.allocate_shared_memory(dtype, [2, 64, D], HALF_TILE)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 128, D], TILE)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 128, D], TILE)
    k_in = k_s
    v_in = v_s
    if KB == 64:
        k_in = _reinterpreted(k_s, [STAGES * D // 32, 64, 64], PIECE)
        v_in = _reinterpreted(v_s, [STAGES * D // 32, 64, 64], PIECE)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                o_boxes, o_runs, q_s, o_s.index(0), k_s, v_s, q_full, q_free, k_full,
                k_free, v_full, v_free, out_ptr, lse_ptr, items, n_items, work, codes, metas,
                width, o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 0, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (_consume, (
                o_boxes, o_runs, q_s, o_s.index(1), k_s, v_s, q_full, q_free, k_full,
                k_free, v_full, v_free, out_ptr, lse_ptr, items, n_items, work, codes, metas,
                width, o_ob, o_oh, o_ch, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 1, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (_produce, (
                q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_in, v_in, q_full, q_free,
                k_full, k_free, v_full, v_free, items, n_items, group, codes, width,
                q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, BOXES, RUNS,
            )),
        ],
        [4, 1],
        [REGISTERS, FEEDER],
    )  # fmt: skip
