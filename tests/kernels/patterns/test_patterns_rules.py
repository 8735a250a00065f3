"""Every pattern against its definition, enumerated here: its token rule and its plans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.geometry.blocks import token_coordinates
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.libraries.flex import flex_plan
from dit_accel.kernels.patterns import Pattern, pattern, plan_for
from dit_accel.kernels.patterns.base import Rules
from dit_accel.kernels.patterns.composite import PerHead
from dit_accel.kernels.reference import dense_mask
from dit_accel.kernels.token_rules import MAX_PARAMS, TOKEN_RULES
from dit_accel.layout import TokenLayout

Grid = tuple[int, int, int]
Mask = np.ndarray


def places(grid: Grid) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, grid)))


def product(axes: list[Mask]) -> Mask:
    """Token pairs [L, L] of what three axes allow."""
    t, h, w = axes
    pairs = t[:, None, None, :, None, None] & h[:, None, None, :, None] & w[:, None, None, :]
    size = math.prod(len(axis) for axis in axes)
    return pairs.reshape(size, size)


def neighborhood(length: int, window: int, stride: int, dilation: int, causal: bool) -> Mask:
    seen = np.zeros((length, length), bool)
    for group in range(dilation):
        members = list(range(group, length, dilation))
        n = len(members)
        for q in range(n):
            if causal:
                leader = min((q // stride) * stride + stride - 1, n - 1)
                keys = [k for k in range(n) if k <= q and leader - k < window]
            else:
                left = window // 2
                right = window // 2 - 1 + window % 2
                leader = min((q // stride) * stride + stride // 2, n - 1)
                centre = max(left, min(leader, n - 1 - right))
                keys = list(range(centre - left, centre + right + 1))
                assert len(keys) == window and keys[0] >= 0 and keys[-1] < n
            for k in keys:
                seen[members[q], members[k]] = True
    return seen


def tile_numbers(sizes: tuple[int, ...]) -> list[int]:
    return [number for number, size in enumerate(sizes) for _ in range(size)]


def sliding(sizes: tuple[int, ...], window: int) -> Mask:
    tiles, n = tile_numbers(sizes), len(sizes)
    seen = np.zeros((len(tiles), len(tiles)), bool)
    for (i, q), (j, k) in itertools.product(enumerate(tiles), repeat=2):
        centre = max(window // 2, min(q, n - 1 - window // 2))
        seen[i, j] = window >= n or abs(centre - k) <= window // 2
    return seen


def frame_pairs(frames: int, references: set[int]) -> Mask:
    seen = np.zeros((frames, frames), bool)
    for i, j in itertools.product(range(frames), repeat=2):
        seen[i, j] = i == j or i in references or j in references
    return seen


def inward(length: int, base: int) -> Mask:
    d = base // 2
    seen = np.zeros((length, length), bool)
    for y in range(length):
        low = y - d - max(0, d + y - length + 1)
        high = y + d + max(0, d - y)
        for k in range(length):
            seen[y, k] = low <= k <= high
    return seen


def radial(grid: Grid, decay: float, sink: bool) -> Mask:
    frames, s = grid[0], grid[1] * grid[2]
    above = 1
    while above <= s:
        above *= 2
    apart = abs(np.arange(s)[:, None] - np.arange(s))
    seen = np.zeros((frames, s, frames, s), bool)
    for i, j in itertools.product(range(frames), repeat=2):
        d = abs(i - j)
        if d <= 1 or (sink and j == 0):
            seen[i, :, j] = True
            continue
        g = next(g for g in itertools.count() if 2**g > d)
        base = above / 2**g
        if base < 128 and d % int(128 / base):
            continue
        seen[i, :, j] = apart <= max(128, decay * base)
    return seen.reshape(frames * s, frames * s)


def disc(grid: Grid, radius: float, frames: int) -> Mask:
    where = np.array(places(grid))
    apart = where[:, None] - where[None]
    near = apart[..., 1] ** 2 + apart[..., 2] ** 2 < radius**2
    return near & (abs(apart[..., 0]) <= frames // 2)


def band(grid: Grid, width: int, sink: bool, temporal: bool) -> Mask:
    frames, s = grid[0], grid[1] * grid[2]
    index = [
        (y * grid[2] + x) * frames + t if temporal else t * s + y * grid[2] + x
        for t, y, x in places(grid)
    ]
    i = np.array(index)
    return (abs(i[:, None] - i) <= width) | (sink & (i < s))[None]


def power(parts: tuple[tuple[int, ...], ...], windows: list[int], sink: int) -> Mask:
    tiles = np.array(list(itertools.product(*map(tile_numbers, parts))))
    apart = abs(tiles[:, None] - tiles)
    far = apart > np.array(windows) // 2
    reached = ~far | np.isin(apart, [2**n for n in range(20)])
    return (reached.all(-1) & (far.sum(-1) <= 1)) | (tiles[:, 0] < sink)[None]


# (pattern, parameters, what its definition keeps on a grid whose tiles have these parts)
Definition = Callable[[Grid, tuple[tuple[int, ...], ...]], Mask]
CASES: dict[str, tuple[str, dict, Definition]] = {}


def case(label: str, name: str, definition: Definition, **params: object) -> None:
    CASES[f"{name} {label}"] = (name, params, definition)


def windows_of(grid: Grid, window: tuple[int, ...]) -> list[int]:
    return [size if w == -1 else min(w, size) for w, size in zip(window, grid, strict=True)]


def neighbor_case(
    label: str,
    window: tuple[int, ...],
    stride: tuple[int, ...] = (1, 1, 1),
    dilation: tuple[int, ...] = (1, 1, 1),
    causal: tuple[bool, ...] = (False, False, False),
) -> None:
    def definition(grid: Grid, parts: tuple[tuple[int, ...], ...]) -> Mask:
        axes = []
        for n, w, s, d, c in zip(grid, window, stride, dilation, causal, strict=True):
            wide = n // d if w == -1 else min(w, n // d)
            axes.append(neighborhood(n, wide, min(s, wide), d, c))
        return product(axes)

    params = {"window": {"tokens": list(window)}, "stride": stride}
    if dilation != (1, 1, 1):
        params["dilation"] = dilation
    case(label, "neighborhood", definition, **params, causal=causal)


neighbor_case("slides", (3, 5, 4))
neighbor_case("even", (2, 4, 6))
neighbor_case("strided", (5, 6, 7), (2, 3, 7))
neighbor_case("blocked", (2, 3, 4), (2, 3, 4))
neighbor_case("wider than the axis", (99, 3, 99), (1, 2, 1))
neighbor_case("dilated", (-1, 3, 2), dilation=(1, 3, 2))
neighbor_case("sparse global", (-1, 2, 3), dilation=(1, 4, 2))
neighbor_case("causal in time", (3, 4, 5), causal=(True, False, False))
neighbor_case("causal and strided", (4, 5, 6), (2, 3, 4), causal=(True, True, True))
neighbor_case("one token", (1, 1, 1))
case(
    "as a fraction",
    "neighborhood",
    lambda grid, parts: product([neighborhood(n, math.ceil(n / 2), 1, 1, False) for n in grid]),
    window={"fraction": [0.5, 0.5, 0.5]},
)
case(
    "in tiles",
    "neighborhood",
    lambda grid, parts: product(
        [
            neighborhood(n, min(n, 2 * p[0]), min(n, p[0]), 1, False)
            for n, p in zip(grid, parts, strict=True)
        ]
    ),
    window={"tiles": [2, 2, 2]},
    stride={"tiles": [1, 1, 1]},
    tile=[2, 3, 4],
)
for windows in ((1, 3, 3), (3, 2, 1), (-1, 3, 99)):
    case(
        str(windows),
        "sliding_tile",
        lambda grid, parts, windows=windows: product(
            [
                sliding(p, len(p) if w in (-1, 99) else min(len(p), w + 1 - w % 2))
                for p, w in zip(parts, windows, strict=True)
            ]
        ),
        window={"tiles": list(windows)},
    )
for label, references, place in (
    ("1 first", lambda T: {0}, "first"),
    ("3 first", lambda T: set(range(3)), "first"),
    ("2", lambda T: {m * T // min(2, T) for m in range(min(2, T))}, "uniform"),
    ("5", lambda T: {m * T // min(5, T) for m in range(min(5, T))}, "uniform"),
):
    case(
        label,
        "attention_tile",
        lambda grid, parts, references=references: product(
            [frame_pairs(grid[0], references(grid[0])), *(np.ones((n, n), bool) for n in grid[1:])]
        ),
        references=int(label[0]),
        place=place,
    )
for decay, sink in ((0.2, True), (0.95, False), (3.0, False)):
    case(
        f"{decay}",
        "radial",
        lambda grid, parts, decay=decay, sink=sink: radial(grid, decay, sink),
        decay=decay,
        sink=sink,
    )
for radius, frames in ((4, 3), (1, -1), (6, 4), (99, 1)):
    case(
        f"{radius} {frames}",
        "disc",
        lambda grid, parts, r=radius, f=frames: disc(grid, r, 2 * grid[0] if f < 0 else f),
        radius={"tokens": radius},
        frame_window={"tokens": frames},
    )
case(
    "fraction",
    "disc",
    lambda grid, parts: disc(grid, 0.3 * max(grid[1:]), 2 * grid[0]),
    radius={"fraction": 0.3},
)
for base in ((4, 5), (99, 3), (1, 8)):
    case(
        str(base),
        "inward_window",
        lambda grid, parts, base=base: product(
            [np.ones((grid[0],) * 2, bool), inward(grid[1], base[0]), inward(grid[2], base[1])]
        ),
        base={"tokens": list(base)},
    )
for windows, sink in (((3, 3, 3), 0), ((1, 1, 3), 1)):
    case(
        f"{windows}",
        "power_strided",
        lambda grid, parts, windows=windows, sink=sink: power(
            parts, [min(len(p), w) for p, w in zip(parts, windows, strict=True)], sink
        ),
        window={"tiles": list(windows)},
        sink=sink,
    )
for temporal in (False, True):
    for width, sink in ((20, True), (131, False), (0.13, True)):
        case(
            f"{width}",
            "temporal_band" if temporal else "spatial_band",
            lambda grid, parts, width=width, sink=sink, temporal=temporal: band(
                grid,
                width if width >= 1 else math.ceil(width * math.prod(grid) - 1e-6),
                sink,
                temporal,
            ),
            reach={"tokens": width} if width >= 1 else {"fraction": width},
            sink=sink,
        )
case("", "full", lambda grid, parts: np.ones((math.prod(grid),) * 2, bool))

GRIDS: list[Grid] = [(7, 11, 13), (1, 9, 14), (5, 1, 17), (9, 12, 4)]
# On other backends' blocks: a smaller grid, with text before and after.
PLACES = [
    ("gather", TokenLayout((7, 11, 13), 130, 9)),
    ("gather", TokenLayout((1, 9, 14), 3)),
    ("gather", TokenLayout((5, 1, 17), 0, 5)),
    ("gather", TokenLayout((9, 12, 4))),
    ("lengths", TokenLayout((5, 7, 11), 0, 5)),
    ("boxes", TokenLayout((5, 7, 11), 20)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("label", CASES)
def test_token_rules_are_the_definitions(label: str, grid: Grid) -> None:
    name, params, definition = CASES[label]
    rule = pattern(name, **params)
    if not isinstance(rule, Rules):
        return
    if any(d * (n // d if w == -1 else w) > n for n, d, w in _dilated(rule, grid)):
        pytest.skip("the dilated window is longer than an axis of this grid")
    tiling = rule.tiling(TokenLayout(grid), "lengths")
    token_rule, parameters = rule.token_rule(grid, tiling)
    assert len(parameters) <= MAX_PARAMS and all(type(number) is int for number in parameters)
    coords = token_coordinates(TokenLayout(grid), torch.device("cpu"))
    query, key = coords[:, None].unbind(-1), coords[None].unbind(-1)
    kept = TOKEN_RULES[token_rule](*query, *key, parameters)
    assert np.array_equal(kept.numpy(), definition(grid, tiling.parts))


def _dilated(rule: Pattern, grid: Grid) -> list[tuple[int, int, int]]:
    dilation = getattr(rule, "dilation", (1, 1, 1))
    if max(dilation) == 1:
        return []
    return list(zip(grid, dilation, rule.window.values, strict=True))


@pytest.mark.parametrize("label", CASES)
def test_plans_keep_what_the_rule_keeps(label: str) -> None:
    """Whole blocks keep no less than the rule, masked ones exactly that; text is dense."""
    name, params, definition = CASES[label]
    for kind, layout in PLACES:
        video = slice(layout.before, layout.before + layout.video_length)
        rule = pattern(name, **params)
        if any(d * (n // d if w == -1 else w) > n for n, d, w in _dilated(rule, layout.grid)):
            continue
        tiling = rule.tiling(layout, kind)
        expected = torch.from_numpy(definition(layout.grid, tiling.parts).copy())
        for exact in (False, True) if isinstance(rule, Rules) else (False,):
            if isinstance(rule, Rules):
                rule = pattern(name, **params, exact=exact)
            plan = plan_for(layout, rule, "cpu", layout_kind=kind).validate()
            mask = dense_mask(plan, 1, 1)[0, 0]
            kept = mask[video, video]
            assert (kept | ~expected).all(), "a kept pair was dropped"
            if exact:
                assert torch.equal(kept, expected)
            others = torch.ones(layout.length, dtype=torch.bool)
            others[video] = False
            assert mask[others].all() and mask[:, others].all()
            density = mask.double().mean().item()
            assert plan.kept_density() == pytest.approx(density)
            assert plan.launched_density("torch") >= density - 1e-9
            if not exact and not tiling.straddles and name in ("sliding_tile", "full"):
                assert torch.equal(kept, expected)


WHOLE_AXES = [
    ("disc", {"radius": {"tokens": -1}, "frame_window": {"fraction": 1}}),
    ("disc", {"radius": {"tokens": 46341}, "frame_window": {"tokens": 99}}),  # squares need 32 bits
    ("disc", {"radius": {"tokens": 2**31 - 1}}),
    ("power_strided", {"window": {"tiles": [-1, -1, -1]}, "tile": [1, 1, 1]}),
    ("power_strided", {"window": {"fraction": [1, 1.0, 1]}}),
    ("power_strided", {"window": {"tokens": [99, 99, 99]}}),
    ("neighborhood", {"window": {"fraction": [1, 1, 1]}}),
    ("neighborhood", {"window": {"tokens": [-1, 99, -1]}}),
    ("sliding_tile", {"window": {"tokens": [-1, 99, -1]}}),
    ("inward_window", {"base": {"fraction": [1, 1]}}),
]


@pytest.mark.parametrize(("name", "parameters"), WHOLE_AXES, ids=str)
@pytest.mark.parametrize("grid", [(9, 5, 7), (1, 13, 1)], ids=str)
def test_whole_axes_are_seen_whole(name: str, parameters: dict[str, Any], grid: Grid) -> None:
    layout = TokenLayout(grid, after=3)
    plan = plan_for(layout, pattern(name, exact=True, **parameters), "cpu", layout_kind="lengths")
    assert dense_mask(plan, 1, 1).all()


@pytest.mark.parametrize("grid", [(9, 5, 7), (4, 6, 1)], ids=str)
def test_a_whole_axis_is_the_whole_dilation_group(grid: Grid) -> None:
    steps = (2, 3, 1)
    rule = pattern("neighborhood", window={"tokens": [-1, -1, -1]}, dilation=steps, exact=True)
    mask = dense_mask(plan_for(TokenLayout(grid), rule, "cpu", layout_kind="lengths"), 1, 1)
    groups = [
        tuple(x % d for x, d in zip(place, steps, strict=True))
        for place in itertools.product(*map(range, grid))
    ]
    assert mask.view(len(groups), -1).tolist() == [[a == b for b in groups] for a in groups]
    with pytest.raises(DitAccelError, match="nearest legal dilation is 4"):
        far = pattern("neighborhood", window={"tokens": [-1, 3, 3]}, dilation=(5, 1, 1))
        plan_for(TokenLayout((4, 6, 8)), far, "cpu", layout_kind="lengths")


def test_radial_at_the_paper_s_frame_sizes() -> None:
    """Bands wider than a block, at 540 tokens a frame."""
    layout = TokenLayout((7, 20, 27))
    for decay in (0.4, 0.9):
        rule = pattern("radial", decay=decay, exact=True)
        kept = dense_mask(plan_for(layout, rule, "cpu"), 1, 1)[0, 0].numpy()
        assert np.array_equal(kept, radial(layout.grid, decay, True))


@pytest.mark.parametrize("grid", [(6, 9, 8), (4, 6, 16), (2, 15, 12)])
@pytest.mark.parametrize("tiles", [(1, 3, 3), (3, 1, 5), (3, 5, 3)])
def test_sliding_tiles_are_strided_neighborhoods(grid: Grid, tiles: tuple[int, ...]) -> None:
    """With odd windows, on grids that the tile divides."""
    tile = [2, 3, 4]
    window = [min(n, k * t) for n, k, t in zip(grid, tiles, tile, strict=True)]
    layout = TokenLayout(grid)
    sliding_plan = plan_for(
        layout, pattern("sliding_tile", window={"tiles": tiles}, tile=tile), "cpu"
    )
    near = pattern("neighborhood", window={"tokens": window}, stride=tile, tile=tile, exact=True)
    strided = plan_for(layout, near, "cpu")
    assert torch.equal(dense_mask(sliding_plan, 1, 1), dense_mask(strided, 1, 1))
    assert strided.mask is None, "windows that end on tiles need no token mask"
    tiled = pattern("neighborhood", window={"tiles": tiles}, stride={"tiles": [1, 1, 1]}, tile=tile)
    assert torch.equal(dense_mask(plan_for(layout, tiled, "cpu"), 1, 1), dense_mask(strided, 1, 1))


TWO = [
    ("disc 4 3", "temporal_band 20"),
    ("neighborhood causal and strided", "neighborhood dilated"),
    ("radial 0.2", "neighborhood strided"),
    ("attention_tile 2", "disc 4 3"),
]
TILES = {"gather": (2, 3, 4), "lengths": (2, 3, 4), "boxes": (2, 4, 8)}


def united(labels: tuple[str, str], layout: TokenLayout, kind: LayoutKind) -> tuple[Pattern, Mask]:
    """The union of two exact cases over tiles of one size, and the video pairs that it keeps."""
    tile = list(TILES[kind])
    rules, kept = [], np.zeros((layout.video_length,) * 2, bool)
    for label in labels:
        name, params, definition = CASES[label]
        rules.append(pattern(name, **{**params, "tile": tile}, exact=True))
        kept = kept | definition(layout.grid, rules[-1].tiling(layout, kind).parts)
    return pattern("union", union=rules), kept


@pytest.mark.parametrize("labels", TWO, ids=str)
@pytest.mark.parametrize("kind", TILES)
def test_unions_of_two_exact_rules(labels: tuple[str, str], kind: LayoutKind) -> None:
    """A pair counts where either definition keeps it, no pair more; alone, or for some heads."""
    layout = TokenLayout((5, 9, 11), before=5, after=3)
    rule, expected = united(labels, layout, kind)
    plan = plan_for(layout, rule, "cpu", layout_kind=kind).validate()
    video = slice(5, 5 + layout.video_length)
    assert np.array_equal(dense_mask(plan, 1, 1)[0, 0, video, video].numpy(), expected)
    assert plan.mask is not None and plan.mask.other is not None
    density = dense_mask(plan, 1, 1).double().mean().item()
    assert plan.kept_density() == pytest.approx(density)
    groups = (("0", pattern("full")), ("2", pattern("sliding_tile", tile=list(TILES[kind]))))
    heads = plan_for(layout, PerHead(groups, rule), "cpu", 4, kind).validate()
    mask = dense_mask(heads, 1, 4)[0, :, video, video].numpy()
    assert mask[0].all() and not np.array_equal(mask[2], expected)
    assert np.array_equal(mask[1], expected) and np.array_equal(mask[3], expected)


def test_a_block_that_one_rule_keeps_whole_is_full() -> None:
    layout = TokenLayout((4, 8, 16))
    frames = pattern("attention_tile", references=1, tile=[1, 8, 16], exact=True)
    near = pattern("disc", radius={"tokens": 3}, tile=[1, 8, 16], exact=True)
    plan = plan_for(layout, pattern("union", union=[near, frames]), "cpu", layout_kind="boxes")
    lists = plan.visits
    assert lists.full.flatten().tolist() == [4, 2, 2, 2]  # own frame, and the reference
    assert (lists.count - lists.full).flatten().tolist() == [0, 2, 2, 2]


@pytest.mark.parametrize("labels", TWO, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_kernels_mask_tokens_by_two_rules(
    labels: tuple[str, str],
    backend: str,
    qkv: Callable[..., tuple[torch.Tensor, ...]],
    assert_right: Callable[..., None],
    device: torch.device,
) -> None:
    layout = TokenLayout((2, 9, 7), before=4)
    rule, expected = united(labels, layout, "gather")
    plan = plan_for(layout, rule, device, layout_kind="gather")
    mask = torch.ones(1, 1, layout.length, layout.length, dtype=torch.bool)
    mask[0, 0, 4:, 4:] = torch.from_numpy(expected)
    q, k, v = qkv(layout.length, heads=1, dim=32)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)


def test_flex_masks_tokens_by_two_rules() -> None:
    """FlexAttention's mask function, pair by pair, where every block is masked."""
    layout = TokenLayout((3, 8, 16))
    rule, expected = united(TWO[0], layout, "boxes")
    plan = plan_for(layout, rule, "cpu", layout_kind="boxes")
    flex = flex_plan(plan)
    tokens = torch.arange(flex.q_slots)
    token = tokens if flex.q_index is None else flex.q_index.long()
    allowed = flex.mask_mod(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None])
    blocks = torch.zeros(plan.shape.q_blocks, plan.shape.k_blocks, dtype=torch.bool)
    for row in range(len(blocks)):
        blocks[row, plan.visits.entries(0, 0, row)[1].long()] = True
    seen = blocks.repeat_interleave(plan.shape.block_q, 0)
    seen = seen.repeat_interleave(plan.shape.block_k, 1)
    seen &= (token[:, None] >= 0) & (token[None] >= 0)
    wanted = torch.from_numpy(expected)[token.clamp_min(0)[:, None], token.clamp_min(0)[None]]
    assert seen.any() and torch.equal(allowed[seen], wanted[seen])


@pytest.mark.parametrize("label", ["neighborhood strided", "neighborhood causal and strided",
    "neighborhood dilated", "sliding_tile (3, 2, 1)", "attention_tile 2", "radial 0.2", "disc 4 3",
    "power_strided (3, 3, 3)", "temporal_band 20"])  # fmt: skip
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_kernels_mask_tokens(
    label: str,
    backend: str,
    qkv: Callable[..., tuple[torch.Tensor, ...]],
    assert_right: Callable[..., None],
    device: torch.device,
) -> None:
    """Each token rule as the kernels run it."""
    name, params, definition = CASES[label]
    layout = TokenLayout((2, 9, 7), before=4)
    rule = pattern(name, **params, exact=True)
    plan = plan_for(layout, rule, device, layout_kind="gather")
    mask = torch.ones(1, 1, layout.length, layout.length, dtype=torch.bool)
    parts = rule.tiling(layout, "gather").parts
    mask[0, 0, 4:, 4:] = torch.from_numpy(definition(layout.grid, parts).copy())
    q, k, v = qkv(layout.length, heads=1, dim=32)
    result = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    assert_right(result, q, k, v, mask)
