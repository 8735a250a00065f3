"""Runs belong to callers: nothing crosses between pipelines, threads, prompts and windows."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel import DitAccelError
from dit_accel.api import session_of
from dit_accel.engine.profile import parse_profile
from dit_accel.hosts.diffusers.attachment import attachment_of

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "steps = [0.3, 1.0]\n"
    "[[rule]]\nlayers = '1'\nreuse = {every = 2}\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 3}\n"
)
ONLINE = parse_profile(
    "[profile]\nbreakeven = false\n[[rule]]\ncompute = 'block_topk'\ndensity = 0.4\n"
    "tile = [1, 3, 3]\n[[rule]]\nlayers = '0'\nreuse = {every = 2}\n"
)


def sharing(tiny: Any) -> Any:
    """Another pipeline over the same models, with a scheduler of its own; not enabled itself."""
    base = type(tiny.pipe).__mro__[1] if hasattr(type(tiny.pipe), "_dit_accel_base") else None
    parts = {**tiny.pipe.components}
    parts["scheduler"] = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
    other = copy.copy(tiny)
    other.pipe = (base or type(tiny.pipe))(**parts)
    other.pipe.set_progress_bar_config(disable=True)
    return other


def request(tiny: Any, rng: random.Random) -> dict[str, Any]:
    """The arguments of a call of its own: prompt, size, number of steps."""
    noise = torch.Generator().manual_seed(rng.randrange(1 << 30))
    shape = tiny.inputs["prompt_embeds"].shape
    return {
        "prompt_embeds": torch.randn(shape, generator=noise).to(tiny.inputs["prompt_embeds"]),
        "width": rng.choice([80, 112]),
        "num_frames": rng.choice([5, 9]),
        "num_inference_steps": rng.choice([2, 3, 4]),
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("profile", "rounds"), [(SPARSE, 20), (ONLINE, 5)], ids=["static", "online"]
)
def test_threads_give_what_one_after_the_other_gives(
    build: Any, profile: Any, rounds: int, device: str
) -> None:
    """Rounds of two to four requests at once over one transformer, one of which may raise: same
    bits, same receipts."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    first = build("wan").to(device)
    first.pipe.enable_sparse_attention(profile, strict=True)
    every = [first, *(sharing(first) for _ in range(3))]
    rng = random.Random(0)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(rounds if device == "cpu" else 20):
            chosen = every[: rng.randint(2, 4)]
            asked = [request(first, rng) for _ in chosen]
            pairs = list(zip(chosen, asked, strict=True))
            bad = rng.choice(chosen) if len(chosen) > 2 else None
            alone = [(tiny.run(**call), receipt(tiny)) for tiny, call in pairs]
            start = threading.Barrier(len(chosen))

            def one(tiny: Any, call: dict[str, Any], start: Any = start, bad: Any = bad) -> Any:
                start.wait()
                if tiny is bad:
                    with pytest.raises(RuntimeError, match="enough"):
                        tiny.run(**call, callback_on_step_end=enough)
                    return None
                return tiny.run(**call), receipt(tiny)

            together = list(pool.map(lambda each: one(*each), pairs))
            for tiny, got, wanted in zip(chosen, together, alone, strict=True):
                assert (got is None) == (tiny is bad)
                if got is not None:
                    assert torch.equal(got[0], wanted[0]) and got[1] == wanted[1]


def enough(*args: Any) -> Any:
    raise RuntimeError("enough")


@pytest.mark.parametrize("family", ["wan_two_experts", "hunyuan_video", "ltx_video", "flux"])
def test_threads_on_every_family(build: Any, family: str) -> None:
    first = build(family)
    first.pipe.enable_sparse_attention(SPARSE, strict=True)
    every = [first, sharing(first), sharing(first)]
    taller = {"height": first.inputs["height"] + 64}
    changes = [{}, taller, {"num_inference_steps": first.steps + 1}]
    pairs = zip(every, changes, strict=True)
    alone = [(tiny.run(**change), receipt(tiny)) for tiny, change in pairs]
    start = threading.Barrier(3)

    def one(tiny: Any, change: dict[str, Any]) -> Any:
        start.wait()
        return tiny.run(**change), receipt(tiny)

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(one, every, changes))
    for (output, counts), (wanted, wanted_counts) in zip(together, alone, strict=True):
        assert torch.equal(output, wanted) and counts == wanted_counts


def test_profiles_at_once_on_models_of_their_own(build: Any) -> None:
    """Two enabled models in four threads: neither session sees the other's calls."""
    pairs = []
    for profile in (SPARSE, ONLINE):
        tiny = build("wan")
        tiny.pipe.enable_sparse_attention(profile, strict=True)
        pairs += [tiny, sharing(tiny)]
    alone = [(tiny.run(), receipt(tiny)) for tiny in pairs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda tiny: (tiny.run(), receipt(tiny)), pairs))
    for (output, counts), (wanted, wanted_counts) in zip(together, alone, strict=True):
        assert torch.equal(output, wanted) and counts == wanted_counts


def receipt(tiny: Any) -> dict[str, Any]:
    report = tiny.pipe.sparse_attention_report().to_dict()
    return {key: report[key] for key in ("steps", "self", "cross", "per_layer", "per_step")}


def test_a_request_that_raises_leaves_the_others(build: Any) -> None:
    first = build("wan")
    first.pipe.enable_sparse_attention(SPARSE)
    second = sharing(first)
    wanted = first.run(num_inference_steps=4)

    def fails(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 1:
            raise RuntimeError("enough")
        return kwargs

    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(first.run, num_inference_steps=4)
        bad = pool.submit(second.run, callback_on_step_end=fails)
        assert torch.equal(good.result(), wanted)
        with pytest.raises(RuntimeError, match="enough"):
            bad.result()


def test_the_schedule_is_that_of_the_pipeline_that_runs(build: Any) -> None:
    first = build("flux")
    first.pipe.enable_sparse_attention(SPARSE)
    first.run(num_inference_steps=4)
    second = sharing(first)
    for steps in (12, 5):
        second.run(num_inference_steps=steps)
        report = second.pipe.sparse_attention_report()
        assert report.steps == steps
        assert [row["step"] for row in report.per_step] == list(range(steps))
        assert first.pipe.sparse_attention_report().steps == 4


@pytest.mark.parametrize("how", ["from_pipe", "replaced", "copied"])
def test_other_schedulers_over_an_enabled_transformer(tiny: Any, how: str) -> None:
    """Whoever runs with another scheduler is told by that one, also if the first never ran."""
    later = parse_profile(
        "[profile]\nbreakeven = false\n[[rule]]\ncompute = 'sliding_tile'\n"
        "window = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\nsteps = [0.6, 1.0]\n"
    )
    tiny.pipe.enable_sparse_attention(later)
    other = copy.copy(tiny)
    scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
    if how == "from_pipe":
        other.pipe = type(tiny.pipe).__mro__[1].from_pipe(tiny.pipe, scheduler=scheduler)
    elif how == "copied":
        other.pipe = copy.copy(tiny.pipe)
        other.pipe.scheduler = scheduler
    else:
        tiny.pipe.scheduler = scheduler
    other.pipe.set_progress_bar_config(disable=True)
    other.run(num_inference_steps=5)
    rows = other.pipe.sparse_attention_report().per_step
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["sparse"] > 0 for row in rows] == [False] * 3 + [True] * 2


def test_a_transformer_under_another_name(build: Any) -> None:
    """Another pipeline has it as its second expert: its own schedule, and its own receipt."""
    one, two = build("wan"), build("wan_two_experts")
    two.pipe.transformer_2 = one.pipe.transformer
    one.pipe.enable_sparse_attention(SPARSE)
    one.run()
    two.run(num_inference_steps=6)
    mine = session_of(one.pipe).runs
    assert mine[two.pipe].steps == 6 and mine[one.pipe].steps == 3
    assert session_of(one.pipe) not in mine


@pytest.mark.parametrize("ended_by", ["callback", "forward", "interrupt"])
def test_whatever_ends_a_run_frees_what_it_kept(build: Any, ended_by: str) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(SPARSE)
    clean = tiny.run()
    error = KeyboardInterrupt if ended_by == "interrupt" else RuntimeError
    kept: list[weakref.ref[Any]] = []

    def stop(*args: Any) -> None:
        store = session_of(tiny.pipe).run_of(tiny.pipe).store
        kept.extend(weakref.ref(each.value) for each in store._kept.values())
        if kept:
            raise error("stop")

    change: dict[str, Any] = {}
    if ended_by == "forward":
        hook = tiny.pipe.transformer.blocks[2].attn1.register_forward_hook(stop)
    else:
        change["callback_on_step_end"] = lambda pipe, step, t, kwargs: stop() or kwargs
    with pytest.raises(error):
        tiny.run(**change)
    if ended_by == "forward":
        hook.remove()
    gc.collect()
    assert kept and all(ref() is None for ref in kept)
    attachment = attachment_of(tiny.pipe.transformer)
    assert attachment is not None and attachment.here.moment is None
    assert torch.equal(tiny.run(), clean)


def forwards(
    model: nn.Module, calls: list[tuple[float, str, torch.Tensor]], latents: Any = None
) -> list[torch.Tensor]:
    """Forwards at (timestep, branch, prompt) of an own loop."""
    if latents is None:
        noise = torch.randn(1, 16, 5, 10, 14, generator=torch.Generator().manual_seed(0))
        latents = [noise] * len(calls)
    outputs = []
    with torch.no_grad():
        for (time, branch, prompt), x in zip(calls, latents, strict=True):
            with model.cache_context(branch):
                outputs.append(model(x, torch.tensor([time]), prompt, return_dict=False)[0])
    return outputs


REUSE = parse_profile(
    "[profile]\nbreakeven = false\n[[rule]]\nreuse = {every = 2}\n"
    "[[rule]]\nattention = 'cross'\nreuse = {every = 2}\n"
)


def prompts(count: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randn(1, 8, 16, generator=noise) for _ in range(count)]


@pytest.mark.parametrize("order", ["same", "turned", "skipped"])
@pytest.mark.parametrize("scheduled", [True, False])
def test_windows_of_one_branch_are_served_nothing(build: Any, scheduled: bool, order: str) -> None:
    """Two windows under one branch name and prompt in a step: nothing tells them apart later."""
    model = build("wan").pipe.transformer
    scheduler = SimpleNamespace(timesteps=torch.tensor([900.0, 800.0, 500.0, 200.0]))
    how: dict[str, Any] = {"scheduler": scheduler} if scheduled else {"steps": 4}
    text, (a, b) = prompts(1)[0], torch.randn(2, 1, 16, 5, 10, 14)
    later = {"same": [a, b], "turned": [b, a], "skipped": [b]}[order]
    stock = forwards(model, [(800.0, "cond", text)] * len(later), later)
    session = dit_accel.enable(model, profile=REUSE, **how)
    calls = [(900.0, "cond", text)] * 2 + [(800.0, "cond", text)] * len(later)
    outputs = forwards(model, calls, [a, b, *later])
    assert all(map(torch.equal, outputs[2:], stock))
    assert session.report().kinds["self"]["reused"] == 0


@pytest.mark.parametrize("windows", [2, 3])
def test_windows_stay_apart_to_the_end(build: Any, windows: int) -> None:
    """A whole loop without a scheduler: the steps of all windows, and stock's outputs."""
    model = build("wan").pipe.transformer
    text, parts = prompts(1)[0], torch.randn(windows, 1, 16, 5, 10, 14)
    times = (900.0, 700.0, 500.0, 300.0)
    calls = [(time, "cond", text) for time in times for _ in range(windows)]
    stock = forwards(model, calls, [*parts] * 4)
    session = dit_accel.enable(model, profile=REUSE, steps=4)
    for _ in range(2):
        assert all(map(torch.equal, forwards(model, calls, [*parts] * 4), stock))
        rows = session.report().per_step
        assert [(row["step"], row["calls"]) for row in rows[1:]] == [
            (step, 3 * windows) for step in (1, 2, 3)
        ]
        assert session.report().kinds["self"]["reused"] == 0


def test_inference_mode_sees_a_prompt_that_is_overwritten(build: Any) -> None:
    tiny = build("wan")
    one = tiny.inputs["prompt_embeds"]
    two = one.flip(1).contiguous()
    tiny.pipe.enable_sparse_attention(REUSE)

    def change(how: str) -> torch.Tensor:
        def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> Any:
            if step == 0 and how == "overwritten":
                kwargs["prompt_embeds"].copy_(two)
            elif step == 0:
                kwargs["prompt_embeds"] = two.clone()
            return kwargs

        with torch.inference_mode():
            return tiny.run(
                prompt_embeds=one.clone(), callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                num_inference_steps=4,
            )  # fmt: skip

    assert torch.equal(change("overwritten"), change("replaced"))


@pytest.mark.parametrize("steps", [2, 5])
def test_a_preview_in_a_callback_is_a_run_of_its_own(build: Any, steps: int) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(SPARSE)
    preview = sharing(tiny)
    alone, shown = tiny.run(), preview.run(num_inference_steps=steps)
    wanted = receipt(tiny)
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> Any:
        if step == 0:
            seen.append(preview.run(num_inference_steps=steps))
        return kwargs

    assert torch.equal(tiny.run(callback_on_step_end=callback), alone)
    assert torch.equal(seen[0], shown)
    assert receipt(tiny) == wanted and receipt(preview)["steps"] == steps


def test_disabling_one_of_two_pipelines(build: Any) -> None:
    first = build("flux")
    second = sharing(first)
    stock = first.run()
    first.pipe.enable_sparse_attention(SPARSE)
    second.pipe.enable_sparse_attention(SPARSE)
    sparse = second.run()
    assert not torch.equal(sparse, stock)
    first.pipe.disable_sparse_attention()
    assert torch.equal(first.run(), stock)
    assert torch.equal(second.run(), sparse)
    second.pipe.disable_sparse_attention()
    assert torch.equal(second.run(), stock)
    assert attachment_of(first.pipe.transformer) is None
    assert not any(hasattr(type(x.pipe), "_dit_accel_base") for x in (first, second))


def test_a_transformer_that_is_gone(build: Any) -> None:
    tiny, spare = build("wan"), build("wan")
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run()
    tiny.pipe.transformer = spare.pipe.transformer
    del spare
    gc.collect()
    tiny.run()
    assert tiny.pipe.sparse_attention_report().kinds["self"]["calls"] == 18


def test_reports_of_loops_in_threads(build: Any) -> None:
    model = build("wan").pipe.transformer
    session = dit_accel.enable(model, profile=SPARSE, steps=4)
    text = prompts(1)[0]

    both = threading.Barrier(2)

    def loop(steps: int) -> int:
        both.wait()  # the other loop has begun its run when this one asks
        forwards(model, [(900.0 - 100 * n, "cond", text) for n in range(steps)])
        both.wait()
        return session.report().kinds["self"]["calls"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(loop, (2, 4))) == [6, 12]


def test_a_copied_model_can_be_pickled(build: Any, tmp_path: Any) -> None:
    tiny = build("wan")
    tiny.pipe.enable_sparse_attention(SPARSE)
    torch.save(copy.deepcopy(tiny.pipe.transformer), tmp_path / "model.pt")


def test_families_do_not_mix(build: Any) -> None:
    models = {"a": build("wan").pipe.transformer, "b": build("ltx_video").pipe.transformer}
    with pytest.raises(DitAccelError, match="one family, got wan and ltx_video"):
        dit_accel.enable(models, profile="dense", steps=4)


def test_a_warm_up_leaves_the_last_receipt(build: Any) -> None:
    tiny = build("wan")
    for profile in (SPARSE, ONLINE):
        tiny.pipe.enable_sparse_attention(profile)
        tiny.pipe.sparse_attention_warmup(80, 112, 17)
        assert tiny.pipe.sparse_attention_report().steps == 0
        tiny.run()
        before = receipt(tiny)
        tiny.pipe.sparse_attention_warmup(80, 112, 17)
        assert receipt(tiny) == before


@pytest.mark.parametrize("how", ["replaced", "overwritten"])
def test_a_prompt_that_changes_is_computed_anew(build: Any, how: str) -> None:
    model = build("wan").pipe.transformer
    one, two = prompts(2)
    session = dit_accel.enable(model, profile=REUSE, steps=4)
    (wanted,) = forwards(model, [(800.0, "cond", two)])
    session.report(reset=True)
    given = one.clone()
    forwards(model, [(900.0, "cond", given)])
    if how == "overwritten":
        given.copy_(two)
    (got,) = forwards(model, [(800.0, "cond", given if how == "overwritten" else two)])
    assert torch.equal(got, wanted)
    assert session.report().kinds["self"]["reused"] == 0


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("flux", "pooled_prompt_embeds"),
        ("flux", "prompt_embeds"),
        ("hunyuan_video", "pooled_prompt_embeds"),
        ("hunyuan_video", "prompt_attention_mask"),
        ("cogvideox", "prompt_embeds"),
        ("ltx_video", "prompt_embeds"),
        ("ltx_video", "prompt_attention_mask"),
        ("wan", "prompt_embeds"),
    ],
)
def test_nothing_is_served_across_conditionings(build: Any, family: str, name: str) -> None:
    """Whatever of the prompt is overwritten between two steps, the next step serves nothing."""
    tiny = build(family)
    guided = {"guidance_scale": 1.0} if family in ("wan", "cogvideox", "ltx_video") else {}
    given = tiny.inputs[name].clone()
    hook = {"write": True}

    def before(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hook["calls"] = hook.get("calls", 0) + 1
        if hook["write"] and hook["calls"] == 2:
            for key in CONDITIONING[name]:
                kwargs[key].copy_(kwargs[key].flip(-1))

    handle = tiny.pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)
    tiny.pipe.enable_sparse_attention(REUSE)
    tiny.run(**{name: given}, num_inference_steps=2, **guided)
    reused = sum(tiny.pipe.sparse_attention_report().kinds[kind]["reused"] for kind in KINDS)
    assert hook["calls"] == 2 and reused == 0
    hook.update(calls=0, write=False)
    tiny.run(num_inference_steps=2, **guided)
    reused = sum(tiny.pipe.sparse_attention_report().kinds[kind]["reused"] for kind in KINDS)
    assert reused == tiny.self_sites + tiny.cross_sites
    handle.remove()


KINDS = ("self", "cross")
CONDITIONING = {
    "prompt_embeds": ["encoder_hidden_states"],
    "pooled_prompt_embeds": ["pooled_projections"],
    "prompt_attention_mask": ["encoder_attention_mask"],
}


@pytest.mark.parametrize(("calls", "expected"), [(1, 3), (2, 6), (3, 9)])
def test_unnamed_calls_of_a_number_of_steps(build: Any, calls: int, expected: int) -> None:
    """Any number of unnamed calls a step, with a timestep for each sample, and twice."""
    model = build("wan").pipe.transformer
    session = dit_accel.enable(model, profile=REUSE, steps=8)
    latents = torch.zeros(2, 16, 1, 10, 14)
    for _ in range(2):
        with torch.no_grad():
            for step in range(8):
                for text in prompts(calls):
                    time = torch.tensor([900.0 - 100 * step] * 2)
                    model(latents, time, text.expand(2, -1, -1), return_dict=False)
        rows = session.report().per_step
        assert [(row["step"], row["calls"]) for row in rows] == [(n, expected) for n in range(8)]


def test_unnamed_calls_at_one_timestep_are_one_step(build: Any) -> None:
    model = build("wan").pipe.transformer
    one, two = prompts(2)
    session = dit_accel.enable(model, profile=SPARSE, steps=4)
    latents = torch.zeros(1, 16, 5, 10, 14)
    with torch.no_grad():
        for time in (900.0, 700.0, 500.0, 300.0):
            for prompt in (one, two):
                model(latents, torch.tensor([time]), prompt, return_dict=False)
    report = session.report()
    assert [(row["step"], row["calls"]) for row in report.per_step] == [(n, 6) for n in range(4)]


def test_a_shared_transformer_leaves_the_other_expert(build: Any) -> None:
    two, one = build("wan_two_experts"), build("wan")
    one.pipe.transformer = two.pipe.transformer
    two.pipe.enable_sparse_attention(SPARSE)
    one.pipe.enable_sparse_attention(SPARSE)
    assert attachment_of(two.pipe.transformer_2) is not None
    two.run()
    report = two.pipe.sparse_attention_report()
    assert report.kinds["self"]["calls"] == 3 * 2 * 6 and report.kinds["self"]["sparse"] > 0


@pytest.mark.parametrize("what", ["transformer", "block", "attention"])
def test_what_was_exchanged_is_attached_again(build: Any, what: str) -> None:
    tiny, spare = build("wan"), build("wan")
    spare.pipe.transformer.load_state_dict(tiny.pipe.transformer.state_dict())
    tiny.pipe.enable_sparse_attention(SPARSE)
    wanted = tiny.run()
    if what == "transformer":
        tiny.pipe.transformer = spare.pipe.transformer
    elif what == "block":
        tiny.pipe.transformer.blocks[1] = spare.pipe.transformer.blocks[1]
    else:
        tiny.pipe.transformer.blocks[2].attn1 = spare.pipe.transformer.blocks[2].attn1
    assert torch.equal(tiny.run(), wanted)
    assert tiny.pipe.sparse_attention_report().kinds["self"]["calls"] == 18
    tiny.pipe.disable_sparse_attention()
    assert attachment_of(tiny.pipe.transformer) is None


def test_a_copied_pipeline_is_stock(build: Any) -> None:
    tiny = build("flux")
    stock = tiny.run()
    tiny.pipe.enable_sparse_attention(SPARSE)
    copied = copy.deepcopy(tiny)
    assert torch.equal(copied.run(), stock)
    with pytest.raises(DitAccelError, match="not enabled"):
        copied.pipe.sparse_attention_report()
    assert type(copied.pipe) is type(tiny.pipe).__mro__[1]
    tiny.pipe.disable_sparse_attention()
    assert type(tiny.pipe) is type(copied.pipe)
