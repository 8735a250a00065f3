"""The receipt of a denoising run: what its attention calls did, as data and as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Report:
    """The receipt of the last denoising run of a pipeline; `str()` gives a table.

    Densities are means over the calls that ran sparse: launched counts the tiles that the kernel
    computed, kept the token pairs that entered the softmax, each over all pairs of the call.
    `dense_reasons` tells planned ("profile") from unplanned dense calls. Times are in seconds;
    `attention_s` is the attention calls alone, without projections. `compile_s` is the first
    calls of kernels, which compile them; it is not part of `attention_s`. `plans` has a row for
    each compute that ran: how the video was cut, and what a call launched.
    """

    profile: str
    family: str
    model: str
    steps: int
    kinds: dict[str, dict[str, Any]]
    per_layer: list[dict[str, Any]]
    per_step: list[dict[str, Any]]
    time: dict[str, float | None]
    cache: dict[str, int | None]
    plans: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the keys `profile`, `self`, `cross`, `per_layer`, `per_step`, ..."""
        data = asdict(self)
        return {**{k: v for k, v in data.items() if k != "kinds"}, **data["kinds"]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        if not self.steps:
            return f"dit_accel: profile {self.profile!r} is enabled; the pipeline has not run yet."
        lines = [
            f"dit_accel: profile {self.profile!r} ({self.family}) on {self.model}, "
            f"{self.steps} step{'s' * (self.steps != 1)}"
        ]
        for kind, title in (("self", "self-attention"), ("cross", "cross-attention")):
            if self.kinds[kind]["calls"]:
                lines += _kind_lines(title, self.kinds[kind])
        for line in dict.fromkeys(map(_plan_line, self.plans)):
            lines += [f"  {'plan':<17}{line}"]
        lines += [f"  {'time':<17}{_time_line(self.time)}"]
        if self.cache["peak_bytes"] or self.cache["refused"]:
            lines += [f"  {'cache':<17}{_cache_line(self.cache)}"]
        header = f"{'calls':>7}{'sparse':>8}{'reused':>8}{'dense':>7}{'density':>9}"
        for title, rows, label in (
            ("layers (self)", [r for r in self.per_layer if r["kind"] == "self"], "layer"),
            ("steps (self)", self.per_step, "step"),
        ):
            lines += ["", f"  {title:<17}{header}"]
            lines += [f"  {name:<17}{_count_line(row)}" for name, row in _folded(rows, label)]
        return "\n".join(lines)


def _kind_lines(title: str, kind: dict[str, Any]) -> list[str]:
    calls = kind["calls"]
    parts = [
        f"{kind[name]} {name} ({kind[name] / calls:.0%})"
        for name in ("sparse", "reused", "dense")
        if kind[name]
    ]
    lines = [f"  {title:<17}{calls} calls: {', '.join(parts)}"]
    if kind["sparse"]:
        by = ", ".join(f"{name} {n}" for name, n in kind["backends"].items())
        lines.append(
            f"  {'':<17}launched density {kind['launched_density']:.3f}, "
            f"kept {kind['kept_density']:.3f}; backend: {by}"
        )
    if kind["dense"]:
        reasons = ", ".join(f"{why} ({n})" for why, n in sorted(kind["dense_reasons"].items()))
        lines.append(f"  {'':<17}dense because: {reasons}")
    return lines


def _plan_line(row: dict[str, Any]) -> str:
    waste = "" if row["waste"] is None else f", waste {row['waste']:.1%}"
    return (
        f"{row['pattern']}: {row['blocks']:,} {row['cut']}{waste}, "
        f"launched {row['launched_density']:.3f}"
    )


def _time_line(times: dict[str, float | None]) -> str:
    share = f" ({times['attention_share']:.0%})" if times["attention_share"] is not None else ""
    line = f"denoising {times['denoising_s']:.2f} s, attention {times['attention_s']:.2f} s{share}"
    return line + (f", compilation {times['compile_s']:.2f} s" if times["compile_s"] else "")


def _cache_line(cache: dict[str, int | None]) -> str:
    limit = cache["limit_bytes"]
    line = f"peak {(cache['peak_bytes'] or 0) / 2**20:.1f} MiB"
    line += f" of {limit / 2**20:.1f} MiB allowed" if limit is not None else ", no limit"
    if cache.get("estimate_bytes"):
        line += f", about {(cache['estimate_bytes'] or 0) / 2**20:.1f} MiB wanted"
    return line + (f"; {cache['refused']} outputs did not fit" if cache["refused"] else "")


def _count_line(row: dict[str, Any]) -> str:
    density = row["launched_density"]
    shown = "-" if density is None else f"{density:.3f}"
    return f"{row['calls']:>7}{row['sparse']:>8}{row['reused']:>8}{row['dense']:>7}{shown:>9}"


def _folded(rows: list[dict[str, Any]], label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with equal counts, next to each other, become one."""

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        expert = row.get("site", "").split(".")[0] if label == "layer" else ""
        return expert, row["calls"], row["sparse"], row["reused"], row["dense"], _count_line(row)

    for _, group in groupby(rows, key=same):
        members = list(group)
        first, last = members[0][label], members[-1][label]
        name = f"{first}" if first == last else f"{first}-{last}"
        yield name, members[0]
