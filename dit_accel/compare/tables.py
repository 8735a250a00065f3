"""Tables of a comparison for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from dit_accel.compare.attention_level import Summary
from dit_accel.compare.results import AGAIN, Metric, Results, Row, Spread, summarise, worst

MIB = 2**20


def summary(results: Results) -> Table:
    """One row a profile: medians, below them the spread of ratios and the worst clip's metric."""
    rows = summarise(results)
    metrics = {name: m for name, m in results.metrics.items() if not m.skipped}
    memory = any(row.memory_bytes for row in rows)
    title = f"{results.model}: {_size(results)}, {results.steps} steps"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("profile", overflow="fold", min_width=8)
    heads = ["seconds", "faster", "attention", *(_head(n, m) for n, m in metrics.items())]
    for head in (*heads, "density", *(["MiB"] if memory else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.skipped is None:
            table.add_row(*_cells(row, metrics, memory))
    table.caption = (
        "medians over the clips; below them the smallest and largest ratio, and the worst clip"
    )
    return table


def hints(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(profile, what to know) where self-attention of a profile of ours cost as much as dense."""
    found = []
    for row in rows:
        if row.ran_dense:
            found.append((row.profile, why_dense(row)))
        elif row.kind != "profile" or row.profile == AGAIN or not row.density:
            continue
        elif row.density.low >= 1.0:
            covered = "its blocks cover everything at this size"
            own = f"its self-attention {why_dense(row)}"
            found.append((row.profile, covered if "sparse" in row.calls else own))
    return found


def why_dense(row: Row) -> str:
    """Why no self-attention call of a profile ran sparse, and what to do about it."""
    reasons = {why.removeprefix("dense: "): count for why, count in row.calls.items()}
    told = ", ".join(f"{why} ({count:,})" for why, count in reasons.items())
    advice = "; --no-breakeven runs it sparse" if "below break-even" in reasons else ""
    return f"ran dense because: {told}{advice}"


def attention(rows: Sequence[Summary]) -> Table:
    """The table of `--attention`, by density."""
    title = "Relative L2 error of attention against dense, on the model's own q, k, v"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("compute", overflow="fold", min_width=20)
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
    return f"{name}\n{metric.unit}".strip()


def _cells(row: Row, metrics: dict[str, Metric], memory: bool) -> list[str]:
    name = row.profile + (f"\n{row.failed} failed" if row.failed else "")
    cells = [name, _median(row.denoise_s, "{:.2f}")]
    if row.ran_dense:
        cells += ["ran dense", *("-" for _ in ("attention", *metrics))]
    else:
        cells += [_ratio(row.speedup), _ratio(row.attention_speedup)]
        cells += [_quality(row, metric, about) for metric, about in metrics.items()]
    cells.append(_median(row.density, "{:.3f}"))
    if memory:
        cells.append(_median(row.memory_bytes, "{:.0f}", MIB))
    return cells


def _quality(row: Row, metric: str, about: Metric) -> str:
    digits = {"psnr": "{:.1f}", "flicker": "{:.2f}", "adherence": "{:.2f}"}
    return _with_worst(row.metrics[metric], about, digits.get(metric, "{:.3f}"))


def _median(spread: Spread | None, digits: str, unit: float = 1.0) -> str:
    return "-" if spread is None else digits.format(spread.median / unit)


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    middle = f"{spread.median:.2f}x"
    apart = spread.low != spread.high
    return f"{middle}\n{spread.low:.2f}..{spread.high:.2f}" if apart else middle


def _with_worst(spread: Spread | None, metric: Metric, digits: str) -> str:
    if spread is None:
        return "-"
    middle, last = (digits.format(value) for value in (spread.median, worst(spread, metric)))
    sign = ">=" if metric.better == "higher" else "<="
    return middle if last == middle else f"{middle}\n{sign}{last}"
