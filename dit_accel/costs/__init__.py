"""What things cost: one table of measured constants for each GPU, and one for CPUs.

A table is a CSV in `tables/` (see `files`). Three read it: the route of a call (`breakeven`:
whether a sparse call pays, and which of two plans is cheaper), the kernels (`kernels`: how work is
dealt, how a grid is cut), and the planner (`table`: milliseconds of a call). Everything here is
numbers: nothing knows a plan or a tensor.
"""

from __future__ import annotations

from dit_accel.costs.breakeven import effort, pays
from dit_accel.costs.table import CostTable, cost_table

__all__ = ["CostTable", "cost_table", "effort", "pays"]
