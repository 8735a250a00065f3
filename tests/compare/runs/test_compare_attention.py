"""Looking into attention: captured calls, errors of outputs, and the table against density."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_accel.compare import attention_level
from dit_accel.compare.attention_run import about, tabulate
from dit_accel.compare.methods import choose_methods
from dit_accel.compare.probe import Capture, capturing, measuring_errors
from dit_accel.compare.request import Request
from dit_accel.compare.specs import load_spec
from dit_accel.errors import DitAccelError
from dit_accel.kernels.computes import COMPUTES
from dit_accel.kernels.reference import dense_mask
from dit_accel.layout import TokenLayout


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """One head in float64: q [L, D], k [L, D], v [L, D], mask [L, L] of what is seen."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


def all_heads(capture: Capture, mask: np.ndarray | None = None) -> np.ndarray:
    q, k, v = (t.double().numpy() for t in (capture.query, capture.key, capture.value))
    batch, length, heads, dim = q.shape
    out = np.empty((batch, length, heads, dim))
    for b in range(batch):
        for h in range(heads):
            out[b, :, h] = softmax_attention(q[b, :, h], k[b, :, h], v[b, :, h], mask)
    return out


def outputs_of(
    pipe: Any, run: Any, *, projected: bool = True
) -> dict[tuple[str, int], torch.Tensor]:
    """Outputs of self-attention modules by (name, number of the call); without their last
    projection, what attention itself gave."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for name, module in pipe.transformer.named_modules():
        if name.endswith("attn1"):

            def note(module: Any, args: Any, output: Any, name: str = name) -> None:
                counts[name] = counts.get(name, -1) + 1
                found[name, counts[name]] = (output if projected else args[0]).clone()

            where = module if projected else module.to_out[0]
            handles.append(where.register_forward_hook(note))
    run()
    for handle in handles:
        handle.remove()
    return found


def test_captured_calls_give_the_modules_outputs(tiny_wan):
    captures: list[Capture] = []
    tiny_wan.pipe.enable_sparse_attention("dense")
    with capturing(tiny_wan.pipe, [0, -1], [0.0, 0.5], captures.append):
        outputs = outputs_of(tiny_wan.pipe, tiny_wan.run)
    # Steps 0 and 1 of 3, layers 0 and 2, both branches.
    places = [(c.step, c.branch, c.layer) for c in captures]
    assert places == [(s, b, n) for s in (0, 1) for b in ("cond", "uncond") for n in (0, 2)]
    for capture in captures:
        number = 2 * capture.step + (capture.branch == "uncond")
        module = tiny_wan.pipe.transformer.get_submodule(capture.name)
        attended = torch.from_numpy(all_heads(capture)).float().flatten(2)
        with torch.no_grad():
            expected = module.to_out[0](attended)
        assert torch.allclose(expected, outputs[capture.name, number], atol=1e-5)


@pytest.mark.parametrize("family", ["hunyuan_video", "cogvideox", "flux"])
def test_looking_does_not_change_a_run(build, family):
    tiny = build(family)
    before = tiny.run()
    captures: list[Capture] = []
    tiny.pipe.enable_sparse_attention(load_spec("full", breakeven=False).profile)
    with capturing(tiny.pipe, None, [1.0], captures.append):
        looked = tiny.run()
    tiny.pipe.disable_sparse_attention()
    assert torch.allclose(looked, before, atol=1e-4)
    assert torch.equal(tiny.run(), before)
    assert {c.layer for c in captures} == set(range(tiny.self_sites))
    assert {c.step for c in captures} == {2}
    length = captures[0].layout.length
    assert all(c.query.shape[1] == c.key.shape[1] == length for c in captures)


def test_errors_are_those_of_the_first_sparse_layer(tiny_wan):
    """Up to there both runs are the same, so that both modules see the same inputs."""
    spec = "sliding_tile:window=1,1,1,tile=1,4,4,steps=0.3,1.0,layers=1-2"
    dense = outputs_of(tiny_wan.pipe, tiny_wan.run, projected=False)
    _, method = choose_methods([spec], breakeven=False)
    with method.on(tiny_wan.pipe, {}), measuring_errors(tiny_wan.pipe) as errors:
        plain = tiny_wan.run()
    with method.on(tiny_wan.pipe, {}):
        sparse = outputs_of(
            tiny_wan.pipe, lambda: torch.equal(tiny_wan.run(), plain), projected=False
        )
    table = np.array(errors.table)
    assert table.shape == (3, 3) and errors.layer_names[1] == "blocks.1.attn1"
    assert (table[:, 0] == 0).all() and (table[0] == 0).all() and (table[1:, 1:] > 0.01).all()
    apart = [
        float((sparse["blocks.1.attn1", n] - dense["blocks.1.attn1", n]).norm()
              / dense["blocks.1.attn1", n].norm())
        for n in (2, 3)  # step 1: cond, uncond
    ]  # fmt: skip
    assert table[1, 1] == pytest.approx(sum(apart) / 2, rel=1e-4)


def test_errors_of_reused_outputs_are_seen(tiny_wan):
    _, method = choose_methods(["full:reuse={every=3},layers=1"], breakeven=False)
    with method.on(tiny_wan.pipe, {}), measuring_errors(tiny_wan.pipe) as errors:
        tiny_wan.run()
        calls = method.receipt(tiny_wan.pipe).calls
    (row,) = [row for name, row in zip(errors.layer_names, errors.table, strict=True)
              if name == "blocks.1.attn1"]  # fmt: skip
    assert calls["reused"] == 4
    assert row[0] < 1e-5 and row[1] > 1e-3 and row[2] > row[1] * 0.5


def made_capture(grid: tuple[int, int, int], after: int = 0, seed: int = 0) -> Capture:
    torch.manual_seed(seed)
    layout = TokenLayout(grid, after=after)
    q, k, v = (torch.randn(1, layout.length, 2, 32) * 1.5 for _ in range(3))
    return Capture(q, k, v, None, None, layout, "blocks.0.attn1", 0, 1, 4, "cond")


def test_the_table_is_the_error_of_masked_attention():
    grid, tile, after = (2, 6, 9), (1, 3, 3), 5
    capture = made_capture(grid, after)
    (candidate,) = attention_level.candidates([load_spec("sliding_tile:window=1,1,1,tile=1,3,3")])
    (row,) = attention_level.measure(capture, [candidate])
    tiles = [
        (t // tile[0], y // tile[1], x // tile[2])
        for t in range(grid[0])
        for y in range(grid[1])
        for x in range(grid[2])
    ]
    mask = np.ones((len(tiles) + after,) * 2, bool)
    for i, a in enumerate(tiles):
        for j, b in enumerate(tiles):
            mask[i, j] = a == b
    dense, masked = all_heads(capture), all_heads(capture, mask)
    heads = [np.linalg.norm((masked - dense)[:, :, h]) / np.linalg.norm(dense[:, :, h])
             for h in range(2)]  # fmt: skip
    assert row.error == pytest.approx(
        np.linalg.norm(masked - dense) / np.linalg.norm(dense), rel=1e-4
    )
    assert row.worst_head == pytest.approx(max(heads), rel=1e-4)
    assert row.kept_density == pytest.approx(mask.mean())
    assert (row.step, row.branch, row.candidate) == (1, "cond", candidate.name)


def test_padding_takes_no_part_in_the_error():
    torch.manual_seed(0)
    layout = TokenLayout((1, 4, 4), after=8, valid=((0, 3), (0, 8)))
    q, k, v = (torch.randn(2, layout.length, 1, 32) for _ in range(3))
    mask = torch.ones(2, 1, 1, layout.length, dtype=torch.bool)
    mask[0, ..., 19:] = False
    capture = Capture(q, k, v, None, mask, layout, "a", 0, 0, 1, "cond")
    (row,) = attention_level.measure(capture, attention_level.candidates([load_spec("full")]))
    assert row.error < 1e-5


@pytest.mark.parametrize("name", ["block_topk:density=0.3", "block_topp:p=0.9,max_density=0.4"])
def test_selectors_choose_from_the_captured_call(name):
    """The plan is made from its q and k; density and error are that plan's."""
    capture = made_capture((5, 12, 12))
    (tried,) = attention_level.candidates([load_spec(name)])
    plan = tried.plan(capture)
    other = tried.plan(replace(capture, key=capture.key.flip(1)))
    assert not torch.equal(plan.visits.index, other.visits.index)
    (row,) = attention_level.measure(capture, [tried])
    assert row.launched_density == plan.launched_density("torch") < 0.6
    mask = dense_mask(plan, 1, 2)
    q, k, v = (t.transpose(1, 2).double() for t in (capture.query, capture.key, capture.value))
    seen, whole = (F.scaled_dot_product_attention(q, k, v, m) for m in (mask, None))
    expected = float((seen - whole).norm() / whole.norm())
    assert row.error == pytest.approx(expected, rel=1e-3) and row.error > 0


def test_every_compute_has_a_place_in_the_default_table():
    tried = attention_level.candidates()
    assert {c.name.split(":")[0] for c in tried} == set(COMPUTES)
    assert len({c.name for c in tried}) == len(tried)
    rows = attention_level.measure(made_capture((5, 12, 12)), tried)
    summary = attention_level.summarise(rows)
    full = next(each for each in summary if each.candidate == "full")
    assert full.error < 1e-5 and full.launched_density == pytest.approx(1.0)
    assert [s.launched_density for s in summary] == sorted(
        (s.launched_density for s in summary), reverse=True
    )
    windows = [s for s in summary if s.candidate.startswith("sliding_tile")]
    assert windows[-1].error > windows[0].error
    # Every name is an inline profile that means the same.
    again = attention_level.candidates([load_spec(each.name) for each in tried])
    assert attention_level.measure(made_capture((5, 12, 12)), again) == rows


def test_the_table_of_a_pipeline(pipe, call):
    request = Request(["a red circle moves left"], [0], call, model="tiny")
    before = outputs_of(
        pipe,
        lambda: pipe(
            **{**call, "prompt": "a"},
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ),
    )
    tried = attention_level.candidates([load_spec("full"), load_spec("sliding_tile")])
    rows = tabulate(pipe, request, tried, [0, 1], [0.0, 1.0])
    assert len(rows) == 2 * 2 * 2 * 2  # candidates, layers, moments, branches
    assert {row.step for row in rows} == {0, 2}
    after = outputs_of(
        pipe,
        lambda: pipe(
            **{**call, "prompt": "a"},
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ),
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    read = list(csv.DictReader(io.StringIO(attention_level.as_csv(rows))))
    assert [float(row["error"]) for row in read] == [row.error for row in rows]
    data = json.loads(attention_level.as_json(rows, about(request, torch.device("cpu"))))
    assert data["model"] == "tiny" and len(data["rows"]) == 16 and len(data["summary"]) == 2


def test_a_selection_of_nothing_is_an_error(pipe, call):
    request = Request(["a"], [0], call)
    with pytest.raises(DitAccelError, match="--layers"):
        tabulate(pipe, request, attention_level.candidates([load_spec("full")]), [], [0.0])
    with pytest.raises(DitAccelError, match="runs a pattern"):
        attention_level.candidates([load_spec("dense")])
