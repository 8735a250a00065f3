"""The report as a page: one HTML file with its styles, its script and its videos inside.

This module makes what the template shows; `charts` places the drawings, `page_parts` words the
tables. Nothing is fetched when the page is read, and nothing is lost when it is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dit_accel.compare import page_parts as parts
from dit_accel.compare.embed import Videos
from dit_accel.compare.numbers import number, plural, seconds
from dit_accel.compare.results import Results, summarise
from dit_accel.video import replacing

FOLDER = Path(__file__).parent
NAME = "index.html"


def write_page(results: Results, out: Path) -> Path:
    """Write `out/index.html`, a report that needs nothing but itself.

    Args:
        results: the comparison; clips may be missing, failed or without a video.
        out: the folder that the clips' `video` and `difference` paths are relative to.

    Returns: the page's path. A file that stood there is replaced when the new one is complete.
    """
    videos = Videos.of(results.clips, out)
    template = _environment().get_template("page.html.jinja")
    path = Path(out) / NAME
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        # Streamed, because all the videos together need not fit into memory.
        for piece in template.stream(**_context(results, videos)):
            file.write(piece)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": number,
        "plural": plural,
        "seconds": seconds,
        "figures": lambda value: f"{value:.3g}",
        "trimmed": lambda value: f"{value:g}",
    }
    environment.filters.update(filters)
    return environment


def _context(results: Results, videos: Videos) -> dict[str, Any]:
    rows = summarise(results)
    maps = parts.maps(results)
    pictures = [picture for each in maps for picture in (each.density, each.error) if picture]
    skipped = [(parts.title_of(n), m.skipped) for n, m in results.metrics.items() if m.skipped]
    return {
        "css": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "page.js").read_text(encoding="utf-8"),
        "results": results,
        "facts": parts.facts(results),
        "failed": [clip for clip in results.clips if clip.status == "failed"],
        "columns": parts.columns(results),
        "summary": parts.summary(results, rows),
        "skipped_metrics": skipped,
        "skipped_profiles": [info for info in results.profiles if info.skipped],
        "plots": parts.plots(results, rows),
        "kinds": {info.kind for info in results.profiles if not info.skipped},
        "choices": parts.choices(results),
        "groups": parts.groups(results, videos),
        "difference_text": parts.DIFFERENCE_TEXT,
        "time_columns": parts.TIME_COLUMNS,
        "times": parts.times(results),
        "maps": maps,
        "scale": parts.error_scale(results),
        "no_values": any(run.level is None for picture in pictures for run in picture.runs),
        "environment": parts.environment(results),
        "other_texts": [p for p in results.profiles if p.kind == "external" and not p.skipped],
        "videos": videos,
        "anchor": parts.anchor,
    }
