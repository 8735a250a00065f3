"""Patterns in general: parts of others, batches, bad parameters, and what planning costs."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dit_accel.engine.profile import parse_profile
from dit_accel.errors import DitAccelError
from dit_accel.kernels.geometry.tiling import fixed_tiling, geometry, raster_runs
from dit_accel.kernels.patterns import PATTERNS, pattern, plan_for
from dit_accel.kernels.patterns.composite import PerHead, select_heads
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout

LAYOUT = TokenLayout((5, 9, 11), before=7, after=130, valid=((7, 130), (3, 64), (0, 0)))
KINDS = ("lengths", "gather", "boxes")


def kept(plan: BlockPlan, heads: int = 1) -> torch.Tensor:
    return dense_mask(plan.validate(), plan.batch, heads)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "union"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_different_text(name: str, kind: str) -> None:
    """Text rows are dense, text columns kept up to each sample's valid length, video as alone."""
    plan = plan_for(LAYOUT, pattern(name), "cpu", layout_kind=kind)
    start, stop = LAYOUT.before, LAYOUT.before + LAYOUT.video_length
    alone = plan_for(TokenLayout(LAYOUT.grid), pattern(name), "cpu", layout_kind=kind)
    video = kept(alone)[0, 0]
    for sample, (before, after) in enumerate(LAYOUT.valid or ()):
        mask = kept(plan)[sample, 0]
        seen = torch.zeros(LAYOUT.length, dtype=torch.bool)
        seen[:before] = seen[start:stop] = seen[stop : stop + after] = True
        text = torch.ones(LAYOUT.length, dtype=torch.bool)
        text[start:stop] = False
        assert torch.equal(mask[text], seen.expand(int(text.sum()), -1))
        assert torch.equal(mask[start:stop][:, text], seen[text].expand(stop - start, -1))
        if pattern(name).tiling(LAYOUT, kind) == pattern(name).tiling(
            TokenLayout(LAYOUT.grid), kind
        ):
            assert torch.equal(mask[start:stop, start:stop], video)


@pytest.mark.parametrize("kind", KINDS)
def test_unions_keep_what_any_part_keeps(kind: str) -> None:
    tile = [2, 4, 8] if kind == "boxes" else [2, 3, 4]
    parts = [
        pattern("sliding_tile", window={"tiles": [1, 3, 1]}, tile=tile),
        pattern("attention_tile", references=1, tile=tile),
        pattern("neighborhood", window={"tokens": [5, 3, 3]}, tile=tile, exact=True),
    ]
    layout = TokenLayout((5, 9, 11), before=4)
    together = kept(plan_for(layout, pattern("union", union=parts), "cpu", layout_kind=kind))
    alone = [kept(plan_for(layout, part, "cpu", layout_kind=kind)) for part in parts]
    assert torch.equal(together, alone[0] | alone[1] | alone[2])
    assert not torch.equal(together, alone[0] | alone[1])


def test_unions_take_names() -> None:
    short = pattern("union", union=["temporal_band", {"compute": "disc"}])
    assert short == pattern("union", union=[pattern("temporal_band"), pattern("disc")])
    assert pattern("union", union=["dense"]) == pattern("union", union=["full"])
    text = '[profile]\nname = "x"\nfamily = "any"\n[[rule]]\nunion = ["full", {compute = "disc"}]'
    (rule,) = parse_profile(text.replace("any", "wan")).rules
    assert rule.compute == pattern("union", union=["full", "disc"])


@pytest.mark.parametrize("kind", KINDS)
def test_parts_with_tiles_of_their_own_lose_nothing(kind: str) -> None:
    layout = TokenLayout((6, 10, 12))
    parts = [
        pattern("sliding_tile", window={"tiles": [1, 3, 1]}, tile=[3, 2, 4]),
        pattern("temporal_band", reach={"tokens": 12}),
        pattern("disc", radius={"tokens": 3}, tile=[1, 4, 4]),
    ]
    together = kept(plan_for(layout, pattern("union", union=parts), "cpu", layout_kind=kind))
    for part in parts:
        exact = pattern(part.name, **{**vars(part), "exact": True})
        assert (together | ~kept(plan_for(layout, exact, "cpu", layout_kind=kind))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_head_has_its_own(kind: str) -> None:
    tile = [2, 4, 8] if kind == "boxes" else [2, 3, 4]
    wide = pattern("sliding_tile", window={"tiles": [3, 3, 3]}, tile=tile)
    slim = pattern("neighborhood", window={"tokens": [1, 3, 3]}, tile=tile, exact=True)
    rule = PerHead((("0,3", slim), ("0.5-0.75", wide)))
    layout = TokenLayout((5, 9, 11), after=9, valid=((0, 9), (0, 2)))
    plan = plan_for(layout, rule, "cpu", heads=4, layout_kind=kind).validate()
    assert plan.heads == 4 and plan.batch == 2
    mask = kept(plan, 4)
    for head, part in enumerate([slim, pattern("full"), wide, slim]):
        expected = kept(plan_for(layout, part, "cpu", layout_kind=kind))
        assert torch.equal(mask[:, head], expected[:, 0])


def test_which_heads() -> None:
    assert select_heads("0-2,-1", 8) == [0, 1, 2, 7]
    assert select_heads("-2--1", 8) == [6, 7]
    assert select_heads("0.25-0.5,0", 8) == [0, 2, 3]
    assert select_heads("all", 3) == [0, 1, 2]
    for text in ("8", "6-9", "-9", "5-2"):
        with pytest.raises(DitAccelError, match="not within the 8 heads"):
            select_heads(text, 8)
    with pytest.raises(DitAccelError, match="number of query heads"):
        PerHead((("0", pattern("full")),)).build(LAYOUT, "cpu")


def test_two_masks_a_call_the_same_for_all_heads() -> None:
    layout = TokenLayout((3, 4, 5))
    parts = [pattern(name, exact=True) for name in ("disc", "neighborhood", "radial")]
    with pytest.raises(DitAccelError, match=r"at most 2 rules, not of 3 \(disc, neigh.*, radial"):
        plan_for(layout, pattern("union", union=parts), "cpu")
    both = pattern("union", union=parts[:2])
    for rest in (parts[2], parts[0]):  # another rule, and one of the two
        with pytest.raises(DitAccelError, match=r"here heads differ \(disc, .*set exact = false"):
            plan_for(layout, PerHead((("0", both),), rest), "cpu", heads=2)


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("neighborhood", {"window": {"tokens": [4, 4, 4]}, "stride": [5, 1, 1]},
         "stride: .* window along t, got 5 > 4 tokens; the nearest legal value is 4"),
        ("neighborhood", {"window": {"fraction": [0, 1, 1]}}, "window.fraction: expected 0 <"),
        ("neighborhood", {"window": {"fraction": [1.2, 1, 1]}}, "nearest legal value is 1.0"),
        ("neighborhood", {"stride": [0, 1, 1]}, "stride.tokens: expected whole numbers >= 1"),
        ("neighborhood", {"dilation": [1, 1]}, "dilation: expected"),
        ("neighborhood", {"dilation": [1, 1, 0]}, "dilation: expected"),
        ("neighborhood", {"causal": "yes"}, "causal: expected"),
        ("neighborhood", {"exact": 1}, "exact: expected true or false"),
        ("neighborhood", {"tile": [9, 9, 9]}, "at most 128 tokens"),
        ("neighborhod", {}, "Did you mean 'neighborhood'"),
        ("attention_tile", {"references": 0}, "references: .* >= 1, .*nearest legal value is 1"),
        ("attention_tile", {"references": {"fraction": 2}}, "references.fraction"),
        ("attention_tile", {"place": "last"}, "unknown place of attention_tile 'last'"),
        ("radial", {"decay": 0}, "above 0 and up to 16, got 0; usual are 0.2 to 0.95"),
        ("radial", {"decay": 99}, "got 99; the nearest legal value is 16"),
        ("radial", {"sink": 2}, "sink: expected true or false"),
        ("disc", {"radius": {"tokens": 0.5}}, "radius.tokens: expected whole numbers"),
        ("disc", {"radius": 5}, "radius: expected one of {tiles = n}"),
        ("disc", {"frame_window": {"tokens": [1, 2]}}, "frame_window.tokens: expected one"),
        ("inward_window", {"base": {"tokens": [1, 2, 3]}}, "base.tokens: expected two values"),
        ("power_strided", {"sink": -1}, "sink: .*the nearest legal value is 0"),
        ("spatial_band", {"density": 1.5}, "density: expected a number between 0 and 1"),
        ("spatial_band", {"density": 0.3, "reach": {"tokens": 9}}, "expected one of them"),
        ("temporal_band", {"reach": {"frames": 3}}, "unknown unit of reach 'frames'"),
        ("union", {"union": "radial"}, "union: expected a list"),
        ("union", {"union": ["radal"]}, r"union\[0\]: unknown pattern 'radal'. Did .* 'radial'"),
        ("union", {"union": [3]}, r"union\[0\]: expected a table .* or a name such as \"full\""),
    ],
)  # fmt: skip
def test_bad_parameters_say_what_is_legal(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(DitAccelError, match=words):
        pattern(name, **params)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_parameter_is_documented(name: str) -> None:
    rows = PATTERNS[name].parameters()
    assert [row.name for row in rows] == [field.name for field in fields(PATTERNS[name])]
    for row in rows:
        assert row.help.endswith(".") and row.legal and (row.default_text or row.default is None)
        value = row.check(row.default, name)
        if value is not None:  # what is kept is legal too, and so is what a profile would hold
            assert row.check(value, name) == value


def test_dilated_windows_must_fit_the_axis() -> None:
    rule = pattern("neighborhood", window={"tokens": [2, 4, 4]}, dilation=[1, 2, 3])
    plan_for(TokenLayout((2, 8, 12)), rule, "cpu")
    words = "dilation x window <= 11 tokens along w, got 3 x 4; the nearest legal dilation is 2"
    with pytest.raises(DitAccelError, match=words):
        plan_for(TokenLayout((2, 8, 11)), rule, "cpu")


def test_causal_axes_are_masked_unless_told_otherwise() -> None:
    assert pattern("neighborhood", causal=[True, False, False]).exact is True
    assert pattern("neighborhood").exact is False
    assert pattern("neighborhood", causal=True, exact=False).exact is False


def test_runs_and_boxes_tell_where_they_are() -> None:
    layout = TokenLayout((5, 9, 20), before=130)
    runs = plan_for(layout, pattern("radial"), "cpu").blocks
    assert runs.q.order is None and runs.box is None and runs.q.origins is not None
    starts = runs.q.starts
    assert torch.equal(runs.q.origins[:, 1], starts)
    assert (runs.q.origins[:, 0] == -1).all() and (runs.q.lengths <= 128).all()
    boxes = plan_for(layout, pattern("disc", tile=[2, 8, 8]), "cpu", layout_kind="boxes").blocks
    assert boxes.box == (2, 8, 8) and boxes.grid == layout.grid and boxes.video_start == 130
    assert boxes.q.origins is not None
    assert boxes.q.origins[:2].tolist() == [[-1, 0, 0], [-1, 128, 0]]
    corners = [[t, h, w] for t in (0, 2, 4) for h in (0, 8) for w in (0, 8, 16)]
    assert boxes.q.origins[2:].tolist() == corners


@pytest.mark.parametrize("block", [64, 128])
def test_the_boxes_of_a_straddling_block_hold_its_tokens(block: int) -> None:
    from dataclasses import replace

    from dit_accel.kernels.geometry.blocks import tile_order

    for tile in ((2, 3, 5), (1, 1, 13), (7, 1, 1), (4, 11, 2)):
        tiling = replace(fixed_tiling((7, 11, 13), tile), block=block, box=None, straddles=True)
        order = tile_order(TokenLayout((7, 11, 13)), tiling, torch.device("cpu"))
        tokens = torch.arange(1001) if order is None else order
        where = geometry(tiling)
        assert where.blocks == tiling.blocks == -(-1001 // block)
        for number, run in enumerate(tokens.split(block)):
            own = where.rows(number, number + 1)
            places = torch.stack([run // 143, run // 13 % 11, run % 13], -1).numpy()
            inside = ((places[:, None] >= own.low) & (places[:, None] < own.high)).all(-1)
            assert inside.any(1).all()
    assert raster_runs((7, 11, 13)).raster and not fixed_tiling((7, 11, 13), (1, 2, 13)).straddles


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor):  # views of little count as little
                size = tensor.untyped_storage().size() // tensor.element_size()
                self.elements = max(self.elements, size)
        return made


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "union"])
def test_big_plans_are_quick_and_small(name: str) -> None:
    """At 75,600 tokens: no tensor of more than some pairs of 591 blocks, nor of tokens squared."""
    layout = TokenLayout((21, 45, 80), after=300)
    rule = pattern(name, **({"exact": True} if hasattr(PATTERNS[name], "exact") else {}))
    begin = time.perf_counter()
    with Largest() as largest:
        plan = rule.build(layout, "cpu", layout_kind="gather")
    assert time.perf_counter() - begin < 8
    assert largest.elements <= 16 * plan.shape.q_blocks**2
    assert plan.shape.q_blocks <= 1.1 * layout.length / plan.shape.block_q
