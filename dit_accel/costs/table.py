"""What a call costs on a GPU, from a small table of measured constants.

A sparse call is a list of items, one for each query block of each head: an item takes `row` plus,
for each key block that it visits, `whole`, `short` or `partial` (no mask, a length mask, the token
rule). Items are dealt to the GPU's `programs` (see planner/work.py); the call takes `launch` plus
what the busiest one has. A dense call visits every pair of blocks; `short` is its price of one
where the length is no multiple of a block. All prices are clock cycles; `clock` makes milliseconds
of them, because a short call runs at another clock than a long one.

The same backend runs other kernels, with constants of their own, for blocks that are gathered
through an order ("triton gathered"), and for boxes beside runs of text tokens ("hopper mixed").
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path

import numpy as np

from dit_accel.costs.clock import Clock
from dit_accel.costs.files import DENSE, MACHINE, TABLES, gpu_key, table_file, this_gpu, values_of
from dit_accel.errors import DitAccelError, unknown

PARTS = ("row", "whole", "short", "partial")
"""What an item is made of: itself, then visits without a mask, under a length mask, and under the
token rule."""
FULL_BLOCK = 128


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

    def prices(self, rules: Sequence[str] = ()) -> np.ndarray:
        """Of each of PARTS where a pair counts if one of these token rules keeps it."""
        return np.array([self.row, self.whole, self.short, self.masked(rules)])

    def masked(self, rules: Sequence[str]) -> float:
        """Cycles of a partial visit; of two rules, both masks' share over a whole one."""
        label = "+".join(rules)
        if label in self.rules or not rules:
            return self.rules.get(label, self.partial)
        prices = [self.rules.get(name, self.partial) for name in rules]
        return max(max(prices), sum(prices) - self.whole * (len(prices) - 1))


@dataclass(frozen=True)
class CostTable:
    """Measured constants of a GPU; see samples/tools/measure_planner.py.

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

        kernel: of the backend, where it was measured apart.
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

    def linear_ms(self, weights: float, tokens: int) -> float:
        """Predicted milliseconds of linear layers with so many weights over so many tokens."""
        return 2 * weights * tokens / self.linear_tflops / 1e9

    def passes_ms(self, passes: float, elements: float) -> float:
        """Predicted milliseconds of reading or writing 2-byte elements so many times."""
        return passes * elements * 2 / self.copy_gbs / 1e6


def visit_flops(visits: float, head_dim: int) -> float:
    """Floating-point operations of visits of 128 x 128."""
    return 4.0 * FULL_BLOCK**2 * head_dim * visits


def cost_table(gpu: str | None, folder: Path = TABLES) -> CostTable | None:
    """The table of a GPU by its name, None where none is shipped.

    gpu: None is this machine's. Raises DitAccelError for what is no name.
    """
    if gpu is not None and not isinstance(gpu, str):
        raise DitAccelError(f'gpu: expected a name such as "h100", got {gpu!r}.')
    name = this_gpu() if gpu is None else gpu
    path = table_file(name, folder) if name else None
    if path is None:
        return None
    key = gpu_key(name)
    return _read(path, "" if path.stem == key else key)


@lru_cache(maxsize=8)
def _read(path: Path, stands_for: str) -> CostTable:
    with path.open(encoding="utf-8", newline="") as file:
        return parse_table(path.stem, csv.DictReader(file), stands_for)


def parse_table(gpu: str, rows: Iterable[Mapping[str, str]], stands_for: str = "") -> CostTable:
    """A table from its rows (see `files`); DitAccelError where a constant is missing."""
    values = values_of(rows)
    machine = values.get((MACHINE, 0), {})
    try:
        constants = {
            (backend, dim): _constants(known) for (backend, dim), known in values.items() if dim
        }
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
