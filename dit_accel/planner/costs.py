"""What a call costs on a GPU, from a small table of measured constants.

A sparse call is a list of items, one for each query block of each head: an item takes `row` plus,
for each key block that it visits, `whole`, `short` or `partial` (no mask, a length mask, the token
rule). Items are dealt to the GPU's `programs` (see `work`); the call takes `launch` plus what the
busiest one has. A dense call visits every pair of blocks; `short` is its price of one where
the length is no multiple of a block. All prices are clock cycles; `clock` makes milliseconds of
them, because a short call runs at another clock than a long one.

The same backend runs other kernels, with constants of their own, for blocks that are gathered
through an order, and for boxes beside runs of text tokens: see `kernel_of`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.plan import BlockPlan, TokenMask
from dit_accel.planner.clock import Clock
from dit_accel.planner.work import FULL_BLOCK, work_of

TABLES = Path(__file__).parent / "tables"
COLUMNS = ("backend", "head_dim", "constant", "value", "unit", "source")
STAND_INS = {"h100": "h200"}
"""GPUs whose numbers another one's table gives: the same kernels on as many multiprocessors."""
DENSE = "dense"
MACHINE = "machine"
MOVING = 8
"""Passes over a tensor's elements that moving query, key, value and output takes."""


@dataclass(frozen=True)
class Constants:
    """Cycles of one program for a backend and head_dim; launch is of the whole call.

    rules: `partial` for single token rules, where measured.
    """

    launch: float
    row: float
    whole: float
    short: float
    partial: float
    rules: Mapping[str, float] = field(default_factory=dict)

    def prices(self, mask: TokenMask | None) -> np.ndarray:
        """Of each of `work.PARTS` under a token rule."""
        masked = self.partial if mask is None else masked_price(self, mask)
        return np.array([self.row, self.whole, self.short, masked])


@dataclass(frozen=True)
class CostTable:
    """Measured constants of a GPU; see samples/measure_planner.py.

    gpu: whose they are. stands_for: the GPU that was asked for, where that is another one.
    """

    gpu: str
    constants: Mapping[tuple[str, int], Constants]
    programs: int
    linear_tflops: float
    copy_gbs: float
    clock: Clock
    stands_for: str = ""

    @property
    def backends(self) -> list[str]:
        """Sparse backends that were measured."""
        return list(dict.fromkeys(name.split()[0] for name, _ in self.constants if name != DENSE))

    def of(self, backend: str, head_dim: int, kernel: str = "") -> Constants:
        """Constants for a head_dim: the next larger one measured, or the largest scaled up.

        kernel: of the backend (see `kernel_of`), where it was measured apart.
        """
        known = sorted(dim for name, dim in self.constants if name == kernel)
        backend = kernel if known else backend
        known = known or sorted(dim for name, dim in self.constants if name == backend)
        if not known:
            raise unknown(f"backend in the table of {self.gpu}", backend, self.backends)
        dim = next((d for d in known if d >= head_dim), known[-1])
        found = self.constants[backend, dim]
        by = max(1.0, head_dim / dim)
        if by == 1.0:
            return found
        return Constants(
            found.launch,
            by * found.row,
            by * found.whole,
            by * found.short,
            by * found.partial,
            {rule: by * value for rule, value in found.rules.items()},
        )

    def dense_ms(self, batch: int, heads: int, length: int, head_dim: int) -> float:
        """Predicted milliseconds of a dense call."""
        known = self.of(DENSE, head_dim)
        blocks = length / FULL_BLOCK
        visit = known.short if length % FULL_BLOCK else known.whole
        rows = batch * heads * blocks
        spent = known.launch + rows * (known.row + visit * blocks) / self.programs
        return self.clock.ms(spent, visit_flops(rows * blocks, head_dim))

    def launch_ms(self, backend: str, head_dim: int) -> float:
        """Milliseconds of a backend's call without any work."""
        return self.of(backend, head_dim).launch / self.clock.busy / 1e3

    def sparse_ms(
        self,
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
        known = self.of(backend, head_dim, kernel_of(backend, plan, moved=moved))
        moving = 0.0
        if moved:
            moving = self.passes_ms(MOVING, batch * heads * head_dim * plan.blocks.q_length)
        prices = known.prices(plan.mask)
        work = work_of(plan, backend, batch, heads, self.programs)
        spent = known.launch + float(prices @ work.busiest(prices, self.programs))
        return moving + self.clock.ms(spent, visit_flops(work.visits, head_dim))

    def linear_ms(self, weights: float, tokens: int) -> float:
        """Predicted milliseconds of linear layers with so many weights over so many tokens."""
        return 2 * weights * tokens / self.linear_tflops / 1e9

    def passes_ms(self, passes: float, elements: float) -> float:
        """Predicted milliseconds of reading or writing 2-byte elements so many times."""
        return passes * elements * 2 / self.copy_gbs / 1e6


def visit_flops(visits: float, head_dim: int) -> float:
    """Floating-point operations of visits of 128 x 128."""
    return 4.0 * FULL_BLOCK**2 * head_dim * visits


def kernel_of(backend: str, plan: BlockPlan, *, moved: bool = False) -> str:
    """The name that a call's kernel has in tables: the backend, and what sets the kernel apart."""
    if backend == "triton" and plan.shape.gathered:
        return "triton gathered"
    if backend == "hopper" and not moved and plan.shape.box is not None:
        return "hopper mixed" if plan.shape.mixed else "hopper"
    return backend


def masked_price(known: Constants, mask: TokenMask) -> float:
    """Cycles of a partial visit; of two rules, both masks' share over a whole one."""
    if mask.label in known.rules:
        return known.rules[mask.label]
    prices = [known.rules.get(name, known.partial) for name, _ in mask.rules]
    return max(max(prices), sum(prices) - known.whole * (len(prices) - 1))


def gpu_key(name: str) -> str:
    """Short name of a GPU, such as h200 for "NVIDIA H200"."""
    text = name.lower()
    found = re.search(r"\b(gb|[abhl])\d{2,3}s?\b|rtx[ -]?(pro )?[a\d]\d{3,4}( ?(ti|super))?", text)
    return re.sub(r"[^a-z0-9]+", "", found.group(0) if found else text.removeprefix("nvidia "))


def this_gpu() -> str:
    """Name of this machine's GPU, "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def shipped_gpus(folder: Path = TABLES) -> list[str]:
    """GPUs that there is a table for."""
    return sorted(path.stem for path in folder.glob("*.csv"))


def cost_table(gpu: str | None, folder: Path = TABLES) -> CostTable | None:
    """The table of a GPU by its name, None where none is shipped.

    gpu: None is this machine's. Raises DitAccelError for what is no name.
    """
    if gpu is not None and not isinstance(gpu, str):
        raise DitAccelError(f'gpu: expected a name such as "h100", got {gpu!r}.')
    name = this_gpu() if gpu is None else gpu
    if not name:
        return None
    key = gpu_key(name)
    for stem in (key, STAND_INS.get(key, key)):
        path = folder / f"{stem}.csv"
        if path.is_file():
            return _read(path, "" if stem == key else key)
    return None


def known_gpus(folder: Path = TABLES) -> str:
    """The GPUs that calls can be predicted for, as a list to read."""
    there = shipped_gpus(folder)
    for stand_in, own in STAND_INS.items():
        if own in there and stand_in not in there:
            there.append(f"{stand_in} (by the numbers of {own})")
    return ", ".join(there) or "none yet"


def no_table(gpu: str, folder: Path = TABLES) -> DitAccelError:
    """The error for a GPU that was asked for by name and has no table."""
    return DitAccelError(
        f"gpu: there is no table of measured costs for {gpu!r}; there are: "
        f"{known_gpus(folder)}. Leave it out to be told densities and the bound alone: "
        "without a table, times are relative only."
    )


@lru_cache(maxsize=8)
def _read(path: Path, stands_for: str) -> CostTable:
    with path.open(encoding="utf-8", newline="") as file:
        return parse_table(path.stem, list(csv.DictReader(file)), stands_for)


def parse_table(gpu: str, rows: Iterable[Mapping[str, str]], stands_for: str = "") -> CostTable:
    """A table from its rows (see COLUMNS); DitAccelError where a constant is missing."""
    values: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        place = row["backend"], int(row["head_dim"])
        values.setdefault(place, {})[row["constant"]] = float(row["value"])
    machine = values.pop((MACHINE, 0), {})
    try:
        constants = {place: _constants(known) for place, known in values.items()}
        return CostTable(
            gpu,
            constants,
            int(machine["programs"]),
            machine["linear_tflops"],
            machine["copy_gbs"],
            Clock(*(machine[f"clock_{field.name}"] for field in fields(Clock))),
            stands_for,
        )
    except KeyError as error:
        raise DitAccelError(f"table of {gpu}: no value for {error}.") from error


def _constants(known: Mapping[str, float]) -> Constants:
    rules = {
        name.removeprefix("partial_"): value
        for name, value in known.items()
        if name.startswith("partial_")
    }
    return Constants(
        known["launch"],
        known["row"],
        known["whole"],
        known.get("short", known["whole"]),
        known.get("partial", known.get("short", known["whole"])),
        rules,
    )
