"""Tails and the probe against their definitions in loops, in torch and in Triton."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.probe import probe
from dit_accel.kernels.selectors import Context, selector
from dit_accel.kernels.tails import TAILS, Tail, tail
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
TEXT = TokenLayout((3, 4, 6), before=3, after=9, valid=((3, 9), (0, 4)))
VIDEO = TokenLayout((3, 5, 7))
SCALE = 0.2


def valid_text(layout: TokenLayout, sample: int) -> list[int]:
    before, after = (layout.valid or ((layout.before, layout.after),) * 9)[sample]
    stop = layout.before + layout.video_length
    return [*range(before), *range(stop, stop + after)]


def visited(plan: Any, sample: int, head: int, first: int, video: int) -> list[set[int]]:
    found = []
    for i in range(video):
        full, masked = plan.visits.entries(sample, head, first + i)
        found.append({j - first for j in [*full.tolist(), *masked.tolist()]})
    return [{j for j in row if 0 <= j < video} for row in found]


def expected(
    context: Context, plan: Any, form: Any, layout: TokenLayout, members: Any, rule: Any,
    masks: Callable[[int, int], bool] = lambda query, key: True,
) -> tuple[Any, Any]:  # fmt: skip
    """out [B, L, H, D] and LSE [B, H, L] of the video's rows, in float64, from the definition."""
    q, k, v = (x.double().cpu() for x in (context.q, context.k, context.v))
    batch, length, heads, dim = q.shape
    group, first = heads // k.shape[2], context.blocks.first_video
    out, lse = torch.zeros(batch, length, heads, dim).double(), torch.zeros(batch, heads, length)
    count = len(members.queries)
    for b, h in itertools.product(range(batch), range(heads)):
        made = rule(
            q[b, :, h], k[b, :, h // group], v[b, :, h // group], members.queries, form.size,
            form.exact,
        )  # fmt: skip
        seen = visited(plan, b, h, first, count)
        far = [[j for j in range(count) if j not in seen[i]] for i in range(count)]
        weights = [made.weights(i, far[i]) if far[i] else [] for i in range(count)]
        for i, own in enumerate(members.queries):
            near = [t for j in sorted(seen[i]) for t in members.queries[j]] + valid_text(layout, b)
            slope = torch.zeros(dim, dim).double()
            if form.slope is not None and far[i]:
                low = i // form.slope * form.slope
                sharing = [x for x in range(low, min(count, low + form.slope)) if far[x]]
                for x in sharing:
                    for j, w in zip(far[x], weights[x], strict=True):
                        slope += w / len(sharing) * made.covariance(j)
            for query in own:
                row = q[b, query, h]
                terms = [
                    (SCALE * float(row @ made.k[t]), made.v[t], 0.0)
                    for t in near
                    if masks(query, t)
                ]
                for j in far[i]:
                    for piece in made.pieces[j]:
                        z = SCALE * float(row @ made.k[piece].mean(0)) + made.shift(i, piece)
                        terms.append((z, made.v[piece].mean(0), 1.0))
                total = math.log(sum(math.exp(z) for z, _, _ in terms))
                result = sum(math.exp(z - total) * value for z, value, _ in terms)
                share = sum(math.exp(z - total) * tail for z, _, tail in terms)
                out[b, query, h] = result + share * SCALE * (row @ slope)
                lse[b, h, query] = total
    return out, lse


def attended(context: Context, plan: Any, made: Tail) -> tuple[Any, Any]:
    out, lse = block_sparse_attention(
        context.q, context.k, context.v, plan, scale=SCALE, return_lse=True, backend="torch"
    )
    made.join(context, plan, out, lse)
    return out, lse


def check(
    got: tuple[Any, Any], right: tuple[Any, Any], layout: TokenLayout, bound: float = 2e-5
) -> None:
    rows = slice(layout.before, layout.before + layout.video_length)
    assert (got[0].double().cpu() - right[0])[:, rows].abs().max() < bound
    assert (got[1].cpu() - right[1])[..., rows].abs().max() < bound


CASES: list[tuple[TokenLayout, tuple[int, int, int], dict[str, Any], dict[str, Any]]] = [
    (VIDEO, (1, 2, 4), {}, {"heads": 1}),
    (VIDEO, (3, 3, 4), {"pool": 16}, {"heads": 1}),
    (TEXT, (1, 2, 3), {"slope": 3}, {"batch": 2, "heads": 2, "kv_heads": 1, "dim": 40}),
    (TEXT, (1, 2, 3), {"slope": "head", "weights": "count"}, {"batch": 2, "heads": 1}),
    (TokenLayout((1, 8, 9), after=2), (1, 8, 4), {"pool": 16, "weights": "count"}, {"heads": 1}),
]  # fmt: skip


@pytest.mark.parametrize("name", ["probe", "probe_error", "block_topk"])
@pytest.mark.parametrize(("layout", "tile", "params", "how"), CASES, ids=str)
def test_linear(
    layout: TokenLayout, tile: Any, params: Any, how: Any, name: str, way: str, call: Make,
    video: Any, rule: Any,
) -> None:  # fmt: skip
    if way == "triton" and name != "probe_error" and layout != VIDEO:
        pytest.skip("interpreted: what a selector adds is seen in the first layout")
    made = tail("linear", **params)
    context = call(layout, tile, size=made.size(call(layout, tile).blocks), **how)
    plan = selector(name, density=0.3, tile=list(tile)).select(context)
    members = video(layout, tile)
    right = expected(context, plan, made.form(context.blocks), layout, members, rule)
    check(attended(context, plan, made), right, layout)


@pytest.mark.parametrize("params", [{}, {"weights": "exact", "pool": 32}], ids=str)
def test_pooled(params: Any, way: str, call: Make, video: Any, rule: Any) -> None:
    made = tail("pooled", **params)
    context = call(TEXT, (2, 4, 6), batch=2, size=made.size(call(TEXT, (2, 4, 6)).blocks))
    plan = selector("block_topk", density=0.5, tile=[2, 4, 6]).select(context)
    right = expected(context, plan, made.form(context.blocks), TEXT, video(TEXT, (2, 4, 6)), rule)
    check(attended(context, plan, made), right, TEXT)


def test_under_a_static_pattern_with_a_token_mask(
    way: str, call: Make, video: Any, rule: Any
) -> None:
    """A block that is visited under a mask is no tail: its other tokens count for nothing."""
    layout, tile = TokenLayout((1, 8, 10), before=2), (1, 4, 5)
    window = pattern("disc", radius={"tokens": 4}, exact=True, tile=list(tile))
    context = call(layout, tile)
    plan = window.build(layout, context.q.device, 2, layout_kind="gather")
    context.blocks = plan.blocks
    assert plan.mask is not None
    made = tail("linear")

    mask = plan.mask

    def near(query: int, key: int) -> bool:
        tokens = torch.tensor([query]), torch.tensor([key])
        return key < 2 or bool(mask.to("cpu").allowed(*tokens))

    right = expected(context, plan, made.form(plan.blocks), layout, video(layout, tile), rule, near)
    check(attended(context, plan, made), right, layout)


def test_probe(way: str, call: Make, video: Any, rule: Any) -> None:
    context = call(VIDEO, (1, 2, 4), heads=2, kv_heads=1)
    found = probe(context.q, context.k, context.blocks, SCALE, 128, "error")
    members = video(VIDEO, (1, 2, 4)).queries
    q, k, v = (x.double().cpu() for x in (context.q, context.k, context.v))
    for head in range(2):
        made = rule(q[0, :, head], k[0, :, 0], v[0, :, 0], members, 128, True)
        for i, j in itertools.product(range(len(members)), repeat=2):
            assert float(found.mass[0, head, j, i]) == pytest.approx(made.mass(i, j), abs=2e-5)
            shift = made.shift(i, members[j])
            assert float(found.shift[0, head, j, i]) == pytest.approx(shift, abs=2e-5)
            assert float(found.rank[0, head, j, i]) == pytest.approx(made.error(i, j), abs=2e-4)


def test_probe_selects_the_heaviest(way: str, call: Make, video: Any, rule: Any) -> None:
    context = call(TEXT, (1, 2, 3), batch=2)
    members = video(TEXT, (1, 2, 3)).queries
    for name, score in (("probe", "mass"), ("probe_error", "error")):
        plan = selector(name, density=0.4, tile=[1, 2, 3]).select(context)
        context.probe()
        context = call(TEXT, (1, 2, 3), batch=2)
        for b, h in itertools.product(range(2), range(2)):
            q, k, v = (x[b, :, h].double().cpu() for x in (context.q, context.k, context.v))
            made = rule(q, k, v, members, 128, True)
            for i, kept in enumerate(visited(plan, b, h, context.blocks.first_video, 12)):
                row = [getattr(made, score)(i, j) for j in range(12)]
                assert len(kept) == round(0.4 * 12) and i in kept
                lowest = min((row[j] for j in kept - {i}), default=math.inf)
                assert max(row[j] for j in range(12) if j not in kept) <= lowest + 1e-4


@pytest.mark.parametrize("kind", [name for name in TAILS if name != "drop"])
def test_nothing_left_is_dense(kind: str, way: str, call: Make, naive: Make) -> None:
    """Every block kept, and one block: the tail is nothing, the rows are dense attention's."""
    for tile, density in (((3, 3, 4), 1.0), ((3, 5, 7), 0.1)):
        context = call(VIDEO, tile, heads=1)
        plan = selector("probe", density=density, tile=list(tile)).select(context)
        out, lse = attended(context, plan, tail(kind))
        mask = torch.ones(1, 1, VIDEO.length, VIDEO.length, dtype=torch.bool)
        right = naive(context.q, context.k, context.v, mask, SCALE)
        check((out, lse), right, VIDEO, 1e-5)


def test_constant_keys_are_exact_pooled_ones(way: str, call: Make) -> None:
    """Equal keys in each block: the probe's weights are ln n, no slope is left, and all is dense
    attention but for rounding."""
    layout, tile = TokenLayout((2, 4, 8)), (1, 4, 4)
    context = call(layout, tile)
    members = [[t * 32 + h * 8 + w for h in range(4) for w in range(c, c + 4)]
               for t in range(2) for c in (0, 4)]  # fmt: skip
    for tokens in members:
        context.k[:, tokens] = context.k[:, tokens[:1]]
    plan = selector("probe", density=0.25, tile=list(tile)).select(context)
    one, two = (attended(context, plan, tail(kind))[0] for kind in ("linear", "pooled"))
    assert (one - two).abs().max() < 1e-5
    q, k, v = (x.transpose(1, 2) for x in (context.q, context.k, context.v))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2)
    assert (one - full).abs().max() < 1e-5


def test_text_rows_are_left_alone(way: str, call: Make) -> None:
    context = call(TEXT, (3, 2, 3), batch=2, heads=1)
    plan = selector("probe", density=0.2, tile=[3, 2, 3]).select(context)
    before, _ = block_sparse_attention(
        context.q, context.k, context.v, plan, scale=SCALE, return_lse=True, backend="torch"
    )
    after, _ = attended(context, plan, tail("linear"))
    for rows in (slice(0, 3), slice(3 + TEXT.video_length, None)):
        assert torch.equal(before[:, rows], after[:, rows])
    assert not torch.equal(before, after)


def test_some_heads_at_a_time(call: Make, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    from dit_accel.kernels.tails import join

    context = call(VIDEO, (3, 3, 4), heads=4, kv_heads=2)
    plan = selector("probe", density=0.3, tile=[3, 3, 4]).select(context)
    at_once = attended(context, plan, tail("linear"))
    monkeypatch.setattr(join, "_HELD", {"cuda": 1, "cpu": 1})
    one_by_one = attended(context, plan, tail("linear"))
    assert (at_once[0] - one_by_one[0]).abs().max() < 1e-6


def test_same_bits_twice(way: str, call: Make) -> None:
    results = []
    for _ in range(2):
        context = call(TEXT, (3, 2, 6), batch=2, heads=1, size=16)
        plan = selector("probe_error", density=0.3, tile=[3, 2, 6]).select(context)
        results.append(attended(context, plan, tail("linear", pool=16)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_nan_stays_in_its_rows(way: str, call: Make) -> None:
    """A query of NaN makes its own block's rows NaN, and no others."""
    context = call(VIDEO, (1, 2, 4))
    context.q[:, 0, 0] = torch.nan
    plan = selector("probe_error", density=0.3, tile=[1, 2, 4]).select(context).validate()
    out, _ = attended(context, plan, tail("linear"))
    bad = out.isnan().any(-1)[0]
    assert bad[0, 0] and not bad[:, 1].any()
    assert not bad[[t for t in range(VIDEO.length) if t // 7 > 1 or t % 7 > 3], 0].any()


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("linaer", {}, "Did you mean 'linear'"),
        ("linear", {"slop": 1}, "Did you mean 'slope'"),
        ("linear", {"slope": 0}, "from 1 to 4096.*legal value"),
        ("linear", {"slope": True}, "got True"),
        ("linear", {"pool": 20}, "nearest legal value is 16"),
        ("linear", {"pool": "tile"}, '"block"'),
        ("pooled", {"weights": "exakt"}, "Did you mean 'exact'"),
        ("drop", {"pool": 16}, "unknown parameter of drop"),
    ],
)
def test_bad_parameters(kind: str, params: Any, message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        tail(kind, **params)


def test_density_counts_pooled_keys_and_probes(call: Make) -> None:
    blocks = call(VIDEO, (1, 5, 7)).blocks  # 3 blocks of 35 tokens in 64 slots
    slots, pairs = blocks.block_k, VIDEO.length**2
    assert tail("drop").density(blocks) == 0
    assert tail("pooled").density(blocks) == pytest.approx(9 * slots / pairs)
    assert tail("linear").density(blocks) == pytest.approx((9 * slots + 9 * slots / 2) / pairs)
    more = 9 * slots * slots // 16 + 9 * slots / 2
    assert tail("linear", pool=16).density(blocks) == pytest.approx(more / pairs)


def test_tails_over_the_same_blocks_do_not_mix(way: str, call: Make) -> None:
    """Launches are kept with the blocks: one with weights is none without."""
    context = call(VIDEO, (3, 3, 4), heads=1)
    plan = selector("probe", density=0.3, tile=[3, 3, 4]).select(context)
    made = [tail("linear"), tail("pooled", weights="exact")]
    first, second = (attended(context, plan, each)[0] for each in made)
    again = [attended(context, plan, each)[0] for each in reversed(made)]
    assert torch.equal(again[0], second) and torch.equal(again[1], first)
    assert not torch.equal(first, second)


def test_a_probe_counts_half_whoever_asks_for_it(call: Make) -> None:
    blocks = call(VIDEO, (1, 5, 7)).blocks
    probe_alone = 9 * blocks.block_k / 2 / VIDEO.length**2
    assert tail("drop").density(blocks, probed=True) == pytest.approx(probe_alone)
    assert tail("linear").density(blocks, probed=True) == tail("linear").density(blocks)
