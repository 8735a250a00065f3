"""Reused outputs: when they are served, and that no CFG branch or expert sees another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.api import session_of
from dit_accel.engine.call import Moment, Row, Site
from dit_accel.engine.profile import Profile, Reuse, parse_profile
from dit_accel.engine.reuse.output import served
from dit_accel.engine.run import Run
from dit_accel.engine.store import Kept, Store

HEAD = "[profile]\nname = 'test'\nbreakeven = false\n"


def reuse(every: int, attention: str = "self", more: str = "") -> Profile:
    return parse_profile(
        f"{HEAD}[[rule]]\nattention = '{attention}'\nreuse = {{every = {every}}}\n{more}"
    )


class Spy:
    """Records what each self-attention module of block 0 returned, by (expert, branch)."""

    def __init__(self, pipe: Any, module: str) -> None:
        self.seen: dict[tuple[str, str], list[torch.Tensor]] = {}
        self._branch = ""
        for expert in ("transformer", "transformer_2"):
            model = pipe.components.get(expert)
            if model is not None:
                site = model.get_submodule(module)
                site.register_forward_hook(self._record(expert, site._dit_accel_site))

    def _record(self, expert: str, bound: Any) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            key = (expert, bound.moment.branch)
            self.seen.setdefault(key, []).append(output.clone())

        return hook


@pytest.mark.parametrize("attention", ["self", "cross"])
def test_every_second_call_serves_the_same_branch(build: Any, attention: str) -> None:
    tiny = build("wan")
    tiny.steps = 4
    tiny.pipe.enable_sparse_attention(reuse(2, attention))
    spy = Spy(tiny.pipe, "blocks.0.attn1" if attention == "self" else "blocks.0.attn2")
    tiny.run()
    cond, uncond = spy.seen["transformer", "cond"], spy.seen["transformer", "uncond"]
    for outputs in (cond, uncond):
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[2], outputs[3])
        assert not torch.equal(outputs[1], outputs[2])
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report[attention]["reused"] == report[attention]["calls"] // 2
    assert report["cache"]["peak_bytes"] > 0


def test_cond_never_serves_uncond(build: Any) -> None:
    """With the same prompt in both branches they agree; with other ones they must not."""
    tiny = build("wan")
    tiny.steps = 4
    tiny.pipe.enable_sparse_attention(reuse(2, "cross"))
    spy = Spy(tiny.pipe, "blocks.0.attn2")
    tiny.run()
    for cond, uncond in zip(
        spy.seen["transformer", "cond"], spy.seen["transformer", "uncond"], strict=True
    ):
        assert not torch.allclose(cond, uncond, atol=1e-3)


def test_experts_keep_their_own_outputs(build: Any) -> None:
    tiny = build("wan_two_experts")
    tiny.pipe.enable_sparse_attention(reuse(3))
    spy = Spy(tiny.pipe, "blocks.0.attn1")
    tiny.run()
    assert {expert for expert, _ in spy.seen} == {"transformer", "transformer_2"}
    for outputs in spy.seen.values():
        assert all(torch.equal(o, outputs[0]) for o in outputs[:3])


def test_every_site_of_every_family_can_be_reused(tiny: Any) -> None:
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(reuse(2))
    tiny.run(num_inference_steps=4)
    report = tiny.pipe.sparse_attention_report().to_dict()
    assert report["self"]["reused"] >= report["self"]["calls"] // 3
    tiny.pipe.enable_sparse_attention(reuse(1))
    assert torch.equal(tiny.run(), stock)


def test_runs_start_afresh(tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(reuse(50))
    first = tiny_wan.run()
    other = tiny_wan.run(prompt_embeds=tiny_wan.inputs["prompt_embeds"].flip(-1))
    assert not torch.equal(first, other)
    assert torch.equal(tiny_wan.run(), first)


def test_sparse_and_reused_together(tiny_wan: Any) -> None:
    more = "compute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    tiny_wan.pipe.enable_sparse_attention(reuse(3, more=more))
    tiny_wan.run()
    report = tiny_wan.pipe.sparse_attention_report().to_dict()
    assert (report["self"]["sparse"], report["self"]["reused"]) == (6, 12)


def test_limit_is_kept_and_reported(tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(reuse(2), cache_limit=20_000)
    tiny_wan.run()
    report = tiny_wan.pipe.sparse_attention_report().to_dict()
    assert report["cache"]["peak_bytes"] <= 20_000 and report["cache"]["refused"] > 0
    assert report["self"]["reused"] < report["self"]["calls"] // 3


def test_nothing_is_held_after_a_run(tiny_wan: Any) -> None:
    tiny_wan.pipe.enable_sparse_attention(reuse(2))
    tiny_wan.run()
    assert len(session_of(tiny_wan.pipe).run_of(tiny_wan.pipe).store) == 0


SITE = Site("blocks.0.attn1", 0, 1, "self")
ROWS = (Row("cond"),)


def serve(run: Run, how: Reuse, step: int, inputs: torch.Tensor, steps: int = 10) -> int | None:
    """The calls that a served output stands for, None where it was computed."""
    moment = Moment(run, "transformer", step, steps, ROWS)
    return served(how, SITE, moment, "output", (inputs,), lambda: (inputs + step, 1))[1]


def test_age_and_signature_bound_what_is_served() -> None:
    x = torch.zeros(4)

    def fresh() -> Run:
        run = Run(10)
        run.store.put(SITE, "output", ROWS, Kept(x, 2, 1, ((tuple(x.shape), x.dtype, x.device),)))
        return run

    assert serve(fresh(), Reuse(9), 3, x.double()) is None
    assert serve(fresh(), Reuse(9, max_age=0.1), 4, x) is None
    assert serve(fresh(), Reuse(2), 5, x) is None  # steps in between were skipped
    run = fresh()
    assert serve(run, Reuse(9, max_age=0.2), 4, x) == 1
    assert serve(run, Reuse(2), 3, x) is None  # served once already
    assert serve(run, Reuse(2), 4, x) == 1  # what that computed


def test_rows_keep_their_own() -> None:
    store = Store()
    for branch in ("cond", "uncond"):
        for order in range(2):
            for prompt in range(2):
                row = (Row(branch, order, prompt),)
                assert store.get(SITE, "output", row) is None
                assert store.put(SITE, "output", row, Kept(torch.zeros(8), 0, 1, ()))
    assert (len(store), store.bytes, store.peak) == (8, 8 * 32, 8 * 32)
    store.forget(rows=(Row("cond", 1, 0),))
    store.forget(expert="transformer_2")
    assert len(store) == 7
    store.forget()
    assert (len(store), store.bytes, store.peak) == (0, 0, 8 * 32)
