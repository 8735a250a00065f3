"""The comparison of patterns on the demo model: its search, its checks and its rows."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).parents[2] / "samples" / "tools"
sys.path.insert(0, str(TOOLS))

import measure_patterns as script  # noqa: E402
from pattern_families import FAMILIES, Family  # noqa: E402

from dit_accel.engine.profile import Profile, Rule  # noqa: E402
from dit_accel.kernels.patterns import PATTERNS, pattern, plan_for  # noqa: E402
from dit_accel.layout import TokenLayout  # noqa: E402


class Shaped:
    """Stands in for the bench: a plan whose density is a given function of the parameter."""

    def __init__(self, density: Any) -> None:
        self.density = density
        self.asked: list[float] = []

    def plan(self, x: Any) -> tuple[Any, str]:
        self.asked.append(x)
        return SimpleNamespace(launched_density=lambda backend: self.density(x)), "torch"


def searched(density: Any, target: float) -> tuple[float, float, int]:
    bench: Any = Shaped(density)
    family: Any = Family("", lambda x: x)
    return *script.Search(family, bench).nearest(target), len(bench.asked)


def test_search_finds_the_parameter_of_a_smooth_density():
    x, density, asked = searched(lambda x: x**2, 0.3)
    assert abs(x - math.sqrt(0.3)) <= 1 / 256 and density == x**2
    assert asked <= 24


def test_search_finds_a_narrow_step_and_one_below_a_fall():
    def steps(x: float) -> float:
        return 0.1 if x < 0.53 else 0.31 if x < 0.54 else 0.9

    x, density, _ = searched(steps, 0.3)
    assert density == 0.31 and 0.53 <= x < 0.54

    def falling(x: float) -> float:  # passes 0.3 going down, nowhere going up
        return 0.35 + 0.4 * x if x < 0.3 else 0.6 - x if x < 0.5 else 0.05 if x < 0.7 else 0.9

    _, density, _ = searched(falling, 0.3)
    assert abs(density - 0.3) < 0.01


def test_search_gives_the_nearest_by_ratio_where_a_density_is_out_of_reach():
    assert searched(lambda x: 0.75 + x / 4, 0.3)[1] == 0.75 + 1 / 64
    # 0.2 / 0.12 is farther than 0.3 / 0.2.
    assert searched(lambda x: 0.12 if x < 0.5 else 0.3, 0.2)[1] == 0.3


def test_families_hold_every_pattern_and_reach_from_sparse_to_more():
    layout = TokenLayout((9, 17, 19))
    seen = set()
    for family in FAMILIES.values():
        few, many = (family.make(x) for x in (1 / 16, 1.0))
        parts = [many, *getattr(many, "union", ()), *(p for _, p in getattr(many, "groups", ()))]
        seen |= {part.name for part in parts}
        least, most = (plan_for(layout, p, "cpu", 4).kept_density() for p in (few, many))
        assert least < most or "radial" in family.name, family.name  # too small a grid for radial
    assert seen >= set(PATTERNS) - {"full"}


def test_fingerprints_tell_calls_apart_and_not_names():
    layout = TokenLayout((4, 16, 16))

    def mark(name: str, **parameters: Any) -> bytes:
        return script.fingerprint(pattern(name, **parameters).build(layout, "cpu"))

    near = {"fraction": [1.0, 0.375, 0.375]}
    tile = {"tile": [4, 4, 4]}
    base = mark("neighborhood", window=near, **tile)
    # 6 and 7 of 16 tokens: in tiles of 4 the same blocks, masked not the same.
    wider = {"fraction": [1.0, 0.4375, 0.4375]}
    assert base == mark("neighborhood", window=wider, **tile)
    assert mark("neighborhood", window=near, exact=True, **tile) != base
    assert mark("neighborhood", window=near, exact=True, **tile) != mark(
        "neighborhood", window=wider, exact=True, **tile
    )
    assert mark("neighborhood", window={"fraction": [1.0, 0.1, 0.375]}, **tile) != base
    assert mark("neighborhood", window=near, tile=[2, 8, 4]) != base


def test_a_call_that_ran_dense_unplanned_stops_the_measurement(tiny_wan):
    made = tiny_wan
    made.pipe.enable_sparse_attention(
        Profile("p", rules=(Rule(compute=pattern("sliding_tile")),), breakeven=False)
    )
    bench = object.__new__(script.Bench)
    bench.pipe, bench.steps = made.pipe, made.steps
    made.run()
    assert bench.receipt()["sparse"] == made.self_sites * made.branches * made.steps
    # One layer's calls meet a mask, which no plan covers.
    module = made.pipe.transformer.blocks[1].attn1
    forward = module.forward
    mask = torch.zeros(1, 1, 1, 1)
    module.forward = lambda hidden, text, _, rotary: forward(hidden, text, mask, rotary)
    made.run()
    with pytest.raises(SystemExit, match="were planned sparse"):
        bench.receipt()


def test_judge_compares_each_clip_with_its_own_dense_one():
    random = np.random.default_rng(0)
    dense = [random.integers(0, 255, (5, 32, 32, 3), dtype=np.uint8) for _ in range(3)]
    levels = (1, 4, 2)
    clips = [clip + np.uint8(level) for clip, level in zip(dense, levels, strict=True)]
    prompt = "a large red circle moves right slowly over a plain blue background"
    found = script.Judge([prompt] * 3, dense).columns(clips)
    errors = sorted(
        float(np.mean((a.astype(float) - b) ** 2)) for a, b in zip(clips, dense, strict=True)
    )
    worst, median = (10 * math.log10(255**2 / errors[i]) for i in (2, 1))
    assert found["psnr_min"] == pytest.approx(worst, abs=1e-3)
    assert found["psnr_median"] == pytest.approx(median, abs=1e-3)
    assert found["clips"] == 3 and found["ssim_min"] <= found["ssim_median"] <= 1


@pytest.mark.slow
def test_rows_of_a_tiny_run(tmp_path, capsys):
    out = tmp_path / "rows.csv"
    names = ["neighborhood, cube", "neighborhood, cube, exact", "radial"]
    script.main(
        ["--out", str(out), "--tiny", "--device", "cpu", "--densities", "0.5"]
        + ["--patterns", ";".join(names), "--dense-layers", "0"]
    )
    with out.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["dense", "full", *names]
    assert float(rows["full"]["psnr_median"]) > 60 and rows["full"]["launched_density"] == "1.0"
    assert "not run" in rows["radial"]["note"] and rows["radial"]["psnr_median"] == ""
    for name in names[:2]:
        row = rows[name]
        assert abs(float(row["launched_density"]) / 0.5 - 1) <= 0.15 and not row["note"]
        assert 5 < float(row["psnr_min"]) <= float(row["psnr_median"]) < 60
        # 8 layers but one, 2 branches, 2 steps.
        assert (row["sparse_calls"], row["dense_calls"]) == ("28", "4")
        assert row["torch"] == torch.__version__
    exact, whole = rows["neighborhood, cube, exact"], rows["neighborhood, cube"]
    assert float(exact["kept_density"]) < float(whole["kept_density"])
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_an_unknown_pattern_is_named(tmp_path):
    with pytest.raises(SystemExit, match="radial"):
        script.main(["--out", str(tmp_path / "x.csv"), "--patterns", "radiall"])
