"""Shared by the kernel tests: devices, NaN in uninitialised memory, and oracles of their own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Mask = torch.Tensor
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# torch lists the functions that `with torch.device(...)` catches at its first use, and keeps the
# list: not while `poisoned` has replaced some.
with torch.device("cpu"):
    torch.zeros(())


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: CUDA if there is one, else the CPU (Triton interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function of a file in a process where Triton compiles for a GPU that is not here."""
    folder, here = tmp_path_factory.mktemp("triton"), Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
    command = [sys.executable, str(here / "compile_offline.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder,
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def call(file: Path, function: str, **arguments: Any) -> Any:
            print(json.dumps([str(file), function, arguments]), file=asked, flush=True)
            answer = json.loads(answers.readline())
            assert "error" not in answer, answer["error"]
            return answer["made"]

        yield call
        asked.close()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised floating point memory holds NaN."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))
    yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned_allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
        return tensor

    return poisoned_allocate


@pytest.fixture
def qkv(device: torch.device) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Makes q [B, Lq, H, D] and k, v [B, Lk, Hkv, D]."""

    def make(
        lq: int,
        lk: int | None = None,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        dim: int = 64,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(lq + dim)
        shapes = [(lq, heads)] + 2 * [(lk or lq, kv_heads or heads)]
        return tuple(
            torch.randn(batch, n, h, dim, generator=generator).to(device, dtype) for n, h in shapes
        )

    return make


@pytest.fixture
def naive() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention in float64 from a dense mask [B or 1, H or 1, Lq, Lk], one head at a time.

    bias [B or 1, Lk] is added to the scores.
    """

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        scale: float | None = None,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, lq, heads, dim = q.shape
        out = torch.zeros(batch, lq, heads, dim, dtype=torch.float64)
        lse = torch.full((batch, heads, lq), -torch.inf, dtype=torch.float64)
        q, k, v, mask = (x.cpu() for x in (q, k, v, mask))
        for b, h in itertools.product(range(batch), range(heads)):
            kept = mask[b if len(mask) > 1 else 0, h if mask.shape[1] > 1 else 0]
            kv = h // (heads // k.shape[2])
            scores = q[b, :, h].double() @ k[b, :, kv].double().T * (scale or dim**-0.5)
            if bias is not None:
                scores = scores + bias[b if len(bias) > 1 else 0].cpu().double()
            weights = scores.exp() * kept
            total = weights.sum(-1)
            some = total > 0
            out[b, some, h] = (weights[some] @ v[b, :, kv].double()) / total[some, None]
            lse[b, h, some] = total[some].log()
        return out, lse

    return attend


@pytest.fixture
def assert_right(naive: Callable[..., Any]) -> Callable[..., None]:
    """Checks out and LSE of a call against `naive`, within the tolerance of the type."""

    def check(
        result: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        scale: float | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        out, lse = result
        expected, expected_lse = naive(q, k, v, mask, scale, bias)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
        error = (out.double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
        assert error <= TOLERANCE[q.dtype]
        empty = expected_lse.isneginf()
        assert torch.equal(lse.cpu().isneginf(), empty)
        difference = (lse.double().cpu() - expected_lse)[~empty].abs()
        assert difference.numel() == 0 or difference.max() <= 1e-4
        assert (out.cpu().transpose(1, 2)[empty] == 0).all()

    return check


@pytest.fixture
def sliding_mask() -> Callable[..., Mask]:
    """Sliding tile attention's dense mask, by enumeration from the rule in the paper.

    parts: per axis, the sizes of its tiles; window: odd tiles per axis, or all of them.
    """

    def axis_tiles(parts: tuple[int, ...]) -> list[int]:
        return [tile for tile, size in enumerate(parts) for _ in range(size)]

    def sees(query: int, key: int, n: int, k: int) -> bool:
        if k >= n:
            return True
        centre = max(k // 2, min(query, n - 1 - k // 2))
        return abs(centre - key) <= k // 2

    def build(
        parts: tuple[tuple[int, ...], ...],
        window: tuple[int, int, int],
        before: int = 0,
        after: int = 0,
        valid: tuple[tuple[int, int], ...] | None = None,
    ) -> Mask:
        places = list(itertools.product(*(axis_tiles(axis) for axis in parts)))
        video = len(places)
        samples = valid or ((before, after),)
        mask = torch.zeros(len(samples), 1, before + video + after, before + video + after)
        counts = [len(axis) for axis in parts]
        see = [
            [[sees(q, k, n, w) for k in range(n)] for q in range(n)]
            for n, w in zip(counts, window, strict=True)
        ]
        inner = torch.tensor(
            [[all(see[a][p[a]][o[a]] for a in range(3)) for o in places] for p in places]
        )
        for sample, (first, last) in enumerate(samples):
            mask[sample, 0] = 1
            mask[sample, 0, before : before + video, before : before + video] = inner
            mask[sample, 0, :, first:before] = 0
            mask[sample, 0, :, before + video + last :] = 0
        return mask.bool()

    return build


@pytest.fixture
def random_plan(device: torch.device) -> Callable[..., tuple[Any, Mask]]:
    """A plan over blocks of the given lengths with random lists, and its mask by enumeration."""

    def make(
        q_lengths: list[int],
        k_lengths: list[int],
        *,
        batch: int = 1,
        heads: int = 1,
        keep: float = 0.5,
        block: int = 128,
        shuffled: bool = True,
        partial: tuple[int, int, int] | None = None,
        seed: int = 0,
    ) -> tuple[Any, Mask]:
        from dit_accel.kernels.blocks import Blocks, BlockTable
        from dit_accel.kernels.plan import TokenMask, plan_of, visits_from_mask

        generator = torch.Generator().manual_seed(seed)
        tables, members = [], []
        for lengths in (q_lengths, k_lengths):
            total = sum(lengths)
            order = torch.randperm(total, generator=generator) if shuffled else torch.arange(total)
            sizes = torch.tensor(lengths, dtype=torch.int32)
            tables.append(
                BlockTable(
                    order.int() if shuffled else None, (sizes.cumsum(0) - sizes).int(), sizes[None]
                )
            )
            members.append(order.split(lengths))
        shape = (batch, heads, len(q_lengths), len(k_lengths))
        chosen = torch.rand(shape, generator=generator)
        full = chosen < keep
        masked = (chosen > 1 - keep / 2) & ~full & (partial is not None)
        coords = [
            torch.randint(0, 4, (sum(n), 3), generator=generator, dtype=torch.int32)
            for n in (q_lengths, k_lengths)
        ]
        mask = torch.zeros(batch, heads, sum(q_lengths), sum(k_lengths), dtype=torch.bool)
        for b, h, i, j in itertools.product(*map(range, shape)):
            rows, columns = members[0][i][:, None], members[1][j]
            if full[b, h, i, j]:
                mask[b, h, rows, columns] = True
            elif masked[b, h, i, j] and partial is not None:
                apart = (coords[0][rows[:, 0]][:, None] - coords[1][columns]).abs()
                mask[b, h, rows, columns] = (apart <= torch.tensor(partial)).all(-1)
        lists = visits_from_mask(full, tables[1].lengths == block, masked)
        rule = None if partial is None else TokenMask("box", partial, coords[0], coords[1])
        blocks = Blocks(tables[0], tables[1], sum(q_lengths), sum(k_lengths), block, block)
        return plan_of(blocks, lists, rule).validate().to(device), mask

    return make


@pytest.fixture
def runs_plan(device: torch.device) -> Callable[..., tuple[Any, Mask]]:
    """A plan over runs of consecutive tokens with random lists, and its mask by enumeration."""

    def make(
        q_lengths: list[int],
        k_lengths: list[int],
        *,
        batch: int = 1,
        heads: int = 1,
        keep: float = 0.5,
        block_k: int = 128,
        seed: int = 0,
    ) -> tuple[Any, Mask]:
        from dit_accel.kernels.blocks import Blocks, BlockTable
        from dit_accel.kernels.plan import plan_of, visits_from_mask

        generator = torch.Generator().manual_seed(seed)
        shape = (batch, heads, len(q_lengths), len(k_lengths))
        visible = torch.rand(shape, generator=generator) < keep
        tables = []
        for lengths in (q_lengths, k_lengths):
            sizes = torch.tensor(lengths, dtype=torch.int32)
            tables.append(BlockTable(None, (sizes.cumsum(0) - sizes).int(), sizes[None]))
        mask = visible.repeat_interleave(torch.tensor(q_lengths), 2)
        mask = mask.repeat_interleave(torch.tensor(k_lengths), 3)
        lists = visits_from_mask(visible, tables[1].lengths == block_k)
        blocks = Blocks(*tables, sum(q_lengths), sum(k_lengths), 128, block_k)
        return plan_of(blocks, lists).validate().to(device), mask

    return make


@pytest.fixture
def random_pooled(device: torch.device) -> Callable[..., tuple[Any, Any, Mask]]:
    """Random pooled keys, a plan with random lists of them, and whom each query row sees."""

    def make(
        plan: Any,
        count: int,
        *,
        batch: int = 1,
        kv_heads: int = 2,
        dim: int = 64,
        dtype: torch.dtype = torch.float32,
        keep: float = 0.4,
        shared_counts: bool = True,
        seed: int = 0,
    ) -> tuple[Any, Any, Mask]:
        from dit_accel.kernels.plan import Visits, plan_of
        from dit_accel.kernels.pooling import PooledKeys

        generator = torch.Generator().manual_seed(seed)
        shape = (*plan.visits.count.shape, count)
        seen = torch.rand(shape, generator=generator) < keep
        width = max(1, int(seen.sum(-1).max()))
        lists = torch.full((*shape[:-1], width), -7, dtype=torch.int32)  # unused entries are bad
        blocks = plan.blocks
        mask = torch.zeros(*shape[:2], blocks.q_length, count, dtype=torch.bool)
        order = torch.arange(blocks.q_length)
        if blocks.q.order is not None:
            order = blocks.q.order.cpu().long()
        starts, lengths = blocks.q.starts.tolist(), blocks.q.lengths.tolist()
        for place in itertools.product(*map(range, shape[:3])):
            keys = seen[place].nonzero()[:, 0]
            keys = keys[torch.randperm(len(keys), generator=generator)]
            lists[place][: len(keys)] = keys.int()
            b, h, i = place
            rows = order[starts[i] : starts[i] + lengths[b if len(lengths) > 1 else 0][i]]
            mask[b, h, rows] = seen[place]
        listed = seen.sum(-1, dtype=torch.int32)
        first = torch.arange(listed.numel(), dtype=torch.int32).view(listed.shape) * width
        more = Visits(first, listed, listed, listed, lists.flatten()).to(device)
        plan = plan_of(blocks, plan.visits, plan.mask, more)
        counts = torch.rand(1 if shared_counts else batch, count, generator=generator) * 127 + 1
        pooled = PooledKeys(
            *(
                torch.randn(batch, count, kv_heads, dim, generator=generator).to(device, dtype)
                for _ in range(2)
            ),
            counts.log().to(device),
        )
        return plan.validate(pooled), pooled, mask

    return make


@pytest.fixture
def beside_pooled() -> Callable[..., tuple[torch.Tensor, ...]]:
    """Makes one attention over tokens and pooled keys: its keys, values, mask and bias."""

    def make(
        k: torch.Tensor, v: torch.Tensor, mask: Mask, pooled: Any, seen: Mask
    ) -> tuple[torch.Tensor, ...]:
        logs = pooled.log_count
        bias = torch.cat([logs.new_zeros(len(logs), k.shape[1]), logs], -1)
        shape = [max(x, y) for x, y in zip(mask.shape[:3], seen.shape[:3], strict=True)]
        both = torch.cat([x.expand(*shape, -1) for x in (mask, seen)], -1)
        return torch.cat([k, pooled.key], 1), torch.cat([v, pooled.value], 1), both, bias

    return make
