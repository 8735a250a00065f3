"""The portable Triton kernel: the custom op's contract, and that it writes only its own rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.portable import forward
from dit_accel.kernels.portable.forward import block_sparse_forward
from dit_accel.kernels.portable.steps import TUNED, Config, Machine, boxable, pick_config

Make = Callable[..., Any]


def op_arguments(
    plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pooled: Any = None
) -> tuple[Any, ...]:
    """What `triton_attention` hands to the custom op."""
    seen: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(arguments)
        return torch.zeros_like(q), torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "block_sparse_forward", record)
        patch.setattr(forward, "traced", lambda *_: True)  # an eager GPU call launches by itself
        forward.triton_attention(q, k, v, plan, 0.125, False, pooled)
    return seen[0]


@pytest.mark.parametrize("kind", ["full", "partial", "pooled"])
def test_opcheck(kind: str, qkv: Make, random_plan: Make, random_pooled: Make) -> None:
    plan, _ = random_plan([33, 20], [30, 9], partial=(1, 1, 1) if kind == "partial" else None)
    q, k, v = qkv(53, 39, dim=32)
    pooled = None
    if kind == "pooled":
        plan, pooled, _ = random_pooled(plan, 20, dim=32)
    head_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    for query in (q, head_major):
        arguments = op_arguments(plan, query, k, v, pooled)
        torch.library.opcheck(block_sparse_forward, arguments)


def test_compiles_without_graph_breaks(qkv: Make, random_plan: Make) -> None:
    plan, _ = random_plan([33, 20], [30, 9])
    q, k, v = qkv(53, 39, dim=32)
    arguments = op_arguments(plan, q, k, v)

    def twice(query: torch.Tensor) -> torch.Tensor:
        return block_sparse_forward(query, *arguments[1:])[0] * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), twice(q))


@pytest.mark.parametrize("dim", [64, 80])
def test_neighbours_bytes_stay(
    dim: int, qkv: Make, random_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and LSE lie inside larger memory of sentinels: not one of them changes."""
    plan, _ = random_plan([65, 127, 1, 20], [64, 40], keep=0.8)
    q, k, v = qkv(213, 104, dim=dim)
    expected = block_sparse_attention(q, k, v, plan, backend="triton", scale=0.125)
    guards: list[torch.Tensor] = []

    def guarded(like: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        outer = [n + 7 for n in like.shape]
        guards.append(torch.full(outer, 7.0, dtype=like.dtype, device=like.device))
        return guards[-1][tuple(slice(3, 3 + n) for n in like.shape)]

    monkeypatch.setattr(torch, "empty_like", guarded)
    arguments = op_arguments(plan, q, k, v)
    out, _ = forward.block_sparse_forward._init_fn(*arguments)
    assert torch.equal(out, expected)
    (memory,) = guards
    memory[tuple(slice(3, 3 + n) for n in q.shape)] = 7.0
    assert (memory == 7.0).all()


@pytest.mark.parametrize(
    "config",
    [Config(32, 32, 4, 1), Config(64, 32, 4, 1), Config(32, 64, 4, 1), Config(128, 128, 4, 1)],
)
def test_steps_smaller_than_blocks(
    config: Config,
    qkv: Make,
    random_plan: Make,
    assert_right: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward, "pick_config", lambda *_: config)
    plan, mask = random_plan([128, 31, 65], [128, 33, 90], keep=0.7, partial=(1, 2, 2))
    # float16: on a GPU the largest of these steps would take minutes to compile in float32.
    q, k, v = qkv(224, 251, heads=1, dtype=torch.float16)
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert_right(result, q, k, v, mask)


@pytest.mark.parametrize("name", ["sm80", "sm86", "sm90", "sm100", "sm120", "hip"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_configurations_fit(name: str, itemsize: int) -> None:
    for shared, dim, block, boxes in itertools.product(
        (65536, 101376, 166912, 232448), (32, 64, 128, 256), (64, 128), (False, True)
    ):
        config = pick_config(dim, itemsize, (block, block), Machine(name, shared), boxes)
        assert config.shared_bytes(dim, itemsize) <= shared
        assert block % config.block_m == 0 and block % config.block_n == 0
        assert config.warps in (4, 8) and config.stages in (1, 2, 3, 4)
        assert not config.tma or (boxes and name in ("sm90", "sm100", "sm120"))


def test_tuned_steps_come_first() -> None:
    for (name, dim, itemsize), configs in TUNED.items():
        best = configs[0]
        assert pick_config(dim, itemsize, (128, 128), Machine(name, 232448), best.tma) == best
        for config in configs:
            assert config.block_m in (64, 128) and config.block_n in (32, 64, 128)


@pytest.mark.parametrize(
    ("config", "dim", "head_major"),
    [
        (Config(128, 64, 4, 2, True), 80, False),
        (Config(64, 64, 4, 3, True), 32, True),
        (Config(64, 128, 4, 2, True), 128, False),
    ],
)
def test_boxes_read_what_pointers_read(
    config: Config,
    dim: int,
    head_major: bool,
    qkv: Make,
    random_plan: Make,
    assert_right: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole blocks by tensor descriptors: columns past head_dim and the tensor's end read as 0."""
    plan, mask = random_plan(
        [128, 31], [128, 33, 128, 9], batch=2, keep=0.7, shuffled=False, partial=(1, 2, 2)
    )
    assert plan.shape.kinds[:3] == (True, True, True)
    q, k, v = qkv(159, 298, batch=2, heads=2, kv_heads=1, dim=dim, dtype=torch.float16)
    if head_major:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    assert boxable(k) and boxable(v)
    monkeypatch.setattr(forward, "pick_config", lambda *_: config)
    result = block_sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    assert_right(result, q, k, v, mask)
    plain = replace(config, tma=False)
    monkeypatch.setattr(forward, "pick_config", lambda *_: plain)
    expected = block_sparse_attention(q, k, v, plan, backend="triton")
    assert (result[0] - expected).abs().max() <= (2e-3 if q.is_cuda else 0)


@pytest.mark.parametrize(
    ("make", "usable"),
    [
        (lambda x: x, True),
        (lambda x: x[:, 1:], True),
        (lambda x: x.float(), False),
        (lambda x: x[..., 1:], False),
        (lambda x: x[..., 4:], False),
        (lambda x: x[..., ::2], False),
        (lambda x: x[:, :, :1].expand(-1, -1, 2, -1), False),
        (lambda x: x.mT.contiguous().mT, False),
        (lambda x: x[:, :0], False),
    ],
)
def test_what_boxes_can_read(make: Make, usable: bool, device: torch.device) -> None:
    x = torch.zeros(1, 20, 2, 64, dtype=torch.float16, device=device)
    assert boxable(make(x)) == usable


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float, qkv: Make, random_plan: Make, assert_right: Make) -> None:
    """The running maximum is taken before scaling: that must hold for every sign."""
    plan, mask = random_plan([128, 31], [128, 128, 40], keep=0.8)
    q, k, v = qkv(159, 296, heads=1)
    for backend in ("triton", "torch", "reference"):
        result = block_sparse_attention(
            q, k, v, plan, backend=backend, return_lse=True, scale=scale
        )
        assert_right(result, q, k, v, mask, scale or 1e-30)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_numbers_spread_as_in_sdpa(
    backend: str, bad: float, where: str, qkv: Make, device: torch.device, random_plan: Make
) -> None:
    """NaN and Inf reach the rows that dense attention lets them reach, and no other."""
    plan, mask = random_plan([128, 31], [128, 128, 40], keep=0.5, shuffled=False, seed=3)
    q, k, v = qkv(159, 296, heads=1)
    {"q": q, "k": k, "v": v}[where][0, 30, 0, :4] = bad
    out, lse = block_sparse_attention(q, k, v, plan, backend=backend, return_lse=True)
    seen = mask[0, 0].to(device)
    scores = (q[0, :, 0] @ k[0, :, 0].T * 0.125).masked_fill(~seen, -torch.inf)
    rows = scores.isnan().any(-1) | scores.isposinf().any(-1)
    finite = ~rows & seen.any(-1)
    if where == "v":  # a value counts where its key is visited: its whole column
        rows = torch.zeros_like(rows)
        assert not out[0, seen[:, 30], 0, :4].isfinite().any()
        assert out[0, ~seen[:, 30]].isfinite().all() and out[0, :, 0, 4:].isfinite().all()
    else:
        assert out[0, rows].isnan().all() and out[0, finite].isfinite().all()
    assert lse[0, 0, ~rows & seen.any(-1)].isfinite().all()
    if bad is torch.nan and where != "v":
        assert rows.any() and lse[0, 0, rows].isnan().all()
