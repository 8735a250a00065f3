"""`compare`: a comparison in one call, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.compare.methods import choose_methods
from dit_accel.compare.metrics import DEFAULT
from dit_accel.compare.page import write_page
from dit_accel.compare.request import Request, Watcher, run_of
from dit_accel.compare.results import Results
from dit_accel.compare.runner import all_there, run_all
from dit_accel.compare.store import open_store
from dit_accel.compare.timing import device_of, dtype_of, transformers
from dit_accel.engine.profile import Profile
from dit_accel.pipelines.registry import adapter_for


def compare(
    pipe: Any,
    prompts: Sequence[str],
    out: str | Path,
    profiles: Sequence[str | Path | Profile] = ("dense", "auto"),
    against: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (0,),
    metrics: Sequence[str] = DEFAULT,
    breakeven: bool | None = None,
    repeats: int | None = None,
    keep_going: bool = False,
    fps: float = 16.0,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    model: str = "",
    **call: Any,
) -> Results:
    """Compare profiles on a pipeline, and write the report into a folder.

    Args:
        pipe: a pipeline that dit_accel supports, on its device.
        out: the folder; finished clips in it are kept.
        profiles: names, files, inline specs (`sliding_tile:window=3,3,3`) or profiles.
        against: other projects' methods, see `dit_accel.compare.external.EXTERNALS`.
        breakeven: False runs sparse what would pay only on larger sizes.
        resume, overwrite: what to do with a folder that holds a different run's results.
        watcher: is told how it goes on.
        model: what the report calls it; "demo" is the demo model, whose adherence is measured.
        call: arguments of the pipeline's call.

    Raises:
        DitAccelError: whatever of the request cannot be carried out.
    """
    found = [adapter for m in transformers(pipe) if (adapter := adapter_for(m))]
    methods = choose_methods(
        profiles, against, family=found[0].family if found else None, breakeven=breakeven
    )
    request = Request(
        prompts=prompts,
        seeds=seeds,
        call=call,
        metrics=metrics,
        fps=fps,
        repeats=repeats,
        keep_going=keep_going,
        model=model or type(pipe).__name__,
        demo=model == "demo",
        command="dit_accel.compare.api.compare(...)",
    )
    run = run_of(request, methods, device_of(pipe), dtype_of(pipe))
    store = open_store(Path(out), run, resume=resume, overwrite=overwrite)
    results = all_there(methods, request, store)
    if results is None:
        results = run_all(pipe, methods, request, store, watcher or Watcher())
    write_page(results, store.folder)
    return results
