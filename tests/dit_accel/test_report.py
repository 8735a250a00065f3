"""The report: what it counts, and how it reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dit_accel.engine.profile import parse_profile
from dit_accel.policy import SiteKey
from dit_accel.report import Recorder

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
    assert plan["predicted_ms"] is None  # there is no table for a CPU
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


def test_densities_are_means_over_sparse_calls() -> None:
    recorder = Recorder("p", "wan", "m")
    recorder.start(2)
    site = SiteKey("blocks.0.attn1", 0, 1, "self")
    recorder.count(site, 0, "dense", reason="profile")
    recorder.count(site, 1, "sparse", backend="torch", launched=0.2, kept=0.1)
    recorder.count(site, 1, "sparse", backend="torch", launched=0.4, kept=0.3)
    kind = recorder.report().kinds["self"]
    assert abs(kind["launched_density"] - 0.3) < 1e-12 and abs(kind["kept_density"] - 0.2) < 1e-12
    assert kind["dense_reasons"] == {"profile": 1} and kind["backends"] == {"torch": 2}


def test_times_add_up() -> None:
    recorder = Recorder()
    recorder.start(1)
    cpu = torch.device("cpu")
    recorder.forward_started(cpu)
    with recorder.attention(cpu):
        torch.randn(200, 200) @ torch.randn(200, 200)
    with recorder.compilation(cpu):
        torch.randn(200, 200) @ torch.randn(200, 200)
    recorder.forward_ended()
    times = recorder.report().time
    assert times["attention_s"] > 0 and times["compile_s"] > 0
    assert times["attention_s"] + times["compile_s"] <= times["denoising_s"]


@pytest.mark.parametrize(("steps", "said"), [(1, "3DModel, 1 step\n"), (2, "3DModel, 2 steps\n")])
def test_one_step_is_no_plural(steps: int, said: str, tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(PROFILE)
    tiny_wan.run(num_inference_steps=steps)
    assert said in str(tiny_wan.pipe.sparse_attention_report())
