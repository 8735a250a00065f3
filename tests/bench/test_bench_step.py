"""`dit-accel bench step`: real configurations, and the whole path with small ones on a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel.bench.records import StepRow
from dit_accel.bench.step import StepOptions, amdahl_bound, step_rows
from dit_accel.bench.step_models import STEP_MODELS, build, fit, pick_model
from dit_accel.bench.step_parts import RunPosition, choose_dense, dense_attention, dispatches
from dit_accel.engine.profile import load_profile, parse_profile
from dit_accel.errors import DitAccelError
from dit_accel.pipelines.preset import Preset, Size

Run = Callable[..., tuple[int, str]]
Rows = Callable[[str], list[dict[str, str]]]
CPU = torch.device("cpu")
BILLIONS = {
    "wan-1.3b": 1.42, "wan-14b": 14.29, "wan-5b": 5.00, "hunyuan": 12.82, "cogvideox-5b": 5.57,
    "flux": 11.90, "ltx": 1.92,
}  # fmt: skip
TWO = {"num_attention_heads": 2, "attention_head_dim": 32}
SMALL: dict[str, tuple[dict[str, Any], dict[str, int], Size]] = {
    "wan-14b": (
        {**TWO, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64},
        {"num_layers": 2},
        Size(96, 128, 17),
    ),
    "hunyuan": (
        {**TWO, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
         "rope_axes_dim": (8, 12, 12), "mlp_ratio": 2.0},
        {"num_layers": 1, "num_single_layers": 1},
        Size(96, 128, 17),
    ),
    "cogvideox-5b": (
        {**TWO, "time_embed_dim": 8, "text_embed_dim": 16, "sample_width": 16,
         "sample_height": 12, "sample_frames": 17},
        {"num_layers": 2},
        Size(96, 128, 17),
    ),
    "flux": (
        {**TWO, "joint_attention_dim": 32, "pooled_projection_dim": 32,
         "axes_dims_rope": (8, 12, 12), "in_channels": 16},
        {"num_layers": 1, "num_single_layers": 1},
        Size(176, 304),
    ),
    "ltx": (
        {**TWO, "cross_attention_dim": 64, "caption_channels": 16, "in_channels": 4,
         "out_channels": 4},
        {"num_layers": 2},
        Size(160, 224, 33),
    ),
}  # fmt: skip


def small(name: str) -> Preset:
    model = pick_model(name)
    config, layers, size = SMALL[name]
    config = {**model.config, **config}
    return dataclasses.replace(model, config=config, layers=layers, size=size, prompt=20)


def rows_of(model: Preset, **options: Any) -> list[StepRow]:
    chosen = {"dtype": torch.float32, "repeats": 2, **options}
    return list(step_rows(model, model.size, StepOptions(CPU, **chosen)))


@pytest.mark.parametrize("name", BILLIONS)
def test_real_configurations_have_the_checkpoints_size(name: str) -> None:
    made = build(STEP_MODELS[name], torch.device("meta"), torch.bfloat16)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)
    own = {p.dtype for n, p in made.named_parameters() if "scale_shift_table" not in n}
    assert torch.bfloat16 in own


def test_float32_parameters_are_those_that_diffusers_keeps() -> None:
    made = build(pick_model("tiny-wan"), CPU, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in made.named_parameters()}
    assert types["blocks.0.scale_shift_table"] == torch.float32
    assert types["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert types["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_the_command(bench: Run, rows: Rows) -> None:
    code, text = bench(
        "step", "--model", "tiny-wan", "--profile", "dense", "--density", "0.3", "--repeats", "2",
        "--layers", "2", "--device", "cpu", "--out", "s.csv",
    )  # fmt: skip
    assert code == 0, text
    dense, same, sparse = rows("s.csv")
    assert (dense["what"], dense["layers"], dense["layers_of"]) == ("dense", "2", "3")
    assert "2 of 3 layers" in text and "dense backend native" in text
    assert (same["profile"], same["dense_calls"], same["reasons"]) == ("dense", "2", "profile (2)")
    assert float(same["change"]) == 0.0 and float(same["bound"]) == 1.0
    assert sparse["profile"] == "sliding_tile@0.3" and sparse["backend"] == "torch"
    assert (sparse["sparse"], sparse["dense_calls"]) == ("2", "0")
    assert float(sparse["launched_density"]) == pytest.approx(0.3, rel=0.3)
    assert float(sparse["change"]) > 1e-4
    for row in (dense, same, sparse):
        assert 0 < float(row["self_attention_ms"]) < float(row["attention_ms"])
        assert row["peak_gib"] == "" and row["tokens"] == "700"
    ratio = float(dense["ms"]) / float(sparse["ms"])
    assert float(sparse["speedup"]) == pytest.approx(ratio, rel=1e-3)
    nearness = float(sparse["speedup"]) / float(sparse["bound"])
    assert float(sparse["of_bound"]) == pytest.approx(nearness, rel=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_runs_sparse(name: str) -> None:
    model = small(name)
    dense, sparse = rows_of(model, densities=(0.3,))
    assert sparse.status == "ok", sparse.note
    assert sparse.sparse == sum(model.layers.values()) and not sparse.dense_calls
    assert sparse.change and 1e-4 < sparse.change < 1
    assert dense.attention_ms and dense.ms and dense.attention_ms < 5 * dense.ms


@pytest.mark.parametrize(("name", "layers"), [("wan-14b", 2), ("cogvideox-5b", 1)])
def test_compiled_blocks(name: str, layers: int) -> None:
    """With diffusers' list of repeated blocks, and without one, where each block is compiled."""
    compiled = {"compile": True, "compiler": "aot_eager", "layers": layers}
    dense, sparse = rows_of(small(name), densities=(0.3,), **compiled)
    assert (dense.mode, sparse.mode, sparse.status) == ("compiled", "compiled", "ok"), sparse.note
    assert sparse.sparse == layers and sparse.attention_ms and sparse.self_attention_ms
    assert "graph breaks" not in dense.note + sparse.note


def test_reuse_and_the_middle_of_a_run() -> None:
    """Forwards are consecutive steps past the warm-up, so that reuse is seen as it is."""
    text = (
        '[profile]\nname = "p"\n[[rule]]\nsteps = [0.4, 1.0]\ncompute = "sliding_tile"\n'
        'window = {fraction = [1.0, 0.3, 0.3]}\n[[rule]]\nattention = "cross"\nreuse = {every = 2}'
    )
    profile = dataclasses.replace(parse_profile(text), breakeven=False)
    _, row = rows_of(small("wan-14b"), profiles=(profile,), repeats=4)
    assert (row.sparse, row.reused) == (2, 1)
    assert row.bound and row.bound > 1


def test_a_failing_profile_does_not_stop_the_others() -> None:
    unable = parse_profile('[profile]\nname = "p"\n[[rule]]\nlayers = "77"\ncompute = "full"')
    rows = rows_of(small("wan-14b"), profiles=(unable, load_profile("dense")))
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert "77" in rows[1].note and rows[1].ms is None


def test_amdahl() -> None:
    """100 ms: 60 self, half the calls at density 0.2; 10 cross, half the calls reused."""
    report = {
        "self": {"calls": 4, "sparse": 2, "dense": 2, "launched_density": 0.2},
        "cross": {"calls": 4, "sparse": 0, "dense": 2, "launched_density": None},
    }
    left = 100 - 60 * (1 - (2 * 0.2 + 2) / 4) - 10 * (1 - 2 / 4)
    assert amdahl_bound(100.0, {"self": 60.0, "cross": 10.0}, report) == pytest.approx(100 / left)


def test_the_dense_backend_is_set_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    made: Any = build(small("wan-14b"), CPU, torch.float32)
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    with dense_attention(made, "_native_math"):
        assert made.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert made.blocks[0].attn1.processor._attention_backend is None
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
    choice = choose_dense(made, (1, 50, 2, 32), torch.float32, CPU, masked=True)
    assert choice.name == "native" and choice.times["native"] > 0
    with pytest.raises(DitAccelError, match="no dense attention can run"):
        choose_dense(made, (1, 50, 2, 32), torch.float32, CPU, False, "_native_cudnn")
    assert dispatches(made) and not dispatches(build(small("cogvideox-5b"), CPU, torch.float32))


def test_run_position() -> None:
    place = RunPosition(50, 25)
    place.advance()
    assert (place.step_index, len(place.timesteps)) == (25, 50)
    place.advance()
    assert place.step_index == 26


def test_sizes_and_layers() -> None:
    flux, wan = pick_model("flux"), pick_model("wan-14b")
    assert fit(flux, 4096, 4096, None) == Size(4096, 4096)
    assert flux.cut(6) == {"num_layers": 2, "num_single_layers": 4}
    assert flux.cut(None) == flux.cut(999) == {"num_layers": 19, "num_single_layers": 38}
    assert fit(wan, None, None, 41) == Size(720, 1280, 41)
    for sizes, said in (
        ((724, None, None), "the nearest is 720"),
        ((None, None, 80), "the nearest is 81"),
    ):
        with pytest.raises(DitAccelError, match=said):
            fit(wan, *sizes)
    with pytest.raises(DitAccelError, match="single images"):
        fit(flux, None, None, 5)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model", "wan14b"), "Did you mean 'wan-14b'?"),
        (("--model", "flux", "--profile", "balancd"), "Did you mean 'balanced'?"),
        (("--model", "wan-14b", "--height", "725"), "the nearest is 720"),
        (("--model", "wan-14b", "--backend", "hoper"), "Did you mean 'hopper'?"),
        (("--model", "wan-14b", "--dense", "native_cudnn"), "Did you mean '_native_cudnn'?"),
        (("--model", "wan-14b", "--density", "0"), "expected numbers in (0, 1]"),
        (("--model", "wan-14b", "--dtype", "fp8"), "nknown dtype 'fp8'"),
    ],
)
def test_bad_input_is_found_before_anything_is_built(
    args: tuple[str, ...], said: str, bench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_accel.bench.step.build", lambda *a: pytest.fail("built"))
    code, text = bench("step", *args)
    assert code == 2 and said in text


def test_densities_are_refused_by_the_name_of_the_option(bench: Run) -> None:
    code, text = bench("step", "--model", "wan-1.3b", "--device", "cpu", "--density", "3")
    assert code == 2
    assert "--density: expected numbers in (0, 1], got 3; the nearest is 1.0" in text
