"""Tables of results for a terminal or a log."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from dit_accel.bench.goals import Reached
from dit_accel.bench.machine import Machine
from dit_accel.bench.records import FAILED, OK, SKIPPED, WRONG, Row

LOG_WIDTH = 180
STYLES = {OK: "", WRONG: "bold red", FAILED: "red", SKIPPED: "dim"}


def show(console: Console, title: str, table: Table) -> None:
    """Print a table; a log, which has no width of its own, gets a wide one without padding."""
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(table)
        return
    text = io.StringIO()
    Console(file=text, width=LOG_WIDTH).print(table)
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())
    console.print(lines, markup=False, highlight=False, soft_wrap=True)
    console.print()


def machine_line(machine: Machine) -> str:
    """One line that says what ran."""
    parts = [machine.machine, f"torch {machine.torch}"]
    parts += [f"triton {machine.triton}"] if machine.triton else []
    parts += [f"cuDNN {machine.cudnn}"] if machine.cudnn else []
    parts += [machine.kernel_packages] if machine.kernel_packages else []
    return ", ".join([*parts, f"commit {machine.commit or 'unknown'}", machine.date])


def new_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table that is narrow enough for logs: without the columns that no row fills.

    Columns that hold numbers in every filled cell are aligned to the right.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for i in kept:
        numeric = all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows)
        table.add_column(columns[i], justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


def styled(table: Table, styles: Sequence[str]) -> Table:
    """The table with a style for each of its rows."""
    for row, style in zip(table.rows, styles, strict=True):
        row.style = style
    return table


DENSE_COLUMNS = ("Dense kernel", "ms", "TFLOP/s", "Error", "Note")
SPARSE_COLUMNS = (
    "Plan", "Asked", "Launched", "Kept", "Backend", "ms", "TFLOP/s useful", "launched",
    "/ fastest dense", "/ FA3", "/ fa4 sparse", "Speed-up", "Error", "Note",
)  # fmt: skip
OTHER_COLUMNS = (
    "What", "Of", "ms", "TFLOP/s", "GB/s", "x copying", "Faster than dense", "than FA3",
    "Plan lookup", "Note",
)  # fmt: skip


def dense_table(rows: Sequence[Row]) -> Table:
    """The dense kernels of a case."""
    cells = [
        (row.kernel, number(row.ms, 4), number(row.useful_tflops), small(row.error), _note(row))
        for row in rows
    ]
    return styled(new_table(DENSE_COLUMNS, cells), [STYLES[row.status] for row in rows])


def sparse_table(rows: Sequence[Row]) -> Table:
    """The backends on the plans of a case; rates are TFLOP/s, ratios are of useful ones."""
    over_fa3 = next((row.fa3_is for row in rows if row.fa3_is), "FA3")
    columns = [f"/ {over_fa3}" if name == "/ FA3" else name for name in SPARSE_COLUMNS]
    cells = []
    last: tuple[str, float | None] | None = None
    for row in rows:
        same, last = last == (row.plan, row.density), (row.plan, row.density)
        cells.append(
            (
                "" if same else row.plan,
                "" if same else number(row.density),
                number(row.launched_density),
                number(row.kept_density),
                row.kernel,
                number(row.ms, 4),
                number(row.useful_tflops),
                number(row.launched_tflops),
                number(row.over_dense),
                number(row.over_fa3),
                number(row.over_fa4),
                number(row.speedup),
                small(row.error),
                _note(row),
            )
        )
    return styled(new_table(columns, cells), [STYLES[row.status] for row in rows])


def other_table(rows: Sequence[Row]) -> Table:
    """Whole calls and ceilings."""
    cells = []
    for row in rows:
        share = "" if row.lookup_share is None else f"{row.lookup_share:.2%}"
        faster = "" if row.speedup is None else f"{row.speedup:.3g}x {row.fastest_dense}"
        than = "" if row.over_fa3 is None else f"{row.over_fa3:.3g}x {row.fa3_is}"
        cells.append(
            (
                row.what,
                " ".join(part for part in (row.case, row.kernel) if part),
                number(row.ms, 4),
                number(row.useful_tflops),
                number(row.gbytes_per_s),
                number(row.over_copy),
                faster,
                than,
                share,
                _note(row),
            )
        )
    table = new_table(OTHER_COLUMNS, cells)
    return styled(table, [STYLES[row.status] for row in rows])


def goals_table(found: Sequence[Reached]) -> Table:
    """Goals and what was reached."""
    cells = [
        (
            f"{entry.goal.title}: {entry.goal.unit}",
            f"{'>=' if entry.goal.least else '<='} {entry.goal.bound:g}",
            f"{entry.value:.4g}",
            "yes" if entry.met else "NO",
            entry.where,
        )
        for entry in found
    ]
    columns = ("Goal", "Bound", "Reached", "Met", "Worst cell")
    styles = ["green" if entry.met else "red" for entry in found]
    return styled(new_table(columns, cells), styles)


def number(value: float | None, digits: int = 3) -> str:
    """A cell with that many significant digits, empty for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e" in text and abs(value) >= 1 else text


def small(value: float | None) -> str:
    """A cell of an error, empty for None."""
    return "" if value is None else f"{value:.1e}"


def _note(row: Row) -> str:
    return row.note if row.status == OK else f"{row.status}: {row.note}"
