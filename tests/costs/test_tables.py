"""Cost tables: how they are read, what they predict, how they are fitted."""

from __future__ import annotations

import csv
import heapq
import itertools
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).parents[2] / "samples" / "tools"
sys.path.insert(0, str(TOOLS))

import measure_planner  # noqa: E402
from planner_fit import Sample, errors, fit  # noqa: E402

from dit_accel.costs.clock import STEADY  # noqa: E402
from dit_accel.costs.files import COLUMNS, TABLES, gpu_key, shipped_gpus  # noqa: E402
from dit_accel.costs.table import Constants, cost_table, parse_table  # noqa: E402
from dit_accel.errors import DitAccelError  # noqa: E402
from dit_accel.kernels.hopper.lists import LIST, work_lists  # noqa: E402
from dit_accel.kernels.patterns import Pattern, pattern, plan_for  # noqa: E402
from dit_accel.kernels.plan import BlockPlan  # noqa: E402
from dit_accel.layout import TokenLayout  # noqa: E402
from dit_accel.planner.work import busiest, sparse_ms, work_of  # noqa: E402

TRUE = Constants(5000.0, 900.0, 400.0, 430.0, 700.0, {"disc": 700.0, "neighborhood": 800.0})


def table_rows(**changes: float) -> list[dict[str, str]]:
    values = {
        ("machine", 0, "programs"): 132, ("machine", 0, "linear_tflops"): 600,
        ("machine", 0, "copy_gbs"): 4000,
        **{("machine", 0, f"clock_{name}"): value for name, value in asdict(STEADY).items()},
        ("dense", 128, "launch"): 8000, ("dense", 128, "row"): 500, ("dense", 128, "whole"): 380,
        ("triton", 128, "launch"): 20000, ("triton", 128, "row"): 1500,
        ("triton", 128, "whole"): 600, ("triton", 128, "short"): 640,
        ("triton", 128, "partial"): 1200, ("triton", 128, "partial_disc"): 900,
        ("hopper", 128, "launch"): 10000, ("hopper", 128, "row"): 900,
        ("hopper", 128, "whole"): 400, ("hopper", 128, "short"): 430,
    }  # fmt: skip
    return [
        dict(zip(COLUMNS, (b, str(d), name, str(changes.get(name, v)), "", ""), strict=True))
        for (b, d, name), v in values.items()
    ]


def longest_first(work: np.ndarray, programs: int) -> float:
    """The busiest of `programs` when each item goes to the idlest, longest items first."""
    loads = [0.0] * programs
    for item in sorted(work.tolist(), reverse=True):
        heapq.heapreplace(loads, loads[0] + item)
    return max(loads)


@pytest.mark.parametrize("count", [1, 131, 132, 133, 1000, 5000])
def test_the_busiest_program_is_about_that_of_a_greedy_deal(count: int) -> None:
    work = np.random.default_rng(count).uniform(1, 6, count)
    assert busiest(work, 132) == pytest.approx(longest_first(work, 132), rel=0.12)
    assert busiest(work, 132) >= max(work.sum() / 132, work.max()) * 0.999


def predicted(plan: BlockPlan, known: Constants, heads: int) -> float:
    """Cycles, item by item."""
    rule = "" if plan.mask is None else plan.mask.name
    work = []
    for block in range(plan.shape.q_blocks):
        lists = plan.visits
        bare, full, count = (int(x[0, 0, block]) for x in (lists.whole, lists.full, lists.count))
        partial = count - full
        masked = known.rules.get(rule, known.partial)
        work.append(known.row + bare * known.whole + (full - bare) * known.short + partial * masked)
    return known.launch + busiest(np.array(work * heads), 132)


RULES = [
    pattern("full"),
    pattern("sliding_tile", window={"fraction": [0.6, 0.5, 0.5]}),
    pattern("neighborhood", window={"fraction": [0.5, 0.5, 0.5]}, exact=True),
    pattern("disc", radius={"tokens": 6}, exact=True),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_predictions_are_sums_over_items(rule: Pattern) -> None:
    table = parse_table("x", table_rows())
    plan = plan_for(TokenLayout((9, 30, 44), after=60), rule, "cpu", layout_kind="boxes")
    if plan.shape.block_q == 128:
        expected = predicted(plan, table.of("triton", 128), 12) / 1e6
        assert sparse_ms(table, plan, "triton", 1, 12, 128) == pytest.approx(expected)
    assert work_of(plan, "triton", 2, 12, 132).total[0] == 24 * plan.shape.q_blocks
    length = 128 * 100
    dense = (8000 + 12 * 100 * (500 + 380 * 100) / 132) / 1e6
    assert table.dense_ms(1, 12, length, 128) == pytest.approx(dense)


def test_small_blocks_cost_their_share() -> None:
    layout = TokenLayout((1, 64, 64))
    rule = pattern("sliding_tile", window={"fraction": [1.0, 0.35, 0.35]})
    plan = plan_for(layout, rule, "cpu", layout_kind="gather")
    assert plan.shape.block_q == 64
    total = work_of(plan, "triton", 1, 1, 132).total
    assert total[0] == plan.shape.q_blocks / 2
    assert total[1:].sum() == int(plan.visits.full.sum()) / 4


def busiest_as_dealt(plan: BlockPlan, known: Constants, heads: int, programs: int) -> float:
    """Cycles of the Hopper kernel's busiest program, from the lists that it is given."""
    lists = work_lists(plan, 1, heads, programs)
    starts = [*lists.work[:, 0].tolist(), len(lists.items)]
    mask = plan.mask
    prices = (known.whole, known.short, 0.0 if mask is None else known.rules[mask.name])
    full, bare = plan.visits.full, plan.visits.whole
    partial = plan.visits.count - full
    if plan.shape.mixed:  # boxes twice as high take 0.08 longer
        assert plan.shape.box is not None
        partial = partial * (1 + 0.08 * (math.log2(plan.shape.box[1]) - 3))
    visits = torch.stack([bare, full - bare, partial], -1).view(-1, 3).double()
    spent = known.row + visits @ torch.tensor(prices).double()
    loads = [
        float(spent[lists.items[begin:end, LIST].long()].sum())
        for begin, end in itertools.pairwise(starts)
    ]
    return known.launch + max(loads)


@pytest.mark.parametrize("text", [0, 60])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_hopper_calls_take_as_long_as_their_busiest_program(rule: Pattern, text: int) -> None:
    rows = table_rows() + [
        dict(zip(COLUMNS, ("hopper", "128", f"partial_{name}", "900", "", ""), strict=True))
        for name in ("disc", "neighborhood")
    ]
    table = parse_table("x", rows)
    plan = plan_for(TokenLayout((9, 30, 44), after=text), rule, "cpu", layout_kind="boxes")
    expected = busiest_as_dealt(plan, table.of("hopper", 128), 7, 132) / 1e6
    assert sparse_ms(table, plan, "hopper", 1, 7, 128) == pytest.approx(expected)


def test_fits_follow_the_deal_of_the_hopper_kernel() -> None:
    """From times of calls whose masked tiles are dealt unevenly: its constants, not their mean."""
    samples = []
    for heads in (2, 5):
        for grid in ((5, 30, 44), (9, 24, 40), (16, 45, 53)):
            for rule in RULES:
                plan = plan_for(TokenLayout(grid), rule, "cpu", layout_kind="boxes")
                ms = busiest_as_dealt(plan, TRUE, heads, 132) / 1e6
                samples.append(Sample(ms, 1, heads, plan.blocks.q_length, plan, "hopper"))
    found = fit(samples, 132)
    assert found.whole == pytest.approx(TRUE.whole, rel=0.02)
    assert found.rules == pytest.approx(dict(TRUE.rules), rel=0.02)
    assert max(map(abs, errors(samples, found, 132))) < 0.01
    as_if_free = [Sample(s.ms, 1, s.heads, s.length, s.plan) for s in samples]
    assert max(map(abs, errors(as_if_free, found, 132))) > 0.03


def test_token_rules_have_prices_of_their_own() -> None:
    known = Constants(0.0, 0.0, 400.0, 430.0, 800.0, {"disc": 700.0, "radial": 600.0, "a+b": 9.0})
    assert known.masked(()) == known.masked(["unknown"]) == 800.0
    assert known.masked(["disc"]) == 700.0
    assert known.masked(["a", "b"]) == 9.0, "measured together"
    assert known.masked(["disc", "radial"]) == 900.0, "both, the pair's own step counted once"
    assert known.prices(["disc"]).tolist() == [0.0, 400.0, 430.0, 700.0]


def test_head_dims_between_and_beyond() -> None:
    table = parse_table("x", table_rows())
    assert table.of("hopper", 64) == table.of("hopper", 128)
    assert table.of("hopper", 256).whole == 2 * table.of("hopper", 128).whole
    assert table.of("hopper", 256).launch == table.of("hopper", 128).launch
    assert table.of("hopper", 128).partial == table.of("hopper", 128).short == 430
    with pytest.raises(DitAccelError, match="unknown backend in the table of x 'tritn'"):
        table.of("tritn", 128)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("h100", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "amdinstinctmi300x"),
    ],
)
def test_gpus_by_name(name: str, key: str) -> None:
    assert gpu_key(name) == key


def test_tables_are_found_and_stand_in(tmp_path: Path) -> None:
    with (tmp_path / "h200.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table_rows())
    own = cost_table("NVIDIA H200", tmp_path)
    assert own is not None and own.gpu == "h200" and own.stands_for == "" and own.programs == 132
    other = cost_table("h100", tmp_path)
    assert other is not None and (other.gpu, other.stands_for) == ("h200", "h100")
    assert own.backends == ["triton", "hopper"]
    assert cost_table("a100", tmp_path) is None
    assert shipped_gpus(tmp_path) == ["h200"]
    with pytest.raises(DitAccelError, match="table of y: no value for 'whole'"):
        parse_table("y", [row for row in table_rows() if row["constant"] != "whole"])


def test_fits_find_the_constants() -> None:
    """From times that follow the model, with a little noise."""
    noise = np.random.default_rng(0)
    samples = []
    for heads in (4, 16):
        for length in (2048, 4096, 8192):
            layout = TokenLayout((1, 1, length))
            plan = plan_for(layout, pattern("full"), "cpu")
            ms = predicted(plan, TRUE, heads) / 1e6
            samples.append(Sample(ms, 1, heads, length, plan))
        for grid in ((5, 30, 44), (9, 24, 40)):
            for rule in RULES[1:]:
                plan = plan_for(TokenLayout(grid), rule, "cpu", layout_kind="boxes")
                if plan.shape.block_q == 128:
                    ms = predicted(plan, TRUE, heads) / 1e6 * noise.normal(1, 0.01)
                    samples.append(Sample(ms, 1, heads, plan.blocks.q_length, plan))
    found = fit(samples, 132)
    for name in ("whole", "short"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.1)
    assert found.rules["neighborhood"] == pytest.approx(800, rel=0.1)
    assert found.partial == max(found.rules.values())
    for sample in samples:
        assert sample.plan is not None
        again = predicted(sample.plan, found, sample.heads) / 1e6
        assert again == pytest.approx(sample.ms, rel=0.05)


def test_dense_fits() -> None:
    samples = [
        Sample((9000 + h * n / 128 * (700 + 350 * n / 128) / 132) / 1e6, 1, h, n)
        for n in (2048, 8192, 32768)
        for h in (4, 16)
    ]
    found = fit(samples, 132)
    assert found.launch == pytest.approx(9000, rel=0.01)
    assert (found.row, found.whole) == (pytest.approx(700, rel=0.01), pytest.approx(350, rel=0.01))


@pytest.mark.parametrize("gpu", shipped_gpus() or [pytest.param("", marks=pytest.mark.skip)])
def test_shipped_tables_make_sense(gpu: str) -> None:
    table = cost_table(gpu, TABLES)
    assert table is not None and table.backends
    assert table.programs > 1 and table.linear_tflops > 1 and table.copy_gbs > 100
    for (_, dim), known in table.constants.items():
        assert dim in (64, 128) and known.launch >= 0 and known.whole > 0
        assert known.whole <= 1.1 * known.short and known.whole <= known.partial


RESULTS = sorted((Path(__file__).parents[2] / "samples" / "results").glob("planner_*.csv"))


@pytest.mark.parametrize("path", RESULTS or [pytest.param(None, marks=pytest.mark.skip)])
def test_predictions_were_right(path: Path) -> None:
    """The committed comparison: of the calls that a pipeline would make, 20 or more pairs, all
    within 15 %."""
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    own = [row for row in rows if row["chosen"] == "True"]
    pairs = {(row["model"], row["pattern"], row["parameters"]) for row in own}
    near = [row for row in own if abs(float(row["error"])) <= 0.15]
    assert len(own) == len(pairs) and len(near) == len(own) >= 20


def test_the_comparison_follows_from_the_committed_times(tmp_path: Path) -> None:
    """Fitted again from what was measured: the shipped table, and the committed predictions."""
    samples = Path(__file__).parents[2] / "samples"
    replay = [
        "--replay", str(samples / "results" / "planner_times_h200.json"),
        "--out", str(tmp_path / "pairs.csv"), "--table", str(tmp_path / "h200.csv"),
    ]  # fmt: skip
    measure_planner.main(replay)
    for made, kept in (
        (tmp_path / "h200.csv", TABLES / "h200.csv"),
        (tmp_path / "pairs.csv", samples / "results" / "planner_h200.csv"),
    ):
        again, committed = (list(csv.DictReader(path.open())) for path in (made, kept))
        assert len(again) == len(committed)
        for row, other in zip(again, committed, strict=True):
            for name, value in other.items():
                if name in ("value", "predicted_ms"):
                    assert float(row[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-3)
                elif name != "error":
                    assert row[name] == value
