"""The planner's measurement: its calls, how a GPU is kept at work, and a run of all of it."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "samples" / "tools"
sys.path.insert(0, str(TOOLS))

import measure_planner  # noqa: E402
import planner_cases as cases  # noqa: E402
import planner_times as times  # noqa: E402

from dit_accel.costs.clock import STEADY, Clock  # noqa: E402
from dit_accel.kernels import backends  # noqa: E402
from dit_accel.planner.work import kernel_of  # noqa: E402

BACKENDS = ("hopper", "triton")


def test_no_pair_takes_part_in_the_fit() -> None:
    rounds = cases.round_jobs(cases.FULL, BACKENDS)
    pairs = cases.check_jobs(BACKENDS, tiny=False)
    for jobs in (rounds, pairs):
        assert len(set(jobs)) == len(jobs)
    assert not {cases.called(job.call) for job in rounds} & {
        cases.called(job.call) for job in pairs
    }
    dense = {cases.name_of(call) for call in cases.dense_calls(cases.FULL)}
    assert not dense & {cases.name_of(job.call) for job in pairs}
    assert len({(job.call.name, job.rule) for job in pairs}) == 30


def test_times_are_kept_by_what_ran() -> None:
    """A time is found again only where the blocks are those that were timed."""
    pairs = cases.check_jobs(["hopper"], tiny=False)
    wanted = ("wan-14b", "sliding_tile")
    job = next(job for job in pairs if (job.call.name, job.rule.name) == wanted)
    call, rule = job.call, job.rule
    names = {}
    for tile in ((2, 8, 8), (1, 8, 16), (3, 5, 8)):
        given = dataclasses.replace(rule, tile=tile)  # type: ignore[call-arg]
        names[cases.Job(call, given, "hopper", "boxes").name.split("hopper")[1]] = tile
    assert list(names) == [
        " boxes of 2x8x8 of 128",
        " boxes of 1x8x16 of 128",
        " tiles of 3x5x8 of 128",
    ]
    t, h, w = rule.tiling(call.layout, "boxes").tile
    assert job.kind == "boxes" and job.name.endswith(f"hopper boxes of {t}x{h}x{w} of 128")


def test_the_round_calls_show_every_price() -> None:
    """Each kernel of the table meets whole, short and masked blocks, on boxes of several shapes."""
    bench = times.Bench(torch.device("cpu"), torch.float32, cases.FULL, 1)
    visits: dict[str, dict[str, int]] = {}
    boxes: dict[str, set[Any]] = {}
    for job in cases.round_jobs(cases.FULL, BACKENDS):
        if job.call.head_dim == 64 and job.call.layout.length < 40_000:
            plan = bench.plan(job)
            kernel = kernel_of(
                job.backend, plan, moved=backends.BACKENDS[job.backend].moves(plan.shape)
            )
            seen = visits.setdefault(kernel, {})
            kinds = plan.shape.kinds
            seen["whole"] = seen.get("whole", 0) + kinds.whole
            seen["short"] = seen.get("short", 0) + kinds.short
            if kinds.partial and plan.mask is not None:
                label = plan.mask.label
                seen[label] = seen.get(label, 0) + 1
                boxes.setdefault(kernel, set()).add(plan.shape.box)
    masks = {"neighborhood", "disc", "band"}
    assert set(visits) == {"hopper", "hopper mixed", "triton", "triton gathered"}
    for kernel, seen in visits.items():
        wanted = {"frames", "radial"} if kernel == "triton" else masks
        assert min(seen.get(kind, 0) for kind in {"whole", "short"} | wanted) >= 2, (kernel, seen)
    assert min(len(boxes["hopper"]), len(boxes["hopper mixed"])) >= 3


class Gpu:
    """Notes what is asked of torch.cuda. A product takes 0.2 ms, a call 3, the watch 1."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0

    def work(self, name: str, ms: float) -> None:
        self.log.append(name)
        self.now += ms

    def event(self, enable_timing: bool) -> Any:
        mark = SimpleNamespace(at=0.0)
        mark.record = lambda: (self.log.append("mark"), setattr(mark, "at", self.now))
        mark.elapsed_time = lambda later: later.at - mark.at
        return mark

    def stand_in(self) -> Any:
        @contextmanager
        def stream(some: Any) -> Any:
            self.log.append("beside")
            yield

        own = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        return SimpleNamespace(
            Stream=lambda device: object(), stream=stream, Event=self.event,
            current_stream=lambda device: own, synchronize=lambda device: self.log.append("sync"),
            _sleep=lambda cycles: self.work("watch", cycles / 2e6),
        )  # fmt: skip


def test_a_gpu_never_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products run while a call is made ready and right before it; then it is timed, then its
    clock."""
    gpu = Gpu()
    monkeypatch.setattr(torch, "cuda", gpu.stand_in())
    monkeypatch.setattr(torch, "mm", lambda *_, out: gpu.work("product", 0.2))
    monkeypatch.setattr(times, "PRODUCT", 4)

    def measure(call: Callable[[], object], *_: Any) -> Any:
        call()
        return SimpleNamespace(median_ms=0.2)

    monkeypatch.setattr(times, "measure", measure)
    made = itertools.count()

    def runner(bench: Any, call: Any) -> Callable[[], object]:
        ms = 9.0 if next(made) == 3 else 3.0  # in one burst the clock is another one
        return lambda: gpu.work("call", ms)

    monkeypatch.setattr(times.Bench, "runner", runner)
    cuda = SimpleNamespace(type="cuda")
    bench = times.Bench(cuda, torch.bfloat16, cases.TINY, 5)  # type: ignore[arg-type]
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device, dtype: randn(*size, dtype=dtype))
    calls = [cases.round_call((n, 1), 64) for n in (4096, 262144)]
    bench.time(calls)
    assert bench.known == {cases.name_of(call): pytest.approx(3.0) for call in calls}
    assert bench.clocks == {cases.name_of(call): pytest.approx(2000.0) for call in calls}
    assert gpu.log[:2] == ["call", "call"], "each call is made once before any is timed"
    assert next(made) == 2 + times.BURSTS + 1, "only the short call is timed anew"
    first = gpu.log[gpu.log.index("wait") - 200 :]
    beside, head = round(times.LOAD_MS / 0.2), round(times.HEAD_MS / 0.2)
    ready = first[: first.index("wait")]
    assert ready[-beside - 1 :] == ["beside"] + ["product"] * beside
    behind = first[first.index("wait") + 1 : first.index("sync")]
    timed = ["mark"] + ["call", "mark"] * bench.times(calls[0].attention_flops)
    own = ["call"] * times.OWN
    assert behind == ["product"] * head + own + timed + ["watch", "mark"]


def test_a_run_and_its_replay(tmp_path: Path) -> None:
    """On small calls and a CPU; the replay of what was kept says the same."""

    def arguments(name: str) -> list[str]:
        files = ["--out", str(tmp_path / f"{name}.csv")]
        files += ["--table", str(tmp_path / f"{name}_table.csv")]
        return ["--tiny", "--device", "cpu", "--repeats", "1", *files]

    def rows(name: str) -> list[dict[str, str]]:
        return list(csv.DictReader((tmp_path / f"{name}.csv").open(encoding="utf-8")))

    kept = tmp_path / "times.json"
    script = str(TOOLS / "measure_planner.py")
    command = [sys.executable, script, *arguments("first"), "--times", str(kept)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(TOOLS.parents[1])
    subprocess.run(command, check=True, capture_output=True, env=environment)
    first = rows("first")
    assert len(first) == len({(row["model"], row["pattern"], row["parameters"]) for row in first})
    assert all(float(row["measured_ms"]) > 0 for row in first) and len(first) == 30
    assert set(json.loads(kept.read_text())) == {"machine", "times", "clocks_mhz"}
    measure_planner.main([*arguments("again"), "--replay", str(kept)])
    assert rows("again") == first
    tables = [(tmp_path / f"{name}_table.csv").read_text() for name in ("first", "again")]
    assert tables[0] == tables[1]


def test_the_clock_of_a_call_is_that_of_the_middle_one() -> None:
    """It is read behind the last one; what it rose meanwhile is taken off."""
    bench = times.Bench(torch.device("cpu"), torch.float32, cases.FULL, 7)
    call = cases.round_call((8192, 16), 64)
    assert bench.mhz(call, STEADY) == 1000.0, "nobody watched"
    name = cases.name_of(call)
    bench.known[name], bench.clocks[name] = 2.0, 1800.0
    ahead, timed = times.OWN, bench.times(call.attention_flops)
    last = bench.reading(call)
    assert (last.mhz, last.ms) == (1800.0, 2.0 * (ahead + timed))
    assert last.kflops == pytest.approx(call.attention_flops / (2e-3 * 1800e6) / 1e3)
    clock = Clock(busy=1500.0, free=1900.0, lag=0.0, settling=30.0, cycle=0.1, kflop=0.0)
    risen = [1900 - 400 * math.exp(-2.0 * n / 30) for n in (ahead + timed / 2, ahead + timed)]
    assert bench.mhz(call, clock) == pytest.approx(1800 * risen[0] / risen[1])
