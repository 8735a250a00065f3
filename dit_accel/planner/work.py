"""How long a plan takes on a GPU: what the program that ends last has to do, at a table's prices.

An item is a query block of a head. Portable kernels start items longest first and the GPU deals
them to whoever is free. The Hopper kernel deals them beforehand, by weights of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from dit_accel.costs.table import FULL_BLOCK, PARTS, CostTable, visit_flops
from dit_accel.kernels.hopper.lists import LIST, work_lists
from dit_accel.kernels.hopper.online import online_lists
from dit_accel.kernels.plan import BlockPlan

MOVING = 8
"""Passes over a tensor's elements that moving query, key, value and output takes."""
MIDDLING, PER_OCTAVE = 8, 0.08
"""Where boxes lie beside runs of text, the Hopper kernel's visits under a token rule take longer in
higher boxes, of which a thread has more rows to compare: the height that prices are for, and the
share that doubling it adds (as the round calls of samples/tools/planner_cases.py have it)."""


@dataclass(frozen=True, eq=False)
class Work:
    """A call's items.

    parts: float [lists, len(PARTS)], items and visits of 128 x 128 of each list of the plan; visits
        under a rule are counted as those of MIDDLING height that take as long.
    copies: items of each list. visits: of 128 x 128, of all items together.
    lists, owners: int [n], the list of each item and the program that takes it; None where the GPU
        deals them.
    """

    parts: np.ndarray
    copies: int
    visits: float
    lists: np.ndarray | None = None
    owners: np.ndarray | None = None

    @property
    def total(self) -> np.ndarray:
        """Parts of all items together."""
        total: np.ndarray = self.copies * self.parts.sum(0)
        return total

    def busiest(self, prices: np.ndarray, programs: int) -> np.ndarray:
        """Parts of the program that has most at these prices; of none in particular where the GPU
        deals: then all parts are as much above the mean."""
        if self.lists is None or self.owners is None:
            work = np.tile(self.parts @ prices, self.copies)
            share: np.ndarray = self.total * (busiest(work, programs) / max(work.sum(), 1e-9))
            return share
        loads = np.zeros((self.owners.max() + 1, len(PARTS)))
        np.add.at(loads, self.owners, self.parts[self.lists])
        worst: np.ndarray = loads[(loads @ prices).argmax()]
        return worst


def sparse_ms(
    table: CostTable,
    plan: BlockPlan,
    backend: str,
    batch: int,
    heads: int,
    head_dim: int,
    *,
    moved: bool = False,
) -> float:
    """Predicted milliseconds of a call that runs a plan.

    moved: queries, keys, values and output are moved in memory.
    """
    known = table.of(backend, head_dim, kernel_of(backend, plan, moved=moved))
    moving = 0.0
    if moved:
        moving = table.passes_ms(MOVING, batch * heads * head_dim * plan.blocks.q_length)
    prices = known.prices(plan.shape.rules)
    work = work_of(plan, backend, batch, heads, table.programs)
    spent = known.launch + float(prices @ work.busiest(prices, table.programs))
    return moving + table.clock.ms(spent, visit_flops(work.visits, head_dim))


def kernel_of(backend: str, plan: BlockPlan, *, moved: bool = False) -> str:
    """The name that a call's kernel has in tables: the backend, and what sets the kernel apart."""
    if backend == "triton" and plan.shape.gathered:
        return "triton gathered"
    if backend == "hopper" and not moved and plan.shape.box is not None:
        return "hopper mixed" if plan.shape.mixed else "hopper"
    return backend


def work_of(plan: BlockPlan, backend: str, batch: int, heads: int, programs: int) -> Work:
    """The items of a call that runs a plan."""
    whole, short, partial = list_visits(plan)
    area = area_of(plan)
    copies = (batch // whole.shape[0]) * (heads // whole.shape[1])
    visits = copies * area * float((whole + short + partial).sum())
    box = plan.shape.box
    if backend == "hopper" and box is not None and plan.shape.mixed:
        partial = partial * (1 + PER_OCTAVE * math.log2(box[1] / MIDDLING))
    rows = np.full_like(whole, plan.shape.block_q / FULL_BLOCK)
    parts = np.stack([rows, area * whole, area * short, area * partial], -1)
    parts = parts.reshape(-1, len(PARTS))
    if backend != "hopper":
        return Work(parts, copies, visits)
    # A plan of its own: the kernel keeps the lists of the GPU at hand, of as many programs.
    own = replace(plan.to("cpu"))
    deal = online_lists if plan.shape.online else work_lists
    dealt = deal(own, batch, heads, min(programs, copies * whole.size))
    starts = dealt.work[:, 0].contiguous()
    owners = torch.searchsorted(starts, torch.arange(len(dealt.items)).int(), right=True) - 1
    return Work(parts, copies, visits, dealt.items[:, LIST].numpy(), owners.numpy())


def area_of(plan: BlockPlan) -> float:
    """Slots of a visit over those of 128 x 128.

    Small blocks are visited at the rate of large ones: where it was measured, the portable kernel's
    steps are no larger.
    """
    return plan.shape.block_q * plan.shape.block_k / FULL_BLOCK**2


def list_visits(plan: BlockPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(whole, short, partial) visits of every list, float [Bp, Hp, NQ] each."""
    lists = plan.visits
    kinds = lists.whole, lists.full - lists.whole, lists.count - lists.full
    whole, short, partial = (x.cpu().numpy().astype(float) for x in kinds)
    return whole, short, partial


def busiest(work: np.ndarray, programs: int) -> float:
    """What the busiest program has when items are dealt longest first, to and fro."""
    longest_first = np.sort(work)[::-1]
    padded = np.pad(longest_first, (0, -len(work) % (2 * programs)))
    turns = padded.reshape(-1, 2, programs)
    return float((turns[:, 0] + turns[:, 1, ::-1]).sum(0).max())
