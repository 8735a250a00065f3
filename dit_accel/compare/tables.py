"""Tables of a comparison for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from dit_accel.compare.attention_level import Summary
from dit_accel.compare.methods import AGAIN
from dit_accel.compare.results import Metric, Results, Row, Spread, summarise

MIB = 2**20


def summary(results: Results) -> Table:
    """One row a profile: medians, and below them the smallest and largest."""
    rows = summarise(results)
    metrics = {name: m for name, m in results.metrics.items() if not m.skipped}
    memory = any(row.memory_bytes for row in rows)
    table = Table(title=f"{results.model}: {_size(results)}, {results.steps} steps")
    table.add_column("profile", overflow="fold", min_width=14)
    heads = ["clips", "denoising s", "denoising faster", "attention faster"]
    heads += [_head(name, metric) for name, metric in metrics.items()]
    heads += ["density", *(["memory MiB"] if memory else [])]
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for row in rows:
        if row.skipped is None:
            table.add_row(row.profile, *_cells(row, metrics, memory))
    table.caption = (
        "medians over the clips, and below them smallest..largest; density of self-attention"
    )
    return table


def hints(results: Results) -> list[tuple[str, str]]:
    """(profile, what to know) where a profile of ours ran nothing sparse and reused nothing."""
    found = []
    kinds = {info.name: info.kind for info in results.profiles}
    for row in summarise(results):
        if kinds[row.profile] != "profile" or row.density is None or row.density.low < 1.0:
            continue
        reasons = {
            reason.removeprefix("dense: ")
            for clip in results.clips
            if clip.profile == row.profile
            for reason in clip.calls
            if reason.startswith("dense: ") and reason != "dense: profile"
        }
        if not reasons and row.profile != AGAIN:
            found.append((row.profile, "its blocks cover everything at this size"))
        elif reasons:
            advice = "; --no-breakeven runs it sparse" if "below break-even" in reasons else ""
            found.append((row.profile, f"ran dense ({', '.join(sorted(reasons))}){advice}"))
    return found


def attention(rows: Sequence[Summary]) -> Table:
    """The table of `--attention`, by density."""
    table = Table(title="Relative L2 error of attention against dense, on the model's own q, k, v")
    table.add_column("compute", overflow="fold", min_width=24)
    for head in ("launched", "kept", "error", "worst"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("worst at", overflow="fold", min_width=14)
    for row in rows:
        table.add_row(
            row.candidate,
            f"{row.launched_density:.3f}",
            f"{row.kept_density:.3f}",
            f"{row.error:.4f}",
            f"{row.worst_error:.4f}",
            row.worst_at,
        )
    calls = rows[0].calls if rows else 0
    table.caption = f"launched and kept density; medians over {calls} captured calls"
    return table


def _size(results: Results) -> str:
    frames = f"{results.frames} frames of " if results.frames > 1 else ""
    return f"{frames}{results.width}x{results.height}"


def _head(name: str, metric: Metric) -> str:
    return f"{name} {metric.unit}".strip()


def _cells(row: Row, metrics: dict[str, Metric], memory: bool) -> list[str]:
    clips = f"{row.clips}" + (f"\n{row.failed} failed" if row.failed else "")
    cells = [clips, _spread(row.denoise_s, "{:.2f}")]
    cells += [_spread(row.speedup, "{:.2f}x"), _spread(row.attention_speedup, "{:.2f}x")]
    for name in metrics:
        digits = {"psnr": "{:.1f}", "flicker": "{:.2f}", "adherence": "{:.2f}"}.get(name, "{:.3f}")
        cells.append(_spread(row.metrics[name], digits))
    cells.append(_spread(row.density, "{:.3f}"))
    if memory:
        scaled = row.memory_bytes and Spread(
            *(value / MIB for value in vars(row.memory_bytes).values())
        )
        cells.append(_spread(scaled, "{:.0f}"))
    return cells


def _spread(spread: Spread | None, digits: str, unit: float = 1.0) -> str:
    if spread is None:
        return "-"
    low, middle, high = (
        "inf" if math.isinf(value) else digits.format(value / unit)
        for value in (spread.low, spread.median, spread.high)
    )
    return middle if low == high else f"{middle}\n{low}..{high}"
