"""What reuse may keep: limits as users write them, what stays within one, and "auto"."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from dit_accel import DitAccelError
from dit_accel.api import session_of
from dit_accel.engine import budget
from dit_accel.engine.budget import AutoLimit, parse_limit
from dit_accel.engine.call import Row, Site
from dit_accel.engine.profile import parse_profile
from dit_accel.engine.store import Kept, Store

BOTH = parse_profile(
    "[profile]\nbreakeven = false\n[[rule]]\nattention = 'cross'\nreuse = {every = 3}\n"
    "[[rule]]\nreuse = {every = 3}\n"
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", "auto"), (None, None), (0, 0), (12345, 12345), ("8GB", 8 << 30),
        ("8 GiB", 8 << 30), ("1.5g", 3 << 29), ("512MB", 512 << 20), ("64 kib", 64 << 10),
        ("2T", 2 << 40), ("100", 100), ("100B", 100),
    ],
)  # fmt: skip
def test_limits_as_users_write_them(given: Any, expected: Any) -> None:
    assert parse_limit(given) == expected


@pytest.mark.parametrize(
    "given", [-1, True, 1.5, "8 XB", "lots", "", "-8GB", "9" * 5000, [1], "1e9"]
)
def test_what_is_no_limit(given: Any) -> None:
    with pytest.raises(DitAccelError, match="cache_limit: expected") as caught:
        parse_limit(given)
    assert len(str(caught.value)) < 1000


def kept(size: int, worth: float) -> Kept:
    return Kept(torch.zeros(size, dtype=torch.uint8), 0, 1, (), worth=worth)


def test_what_saves_most_stays() -> None:
    """A random order of outputs of random worth: at every moment the best of those that came."""
    sites = [Site(f"b.{i}", i, 20, "self") for i in range(20)]
    worths = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    store, rows = Store(50), (Row("cond"),)
    for i, site in enumerate(sites):
        store.put(site, "output", rows, kept(10, worths[i]))
        stays = {i for i in range(20) if store.get(sites[i], "output", rows) is not None}
        assert {worths[i] for i in stays} == set(sorted(worths[: i + 1])[-5:])
        assert store.bytes <= 50
    store.restrict(25)
    assert {w for i, w in enumerate(worths) if store.get(sites[i], "output", rows)} == {18, 19}
    assert not store.put(sites[0], "output", rows, kept(30, 99))  # nothing goes in vain
    assert len(store) == 2
    assert not store.put(sites[0], "output", rows, kept(10, 18))  # equals stay


def test_self_attention_stays_before_cross_attention(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(BOTH, cache_limit=None)
    tiny.run()
    free = tiny.pipe.sparse_attention_report()
    peak = free.cache["peak_bytes"]
    assert 0.99 < free.cache["estimate_bytes"] / peak < 1.01  # type: ignore[operator]
    tiny.pipe.enable_sparse_attention(BOTH, cache_limit=peak // 2)  # type: ignore[operator]
    with pytest.warns(UserWarning, match="reuse wants to keep about .* MiB, cache_limit allows"):
        tiny.run()
    report = tiny.pipe.sparse_attention_report()
    assert report.kinds["self"]["reused"] == free.kinds["self"]["reused"] > 0
    assert report.kinds["cross"]["reused"] == 0
    assert report.cache["peak_bytes"] <= peak // 2  # type: ignore[operator]
    assert "MiB wanted" in str(report)


def test_auto_on_a_cpu_is_half_of_what_is_free(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = build("wan")
    monkeypatch.setattr(budget, "_free_host", lambda: 1 << 30)
    tiny.pipe.enable_sparse_attention(BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.run()
    report = tiny.pipe.sparse_attention_report()
    assert report.cache["limit_bytes"] == 1 << 29 and report.kinds["self"]["reused"] > 0
    monkeypatch.setattr(budget, "_free_host", lambda: 0)
    with pytest.warns(UserWarning, match="cache_limit allows 0.0 MiB"):
        expected = tiny.run()
    report = tiny.pipe.sparse_attention_report()
    assert report.cache["peak_bytes"] == 0 and report.kinds["self"]["reused"] == 0
    tiny.pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(), expected)


def test_auto_on_a_gpu_waits_for_the_peak_of_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free 30, reserved 50: of 80 a forward needed 60 at most."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 60)
    auto, gpu = AutoLimit(), torch.device("cuda", 0)
    assert auto.before("small", gpu) == 0
    assert auto.after("small", gpu) == auto.before("small", gpu) == 10
    # What was kept since is part of the largest amount in use: it is not asked again.
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 70)
    assert auto.after("small", gpu) == 10 and auto.before("large", gpu) == 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100))
    assert auto.before("small", gpu) == 0 and auto.before("any", torch.device("mps")) == 0


def test_the_default_is_auto(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention("fast")
    assert session_of(tiny.pipe).settings.cache_limit == "auto"
