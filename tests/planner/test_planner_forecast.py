"""Forecasts: which call, what plan, which times, and the pictures of it."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dit_accel
from dit_accel.costs.files import COLUMNS, no_table
from dit_accel.costs.table import CostTable, cost_table
from dit_accel.engine.profile import parse_profile
from dit_accel.errors import DitAccelError
from dit_accel.kernels.backends import BACKENDS
from dit_accel.kernels.computes import COMPUTES, compute
from dit_accel.kernels.hopper.lists import plan_obstacle
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.kernels.patterns.composite import PerHead
from dit_accel.kernels.reference import dense_mask
from dit_accel.kernels.selectors import Context, Selector
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.registry import PRESETS, adapter_for, adapter_of
from dit_accel.planner import forecast
from dit_accel.planner.diagnosis import diagnose
from dit_accel.planner.draw import KEPT, MASKED, QUERY, TEXT, block_mask, query_sees
from dit_accel.planner.forecast import breakeven_text
from dit_accel.planner.models import at_grid, subject, token_weights
from dit_accel.planner.outlook import kept_share, outlook
from dit_accel.planner.work import sparse_ms

CONSTANTS = {
    ("machine", 0): {
        "programs": 132,
        "linear_tflops": 600,
        "copy_gbs": 4000,
        "clock_busy": 1000,
        "clock_free": 1000,
        "clock_lag": 0,
        "clock_settling": 1,
        "clock_cycle": 1,
        "clock_kflop": 0,
    },
    ("dense", 128): {"launch": 8e3, "row": 500, "whole": 380},
    ("dense", 64): {"launch": 8e3, "row": 500, "whole": 250},
    ("triton", 128): {"launch": 5e4, "row": 1500, "whole": 600, "short": 640, "partial": 1200},
    ("triton", 64): {"launch": 5e4, "row": 1500, "whole": 400, "short": 420, "partial": 800},
    ("hopper", 128): {"launch": 2e4, "row": 900, "whole": 400, "short": 440, "partial": 900},
}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cost tables with one for the h200."""
    with (tmp_path / "h200.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for (backend, dim), values in CONSTANTS.items():
            for name, value in values.items():
                writer.writerow([backend, dim, name, value, "", ""])

    def own(gpu: str | None, folder: Path = tmp_path) -> CostTable | None:
        return cost_table(gpu or "h200", tmp_path)

    monkeypatch.setattr(forecast, "cost_table", own)
    monkeypatch.setattr("dit_accel.planner.diagnosis.cost_table", own)
    return tmp_path


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU, if it has any, nobody measured."""
    monkeypatch.setattr(forecast, "cost_table", lambda gpu: None)
    monkeypatch.setattr("dit_accel.planner.diagnosis.cost_table", lambda gpu: None)


@pytest.mark.parametrize(
    ("name", "grid", "text"),
    [
        ("wan-14b", (21, 45, 80), 0),
        ("wan-1.3b", (21, 30, 52), 0),
        ("hunyuan", (33, 45, 80), 256),
        ("cogvideox-5b", (13, 30, 45), 226),
        ("mochi", (28, 30, 53), 256),
        ("flux", (1, 64, 64), 512),
        ("ltx", (21, 16, 22), 0),
    ],
)
def test_known_models(name: str, grid: tuple[int, int, int], text: int) -> None:
    found = subject(name)
    assert found.layout.grid == grid and found.layout.before + found.layout.after == text
    assert subject("ltx-video", 480, 704, 121).layout.grid == (16, 15, 22)
    assert subject("wan", 480, 832, 81).layout.grid == (21, 30, 52)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "hunyuan", "cogvideox-5b", "ltx", "flux"])
def test_known_models_are_those_of_diffusers(name: str) -> None:
    """Heads, attention sites and weights against the transformer itself, without its weights."""
    import diffusers

    known = PRESETS[name]
    adapter = adapter_of(known.family)
    assert adapter is not None
    with torch.device("meta"):
        made = getattr(diffusers, adapter.transformers[0])(**{**known.config, **known.layers})
    assert adapter_for(made) == adapter
    assert (made.config.num_attention_heads, made.config.attention_head_dim) == (
        known.heads,
        known.head_dim,
    )
    sites = [site for site in adapter.modules(made) if site[3] == "self"]
    assert len(sites) == known.depth
    weights = token_weights(made, {site.blocks for site in adapter.sites})
    assert known.token_weights == pytest.approx(weights, rel=0.02)


def test_a_pipeline_s_own_configuration() -> None:
    """The demo model, by its folder's configuration."""
    found = subject("demo")
    assert found.layout.grid == (9, 24, 24) and found.family == "wan"
    assert subject("demo", 256, 256, 33).layout.grid == (9, 32, 32)
    assert found.heads * found.head_dim == found.width and found.layers > 1
    assert found.token_weights > 1e5


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        ("wan-14", {}, "Did you mean 'wan-14b'"),
        ("nosuch", {}, r"unknown model 'nosuch'\. Known: wan-1.3b, .*demo.* Hub id"),
        ("flux", {"frames": 9}, "frames: flux makes single images, got 9; leave frames out"),
        ("wan-14b", {"height": 8}, "smaller than a token"),
        (
            "wan-14b",
            {"height": 100_000_000},
            r"1280x100000000x81 is a call of 10,500,000,000 tokens; plans are made for at most "
            r"1,000,000\. The nearest that is not more is 1280x9520x81\.",
        ),
        ("wan-14b", {"height": 7200, "width": 12800}, r"is not more is 3488x3488x81\."),
        ("ltx", {"frames": 10**9}, r"704x512x1000000001 .* is not more is 704x512x22713\."),
        ("flux", {"height": 2**20, "width": 2**20}, r"is not more is 15984x15984x1\."),
        ("demo", {"frames": 10**7}, r"tokens; plans are made for at most 1,000,000\. The nearest"),
        ("no/such-model-here-at-all", {}, "no/such-model"),
    ],
)
def test_unknown_models_and_sizes(
    model: str, size: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DitAccelError, match=words):
        subject(model, **size)


@pytest.mark.parametrize("backend", ["hopper", "triton", "torch"])
def test_a_forecast_is_its_plan(backend: str, no_tables: None) -> None:
    window = {"fraction": [0.6, 0.5, 0.5]}
    cast = dit_accel.plan("wan-1.3b", window=window, backend=backend)
    rule = pattern("sliding_tile", window=window)
    kind = forecast.LAYOUT_KINDS[backend][0]
    plan = plan_for(TokenLayout((21, 30, 52)), rule, "cpu", layout_kind=kind)
    assert cast.launched == plan.launched_density(backend)
    assert cast.kept == plan.kept_density() and cast.bound == 1 / cast.launched
    tiling = rule.tiling(TokenLayout((21, 30, 52)), kind)
    assert cast.blocks == tiling.blocks == plan.shape.q_blocks
    assert cast.sparse_ms is cast.speedup is cast.breakeven is None
    assert "no table" in str(cast) and "assumed" not in str(cast)
    data = cast.to_dict()
    assert data["grid"] == (21, 30, 52) and "plan" not in data and data["verdict"]


def test_masked_pairs_are_counted_well() -> None:
    for name, params in (
        ("neighborhood", {"window": {"fraction": [0.5, 0.4, 0.4]}}),
        ("radial", {"decay": 0.3}),
        ("disc", {"radius": {"fraction": 0.3}}),
    ):
        rule = pattern(name, **params, exact=True)
        plan = plan_for(TokenLayout((7, 20, 24), after=9), rule, "cpu", layout_kind="gather")
        assert kept_share(plan) == pytest.approx(plan.kept_density(), rel=0.03)


def test_times_come_from_the_table(tables: Path) -> None:
    window = {"fraction": [0.6, 0.4, 0.4]}
    cast = dit_accel.plan("wan-14b", gpu="h100", window=window)
    table = cost_table("h200", tables)
    assert table is not None
    assert cast.backend == "hopper" and (cast.gpu, cast.measured_on) == ("h100", "h200")
    assert cast.sparse_ms == sparse_ms(table, cast.plan, "hopper", 1, 40, 128, moved=cast.moved)
    assert cast.dense_ms == table.dense_ms(1, 40, 75600, 128)
    assert cast.speedup is not None and 1 < cast.speedup < cast.bound
    assert cast.step_speedup is not None and 1 < cast.step_speedup < cast.speedup
    assert cast.breakeven is not None and cast.launched < cast.breakeven <= 1
    assert "pays" in cast.verdict and "numbers of the h200" in str(cast)
    slow = dit_accel.plan("wan-14b", gpu="h100", window=window, backend="triton")
    assert slow.sparse_ms is not None and slow.sparse_ms > cast.sparse_ms


def test_tokens_are_moved_where_boxes_waste_more(tables: Path) -> None:
    """The cheaper of boxes, which stay where they are, and tiles of any shape, which move."""
    table = cost_table("h200", tables)
    assert table is not None
    rule = pattern("sliding_tile", window={"fraction": [0.6, 0.35, 0.35]})
    for model in ("wan-1.3b", "wan-14b", "mochi"):
        what = subject(model)
        cast = dit_accel.plan(what, pattern=rule, gpu="h200", backend="hopper")
        plans = [plan_for(what.layout, rule, "cpu", layout_kind=k) for k in ("boxes", "gather")]
        own, other = (
            sparse_ms(table, plan, "hopper", 1, what.heads, 128, moved=plan.shape.box is None)
            for plan in plans
        )
        assert cast.sparse_ms == min(own, other) and cast.moved == (other < own)
        move = 8 * what.layout.length * what.width * 2 / 4000e6
        assert other == pytest.approx(
            sparse_ms(table, plans[1], "hopper", 1, what.heads, 128) + move
        )
    assert ("tokens moved" in str(cast)) == cast.moved


def test_what_cannot_pay_is_said_in_advance(tables: Path) -> None:
    """Densities at the break-even predict the dense time, and beyond it the verdict is no."""
    wide = dit_accel.plan("wan-1.3b", gpu="h200", window={"fraction": [1.0, 1.0, 0.98]})
    assert wide.speedup is not None and wide.speedup <= 1
    assert wide.verdict.startswith("cannot pay here: it launches 1")
    assert wide.breakeven is not None and wide.breakeven < wide.launched
    some = dit_accel.plan("flux", gpu="h200", window={"fraction": [1.0, 0.5, 0.5]})
    assert some.breakeven is not None and some.sparse_ms and some.dense_ms
    fixed = 2e4 / 1e6
    at = fixed + (some.sparse_ms - fixed) * some.breakeven / some.launched
    assert at == pytest.approx(some.dense_ms)


def test_a_given_tile_is_compared_with_the_best() -> None:
    cast = dit_accel.plan("wan-14b", tile=[4, 4, 4], backend="triton")
    assert cast.tile == (4, 4, 4) and cast.best_tile is not None
    best = dit_accel.plan("wan-14b", backend="triton")
    assert best.tile == cast.best_tile and best.launched == cast.best_launched
    assert best.best_tile is None and "best tile" in str(cast)


def test_bad_requests() -> None:
    with pytest.raises(DitAccelError, match="Did you mean 'sliding_tile'"):
        dit_accel.plan("wan-14b", pattern="sliding_tiles")
    with pytest.raises(DitAccelError, match="unknown backend 'tritn'. Did you mean 'triton'"):
        dit_accel.plan("wan-14b", backend="tritn")
    with pytest.raises(DitAccelError, match="give its parameters with its name"):
        dit_accel.plan("wan-14b", pattern=pattern("radial"), decay=0.3)
    cast = dit_accel.plan(at_grid((3, 4, 5), 2, 64))
    with pytest.raises(DitAccelError, match="0 <= h < 4, got 9; the nearest legal value is 3"):
        cast.draw("never.png", query=(0, 9, 0))
    with pytest.raises(DitAccelError, match="head: expected 0 to 1"):
        cast.draw("never.png", head=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": 5}, "model: expected a name .* got 5"),
        ({"model": None}, "model: expected a name .* got None"),
        ({"model": ["wan-14b"]}, "model: expected a name"),
        ({"height": "192"}, r"height: expected a whole number >= 1, got '192'\.$"),
        ({"width": math.nan}, r"width: expected a whole number >= 1, got nan\.$"),
        ({"height": 192.0}, r"height: .* got 192\.0; the nearest legal value is 192"),
        ({"width": 0}, "width: .* got 0; the nearest legal value is 1"),
        ({"height": -8}, "height: .* got -8; the nearest legal value is 1"),
        ({"height": True}, r"height: .* got True\.$"),
        ({"frames": 2.5}, r"frames: .* got 2\.5; the nearest legal value is 2"),
        ({"frames": 0}, "frames: .* got 0; the nearest legal value is 1"),
        ({"model": "demo", "frames": 0}, "frames: .* got 0"),
        ({"pattern": None}, "pattern: expected a table .* or a name .* got None"),
        ({"pattern": 5, "decay": 0.3}, "pattern: expected a table .* got 5"),
        ({"pattern": {"decay": 0.3}}, "pattern: expected a table"),
        ({"pattern": {"compute": "radal"}}, "pattern: .* Did you mean 'radial'"),
        ({"pattern": {"compute": "radial"}, "decay": 0.3}, "give its parameters with its name"),
        ({"pattern": "radial", "name": 3}, "unknown parameter of radial 'name'"),
        ({"pattern": "block_topj"}, "unknown compute 'block_topj'. Did you mean 'block_top"),
        ({"pattern": "block_topk", "densty": 1}, "block_topk 'densty'. Did you mean 'density'"),
        ({"pattern": "block_topk", "density": 2}, "density: .* the nearest legal value is 1"),
        ({"pattern": "block_topk", "density": 0}, "above 0 .* got 0; usual are 0.1 to 0.5"),
        ({"pattern": "block_topk", "lists": "share"}, "'share'. Did you mean 'shared'"),
        (
            {"pattern": "block_topk", "window": [3, 3, 3]},
            "of block_topk 'window'",
        ),
        ({"gpu": 5}, 'gpu: expected a name such as "h100", got 5'),
        ({"gpu": ["h100"]}, r"gpu: expected a name such as .* got \['h100'\]"),
        ({"backend": 5}, "unknown backend '5'"),
        ({"backend": ["triton"]}, "unknown backend .*Known: hopper, torch, triton"),
        ({"window": [10**400, 3, 3]}, "window.tiles: .* the nearest legal value is 2147483647"),
        ({"window": {"fraction": [10**400, 1, 1]}}, "window.fraction: .* legal value is 1.0"),
    ],
    ids=str,
)
def test_wrong_values(arguments: dict, words: str) -> None:
    with pytest.raises(DitAccelError, match=words):
        dit_accel.plan(**{"model": "wan-1.3b", **arguments})


def test_diagnose_refuses_what_plan_does() -> None:
    with pytest.raises(DitAccelError, match="gpu: expected a name"):
        diagnose("wan-1.3b", gpu=5)  # type: ignore[arg-type]
    with pytest.raises(DitAccelError, match="frames: expected a whole number >= 1, got 0"):
        diagnose("wan-1.3b", frames=0)


def test_patterns_as_tables_and_sizes_of_numpy(no_tables: None) -> None:
    given = dit_accel.plan("ltx", pattern="radial", decay=0.3, backend="torch")
    table = {"compute": "radial", "decay": 0.3}
    assert dit_accel.plan("ltx", pattern=table, backend="torch") == given
    high, wide, long = np.array([256, 320, 9])
    assert subject("ltx", high, wide, long) == subject("ltx", 256, 320, 9)
    window = dit_accel.plan("ltx", 256, 320, 9, window=[3, 1, 1])
    own = [np.int64(3), np.int64(1), np.int64(1)]
    assert dit_accel.plan("ltx", 256, 320, 9, window=own) == window


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": None}, "path: expected a file that ends in .png, got None"),
        ({"path": "plan"}, "path: expected a file that ends in .png, got 'plan'"),
        ({"query": (1, 2)}, r"query: expected three whole numbers .* got \(1, 2\)"),
        ({"query": (1.5, 2, 3)}, r"query: expected three whole numbers .* got \(1\.5, 2, 3\)"),
        ({"query": 5}, "query: expected three whole numbers .* got 5"),
        ({"head": "0"}, "head: expected 0 to 1, got '0'"),
        ({"head": 0.5}, r"head: expected 0 to 1, got 0\.5"),
    ],
    ids=str,
)
def test_pictures_that_cannot_be_drawn(arguments: dict, words: str, tmp_path: Path) -> None:
    cast = dit_accel.plan(at_grid((3, 4, 5), 2, 64))
    with pytest.raises(DitAccelError, match=words):
        cast.draw(**{"path": tmp_path / "never.png", **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gather", "boxes"])
@pytest.mark.parametrize("name", ["sliding_tile", "neighborhood", "radial"])
def test_pictures_show_the_mask(name: str, kind: Any) -> None:
    layout = TokenLayout((4, 7, 9), before=5, after=70)
    extra = {"exact": True, "window": {"tokens": [3, 3, 5]}} if name == "neighborhood" else {}
    plan = plan_for(layout, pattern(name, **extra), "cpu", layout_kind=kind)
    mask = dense_mask(plan, 1, 1)[0, 0].numpy()
    for token in (5, 100, 256):
        assert np.array_equal(query_sees(plan, token) == 2, mask[token])
    blocks = block_mask(plan)
    assert blocks.shape == (plan.shape.q_blocks, plan.shape.k_blocks)
    assert (blocks == 2).sum() == plan.visits.full.sum()
    partial = (plan.visits.count - plan.visits.full).sum()
    assert (blocks == 1).sum() == partial


SELECTORS = (
    ("block_topk", {"density": 0.3}),
    ("block_topk", {"density": 0.1, "neighbours": True, "sinks": 1, "lists": "shared"}),
    ("block_topp", {"p": 0.9, "max_density": 0.4}),
)


@pytest.mark.parametrize("kind", ["gather", "boxes"])
@pytest.mark.parametrize(("name", "params"), SELECTORS, ids=str)
def test_a_selector_s_lists_are_foreseen(name: str, params: dict, kind: Any) -> None:
    """What no q and k can change is in every plan; a top-k plan is as long as its outlook says."""
    torch.manual_seed(0)
    layout, rule = TokenLayout((4, 14, 18), after=70), compute(name, **params)
    assert isinstance(rule, Selector)
    found = outlook(layout, rule, 2, kind)
    blocks = found.plan.blocks
    q, k = torch.randn(2, 1, layout.length, 2, 32)
    made = rule.select(Context(q, k, k, blocks, 32**-0.5, 2))
    assert found.shape == made.shape and found.expected == rule.expected(blocks)
    always, likely = block_mask(found.plan) > 0, block_mask(found.likely) > 0
    for head in range(2):
        kept = block_mask(made, head) > 0
        assert (kept | ~always).all() and (kept.sum(1) <= likely.sum(1)).all()
        assert name == "block_topp" or (kept.sum(1) == likely.sum(1)).all()
    assert (likely | ~always).all()
    assert found.launched("triton") == pytest.approx(found.likely.launched_density())


def test_a_selector_is_forecast(tables: Path, tmp_path: Path) -> None:
    cast = dit_accel.plan("wan-14b", pattern="block_topk", density=0.2, gpu="h200")
    assert cast.online and cast.backend == "hopper"
    assert 0.2 < cast.launched < 0.26 and cast.kept == pytest.approx(0.2, rel=0.01)
    assert cast.sparse_ms and cast.dense_ms and cast.speedup and 3 < cast.speedup < 6
    table = cost_table("h200", tables)
    assert table is not None
    visits = cast.launched * (75_600 / 128) ** 2 * 40 * 440 / 132 / 1e6
    move = 8 * 75_600 * 5120 * 2 / 4000e6
    assert cast.sparse_ms - cast.moved * move == pytest.approx(visits, rel=0.1)
    told = str(cast)
    for words in ("chosen from q and k", "is not in the times", "kept about 20.0%", "pays"):
        assert words in told
    assert cast.to_dict()["online"] and not dit_accel.plan("wan-14b").online
    most = dit_accel.plan("flux", pattern={"compute": "block_topp", "p": 0.8}, gpu="h200")
    assert "to expect at most" in str(most) and most.launched < 0.7
    drawn = cast.draw(tmp_path / "topk.png")
    assert KEPT in colors_of(drawn)
    token = (10 * 45 + 22) * 80 + 40
    assert 0 < (query_sees(cast.plan, token) == 2).sum() <= 128


def test_a_selector_s_tile_is_compared(no_tables: None) -> None:
    cast = dit_accel.plan("ltx", pattern="block_topk", tile=[2, 4, 4], backend="torch")
    assert cast.tile == (2, 4, 4) and cast.best_launched is not None
    assert "times of" not in str(cast) and "is not in the times" not in str(cast)


def test_a_profile_with_a_selector_is_diagnosed(tables: Path) -> None:
    profile = parse_profile('[[rule]]\ncompute = "block_topk"\ndensity = 0.2\nsteps = [0.2, 1.0]')
    found = diagnose("wan-14b", profile=profile, gpu="h200")
    assert found.shares[compute("block_topk", density=0.2)] == pytest.approx(0.8)
    assert found.run is not None and 1 < found.run < found.limit
    text = " ".join(value for _, value in found.rows())
    assert "80% of the calls: launched 2" in text and "is not in the times" in text


def colors_of(path: Path) -> set[Any]:
    return {color for _, color in Image.open(path).getcolors(1 << 22) or []}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    call = at_grid((3, 12, 20), 4, 64)
    cast = dit_accel.plan(call, pattern="disc", radius={"tokens": 5}, exact=True)
    path = cast.draw(tmp_path / "new" / "plan.png", query=(1, 5, 7))
    assert {QUERY, KEPT, MASKED} <= colors_of(path) and TEXT not in colors_of(path)
    frame = np.asarray(Image.open(path))
    assert (frame == QUERY).all(-1).sum() > 40
    flux = dit_accel.plan("flux", pattern="sliding_tile").draw(tmp_path / "flux.png")
    assert TEXT in colors_of(flux)


def test_heads_are_drawn_one_by_one() -> None:
    rule = PerHead((("0", pattern("full")),), pattern("disc", radius={"tokens": 2}))
    cast = dit_accel.plan(at_grid((3, 12, 20), 4, 64), pattern=rule)
    everything, some = (int((query_sees(cast.plan, 99, head) == 2).sum()) for head in (0, 3))
    assert everything == 720 > some


def test_the_nearest_size_is_the_largest_that_is_planned() -> None:
    """Of a size that is too large, what the message names: legal, and one token more is not."""
    for grid in ((21, 45, 10**6), (10**6, 45, 80), (500, 700, 900), (1, 2000, 3000)):
        with pytest.raises(DitAccelError, match=r"not more is (\d+x\d+x\d+)\.") as caught:
            at_grid(grid, 1, 64)
        wide, high, long = map(int, str(caught.value).split(" is ")[-1].rstrip(".").split("x"))
        near = (long, high, wide)
        assert at_grid(near, 1, 64).layout.grid == near
        cut = max(near)
        more = tuple(min(axis, cut + 1) for axis in grid)
        assert more != near and math.prod(more) > 1_000_000
        assert all(kept == min(axis, cut) for kept, axis in zip(near, grid, strict=True))


def test_where_sparse_is_never_slower(tables: Path) -> None:
    """A break-even of 100 % or more is said in words; never of a pattern that is slower."""
    cast = dit_accel.plan("wan-14b", pattern="radial", gpu="h200")
    at = "at 75,600 tokens"
    told = {}
    for share in (0.62, 0.994, 0.997, 1.3):
        some = dataclasses.replace(cast, breakeven=share, dense_ms=9.0, sparse_ms=3.0)
        told[share] = breakeven_text(some)
    assert told[0.62] == f"{at} dense is faster above 62.0% launched"
    assert told[0.994] == f"{at} dense is faster above 99.4% launched"
    never = f"{at} sparse is never slower than dense, however much is launched"
    assert told[0.997] == told[1.3] == never
    slower = dataclasses.replace(cast, breakeven=1.02, launched=1.1, dense_ms=3.0, sparse_ms=3.2)
    assert "launches 110.0% of the pairs" in slower.verdict
    assert "dense is faster above 102.0% launched" in slower.verdict


@pytest.mark.parametrize("model", ["ltx", "cogvideox-5b", "flux"])
def test_no_backend_is_named_that_cannot_run_the_plan(model: str) -> None:
    """As the Hopper kernel itself says; tiles of 64 and scattered masks are not for it."""
    rules = [
        pattern("sliding_tile", window={"tiles": [3, 3, 3]}),
        pattern("disc", radius={"fraction": 0.3}, exact=True),
        pattern("radial"),
    ]
    refused = 0
    for rule in rules:
        what = subject(model)
        for kind in ("boxes", "gather"):
            made = plan_for(what.layout, rule, "cpu", what.heads, kind)  # type: ignore[arg-type]
            able = BACKENDS["hopper"].refuses(made.shape) is None
            assert able == (plan_obstacle(made.shape) is None)
            refused += not able
        cast = dit_accel.plan(what, pattern=rule, gpu="h200")
        assert cast.backend != "hopper" or plan_obstacle(cast.plan.shape) is None
    assert refused >= 1


def test_why_is_it_not_faster(tables: Path) -> None:
    found = diagnose("wan-14b", profile="balanced", gpu="h200")
    assert found.shares[None] == pytest.approx(1 - 0.8 * 39 / 40)
    assert found.run is not None and 1 < found.run < found.limit
    text = " ".join(value for _, value in found.rows())
    assert "self-attention is" in text and "keeps 22% of the calls dense" in text
    cast = next(iter(found.forecasts.values()))
    assert cast.breakeven is not None
    told = f"at 75,600 tokens dense is faster above {cast.breakeven:.1%} launched"
    assert dict(found.rows())["break-even"] == told and told in str(cast)
    small = diagnose("flux", 256, 256, profile="balanced", gpu="h200")
    assert "dense attention is as fast" in small.rows()[-1][1]
    assert "runs no pattern" in diagnose("flux", profile="dense").rows()[-1][1]


def test_diagnosis_without_a_table(no_tables: None) -> None:
    found = diagnose("ltx", profile="fast", steps=8)
    assert ("break-even", "not known: it needs a table of this GPU") in found.rows()
    assert found.run is None and not found.measured and 0 < found.attention < 1
    flops = 28 * 4 * 2048 * found.subject.layout.length**2
    linear = 2 * PRESETS["ltx"].token_weights * found.subject.layout.length
    assert found.attention == pytest.approx(flops / (flops + linear))


def test_sizes_that_change_are_told(no_tables: None) -> None:
    assert subject("flux", frames=1).notes == subject("wan-14b").notes == ()
    for asked, made in ((82, 81), (83, 85), (84, 85), (2, 1)):
        found = subject("wan-14b", frames=asked)
        assert found.layout.grid[0] == (made - 1) // 4 + 1
        assert found.notes == (f"wan-14b makes 4n+1 frames: {asked} becomes {made}.",)
    tall = subject("wan-14b", height=727)
    assert tall.layout.grid[1] == 45 and "a height of 727 becomes 720" in tall.notes[0]
    demo = dit_accel.plan("demo", frames=10)
    assert demo.layout.grid[0] == 3 and "4n+1 frames: 10 becomes 9" in str(demo)
    assert "10 becomes 9" in " ".join(v for _, v in diagnose("demo", frames=10).rows())
    cut = dit_accel.plan("demo", frames=1, tile=[30, 2, 2])
    assert "a tile of 30x2x2 is longer than the grid 1x24x24: it holds 1x2x2" in str(cut)


def test_the_backend_is_told(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dict(forecast.rows(dit_accel.plan("wan-1.3b", gpu="h200")))
    assert chosen["backend"].startswith("hopper") and "assumed" not in chosen["backend"]
    monkeypatch.setattr(forecast, "cost_table", lambda gpu: None)
    assumed = dict(forecast.rows(dit_accel.plan("wan-1.3b")))
    assert assumed["backend"] == "triton (assumed: no table tells which is the fastest)"


def test_gpus_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, an error that lists what there is; this machine's own, a line in the output."""
    words = r"no table of measured costs for 'bogus'; there are: .*times are relative only"
    with pytest.raises(DitAccelError, match=words):
        dit_accel.plan("wan-1.3b", gpu="bogus")
    with pytest.raises(DitAccelError, match=words):
        diagnose("wan-1.3b", profile="dense", gpu="bogus")
    assert "there are: none yet" in str(no_table("h100", tmp_path))
    (tmp_path / "h200.csv").touch()
    there = "there are: h200, h100 (by the numbers of h200)."
    assert there in str(no_table("b200", tmp_path))
    monkeypatch.setattr(forecast, "cost_table", lambda gpu: None)
    monkeypatch.setattr(forecast, "this_gpu", lambda: "NVIDIA A10")
    assert "NVIDIA A10: no table to predict from" in str(dit_accel.plan("wan-1.3b"))


def test_windows_of_bare_numbers(no_tables: None) -> None:
    for bare, unit in (((3, 3, 3), "tiles"), ([3, -1, 5], "tiles"), ((0.5, 1, 0.4), "fraction")):
        cast = dit_accel.plan("wan-1.3b", window=bare)
        full = dit_accel.plan("wan-1.3b", window={unit: list(bare)})
        assert cast.parameters == full.parameters and cast.launched == full.launched
    with pytest.raises(DitAccelError, match="window.tiles: expected three values"):
        dit_accel.plan("wan-1.3b", window=(3, 3))


def test_no_compute_s_parameter_is_one_of_plan_s_own() -> None:
    own = set(inspect.signature(dit_accel.plan).parameters)
    for kind in COMPUTES.values():
        assert not own & {field.name for field in dataclasses.fields(kind)}
