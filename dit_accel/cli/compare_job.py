"""`dit-accel compare`: everything is checked first, then loaded, run and reported."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dit_accel.cli import option
from dit_accel.cli.console import err, out, warn
from dit_accel.cli.progress import steps_bar
from dit_accel.cli.target import Asked, Target, find_target, load_target
from dit_accel.compare import attention_level, tables
from dit_accel.compare.methods import Method, choose_methods
from dit_accel.compare.metrics import DEFAULT, check_metrics
from dit_accel.compare.prompts import read_prompts
from dit_accel.compare.request import Request, Watcher, check, run_of
from dit_accel.compare.results import Results, summarise
from dit_accel.compare.specs import load_spec, split_profiles
from dit_accel.compare.store import Store, open_store
from dit_accel.errors import DitAccelError, unknown
from dit_accel.kernels.backends import BACKENDS
from dit_accel.models.find import demo_folder
from dit_accel.video import check_writable, replacing

LEAST_WIDE, WIDE = 96, 240
"""Columns of a table on a terminal at least, and in a log."""
SPEED_PERIOD_S = 600.0
"""The time left is told from the speed of this many last seconds: several methods in turn."""


@dataclass(frozen=True)
class Options(Asked):
    """The command line, as it was given; see `cli/compare.py` for what each one means."""

    profiles: str | None
    against: str
    prompts: str | None
    seeds: str
    metrics: str | None
    repeats: int | None
    error_maps: str
    no_breakeven: bool
    strict: bool
    backend: str | None
    keep_going: bool
    output: Path
    resume: bool
    overwrite: bool
    layers: str | None
    moments: str | None

    @property
    def breakeven(self) -> bool | None:
        """What to set in every profile, None for what it says itself."""
        return False if self.no_breakeven else None


@dataclass(frozen=True)
class Job:
    """Options that were checked: nothing heavy has been done for them yet."""

    options: Options
    target: Target
    request: Request


def run(options: Options) -> None:
    """Compare, print the table and write the report.

    Raises DitAccelError for whatever cannot be done, before anything heavy where possible.
    """
    for name, value in (("--layers", options.layers), ("--moments", options.moments)):
        if value is not None:
            raise DitAccelError(f"{name} is for --attention: add that, or leave it out.")
    job = prepare(options)
    methods = _methods(job)
    asked = run_of(job.request, methods, job.target.device, job.target.dtype)
    store = open_store(options.output, asked, resume=options.resume, overwrite=options.overwrite)
    kept = sum(clip.status == "done" for clip in store.clips.values())
    if kept:
        err.print(f"{kept} clips are there already and are kept.", highlight=False)
    from dit_accel.compare.page import write_page
    from dit_accel.compare.runner import all_there

    results = all_there(methods, job.request, store) or _measure(job, methods, store)
    _show(results, write_page(results, store.folder))


def _measure(job: Job, methods: Sequence[Method], store: Store) -> Results:
    from dit_accel.compare.runner import run_all

    pipe = load_target(job.target, job.options)
    try:
        with _watching() as watcher:
            return run_all(pipe, methods, job.request, store, watcher)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what is finished is kept in {store.folder}: the same command goes on."
        ) from None


def run_attention(options: Options) -> None:
    """The table of `--attention`: printed, and written as attention.csv and attention.json."""
    job = prepare(options)
    specs = [
        load_spec(each, job.target.model.family, options.breakeven)
        for each in (split_profiles(options.profiles) if options.profiles else [])
    ]
    tried = attention_level.candidates([spec for spec in specs if spec.name != "dense"])
    layers = None if options.layers is None else option.numbers("--layers", options.layers, int)
    moments = attention_level.MOMENTS
    if options.moments is not None:
        moments = option.numbers("--moments", options.moments, float)
        if not all(0 <= moment <= 1 for moment in moments):
            raise DitAccelError(f"--moments are fractions of the run in 0..1: {options.moments}")
    files = [options.output / "attention.csv", options.output / "attention.json"]
    for file in files:
        check_writable(file)
        if file.exists() and not options.overwrite:
            raise DitAccelError(f"{file} exists: use --overwrite, or another --out folder.")
    pipe = load_target(job.target, job.options)
    from dit_accel.compare.attention_run import about, tabulate

    with _watching() as watcher:
        rows = tabulate(pipe, job.request, tried, layers, moments, watcher)
    texts = (
        attention_level.as_csv(rows),
        attention_level.as_json(rows, about(job.request, job.target.device)),
    )
    for file, text in zip(files, texts, strict=True):
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    _print(tables.attention(attention_level.summarise(rows)))
    _wrote(files)


def prepare(options: Options) -> Job:
    """Check the options against the machine and the model, without loading weights."""
    seeds = option.numbers("--seeds", options.seeds, int)
    if min(seeds) < 0:
        raise DitAccelError(f"--seeds are whole numbers >= 0, got {min(seeds)}.")
    metrics = list(option.names(options.metrics)) if options.metrics is not None else list(DEFAULT)
    check_metrics(metrics)
    prompts = _prompts(options)
    if options.backend is not None and options.backend not in BACKENDS:
        raise unknown("backend", options.backend, BACKENDS)
    target = find_target(options, prompts[0])
    model = target.model
    request = Request(
        prompts=prompts,
        seeds=list(dict.fromkeys(seeds)),
        call={name: value for name, value in target.arguments.items() if name != "prompt"},
        metrics=[name for name in metrics if model.demo or options.metrics or name != "adherence"],
        fps=target.fps,
        repeats=options.repeats,
        error_maps=options.error_maps,
        keep_going=options.keep_going,
        model=options.model,
        demo=model.demo,
        command=shlex.join(["dit-accel", *sys.argv[1:]]),
    )
    check(request)
    return Job(options, target, request)


def _methods(job: Job) -> list[Method]:
    options = job.options
    return choose_methods(
        split_profiles(options.profiles if options.profiles is not None else "dense,auto"),
        split_profiles(options.against) if options.against else (),
        family=job.target.model.family,
        breakeven=options.breakeven,
        strict=options.strict,
        backend=options.backend,
    )


def _prompts(options: Options) -> list[str]:
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if options.model != "demo":
        raise DitAccelError('--prompts is missing: give a file with one a line, or "a prompt".')
    return read_prompts(str(demo_folder().parent / "prompts" / "demo.txt"))


def _show(results: Results, page: Path) -> None:
    """The summary, what was skipped, and hints where a profile did not do what it is for."""
    _print(tables.summary(results))
    for info in results.profiles:
        if info.skipped:
            warn(f"{info.name} was skipped: {info.skipped}")
    for name, hint in tables.hints(summarise(results)):
        warn(f"{name}: {hint}")
    _wrote([page, page.with_name("results.csv"), page.with_name("results.json")])


def _print(table: Table) -> None:
    """As wide as the terminal, but never so narrow that columns are lost."""
    width = max(out.width, LEAST_WIDE) if out.is_terminal else WIDE
    Console(width=width).print(table)


def _wrote(files: Sequence[Path]) -> None:
    names = ", ".join(str(file) for file in files)
    out.print(f"Wrote {names}", markup=False, highlight=False, soft_wrap=True)


class _Bar(Watcher):
    """A bar over denoising steps with the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("Starting", total=None)
        self._done = 0

    def steps(self, total: int) -> None:
        self._progress.update(self._task, total=self._done + total)

    def at(self, text: str) -> None:
        self._progress.update(self._task, description=text[:60])

    def step(self) -> None:
        self._done += 1
        self._progress.advance(self._task)

    def say(self, text: str) -> None:
        warn(text)


@contextmanager
def _watching() -> Iterator[_Bar]:
    with steps_bar(speed_estimate_period=SPEED_PERIOD_S) as progress:
        yield _Bar(progress)
