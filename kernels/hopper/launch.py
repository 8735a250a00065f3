"""The Hopper backend's host side: which calls it takes, tensor descriptors, launch.

The kernel is in `forward`, and how a plan becomes its work lists in `lists`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_accel.kernels.blocks import Triple
from dit_accel.kernels.hopper.forward import forward
from dit_accel.kernels.hopper.lists import WorkLists, work_lists
from dit_accel.kernels.hopper.online import online_lists
from dit_accel.kernels.launching import Launch, alike, launches_of, results_like, traced
from dit_accel.kernels.machine import processors
from dit_accel.kernels.parts import attend_split
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import PooledKeys
from dit_accel.kernels.portable.forward import triton_attention
from dit_accel.kernels.slots import attend_in_slots
from dit_accel.kernels.token_rules import TOKEN_RULES

LOG2_E = 1.4426950408889634
GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
RULES = {name: gluon.jit(rule) for name, rule in TOKEN_RULES.items()}


@dataclass(frozen=True)
class Config:
    """A variant of the kernel.

    stages: tiles of keys in flight; of values one more. registers, feeder: of a thread that
    multiplies, and of one that copies; 8 warps of the first and 4 of the second share 65,536.
    """

    stages: int
    registers: int = 240
    feeder: int = 24


CONFIGS = {64: Config(stages=4), 128: Config(stages=2)}


def halved(box: Triple) -> Triple:
    """The first half of a box's tokens: half of its first axis that is longer than 1."""
    axis = next(a for a in range(3) if box[a] > 1)
    return tuple(n // 2 if a == axis else n for a, n in enumerate(box))  # type: ignore[return-value]


def packed(box: Triple) -> int:
    """A code's coordinates."""
    return box[0] << 20 | box[1] << 10 | box[2]


@dataclass(frozen=True)
class _View:
    """How the copy engine sees a [B, S, H, D] tensor: coordinates and steps of (sample, head)."""

    tensor: Tensor
    outer: int
    outer_stride: int
    inner: int
    steps: Triple

    def boxes(self, grid: Triple, start: int, box: Triple, width: int) -> _Descriptor:
        """Descriptor of the video as [outer, T, H, W, inner], read by boxes x width."""
        t, h, w = grid
        row = self.tensor.stride(1)
        return _descriptor(
            self.tensor[:, start:],
            [self.outer, t, h, w, self.inner],
            [self.outer_stride, h * w * row, w * row, row, 1],
            [1, *box, width],
        )

    def runs(self, rows: int, width: int) -> _Descriptor:
        """Descriptor of all tokens as [outer, S, inner], read by rows x width."""
        return _descriptor(
            self.tensor,
            [self.outer, self.tensor.shape[1], self.inner],
            [self.outer_stride, self.tensor.stride(1), 1],
            [1, rows, width],
        )


def view(x: Tensor) -> _View | None:
    """The view of x [B, S, H, D] that the copy engine can read, or None."""
    batch, length, heads, dim = x.shape
    by_batch, by_token, by_head, by_dim = x.stride()
    if by_dim != 1 or x.data_ptr() % 16 or by_token % 8:
        return None
    if batch == 1:
        by_batch = max(by_batch, 8)
    if heads == 1 or by_head == dim:
        if by_batch % 8 or by_token < heads * dim:
            return None
        return _View(x, batch, by_batch, heads * dim, (1, 0, dim))
    if by_head % 8 or (batch > 1 and by_batch != heads * by_head):
        return None
    return _View(x, batch * heads, by_head, dim, (heads, 1, 0))


def _seen(x: Tensor) -> _View:
    found = view(x)
    assert found is not None, "`obstacle` has let it pass"
    return found


@lru_cache(maxsize=64)
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_TYPES[dtype])


class _Descriptor(TensorDescriptor):
    """One that is not checked again: `view` has done so."""

    def __post_init__(self) -> None:
        pass

    def at(self, address: int) -> _Descriptor:
        """The same of a tensor alike, whose memory begins elsewhere."""
        moved = object.__new__(_Descriptor)
        moved.__dict__.update(self.__dict__)
        moved.__dict__["base"] = _Address(address, self.base.dtype)
        return moved


class _Address:
    """All that a launch asks of a descriptor's tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        """Where its memory begins."""
        return self._address


def _descriptor(
    base: Tensor, shape: list[int], strides: list[int], block: list[int]
) -> _Descriptor:
    return _Descriptor(base, shape, strides, block, _layout(tuple(block), base.dtype))


def tensor_obstacle(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot read these tensors, whatever the plan, or None."""
    dim = q.shape[-1]
    if q.dtype not in GLUON_TYPES:
        return f"dtype {q.dtype}: needs float16 or bfloat16"
    if q.numel() == 0 or k.numel() == 0:
        return "no queries or no keys"
    if dim not in CONFIGS:
        return f"head_dim {dim}: needs one of {', '.join(map(str, CONFIGS))}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if view(tensor) is None:
            return f"strides of {name}: {tuple(tensor.stride())} cannot be read by bulk copies"
    return None


def hopper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool = False,
    pooled: PooledKeys | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Lq, H, D] and, if asked, LSE float32 [B, H, Lq], from q, k, v in BSHD.

    The portable kernel computes pooled keys, and a merge joins them. programs: how many share the
    work; one for each multiprocessor if not given.
    """
    call = (q, k, v, plan, scale, return_lse)
    if plan.shape.scattered:
        attend = partial(hopper_attention, pooled=pooled, programs=programs)
        return attend_in_slots(*call, attend)
    if pooled is not None and plan.shape.kinds.pooled:
        on_blocks = partial(_on_blocks, programs=programs)
        return attend_split(*call, pooled, on_blocks, triton_attention)
    return _on_blocks(*call, programs=programs)


def _on_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    return_lse: bool,
    programs: int | None,
) -> tuple[Tensor, Tensor | None]:
    """A plan of boxes and runs, without pooled keys."""
    batch, _, heads, _ = q.shape
    if scale <= 0:  # the kernel scales maxima
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    shape = plan.shape
    programs = min(programs or processors(q.device), batch * heads * shape.q_blocks)
    make = online_lists if shape.online else work_lists
    lists = make(plan, batch, heads, programs)
    if traced(q, k, v):
        tables = lists.items, lists.work, lists.codes, lists.metas
        out, lse = hopper_forward(q, k, v, *tables, *_fields(plan, scale))
    else:
        out, lse = _launched(q, k, v, plan, lists, scale)
    return out, lse if return_lse else None


def _fields(plan: BlockPlan, scale: float) -> tuple[Any, ...]:
    """What `hopper_forward` takes after the lists."""
    blocks, shape = plan.blocks, plan.shape
    mask = plan.mask if shape.kinds.partial else None
    return (
        None if mask is None else mask.packed, mask.name if mask else "", scale,
        blocks.block_k, list(blocks.box or ()), list(blocks.grid or (1, 1, 1)),
        blocks.video_start, blocks.box is None or shape.mixed, blocks.covers,
        mask.other[0] if mask and mask.other else "",
    )  # fmt: skip


@torch.library.custom_op("dit_accel::hopper_forward", mutates_args=())
def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, items: Tensor, work: Tensor, codes: Tensor, metas: Tensor,
    rule_params: Tensor | None, rule: str, scale: float, block_k: int, box: list[int],
    grid: list[int], video_start: int, runs: bool, covers: bool, other_rule: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel behind `hopper_attention`: a WorkLists' fields, and where the video is.

    box: empty where every block is a run. runs: whether any block is one. rule: empty where no
    list has partial entries; other_rule: where there is no second one. covers: whether every query
    is in a block (else the others are set to 0 and -inf first).
    """
    out, lse = results_like(q, covers)
    launched, arguments, constants = _launch(
        q, k, v, out, lse, items, work, codes, metas, rule_params, rule, scale, block_k, box, grid,
        video_start, runs, other_rule,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        forward[launched](*arguments, **constants)
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, items: Tensor, work: Tensor,
    codes: Tensor, metas: Tensor, rule_params: Tensor | None, rule: str, scale: float,
    block_k: int, box: list[int], grid: list[int], video_start: int, runs: bool, other_rule: str,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The grid, arguments and constants of the kernel; see `hopper_forward`."""
    heads, dim = q.shape[2:]
    views = [_seen(x) for x in (q, k, v)]
    # Gathered blocks come by halves of 64 columns, the width of a row of swizzled shared memory.
    widths = (dim, dim, dim) if block_k == 128 else (dim, 64, 64)
    run_views: list[_Descriptor | None] = [None] * 3  # what the kernel has no code for
    box_views: list[_Descriptor | None] = [None] * 3
    if runs:
        rows = (64, block_k, block_k)
        run_views = [w.runs(n, c) for w, n, c in zip(views, rows, widths, strict=True)]
    q_box, k_box, split = (1, 1, 64), (1, 1, block_k), 64
    if box:
        whole, place = _triple(box), _triple(grid)
        q_box, split = halved(whole), _split(whole)
        k_box = whole if block_k == 128 else q_box
        shapes = (q_box, k_box, k_box)
        box_views = [
            w.boxes(place, video_start, s, c) for w, s, c in zip(views, shapes, widths, strict=True)
        ]
    config = CONFIGS[dim]
    arguments = (
        *box_views, *run_views, out, lse, items, work, codes, metas,
        work if rule_params is None else rule_params,
        len(items) - 1, heads // k.shape[2],
        lse.stride(0), lse.stride(1), *(step for w in views for step in w.steps),
        out.stride(0), out.stride(1), out.stride(2), *grid, video_start, scale * LOG2_E,
    )  # fmt: skip
    constants = {
        "D": dim, "KB": block_k, "STAGES": config.stages, "Q_BOX": q_box, "K_BOX": k_box,
        "SPLIT": split, "BOXES": bool(box), "RUNS": runs, "PARTIAL": bool(rule),
        "RULE": RULES[rule or "box"], "OTHER": RULES[other_rule] if other_rule else None,
        "REGISTERS": config.registers, "FEEDER": config.feeder, "num_warps": 4, "maxnreg": 168,
    }  # fmt: skip
    return (len(work),), arguments, constants


_CHANGING = (
    "out_ptr", "q_boxes", "k_boxes", "v_boxes", "q_runs", "k_runs", "v_runs", "lse_ptr", "items",
    "work", "codes", "metas", "scale",
)  # fmt: skip
"""What a kept launch is given anew at each call."""


class _Prepared(NamedTuple):
    """A launch, and its descriptors: of boxes, which begin with the video, and of runs."""

    launch: Launch
    boxes: tuple[_Descriptor | None, ...]
    runs: tuple[_Descriptor | None, ...]
    skipped: tuple[int, int, int]

    def descriptors(self, *tensors: Tensor) -> list[_Descriptor | None]:
        """Those of q, k and v. skipped: bytes before the video in each."""
        starts = [x.data_ptr() for x in tensors]
        videos = zip(self.boxes, starts, self.skipped, strict=True)
        return [
            *(d if d is None else d.at(start + skipped) for d, start, skipped in videos),
            *(d if d is None else d.at(at) for d, at in zip(self.runs, starts, strict=True)),
        ]


def _launched(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, lists: WorkLists, scale: float
) -> tuple[Tensor, Tensor]:
    """`hopper_forward` with little work for the host; what does not change is kept with the plan,
    or with the blocks of plans that are made at each call."""
    out, lse = results_like(q, plan.blocks.covers)
    tables = lists.items, lists.work, lists.codes, lists.metas
    launches = launches_of(plan.blocks if plan.shape.online else plan)
    aligned = [table.data_ptr() & 15 for table in tables]
    key = ("hopper", len(lists.work), plan.shape.kinds, *alike(q, k, v, out), *aligned)
    found: _Prepared | None = launches.get(key)
    if found is None:
        params, rule, scale_, block_k, box, grid, start, runs, _, other = _fields(plan, scale)
        launched, arguments, constants = _launch(
            q, k, v, out, lse, *tables, params, rule, scale_, block_k, box, grid, start, runs, other
        )
        places = [forward.arg_names.index(name) for name in _CHANGING]
        launch = Launch(forward, launched, arguments, constants, places)
        skipped = [start * x.stride(1) * x.element_size() for x in (q, k, v)]
        launch(q.device, out, *arguments[:6], lse, *tables, scale * LOG2_E)
        boxes, runs_ = (_unbound(arguments[first : first + 3]) for first in (0, 3))
        launches[key] = _Prepared(launch, boxes, runs_, _triple(skipped))
        return out, lse
    moved = found.descriptors(q, k, v)
    found.launch(q.device, out, *moved, lse, *tables, scale * LOG2_E)
    return out, lse


def _unbound(descriptors: tuple[_Descriptor | None, ...]) -> tuple[_Descriptor | None, ...]:
    """The descriptors without their tensors, which are not kept alive."""
    return tuple(d if d is None else d.at(0) for d in descriptors)


@hopper_forward.register_fake
def _fake(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return results_like(q)


def _triple(sizes: list[int]) -> Triple:
    return sizes[0], sizes[1], sizes[2]


def _split(box: Triple) -> int:
    """How far apart the codes of a block's two halves are."""
    half = halved(box)
    return packed(_triple([h if h < b else 0 for h, b in zip(half, box, strict=True)]))
