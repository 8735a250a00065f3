"""Merging partial results: halves of the keys give the whole, sides without keys give nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.errors import DitAccelError
from dit_accel.kernels.parts import Part, combine, merge
from dit_accel.kernels.portable.merge import merge_results

Make = Callable[..., Any]
WAYS = {"torch": merge, "triton": merge_results}


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Make:
    return WAYS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "dim"), [(1, 32), (63, 80), (130, 128), (65, 192)])
def test_halves_give_the_whole(
    way: Make, dtype: torch.dtype, length: int, dim: int, qkv: Make, naive: Make, device: Any
) -> None:
    """Rows with keys on both sides, on one, on none."""
    q, k, v = qkv(length, 90, batch=2, heads=3, kv_heads=3, dim=dim, dtype=dtype)
    seen = torch.rand(2, 3, length, 90, generator=torch.Generator().manual_seed(0)) < 0.3
    seen[:, :, ::4, :40] = False
    seen[:, :, ::3, 40:] = False
    left = torch.arange(90) < 40
    sides = []
    for mask in (seen & left, seen & ~left):
        out, lse = naive(q, k, v, mask)
        sides += [out.to(device, dtype), lse.to(device, torch.float32)]
    expected, expected_lse = naive(q, k, v, seen)
    out, lse = way(*sides)
    assert out.dtype == dtype and out.shape == q.shape and lse.dtype == torch.float32
    assert (out.cpu() - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 2e-3)
    none = expected_lse.isneginf()
    assert none.any() and torch.equal(lse.cpu().isneginf(), none)
    assert (out.cpu().transpose(1, 2)[none] == 0).all()
    assert ((lse.cpu() - expected_lse)[~none].abs() <= 1e-5).all()
    # A side without keys: whatever stands in its output, the other's bits come through.
    sides[2] = torch.full_like(sides[2], torch.nan)
    sides[3] = torch.full_like(sides[3], -torch.inf)
    again, lse = way(*sides)
    assert torch.equal(lse, sides[1])
    assert (again - sides[0]).abs().max() <= 1e-6 * (1 if dtype == torch.float32 else 0)


def test_strides_and_layouts(way: Make, device: torch.device) -> None:
    outs = [torch.randn(2, 3, 40, 64, device=device).transpose(1, 2) for _ in range(2)]
    sums = [torch.randn(2, 40, 3, device=device).transpose(1, 2) for _ in range(2)]
    plain = [x.contiguous() for x in (outs[0], sums[0], outs[1], sums[1])]
    out, lse = way(outs[0], sums[0], outs[1], sums[1])
    expected, expected_lse = way(*plain)
    assert (out - expected).abs().max() <= 1e-6 and (lse - expected_lse).abs().max() <= 1e-6
    turned = [x.transpose(1, 2) for x in outs]
    out, lse = merge(turned[0], sums[0], turned[1], sums[1], layout="bhsd")
    assert (out.transpose(1, 2) - expected).abs().max() <= 1e-6
    assert (lse - expected_lse).abs().max() <= 1e-6


def test_large_and_bad_numbers(way: Make, device: torch.device) -> None:
    """No overflow of exp; NaN stays NaN, in its own row."""
    values = torch.tensor([[[1e4, -1e4, 3e38, torch.nan, -torch.inf]]], device=device)
    others = torch.tensor([[[1e4, 1e4, -3e38, 0.0, 2.0]]], device=device)
    a, b = torch.ones(1, 5, 1, 32, device=device), torch.full((1, 5, 1, 32), 3.0, device=device)
    out, lse = way(a, values, b, others)
    assert out[0, :, 0, 0].tolist() == [2.0, 3.0, 1.0, pytest.approx(torch.nan, nan_ok=True), 3.0]
    assert lse[0, 0, :2].tolist() == [pytest.approx(1e4 + 0.693, abs=1e-2), 1e4]
    assert lse[0, 0, 3].isnan() and lse[0, 0, 4] == 2.0


def test_seeded_state(qkv: Make, naive: Make) -> None:
    """The state (m, l, acc) after some keys is a part: out = acc / l, LSE = m + ln l."""
    q, k, v = qkv(20, 50, heads=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)[..., :30] * 0.125
    top = scores.amax(-1) - 0.5  # any m will do, also one that is not the maximum
    weights = (scores - top.unsqueeze(-1)).exp()
    total = weights.sum(-1)
    acc = torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :30])
    state = Part(acc / total.transpose(1, 2).unsqueeze(-1), top + total.log())
    mask = torch.ones(1, 1, 20, 50, dtype=torch.bool)
    places = torch.arange(50)
    rest = []
    for some in ((places >= 30) & (places < 41), places >= 41):
        out, lse = naive(q, k, v, mask & some)
        rest.append(Part(out.to(q), lse.to(q)))
    both = combine([state, *rest])
    expected, expected_lse = naive(q, k, v, mask)
    assert (both.out.cpu() - expected).abs().max() < 2e-6
    assert (both.lse.cpu() - expected_lse).abs().max() < 1e-5


def test_opcheck(device: torch.device) -> None:
    a, b = (torch.randn(1, 20, 2, 32, device=device) for _ in range(2))
    sums = [torch.randn(1, 2, 20, device=device) for _ in range(2)]
    torch.library.opcheck(merge_results, (a, sums[0], b, sums[1]))
    head_major = a.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(merge_results, (head_major, sums[0], b, sums[1]))


def test_bad_input() -> None:
    out, lse = torch.zeros(1, 8, 2, 32), torch.zeros(1, 2, 8)
    for arguments, words in (
        ((out, lse, out[:, 1:], lse), "out_b: expected"),
        ((out, lse.mT, out, lse), r"lse_a: expected torch.float32 \(1, 2, 8\)"),
        ((out, lse, out, lse.double()), "lse_b: .*float64"),
        ((out, lse, out.to("meta"), lse), "out_b: expected it on cpu"),
    ):
        with pytest.raises(DitAccelError, match=words):
            merge(*arguments)
