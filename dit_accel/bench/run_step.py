"""`dit-accel bench step` as a whole: a model and profiles in, rows and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import dit_accel
from dit_accel.bench import table
from dit_accel.bench.cases import check_densities
from dit_accel.bench.machine import machine
from dit_accel.bench.records import CsvLog, StepRow
from dit_accel.bench.step import StepOptions, step_rows
from dit_accel.bench.step_models import fit, pick_model
from dit_accel.engine.profile import load_profile
from dit_accel.errors import unknown
from dit_accel.kernels.backends import BACKENDS
from dit_accel.pipelines.preset import Preset


class FailedStep(RuntimeError):
    """A profile's step did not run."""


COLUMNS = (
    "Step", "ms", "First", "Attention ms", "Share", "Peak GiB", "Launched", "Sparse", "Reused",
    "Dense", "Speed-up", "Amdahl", "Of bound", "Peak / dense", "Change", "Note",
)  # fmt: skip


def run_step(
    name: str,
    size: tuple[int | None, int | None, int | None],
    profiles: Sequence[str],
    options: StepOptions,
    out: Path | None,
    console: Console,
) -> list[StepRow]:
    """Measure, print and log the dense step of a model and each profile's.

    size: height, width and frames, None for the model's own. profiles: more of them, by name; the
    family's `auto` where nothing is asked. out: a CSV file.

    Raises DitAccelError for bad input, before anything is built, and FailedStep at the end if a
    profile failed.
    """
    model = pick_model(name)
    fitted = fit(model, *size)
    if options.backend is not None and options.backend not in BACKENDS:
        raise unknown("backend", options.backend, BACKENDS)
    names = profiles or (() if options.densities else ("auto",))
    loaded = [replace(load_profile(each, model.family), name=each) for each in names]
    options = replace(options, profiles=(*options.profiles, *loaded))
    check_densities(options.densities, "--density")
    _check_dense(options.dense)
    here = machine(options.device)
    log = CsvLog(out, here.columns())
    console.print(table.machine_line(here), highlight=False, soft_wrap=True)
    rows: list[StepRow] = []
    try:
        for row in step_rows(model, fitted, options):
            log.write(row)
            rows.append(row)
    finally:
        log.close()
    table.show(console, _title(model, rows[0]), step_table(rows))
    failed = [f"{row.profile}: {row.note}" for row in rows if row.status != "ok"]
    if failed:
        raise FailedStep("; ".join(failed))
    return rows


def _check_dense(name: str | None) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name is not None and name not in known:
        raise unknown("dense backend", name, known)


def _title(model: Preset, row: StepRow) -> str:
    layers = f"{row.layers} of {row.layers_of} layers" if row.layers != row.layers_of else ""
    parts = [
        f"{model.name} ({model.source}, random weights)",
        f"{row.width}x{row.height}, {row.frames} frames, {row.tokens:,} tokens",
        row.mode,
        f"dense backend {row.dense_kernel}",
        layers,
        f"dit_accel {dit_accel.__version__}",
    ]
    return "; ".join(part for part in parts if part)


def step_table(rows: Sequence[StepRow]) -> table.Table:
    """The variants of a step."""
    number, small = table.number, table.small
    cells = [
        (
            row.profile or row.what,
            number(row.ms, 4),
            number(row.first_ms, 4),
            number(row.attention_ms, 4),
            "" if row.attention_share is None else f"{row.attention_share:.0%}",
            number(row.peak_gib),
            number(row.launched_density),
            number(row.sparse),
            number(row.reused),
            number(row.dense_calls),
            number(row.speedup),
            number(row.bound),
            number(row.of_bound),
            number(row.peak_over_dense, 4),
            small(row.change),
            "; ".join(part for part in (row.reasons, row.note) if part),
        )
        for row in rows
    ]
    styles = ["" if row.status == "ok" else "bold red" for row in rows]
    return table.styled(table.new_table(COLUMNS, cells), styles)
