"""One small call of each kernel path, for compute-sanitizer.

    compute-sanitizer --tool memcheck python samples/sanitize_kernels.py
    compute-sanitizer --tool racecheck python samples/sanitize_kernels.py

Every result is compared with the reference; a wrong one is an error, and so is a backend of this
machine that ran no call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from dit_accel.kernels.backends import BACKENDS, eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.blocks import Blocks, BlockTable
from dit_accel.kernels.parts import merge
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.permute import block_order, gather
from dit_accel.kernels.plan import BlockPlan, TokenMask, plan_of, visits_from_mask
from dit_accel.kernels.pooling import PooledKeys, pool_blocks, pooled_keys
from dit_accel.kernels.portable import merge as portable_merge
from dit_accel.kernels.portable import permute as portable_permute
from dit_accel.kernels.portable import pooling as portable_pooling
from dit_accel.layout import TokenLayout

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Call:
    """A plan with its inputs; pooled where it lists pooled keys."""

    name: str
    plan: BlockPlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pooled: PooledKeys | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["triton", "hopper"])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong, ran = 0, set()
    for call in (call for dim in options.dims for call in calls(dim, device)):
        expected, expected_lse = block_sparse_attention(
            call.q, call.k, call.v, call.plan, backend="reference", return_lse=True,
            pooled=call.pooled,
        )  # fmt: skip
        for backend in options.backends:
            reason = eligible(backend, call.q, call.k, call.v, call.plan)
            if reason is not None:
                print(f"{call.name:<44} {backend:<7} skipped: {reason}")
                continue
            out, lse = block_sparse_attention(
                call.q, call.k, call.v, call.plan, backend=backend, return_lse=True,
                pooled=call.pooled,
            )  # fmt: skip
            ran.add(backend)
            error = (out.float() - expected.float()).abs().max() / expected.float().abs().max()
            same = torch.allclose(lse, expected_lse, atol=1e-2, rtol=1e-3)
            right = bool(error <= TOLERANCE[out.dtype]) and same
            wrong += not right
            print(f"{call.name:<44} {backend:<7} {'right' if right else f'WRONG: {error:.1e}'}")
    wrong += not token_kernels(device)
    idle = [b for b in options.backends if b not in ran and BACKENDS[b].machine() is None]
    print(f"ran: {', '.join(sorted(ran)) or 'nothing'}; idle: {idle}; wrong: {wrong}")
    return 1 if wrong or idle or not ran else 0


def calls(dim: int, device: torch.device) -> Iterator[Call]:
    """Boxes of a grid, runs and gathered blocks of both sizes; every kind of entry."""
    half, single = torch.float16, torch.float32
    brain = torch.bfloat16 if device.type == "cuda" else half  # the interpreter's is wrong
    layout = TokenLayout((3, 17, 21), after=40, valid=((0, 40), (0, 11)))
    q, k, v = inputs(layout.length, layout.length, dim, half, device)
    for rule in (
        pattern("sliding_tile", window={"fraction": [1.0, 0.5, 0.5]}),
        pattern("neighborhood", window={"tokens": [3, 9, 9]}),
    ):
        for kind in ("boxes", "gather"):
            plan = plan_for(layout, rule, device, layout_kind=kind)
            yield Call(f"D{dim} {rule.name}, {kind}", plan, q, k, v)
    for dtype, in_place, blocks, all_kinds in (
        (half, True, (128, 128), False),
        (brain, True, (128, 64), False),
        (brain, True, (128, 128), True),
        (half, False, (64, 64), True),
        (single, False, (64, 64), True),  # larger float32 steps compile for minutes
    ):
        yield mixed(dim, dtype, in_place, blocks, all_kinds, device)


def inputs(
    lq: int, lk: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """q [2, lq, 4, dim]; k, v [2, lk, 2, dim]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, lq, 4, dim), (2, lk, 2, dim), (2, lk, 2, dim))
    return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)


def mixed(
    dim: int,
    dtype: torch.dtype,
    in_place: bool,
    blocks: tuple[int, int],
    all_kinds: bool,
    device: torch.device,
) -> Call:
    """Random lists per sample and head, one of them empty; partial and pooled ones if asked."""
    name = f"D{dim} {str(dtype)[6:]} {blocks[0]} x {blocks[1]} {'runs' if in_place else 'gathered'}"
    generator = torch.Generator().manual_seed(1)
    (bq, bk), tables = blocks, []
    sizes = [bq, 30, bq], [bk, bk, 9, bk, bk - 1, 40]
    for lengths in sizes:
        length = torch.tensor(lengths, dtype=torch.int32)
        order = torch.randperm(sum(lengths), generator=generator).int()
        starts = (length.cumsum(0) - length).int()
        tables.append(BlockTable(None if in_place else order, starts, length[None]))
    chosen = torch.rand((2, 4, 3, 6), generator=generator)
    full, masked = chosen < 0.4, chosen > 0.7
    full[0, 0, 0] = masked[0, 0, 0] = False
    whole = tables[1].lengths == bk
    lq, lk = map(sum, sizes)
    blocks = Blocks(tables[0], tables[1], lq, lk, bq, bk)
    q, k, v = inputs(lq, lk, dim, dtype, device)
    if not all_kinds:
        plan = plan_of(blocks, visits_from_mask(full, whole))
        return Call(name, plan.validate().to(device), q, k, v)
    coords = [torch.randint(0, 4, (n, 3), generator=generator, dtype=torch.int32) for n in (lq, lk)]
    others = visits_from_mask(~full & ~masked)
    plan = plan_of(
        blocks,
        visits_from_mask(full, whole, masked),
        TokenMask("box", (1, 2, 1), coords[0], coords[1]),
        replace(others, whole=others.count),
    ).to(device)
    pooled = pooled_keys(k, v, plan.blocks.k, bk)
    return Call(f"{name}, all kinds", plan.validate(pooled), q, k, v, pooled)


def token_kernels(device: torch.device) -> bool:
    """Pooling, merging and permuting, against torch."""
    if device.type != "cuda":
        return True
    call = mixed(96, torch.float16, False, (128, 128), True, device)
    table, on_cpu = call.plan.blocks.k, call.plan.blocks.k.to("cpu")
    means = pool_blocks(call.k, table)
    index = block_order(table, 128)
    (moved,) = gather([call.k], index)
    lse = torch.randn(2, 4, call.q.shape[1], device=device)
    merged = merge(call.q, lse, call.q * 2, lse - 1)[0]
    pairs = {
        portable_pooling: (means, pool_blocks(call.k.cpu(), on_cpu)),
        portable_permute: (moved, gather([call.k.cpu()], index.cpu())[0]),
        portable_merge: (
            merged,
            merge(call.q.cpu(), lse.cpu(), call.q.cpu() * 2, lse.cpu() - 1)[0],
        ),
    }
    right = True
    for module, (found, expected) in pairs.items():
        same = torch.allclose(found.cpu().float(), expected.float(), atol=2e-3)
        print(f"{module.__name__:<44} {'right' if same else 'WRONG'}")
        right = right and same
    return right


if __name__ == "__main__":
    sys.exit(main())
