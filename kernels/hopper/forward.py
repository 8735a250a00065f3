"""The block-sparse forward kernel of Hopper GPUs (capability 9.0), in Triton's Gluon.

A persistent grid: each program has a list of query blocks of 128 rows. One warp feeds
tiles of 128 keys through shared memory with bulk tensor copies; two groups of four warps hold 64
query rows each. With tile scores S_t = q k_t^T, a group issues S_t, then acc += P_(t-1) v_(t-1),
finds the maxima of S_t while that product runs, and takes the exponentials (see portable.forward)
when it has ended: then the other group's products run, and the scaling of acc fills the gaps
between exponentials.

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
    tma_load = tma.async_load
else:
    tma_load = tma.async_copy_global_to_shared

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


# The feeder learns from hardware barriers that a buffer may be filled again: both groups (256
# threads) arrive without waiting, and the feeder's warp meets them. Arriving at a barrier in memory
# would cost the groups two more barriers each time, which the compiler puts around it.
FREE_QUERIES = gl.constexpr(8)  # two of them; Triton's own begin at 0
FREE_TILE = gl.constexpr(10)  # one for each stage


@gluon.jit
def _arrive(barrier_id):
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
def _produce(
    q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_s, v_s,
    q_full, full, items, n_items, work, group, codes, width,
    q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
    D: gl.constexpr, KB: gl.constexpr, STAGES: gl.constexpr,
    Q_BOX: gl.constexpr, K_BOX: gl.constexpr, SPLIT: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr,
):  # fmt: skip
    # Step t brings K of tile t and V of tile t - 1, which the groups' step t multiplies.
    i = gl.load(work + gl.program_id(0) * 2)
    tiles = gl.load(work + gl.program_id(0) * 2 + 1)
    item = items + i * 8
    follows = gl.load(item + 2) * width
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
        if t == total:  # the next item; its row of `items` came with the number of its lists' row
            sample = gl.load(item)
            head = gl.load(item + 1)
            code = gl.load(item + 3)
            total = gl.load(item + 5)
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
            item = items + gl.minimum(i, n_items - 1) * 8
            follows = gl.load(item + 2) * width
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


@gluon.jit
def _masked(
    s, items, item, t, codes, metas, width, grid_t, grid_h, grid_w, rule_params,
    KB: gl.constexpr, Q_BOX: gl.constexpr, BOX: gl.constexpr, LAYOUT: gl.constexpr,
    SPLIT: gl.constexpr, BOXES: gl.constexpr, RUNS: gl.constexpr, PARTIAL: gl.constexpr,
    RULE: gl.constexpr, OTHER: gl.constexpr,
):  # fmt: skip
    """Scores [64, 128] of an item's tile t with -inf where a pair does not count.

    SPLIT: how far the code of the group's first query is from the item's.
    """
    entry = gl.load(items + item * 8 + 2).to(gl.int64) * width + t * (128 // KB)
    rows = gl.load(items + item * 8 + 3) + SPLIT
    codes += entry
    metas += entry
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
def _exponents(s, top, scale):
    """One online step, base 2: (x with p = 2^x, new maximum, factor of what came before)."""
    # Maxima of four parts at a time: short chains of dependent instructions.
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    parts = gl.max(gl.max(s.reshape([64, 4, 4, 8]), axis=1), axis=1)
    most = gl.convert_layout(gl.max(parts, axis=1), rows, assert_trivial=True)
    new = gl.maximum(top, most * scale)
    # Rows that have seen no key yet: subtract 0, so that -inf - -inf never happens.
    base = gl.where(new == float("-inf"), 0.0, new)
    return s * scale - gl.expand_dims(base, 1), new, gl.exp2(top - base)


@gluon.jit
def _sums(p):
    """Sums [64, 8] of columns i, i + 8, ...: of what a thread holds. `_finish` adds them up."""
    return gl.sum(p.reshape([64, 16, 8]), axis=1)


@gluon.jit
def _scaled(x, factor):
    """The rows of x times factor [64]."""
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.expand_dims(gl.convert_layout(factor, rows, assert_trivial=True), 1)


@gluon.jit
def _finish(
    acc, top, sums, items, item, out_ptr, lse_ptr, o_sb, o_ss, o_sh, lse_b, lse_h,
    grid_t, grid_h, grid_w, video,
    D: gl.constexpr, Q_BOX: gl.constexpr, SPLIT: gl.constexpr, HALF: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """Store out = acc / sums and LSE = (top + log2 sums) ln 2 of this group's 64 rows."""
    sample = gl.load(items + item * 8)
    head = gl.load(items + item * 8 + 1)
    code = gl.load(items + item * 8 + 3)
    length = gl.load(items + item * 8 + 4)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S_L))
    start = code + HALF * SPLIT
    if BOXES:
        row_t = ((start >> 20) & 1023) + row // (Q_BOX[1] * Q_BOX[2])
        row_h = ((start >> 10) & 1023) + row // Q_BOX[2] % Q_BOX[1]
        row_w = (start & 1023) + row % Q_BOX[2]
        token = video + (row_t * grid_h + row_h) * grid_w + row_w
        held = (row_t < grid_t) & (row_h < grid_h) & (row_w < grid_w)
    if RUNS:
        run_token = (code & TOKEN) + HALF * 64 + row
        run_held = row < length - HALF * 64
        if BOXES:
            token = gl.where(code >= RUN, run_token, token)
            held = gl.where(code >= RUN, run_held, held)
        else:
            token = run_token
            held = run_held
    sums = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, S_L), assert_trivial=True)
    seen = sums > 0
    sums = gl.where(sums == 0, 1.0, sums)  # NaN stays
    lse = gl.where(seen | (sums != sums), (top + gl.log2(sums)) * LN_2, float("-inf"))
    out = _scaled(acc, 1.0 / sums).to(out_ptr.dtype.element_ty)
    # Straight from registers, so that shared memory holds a third tile of values. A short block
    # must not touch its neighbour. Strides are multiples of 16 bytes, as those of q are.
    rows = gl.convert_layout(token, gl.SliceLayout(1, O_L)).to(gl.int64)
    mask = gl.convert_layout(held, gl.SliceLayout(1, O_L))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, O_L))
    base = out_ptr + gl.multiple_of(sample.to(gl.int64) * o_sb + head.to(gl.int64) * o_sh, 8)
    steps = gl.multiple_of(rows * o_ss, 8)
    at = base + gl.expand_dims(steps, 1) + gl.expand_dims(dims, 0)
    gl.store(at, out, mask=gl.expand_dims(mask, 1))
    line = lse_ptr + sample.to(gl.int64) * lse_b + head.to(gl.int64) * lse_h
    gl.store(line + token, lse, mask=held)


@gluon.jit
def _consume(
    q_s, k_s, v_s, q_full, full,
    out_ptr, lse_ptr, items, n_items, work, codes, metas, width,
    o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h, grid_w, video,
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
    item = gl.load(work + gl.program_id(0) * 2)
    tiles = gl.load(work + gl.program_id(0) * 2 + 1)
    # Of the items' rows two numbers are kept, those of the next one as well: nobody waits for them.
    total = gl.load(items + item * 8 + 5)
    bare = gl.load(items + item * 8 + 6)
    row_ = items + gl.minimum(item + 1, n_items - 1) * 8
    total_ = gl.load(row_ + 5)
    bare_ = gl.load(row_ + 6)
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q_s.index(HALF), k_s.index(0).permute((1, 0)), zero, use_acc=False,
                      is_async=True)  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    _arrive(done + FREE_TILE)
    if bare == 0:
        s = _masked(s, items, item, 0, codes, metas, width, grid_t, grid_h, grid_w, rule_params,
                    KB, Q_BOX, K_BOX, S_L, HALF * SPLIT, BOXES, RUNS, PARTIAL, RULE,
                    OTHER)  # fmt: skip
    x, top, alpha = _exponents(s, top, scale)
    p = gl.exp2(x)
    sums = _sums(p)
    mbarrier.wait(full.index(1), 0)
    w = gl.convert_layout(p.to(dtype), P_L)
    t = 1
    for now in range(1, tiles):
        first = t == total
        old_item = item
        if first:
            _arrive((done & 1) + FREE_QUERIES)
            done += 1
            item += 1
            total = total_
            bare = bare_
            row_ = items + gl.minimum(item + 1, n_items - 1) * 8
            total_ = gl.load(row_ + 5)
            bare_ = gl.load(row_ + 6)
            t = 0
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
        stage = now % STAGES
        q = q_s.index((done & 1) * 2 + HALF)
        s = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False,
                          is_async=True)  # fmt: skip
        acc = warpgroup_mma(w, v_s.index((now - 1) % (STAGES + 1)), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        # K of this tile, and V of the tile two before it, whose product has ended.
        _arrive(stage + FREE_TILE)
        if t >= bare:
            s = _masked(s, items, item, t, codes, metas, width, grid_t, grid_h, grid_w,
                        rule_params, KB, Q_BOX, K_BOX, S_L, HALF * SPLIT, BOXES, RUNS, PARTIAL,
                        RULE, OTHER)  # fmt: skip
        old_top = top
        old_sums = sums
        x, top, alpha = _exponents(s, gl.where(first, float("-inf"), top), scale)
        # Between these and the product's end stands a wait that branches: without it the assembler
        # moves the latter ahead of the maxima, and nothing runs beside the product.
        x = _pinned(x)
        after = now + 1
        mbarrier.wait(full.index(after % STAGES), (after // STAGES) & 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if first:
            _finish(
                acc, old_top, old_sums, items, old_item, out_ptr, lse_ptr, o_sb, o_ss, o_sh,
                lse_b, lse_h, grid_t, grid_h, grid_w, video, D, Q_BOX, SPLIT, HALF, BOXES, RUNS,
                S_L, O_L,
            )  # fmt: skip
            acc = gl.zeros([64, D], gl.float32, O_L)
        p = gl.exp2(x)
        acc = _scaled(acc, alpha)
        w = gl.convert_layout(p.to(dtype), P_L)
        sums = _scaled(gl.where(first, 0.0, sums), alpha) + _sums(p)
        t += 1
    acc = warpgroup_mma(w, v_s.index((tiles - 1) % (STAGES + 1)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _finish(
        acc, top, sums, items, item, out_ptr, lse_ptr, o_sb, o_ss, o_sh, lse_b, lse_h,
        grid_t, grid_h, grid_w, video, D, Q_BOX, SPLIT, HALF, BOXES, RUNS, S_L, O_L,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "n_items", "group", "width", "lse_b", "lse_h", "grid_t", "grid_h", "grid_w", "video",
        "q_ob", "q_oh", "q_ch", "k_ob", "k_oh", "k_ch", "v_ob", "v_oh", "v_ch",
        "o_sb", "o_ss", "o_sh",
    ]
)  # fmt: skip
def forward(
    q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, out_ptr, lse_ptr,
    items, work, codes, metas, rule_params, n_items, group, width, lse_b, lse_h,
    q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch, o_sb, o_ss, o_sh,
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
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 128, D], TILE)
    v_s = gl.allocate_shared_memory(dtype, [STAGES + 1, 128, D], TILE)
    k_in = k_s
    v_in = v_s
    if KB == 64:
        k_in = _reinterpreted(k_s, [STAGES * D // 32, 64, 64], PIECE)
        v_in = _reinterpreted(v_s, [(STAGES + 1) * D // 32, 64, 64], PIECE)
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                q_s, k_s, v_s, q_full, full,
                out_ptr, lse_ptr, items, n_items, work, codes, metas,
                width, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 0, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (_consume, (
                q_s, k_s, v_s, q_full, full,
                out_ptr, lse_ptr, items, n_items, work, codes, metas,
                width, o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 1, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (_produce, (
                q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_in, v_in, q_full,
                full, items, n_items, work, group, codes, width,
                q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, BOXES, RUNS,
            )),
        ],
        [4, 1],
        [REGISTERS, FEEDER],
    )  # fmt: skip
