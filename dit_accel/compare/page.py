"""The report as a page: one HTML file with its styles, its script and its videos inside.

This module puts together what the template shows; `page_summary`, `page_clips` and `page_maps`
word its parts, `charts` places the drawings. Nothing is fetched when the page is read, and
nothing is lost when it is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dit_accel.compare import page_clips, page_maps, page_summary
from dit_accel.compare.embed import Videos
from dit_accel.compare.numbers import number, plural, seconds
from dit_accel.compare.page_words import anchor, title_of
from dit_accel.compare.results import Results, summarise
from dit_accel.compare.tables import hints
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
    maps = page_maps.maps(results)
    pictures = [picture for each in maps for picture in (each.density, each.error) if picture]
    skipped = [(title_of(n), m.skipped) for n, m in results.metrics.items() if m.skipped]
    return {
        "css": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": (FOLDER / "page.js").read_text(encoding="utf-8"),
        "results": results,
        "aspect": results.width / results.height if results.height else 1.0,
        "facts": page_summary.facts(results),
        "failed": [clip for clip in results.clips if clip.status == "failed"],
        "columns": page_summary.columns(results, rows),
        "summary": page_summary.summary(results, rows),
        "hints": hints([row for row in rows if not row.ran_dense]),
        "ran_dense": [row.profile for row in rows if row.ran_dense],
        "skipped_metrics": skipped,
        "gaps": page_summary.gaps(results),
        "skipped_profiles": [info for info in results.profiles if info.skipped],
        "plots": page_summary.plots(results, rows),
        "kinds": {info.kind for info in results.profiles if not info.skipped},
        "choices": page_clips.choices(results, rows),
        "groups": page_clips.groups(results, rows, videos),
        "difference_text": page_clips.DIFFERENCE_TEXT,
        "time_columns": page_summary.TIME_COLUMNS,
        "times": page_summary.times(results),
        "maps": maps,
        "scale": page_maps.error_scale(results),
        "no_values": any(run.level is None for picture in pictures for run in picture.runs),
        "environment": page_summary.environment(results),
        "other_texts": [p for p in results.profiles if p.kind == "external" and not p.skipped],
        "videos": videos,
        "anchor": anchor,
    }
