"""NaN and infinity in a key or a value: no row that does not keep that key may notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.patterns import pattern, plan_for
from dit_accel.layout import TokenLayout

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's
BACKENDS = ("torch", "triton", "reference")


@pytest.mark.parametrize(("side", "pooled_too"), [("key", False), ("value", False), ("both", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cut_a_key_off_are_untouched(
    backend: str, side: str, pooled_too: bool, qkv: Make, random_plan: Make, random_pooled: Make
) -> None:
    """One key is NaN, one infinite in one number, one -infinite in one number."""
    plan, mask = random_plan([65, 3], [64, 40, 9], heads=2, keep=0.3, partial=(1, 2, 1), seed=4)
    q, k, v = qkv(68, 113, dim=32)
    more = {}
    if pooled_too:
        plan, pooled, _ = random_pooled(plan, 11, dim=32)
        more = {"pooled": pooled}
    expected, expected_lse = block_sparse_attention(
        q, k, v, plan, backend=backend, return_lse=True, **more
    )
    bad = [5, 60, 100]
    for tensor, told in ((k, side != "value"), (v, side != "key")):
        if told:
            tensor[:, bad[0]] = torch.nan
            tensor[:, bad[1], :, 1] = torch.inf
            tensor[:, bad[2], :, 7] = -torch.inf
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True, **more)
    sees = mask[0, :, :, bad].any(-1).T.to(out.device)  # [Lq, H]
    masked = mask[0].any(-1) & ~mask[0].all(-1)
    assert sees.any() and not sees.all() and masked.any()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out[0][~sees], expected[0][~sees], **close)
    torch.testing.assert_close(lse[0].T[~sees], expected_lse[0].T[~sees], **close)
    assert not out[0][mask[0, :, :, bad[0]].T.to(out.device)].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kept_value_counts_as_in_dense_attention(
    backend: str, qkv: Make, random_plan: Make
) -> None:
    """Infinity stays infinity, and only in its own number; both signs together are NaN."""
    plan, mask = random_plan([65], [64, 40], keep=0.2, partial=(2, 2, 2), seed=3)
    q, k, v = qkv(65, 104, heads=1, dim=32)
    v[0, 3, 0, 5] = v[0, 50, 0, 6] = torch.inf
    v[0, 70, 0, 6] = -torch.inf
    out = block_sparse_attention(q, k, v, plan, backend=backend)[0, :, 0].cpu()
    kept = mask[0, 0]
    scores = (q[0, :, 0] @ k[0, :, 0].T * 32**-0.5).double().cpu()
    weights = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0)
    for row in range(65):
        some = kept[row].nonzero()[:, 0]
        expected = weights[row, some] @ v[0, some, 0].double().cpu()
        torch.testing.assert_close(
            out[row].double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("neighborhood", {"window": {"tokens": [3, 3, 3]}, "causal": True}),
        ("disc", {"radius": {"tokens": 3}}),
        ("radial", {}),
    ],
)
def test_exact_patterns(name: str, parameters: dict[str, Any], backend: str, qkv: Make) -> None:
    """A causal row is not touched by what comes after it, and so on."""
    layout = TokenLayout((4, 3, 11), 3, 5)
    bad, video = 100, torch.arange(3, 135)
    q, k, v = qkv(layout.length, heads=1, dim=32)
    rule = pattern(name, exact=True, tile=[2, 4, 8], **parameters)
    plan = plan_for(layout, rule, q.device)
    assert plan.shape.kinds.partial and plan.mask is not None
    expected = block_sparse_attention(q, k, v, plan, backend=backend)
    k[:, bad], v[:, bad] = torch.inf, torch.nan
    out = block_sparse_attention(q, k, v, plan, backend=backend)
    video = video.to(q.device)
    kept = plan.mask.allowed(video, torch.tensor([bad], device=q.device))[:, 0]
    rows = video[~kept]
    assert 0 < len(rows) < len(video)
    torch.testing.assert_close(out[0, rows], expected[0, rows], rtol=1e-4, atol=1e-5)


def test_finite_calls_keep_their_bits(
    qkv: Make, random_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch backend takes torch's own attention wherever all numbers are finite."""
    from dit_accel.kernels import torch_backend

    plan, _ = random_plan([65, 60], [64, 40], partial=(1, 1, 1))
    q, k, v = qkv(125, 104)
    monkeypatch.setattr(torch_backend, "written_out", lambda *_: pytest.fail("written out"))
    block_sparse_attention(q, k, v, plan, backend="torch")
