"""The report: what it counts, and how it reads."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel.engine.call import Site
from dit_accel.engine.ledger import Ledger, mark
from dit_accel.engine.profile import parse_profile

PROFILE = parse_profile(
    "[profile]\nname = 'mixed'\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "steps = [0.5, 1.0]\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 2}\n"
)


def test_counts_by_layer_and_step(tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(PROFILE)
    assert "has not run yet" in str(tiny_wan.pipe.sparse_attention_report())
    tiny_wan.run(num_inference_steps=4)
    report = tiny_wan.pipe.sparse_attention_report()
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert (data["profile"], data["family"], data["model"]) == (
        "mixed",
        "wan",
        "WanTransformer3DModel",
    )
    assert [row["sparse"] for row in data["per_step"]] == [0, 0, 6, 6]
    own = [row for row in data["per_layer"] if row["kind"] == "self"]
    assert [row["site"] for row in own] == [f"blocks.{n}.attn1" for n in range(3)]
    assert all(row["sparse"] == row["dense"] == 4 for row in own)
    assert data["cross"]["reused"] == data["cross"]["dense"] == 12
    assert 0 < data["time"]["attention_share"] < 1
    assert data["time"]["compile_s"] == 0
    (plan,) = data["plans"]
    assert (plan["pattern"], plan["backend"], plan["calls"]) == ("sliding_tile", "torch", 12)
    assert plan["launched_density"] == data["self"]["launched_density"]
    text = str(report)
    assert f"plan             sliding_tile: {plan['blocks']} tiles of 2x3x3, launched" in text
    for part in ("self-attention   24 calls: 12 sparse (50%), 12 dense (50%)", "dense because"):
        assert part in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_reset_forgets_the_run(tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(PROFILE)
    tiny_wan.run()
    assert tiny_wan.pipe.sparse_attention_report(reset=True).steps == 3
    assert tiny_wan.pipe.sparse_attention_report().steps == 0


def route(launched: float, kept: float) -> Any:
    return SimpleNamespace(backend="torch", plan=object(), known=launched, kept=kept, row=None)


def test_densities_are_means_over_sparse_calls() -> None:
    ledger = Ledger(2)
    site = Site("blocks.0.attn1", 0, 1, "self")
    ledger.count(site, 0, "dense", reason="profile")
    ledger.count_sparse(site, 1, route(0.2, 0.1))
    ledger.count_sparse(site, 1, route(0.4, 0.3))
    tally = ledger.cells()[site, 1]
    counts = tally.counts()
    assert abs(counts["launched_density"] - 0.3) < 1e-12
    assert abs(counts["kept_density"] - 0.2) < 1e-12


def test_device_counts_join_the_others() -> None:
    ledger = Ledger(1)
    site, online = Site("blocks.0.attn1", 0, 1, "self"), SimpleNamespace(backend="torch", plan=None)
    online.row, online.known = None, 0.125  # of a tail
    for pairs, launched, kept in ((100, 50, 40), (100, 30, 20), (400, 100, 80)):
        ledger.device_row(site, 0, pairs, torch.device("cpu")).add_(torch.tensor([launched, kept]))
        ledger.count_sparse(site, 0, online)
    counts = ledger.cells()[site, 0].counts()
    assert abs(counts["launched_density"] - (0.5 + 0.3 + 0.25) / 3 - 0.125) < 1e-12
    assert abs(counts["kept_density"] - (0.4 + 0.2 + 0.2) / 3) < 1e-12
    assert ledger.cells()[site, 0].counts() == counts  # asking changes nothing


def test_times_add_up() -> None:
    ledger, cpu = Ledger(1), torch.device("cpu")
    ledger.forward_started(cpu)
    begin = mark(cpu)
    torch.randn(200, 200) @ torch.randn(200, 200)
    ledger.timed(begin, mark(cpu))
    with ledger.compilation(cpu):
        torch.randn(200, 200) @ torch.randn(200, 200)
    ledger.forward_ended()
    times = ledger.report("p", "wan", "m", {}).time
    assert times["attention_s"] > 0 and times["compile_s"] > 0
    assert times["attention_s"] + times["compile_s"] <= times["denoising_s"]


@pytest.mark.parametrize(("steps", "said"), [(1, "3DModel, 1 step\n"), (2, "3DModel, 2 steps\n")])
def test_one_step_is_no_plural(steps: int, said: str, tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(PROFILE)
    tiny_wan.run(num_inference_steps=steps)
    assert said in str(tiny_wan.pipe.sparse_attention_report())
