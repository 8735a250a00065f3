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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_accel.kernels.hopper.feed import (
    BARE,
    CODE,
    FREE_QUERIES,
    FREE_TILE,
    HEAD,
    LENGTH,
    RUN,
    SAMPLE,
    TILES,
    TOKEN,
    arrive,
    produce,
    program,
    wide,
)
from dit_accel.kernels.hopper.scores import exponents, masked, scaled, sums_of

LN_2 = gl.constexpr(0.6931471805599453)

# The name changed between Triton 3.6 and 3.9.
if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def _reinterpreted(memory, shape: gl.constexpr, layout: gl.constexpr):
        return memory.reinterpret(memory.dtype, shape, layout)

else:

    @gluon.jit
    def _reinterpreted(memory, shape: gl.constexpr, layout: gl.constexpr):
        return memory._reinterpret(memory.dtype, shape, layout)


@gluon.jit
def _pinned(x):
    """x, computed before anything that has effects and comes later in the program."""
    return gl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


@gluon.jit
def _finish(
    acc, top, sums, items, item, out_ptr, lse_ptr, o_sb, o_ss, o_sh, lse_b, lse_h,
    grid_t, grid_h, grid_w, video,
    D: gl.constexpr, Q_BOX: gl.constexpr, SPLIT: gl.constexpr, HALF: gl.constexpr,
    BOXES: gl.constexpr, RUNS: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr,
):  # fmt: skip
    """Store out = acc / sums and LSE = (top + log2 sums) ln 2 of this group's 64 rows."""
    sample = gl.load(items + item * 8 + SAMPLE)
    head = gl.load(items + item * 8 + HEAD)
    code = gl.load(items + item * 8 + CODE)
    length = gl.load(items + item * 8 + LENGTH)
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
    out = scaled(acc, 1.0 / sums).to(out_ptr.dtype.element_ty)
    # Straight from registers, so that shared memory holds a third tile of values. A short block
    # must not touch its neighbour. Strides are multiples of 16 bytes, as those of q are.
    rows = gl.convert_layout(token, gl.SliceLayout(1, O_L)).to(gl.int64)
    mask = gl.convert_layout(held, gl.SliceLayout(1, O_L))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, O_L))
    first = sample.to(gl.int64) * wide(o_sb) + head.to(gl.int64) * wide(o_sh)
    base = out_ptr + gl.multiple_of(first, 8)
    steps = gl.multiple_of(rows * wide(o_ss), 8)
    at = base + gl.expand_dims(steps, 1) + gl.expand_dims(dims, 0)
    gl.store(at, out, mask=gl.expand_dims(mask, 1))
    line = lse_ptr + sample.to(gl.int64) * wide(lse_b) + head.to(gl.int64) * wide(lse_h)
    gl.store(line + token, lse, mask=held)


@gluon.jit
def _consume(
    q_s, k_s, v_s, q_full, full,
    out_ptr, lse_ptr, items, last, work, codes, metas,
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
    work += program() * 2
    item = gl.load(work)
    tiles = gl.load(work + 1)
    # Of the items' rows two numbers are kept, those of the next one as well: nobody waits for them.
    total = gl.load(items + item * 8 + TILES)
    bare = gl.load(items + item * 8 + BARE)
    row_ = items + gl.minimum(item + 1, last) * 8
    total_ = gl.load(row_ + TILES)
    bare_ = gl.load(row_ + BARE)
    done = 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q_s.index(HALF), k_s.index(0).permute((1, 0)), zero, use_acc=False,
                      is_async=True)  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    arrive(done + FREE_TILE)
    if bare == 0:
        s = masked(s, items, item, 0, codes, metas, grid_t, grid_h, grid_w, rule_params,
                    KB, Q_BOX, K_BOX, S_L, HALF * SPLIT, BOXES, RUNS, PARTIAL, RULE,
                    OTHER)  # fmt: skip
    x, top, alpha = exponents(s, top, scale)
    p = gl.exp2(x)
    sums = sums_of(p)
    mbarrier.wait(full.index(1), 0)
    w = gl.convert_layout(p.to(dtype), P_L)
    t = 1
    for now in range(1, tiles):
        first = t == total
        old_item = item
        if first:
            arrive((done & 1) + FREE_QUERIES)
            done += 1
            item += 1
            total = total_
            bare = bare_
            row_ = items + gl.minimum(item + 1, last) * 8
            total_ = gl.load(row_ + TILES)
            bare_ = gl.load(row_ + BARE)
            t = 0
            mbarrier.wait(q_full.index(done & 1), (done >> 1) & 1)
        stage = now % STAGES
        q = q_s.index((done & 1) * 2 + HALF)
        s = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zero, use_acc=False,
                          is_async=True)  # fmt: skip
        acc = warpgroup_mma(w, v_s.index((now - 1) % (STAGES + 1)), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        # K of this tile, and V of the tile two before it, whose product has ended.
        arrive(stage + FREE_TILE)
        if t >= bare:
            s = masked(s, items, item, t, codes, metas, grid_t, grid_h, grid_w,
                        rule_params, KB, Q_BOX, K_BOX, S_L, HALF * SPLIT, BOXES, RUNS, PARTIAL,
                        RULE, OTHER)  # fmt: skip
        old_top = top
        old_sums = sums
        x, top, alpha = exponents(s, gl.where(first, float("-inf"), top), scale)
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
        acc = scaled(acc, alpha)
        w = gl.convert_layout(p.to(dtype), P_L)
        sums = scaled(gl.where(first, 0.0, sums), alpha) + sums_of(p)
        t += 1
    acc = warpgroup_mma(w, v_s.index((tiles - 1) % (STAGES + 1)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _finish(
        acc, top, sums, items, item, out_ptr, lse_ptr, o_sb, o_ss, o_sh, lse_b, lse_h,
        grid_t, grid_h, grid_w, video, D, Q_BOX, SPLIT, HALF, BOXES, RUNS, S_L, O_L,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "last", "group", "lse_b", "lse_h", "grid_t", "grid_h", "grid_w", "video",
        "q_ob", "q_oh", "q_ch", "k_ob", "k_oh", "k_ch", "v_ob", "v_oh", "v_ch",
        "o_sb", "o_ss", "o_sh",
    ]
)  # fmt: skip
def forward(
    q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, out_ptr, lse_ptr,
    items, work, codes, metas, rule_params, last, group, lse_b, lse_h,
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
                out_ptr, lse_ptr, items, last, work, codes, metas,
                o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 0, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (_consume, (
                q_s, k_s, v_s, q_full, full,
                out_ptr, lse_ptr, items, last, work, codes, metas,
                o_sb, o_ss, o_sh, lse_b, lse_h, grid_t, grid_h,
                grid_w, video, rule_params, scale,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, 1, BOXES, RUNS, PARTIAL, RULE,
                OTHER,
            )),
            (produce, (
                q_boxes, k_boxes, v_boxes, q_runs, k_runs, v_runs, q_s, k_in, v_in, q_full,
                full, items, last, work, group, codes,
                q_ob, q_oh, q_ch, k_ob, k_oh, k_ch, v_ob, v_oh, v_ch,
                D, KB, STAGES, Q_BOX, K_BOX, SPLIT, BOXES, RUNS,
            )),
        ],
        [4, 1],
        [REGISTERS, FEEDER],
    )  # fmt: skip
