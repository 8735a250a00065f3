"""Compare all patterns on the demo model: how close to dense they stay at equal launched density.

    python samples/tools/measure_patterns.py --out samples/results/patterns_demo.csv

Every prompt is generated dense, then with each pattern at each launched density (PSNR and SSIM are
those of the pair with the same prompt and seed). A pattern's one free parameter is searched in the
plans that the calls would get; one that has no plan within 15 % of a density gets a row that says
how near it comes. Calls of clips this small would not pay, so the break-even test is off, and that
every planned call ran sparse is checked in the report of the run. Rows are written one by one, the
first density first, so that a run that was cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from pattern_families import FAMILIES, Family
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dit_accel import api
from dit_accel.bench.machine import machine
from dit_accel.cli import runtime
from dit_accel.compare.metrics import choose_metrics
from dit_accel.compare.prompts import read_prompts
from dit_accel.engine.profile import Profile, Rule
from dit_accel.engine.route import make_route
from dit_accel.errors import unknown
from dit_accel.kernels.patterns import Pattern, pattern
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout
from dit_accel.metrics import psnr
from dit_accel.models.find import find_model

PROMPTS = Path(__file__).parents[1] / "prompts" / "demo.txt"
DENSITIES = (0.3, 0.2, 0.5)
WITHIN, AGREE = 0.15, 0.03
"""How far a plan may be from the density that is asked for, and a run from its plan."""
COARSE, FINE = 16, 256
"""The free parameter is tried at sixteenths, then between two of them, down to 1/256."""
GUIDANCE, BRANCHES = 2.5, 2
TINY = {"prompts": 1, "steps": 2, "frames": 9, "size": 96}
COLUMNS = (
    "name", "compute", "parameters", "target", "launched_density", "kept_density", "note",
    "psnr_median", "psnr_min", "ssim_median", "ssim_min", "adherence", "clips", "steps",
    "dense_steps", "dense_layers", "frames", "size", "tokens", "backend", "sparse_calls",
    "dense_calls",
)  # fmt: skip


@dataclass
class Search:
    """Launched densities of a family's patterns, as the calls would have them."""

    family: Family
    bench: Bench
    densities: dict[float, float] = field(default_factory=dict)

    def density(self, x: float) -> float:
        """At one value of the free parameter, in (0, 1]."""
        if x not in self.densities:
            plan, backend = self.bench.plan(self.family.make(x))
            self.densities[x] = plan.launched_density(backend)
        return self.densities[x]

    def nearest(self, target: float) -> tuple[float, float]:
        """(value, density) that comes nearest to `target` by ratio.

        Densities need not rise with the value, since tiles are chosen anew for each: every pair of
        neighbouring sixteenths that has the target in between is searched.
        """
        coarse = [i / COARSE for i in range(1, COARSE + 1)]
        for low, high in zip(coarse, coarse[1:], strict=False):
            if (self.density(low) - target) * (self.density(high) - target) < 0:
                self._bisect(low, high, target)
        found = self.densities
        return min(found.items(), key=lambda item: max(item[1] / target, target / item[1]))

    def _bisect(self, low: float, high: float, target: float) -> None:
        rising = self.density(low) < target
        while high - low > 1 / FINE:
            middle = (low + high) / 2
            if (self.density(middle) < target) == rising:
                low = middle
            else:
                high = middle


@dataclass
class Bench:
    """The demo model, what it is asked for, and how its attention is set."""

    pipe: Any
    prompts: list[str]
    frames: int
    size: int
    steps: int
    dense_steps: int = 0
    dense_layers: str = ""
    backend: str | None = None

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        self.enable(pattern("full"))
        session = api.session_of(self.pipe)
        grid = session.adapter.grid(self.pipe, self.size, self.size, self.frames)
        self.layout = TokenLayout(grid)
        model = self.pipe.transformer
        heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
        shape = (len(self.prompts), self.layout.length, heads, dim)
        self._query = torch.empty(shape, dtype=model.dtype, device=model.device)

    def plan(self, rule: Pattern) -> tuple[BlockPlan, str]:
        """The plan of a call, and the backend that runs it."""
        route = make_route(self.layout, rule, (self._query,) * 3)
        if route.reason is not None:
            raise SystemExit(f"{rule.name}: {route.backend}: {route.reason}")
        return route.plan, route.backend

    def enable(self, rule: Pattern | None) -> None:
        """Set all self-attention to a pattern, but the dense steps and layers; None is dense."""
        rules: list[Rule] = []
        if rule is not None:
            rules.append(Rule(steps=(self.dense_steps / self.steps, 1.0), compute=rule))
        if rule is not None and self.dense_layers:
            rules.append(Rule(layers=self.dense_layers, compute="dense"))
        profile = Profile("measured", rules=tuple(rules), breakeven=False)
        self.pipe.enable_sparse_attention(profile, strict=True, backend=self.backend)

    def clips(self) -> list[np.ndarray]:
        """One clip a prompt, [T, H, W, 3] uint8; prompt number i has seed i."""
        out = self.pipe(
            prompt=self.prompts,
            height=self.size,
            width=self.size,
            num_frames=self.frames,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(i) for i in range(len(self.prompts))],
            output_type="np",
        )
        return [(clip.clip(0, 1) * 255).round().astype(np.uint8) for clip in out.frames]

    def receipt(self) -> dict[str, Any]:
        """What the report says of self-attention; SystemExit unless all that was planned ran."""
        session = api.session_of(self.pipe)
        keys = [bound.site for bound in session.sites if bound.site.kind == "self"]
        wanted = BRANCHES * sum(
            session.policy.decide(key, "cond", step, self.steps).compute is not None
            for key in keys
            for step in range(self.steps)
        )
        found = self.pipe.sparse_attention_report().to_dict()["self"]
        total = BRANCHES * self.steps * len(keys)
        if (found["sparse"], found["calls"]) != (wanted, total):
            raise SystemExit(f"{wanted} of {total} calls were planned sparse; the report: {found}")
        return found


@dataclass
class Judge:
    """Compares clips with the dense ones of the same prompts and seeds."""

    prompts: list[str]
    dense: list[np.ndarray]

    def __post_init__(self) -> None:
        self._measures = choose_metrics(("ssim", "adherence"), demo=True)
        self._measures.of(self.dense[0], self.dense[0], self.prompts[0])  # loads the checker

    def columns(self, clips: list[np.ndarray]) -> dict[str, Any]:
        """Medians and worst clips; adherence is the mean of what could be judged."""
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(self._one, clips, self.dense, self.prompts))
        found = {name: [v for row in rows if (v := row[name]) is not None] for name in rows[0]}
        result: dict[str, Any] = {"clips": len(clips)}
        for name in ("psnr", "ssim"):
            result[f"{name}_median"] = round(statistics.median(found[name]), 4)
            result[f"{name}_min"] = round(min(found[name]), 4)
        adherence = found["adherence"]
        result["adherence"] = round(statistics.mean(adherence), 4) if adherence else ""
        return result

    def _one(self, clip: np.ndarray, dense: np.ndarray, prompt: str) -> dict[str, float | None]:
        values, _ = self._measures.of(clip, dense, prompt)
        return {"adherence": None, **values, "psnr": psnr(list(clip), list(dense))}


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    runtime.quiet()
    names = options.patterns.split(";") if options.patterns else list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            raise SystemExit(str(unknown("pattern", name, FAMILIES)))
    device = runtime.pick_device(options.device)
    pipe = runtime.load(find_model("demo"), WanPipeline, runtime.pick_dtype(None, device)).to(
        device
    )
    prompts = read_prompts(str(PROMPTS))[: options.prompts]
    bench = Bench(
        pipe, prompts, options.frames, options.size, options.steps, options.dense_steps,
        options.dense_layers, options.backend,
    )  # fmt: skip
    here = machine(device).columns()
    rows: list[dict[str, Any]] = []
    begin = time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *here])
            writer.writeheader()
            for row in measured(bench, [FAMILIES[name] for name in names], options.densities):
                writer.writerow(row | here)
                file.flush()
                rows.append(row)
                print(f"{time.perf_counter() - begin:6.0f} s  {line(row)}", flush=True)
    finally:
        Console(width=200).print(table(rows), highlight=False)


def measured(
    bench: Bench, families: list[Family], densities: tuple[float, ...]
) -> Iterator[dict[str, Any]]:
    """Rows: dense, the whole attention on the sparse kernel, then every pattern by density."""
    bench.enable(None)
    judge = Judge(bench.prompts, bench.clips())
    yield row_of(bench, "dense", None, "", judge.columns(judge.dense))
    yield row_of(bench, "full", pattern("full"), 1.0, run(bench, judge, pattern("full"), 1.0))
    searches = [Search(family, bench) for family in families]
    done: dict[bytes, tuple[str, dict[str, Any]]] = {}
    for target in densities:
        for search in searches:
            x, density = search.nearest(target)
            name, rule = search.family.name, search.family.make(x)
            plan, _ = bench.plan(rule)
            same, found = done.get(key := fingerprint(plan), ("", {}))
            if abs(density / target - 1) > WITHIN:
                found = unreached(search, density)
            elif same:
                found = found | {"note": f"the same blocks as {same}"}
            else:
                found = run(bench, judge, rule, density)
                done[key] = name, found
            yield row_of(bench, name, rule, target, found)


def fingerprint(value: Any) -> bytes:
    """Equal for plans that make the same calls: patterns may come to the same blocks."""
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().tobytes()
    if dataclasses.is_dataclass(value):
        parts = [fingerprint(getattr(value, f.name)) for f in dataclasses.fields(value)]
        return hashlib.sha256(b"|".join(parts)).digest()
    return repr(value).encode()


def run(bench: Bench, judge: Judge, rule: Pattern, density: float) -> dict[str, Any]:
    """What a pattern, planned with `density`, gives; what it launched is from the report."""
    bench.enable(rule)
    clips = bench.clips()
    receipt = bench.receipt()
    found = {key: round(receipt[key], 4) for key in ("launched_density", "kept_density")}
    found |= {"backend": " ".join(receipt["backends"]), "sparse_calls": receipt["sparse"]}
    found |= {"dense_calls": receipt["dense"]}
    if abs(receipt["launched_density"] / density - 1) > AGREE:
        found["note"] = f"planned with density {density:.4f}"
    return found | judge.columns(clips)


def unreached(search: Search, density: float) -> dict[str, Any]:
    low, high = min(search.densities.values()), max(search.densities.values())
    note = f"not run: launches {low:.3f} to {high:.3f}, the nearest is {density:.3f}"
    return {"launched_density": round(density, 4), "note": note}


def row_of(
    bench: Bench, name: str, rule: Pattern | None, target: float | str, found: dict[str, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {key: getattr(bench, key) for key in ("steps", "frames", "size")}
    row |= {"dense_steps": bench.dense_steps, "dense_layers": bench.dense_layers}
    row |= {"name": name, "target": target, "tokens": bench.layout.length}
    if rule is not None:
        row |= {"compute": rule.name, "parameters": rule.describe()}
    return row | found


def line(row: dict[str, Any]) -> str:
    return f"{row['target']!s:>4} {row['name']:34} {row['psnr_median']} {row['note']}"


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows by density, the highest median PSNR first."""
    shown = Table(title="Clips against dense, at equal launched density")
    columns = ["target", "name", "launched_density", "kept_density", "psnr_median", "psnr_min"]
    columns += ["ssim_median", "ssim_min", "adherence", "note"]
    for column in columns:
        shown.add_column(column.replace("_", " "))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    for target in sorted(targets, key=lambda t: float(t or 2)):
        own = [row for row in rows if row["target"] == target]
        for row in sorted(own, key=lambda row: -float(row["psnr_median"] or 0)):
            shown.add_row(*(escape(str(row[column])) for column in columns))
        shown.add_section()
    return shown


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8, help="how many of prompts/demo.txt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--size", type=int, default=192, help="height and width in pixels")
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--patterns", help="names of pattern_families.py, with ; in between")
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense")
    parser.add_argument("--dense-layers", default="", help="as `layers` of a profile, such as 0,-1")
    parser.add_argument("--backend", help="default: the best for the device")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--tiny", action="store_true", help="one small clip of two steps")
    options = parser.parse_args(arguments)
    if options.tiny:
        vars(options).update(TINY)
    if not 0 <= options.dense_steps < options.steps:
        parser.error(f"--dense-steps: expected 0 to {options.steps - 1}")
    try:
        options.densities = tuple(float(part) for part in options.densities.split(","))
    except ValueError:
        parser.error(f"--densities: expected numbers such as 0.3,0.2, got {options.densities!r}")
    return options


if __name__ == "__main__":
    main()
