"""`dit-accel bench step` as a whole: a model and profiles in, rows and a table out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

import dit_accel
from dit_accel.bench import table
from dit_accel.bench.cases import check_densities
from dit_accel.bench.machine import machine
from dit_accel.bench.records import CsvLog, StepRow
from dit_accel.bench.step import StepOptions, step_rows
from dit_accel.bench.step_models import fit, pick_model
from dit_accel.engine.profile import Profile, load_profile
from dit_accel.errors import unknown
from dit_accel.kernels.backends import BACKENDS
from dit_accel.pipelines.preset import Preset


class FailedStep(RuntimeError):
    """A profile's step did not run."""


@dataclass(frozen=True)
class StepRequest:
    """What was asked on the command line; None and empty mean the default."""

    model: str
    device: torch.device
    dtype: torch.dtype
    profiles: tuple[str, ...] = ()
    densities: tuple[float, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    backend: str | None = None
    dense: str | None = None
    layers: int | None = None
    repeats: int | None = None
    compile: bool = False
    out: Path | None = None


COLUMNS = (
    "Step", "ms", "First", "Attention ms", "Share", "Peak GiB", "Launched", "Sparse", "Reused",
    "Dense", "Speed-up", "Amdahl", "Of bound", "Peak / dense", "Change", "Note",
)  # fmt: skip


def run_step(request: StepRequest, console: Console) -> list[StepRow]:
    """Measure, print and log the dense step and each profile's.

    Raises DitAccelError for bad input, before anything is built, and FailedStep at the end if a
    profile failed.
    """
    model = pick_model(request.model)
    size = fit(model, request.height, request.width, request.frames)
    if request.backend is not None and request.backend not in BACKENDS:
        raise unknown("backend", request.backend, BACKENDS)
    options = StepOptions(
        device=request.device,
        dtype=request.dtype,
        profiles=_profiles(model, request),
        densities=check_densities(request.densities, "--density"),
        backend=request.backend,
        dense=_dense(request.dense),
        layers=request.layers,
        repeats=request.repeats,
        compile=request.compile,
    )
    here = machine(request.device)
    log = CsvLog(request.out, here.columns())
    console.print(table.machine_line(here), highlight=False, soft_wrap=True)
    rows: list[StepRow] = []
    try:
        for row in step_rows(model, size, options):
            log.write(row)
            rows.append(row)
    finally:
        log.close()
    table.show(console, _title(model, rows[0]), step_table(rows))
    failed = [f"{row.profile}: {row.note}" for row in rows if row.status != "ok"]
    if failed:
        raise FailedStep("; ".join(failed))
    return rows


def _profiles(model: Preset, request: StepRequest) -> tuple[Profile, ...]:
    """The profiles by name, the family's `auto` where nothing is asked."""
    names = request.profiles or (() if request.densities else ("auto",))
    return tuple(replace(load_profile(name, model.family), name=name) for name in names)


def _dense(name: str | None) -> str | None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name is not None and name not in known:
        raise unknown("dense backend", name, known)
    return name


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
