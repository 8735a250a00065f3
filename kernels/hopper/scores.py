"""What happens to a tile of scores in the Hopper kernel: masks, maxima, sums."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dit_accel.kernels.hopper.feed import CODE, RUN, START, UNDER_RULE


@gluon.jit
def _load_params(at):
    return (
        gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7),
        gl.load(at + 8), gl.load(at + 9), gl.load(at + 10), gl.load(at + 11),
        gl.load(at + 12), gl.load(at + 13), gl.load(at + 14), gl.load(at + 15),
    )  # fmt: skip


@gluon.jit
def _taken_here(at, t):
    """The pointer `at`. The compiler takes it to depend on t, or it would compute the addresses of
    parameters at the kernel's entry and keep them."""
    return at + gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def masked(
    s, items, item, t, codes, metas, grid_t, grid_h, grid_w, rule_params,
    KB: gl.constexpr, Q_BOX: gl.constexpr, BOX: gl.constexpr, LAYOUT: gl.constexpr,
    SPLIT: gl.constexpr, BOXES: gl.constexpr, RUNS: gl.constexpr, PARTIAL: gl.constexpr,
    RULE: gl.constexpr, OTHER: gl.constexpr,
):  # fmt: skip
    """Scores [64, 128] of an item's tile t with -inf where a pair does not count.

    SPLIT: how far the code of the group's first query is from the item's.
    """
    entry = gl.load(items + item * 8 + START).to(gl.int64) + t * (128 // KB)
    rows = gl.load(items + item * 8 + CODE) + SPLIT
    codes += entry
    metas += entry
    column = gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))
    code = gl.load(codes)
    meta = gl.load(metas)
    flags = meta
    if KB == 64:
        second = gl.load(metas + 1)
        flags |= second
        code = gl.where(column < 64, code, gl.load(codes + 1))
        meta = gl.where(column < 64, meta, second)
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
    s = gl.where(gl.expand_dims(inside, 0), s, float("-inf"))
    if PARTIAL:  # known when the kernel is compiled  # noqa: SIM102
        if (flags & UNDER_RULE) != 0:
            rule_params = _taken_here(rule_params, t)
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
                kept = kept | gl.expand_dims((meta & UNDER_RULE) == 0, 0)
            s = gl.where(kept, s, float("-inf"))
    return s


@gluon.jit
def exponents(s, top, scale):
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
def sums_of(p):
    """Sums [64, 8] of columns i, i + 8, ...: of what a thread holds. `_finish` adds them up."""
    return gl.sum(p.reshape([64, 16, 8]), axis=1)


@gluon.jit
def scaled(x, factor):
    """The rows of x times factor [64]."""
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    return x * gl.expand_dims(gl.convert_layout(factor, rows, assert_trivial=True), 1)
