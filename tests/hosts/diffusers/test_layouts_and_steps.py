"""Where tokens are and which steps run, where the arguments alone do not say it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import DitAccelError
from dit_accel.engine.profile import parse_profile
from dit_accel.hosts.diffusers.clock import StepClock
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.flux import FLUX
from dit_accel.pipelines.ltx_video import LTX_VIDEO

SPARSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
)
WIDE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [1, 4, 32]\n"
)
WARM = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "steps = [0.3, 1.0]\n"
)


def flux_ids(height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Position ids of an image as FluxPipeline makes them."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(-1, 3).to(dtype)


def flux_layout(ids: torch.Tensor) -> Any:
    return FLUX.place(None, {"img_ids": ids, "encoder_hidden_states": torch.zeros(1, 7, 1)}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("height", "width"), [(4, 264), (264, 4), (300, 290), (1, 600), (600, 1), (11, 19), (4, 2100)]
)
def test_flux_grids_of_every_type(height: int, width: int, dtype: torch.dtype) -> None:
    ids = flux_ids(height, width, dtype)
    reference = flux_ids(5, 6, dtype)
    reference[:, 0] = 1
    assert flux_layout(ids) == TokenLayout((1, height, width), before=7)
    assert flux_layout(ids[None]) == TokenLayout((1, height, width), before=7)
    wanted = TokenLayout((1, height, width), before=7, after=30)
    assert flux_layout(torch.cat([ids, reference])) == wanted


def test_flux_ids_that_are_no_raster() -> None:
    ids = flux_ids(6, 8, torch.float32)
    wrong = [ids.flip(0), ids[:-1], ids * 2, torch.cat([ids, ids]), ids[torch.randperm(48)]]
    for each in wrong:
        assert "not one image grid" in flux_layout(each)


def test_flux_in_half_precision_runs_sparse_beyond_256_columns(build: Any) -> None:
    tiny = build("flux").to("cpu", torch.bfloat16)
    tiny.pipe.enable_sparse_attention(WIDE, strict=True, backend="torch")
    tiny.pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    del tiny.pipe.transformer.transformer_blocks[1]
    tiny.run(height=64, width=4224, num_inference_steps=1)
    kind = tiny.pipe.sparse_attention_report().kinds["self"]
    assert kind["sparse"] == kind["calls"] == 1


def coordinates(
    frames: int, height: int, width: int, first: float = 0.0, rate: float = 25.0
) -> torch.Tensor:
    """[1, 3, tokens]: seconds and pixels of latents, as LTX's pipelines make them."""
    t = (torch.arange(frames) * 8.0 - 7).clamp(min=0) + first
    y, x = torch.arange(height) * 32.0, torch.arange(width) * 32.0
    mesh = torch.stack(torch.meshgrid(t / rate, y, x, indexing="ij"))
    return mesh.flatten(1)[None]


def ltx_layout(grid: Any, coords: Any, tokens: int = 0) -> Any:
    bound = dict(zip(("num_frames", "height", "width"), grid, strict=True))
    tokens = tokens or coords.shape[-1]
    hidden = torch.zeros(1, tokens, 4)
    return LTX_VIDEO.place(None, {**bound, "video_coords": coords, "hidden_states": hidden}, {})


@pytest.mark.parametrize("grid", [(1, 1, 1), (None, None, None), (5, 5, 7), (9, 9, 9)])
@pytest.mark.parametrize("shape", [(5, 5, 7), (1, 4, 6), (3, 1, 8), (3, 8, 1), (7, 1, 1)])
def test_ltx_coordinates_tell_the_grid(grid: Any, shape: Any) -> None:
    video = coordinates(*shape)
    assert ltx_layout(grid, video) == TokenLayout(shape)
    assert ltx_layout(grid, video.repeat(2, 1, 1)) == TokenLayout(shape)


def test_ltx_conditions_stand_before_or_after_the_video() -> None:
    video = coordinates(5, 5, 7)
    two = [coordinates(1, 5, 7, first=16), coordinates(2, 5, 7, first=24)]
    before = torch.cat([*two, video], dim=-1)
    assert ltx_layout((1, 1, 1), before) == TokenLayout((5, 5, 7), before=3 * 35)
    after = torch.cat([video, coordinates(1, 5, 7)], dim=-1)
    assert ltx_layout((1, 1, 1), after) == TokenLayout((5, 5, 7), after=35)


def test_ltx_coordinates_that_are_no_grid_have_a_reason() -> None:
    video = coordinates(5, 5, 7)
    mixed = video[..., torch.randperm(175, generator=torch.Generator().manual_seed(0))]
    assert "not one grid" in ltx_layout((1, 1, 1), mixed)
    assert "differ between" in ltx_layout((1, 1, 1), torch.cat([video, video + 1]))
    rounded = coordinates(2, 2, 900).to(torch.bfloat16)
    assert "not one grid" in ltx_layout((1, 1, 1), rounded)
    assert "neither a grid" in ltx_layout((None, 5, 7), None, 175)
    assert "not those of the grid" in ltx_layout((1, 1, 1), None, 175)


def ltx_forward(model: Any, noise: torch.Tensor, **how: Any) -> torch.Tensor:
    text = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(
            noise, text, torch.tensor([900]), torch.ones(1, 12), return_dict=False, **how
        )[0]  # fmt: skip


@pytest.mark.parametrize("conditions", [0, 1])
def test_ltx_with_coordinates_runs_as_with_a_grid(build: Any, conditions: int) -> None:
    """1x1x1 grid arguments: the same bits as a call that gives the grid, sparse and counted so."""
    model = build("ltx_video").pipe.transformer
    parts = [coordinates(1, 5, 7, first=16)] * conditions + [coordinates(5, 5, 7)]
    coords = torch.cat(parts, dim=-1)
    noise = torch.randn(1, coords.shape[-1], 4, generator=torch.Generator().manual_seed(0))
    one = {"num_frames": 1, "height": 1, "width": 1, "video_coords": coords}
    stock = ltx_forward(model, noise, **one)
    session = dit_accel.enable(model, profile="dense", steps=4)
    assert torch.equal(ltx_forward(model, noise, **one), stock)
    session = dit_accel.enable(model, profile=SPARSE, steps=4, strict=True)
    sparse = ltx_forward(model, noise, **one)
    kind = session.report().kinds["self"]
    assert kind["sparse"] == kind["calls"] == 3 and kind["kept_density"] < 0.7
    assert not torch.equal(sparse, stock)
    session = dit_accel.enable(model, profile=SPARSE, steps=4)
    mixed = dict(one, video_coords=coords[..., torch.randperm(coords.shape[-1])])
    ltx_forward(model, noise, **mixed)
    (reason,) = session.report().kinds["self"]["dense_reasons"]
    assert "not one grid" in reason


def steps_of(report: Any) -> list[tuple[int, int]]:
    return [(row["step"], row["dense"]) for row in report.per_step]


@pytest.mark.parametrize("strength", [0.5, 0.34, 1.0])
@pytest.mark.parametrize(
    "scheduler",
    ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "DDIMScheduler"],
)
def test_wan_video_to_video(build: Any, scheduler: str, strength: float) -> None:
    """Fractions of the steps that run: of 6 with strength 0.5 that is 3, the first one dense."""
    import diffusers

    tiny = build("wan")
    names = ("tokenizer", "text_encoder", "transformer", "vae")
    pipe = diffusers.WanVideoToVideoPipeline(
        **{name: tiny.pipe.components[name] for name in names},
        scheduler=getattr(diffusers, scheduler)(),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_sparse_attention(WARM)
    tiny.pipe = pipe
    del tiny.inputs["num_frames"]
    latents = torch.randn(1, 16, 2, 10, 14)
    tiny.run(num_inference_steps=6, strength=strength, latents=latents)
    report = pipe.sparse_attention_report()
    ran = int(6 * strength)
    per_step = tiny.self_sites * tiny.branches
    assert report.steps == ran
    assert steps_of(report) == [(n, per_step if n / ran < 0.3 else 0) for n in range(ran)]


@pytest.mark.parametrize("family", ["wan", "cogvideox", "ltx_video", "flux", "hunyuan_video"])
@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize("half", [False, True], ids=["", "half"])
def test_own_loops_over_the_tail(build: Any, family: str, begin: int, half: bool) -> None:
    """`for t in timesteps[3:]`, with the timestep as it is and in half precision."""
    tiny = build(family)
    scheduler = tiny.pipe.scheduler
    scheduler.set_timesteps(6)
    model, calls = tiny.pipe.transformer, []

    class Enough(Exception):
        pass

    def grab(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, dict(kwargs)))
        raise Enough

    hook = model.register_forward_pre_hook(grab, with_kwargs=True)
    with pytest.raises(Enough):
        tiny.run()
    hook.remove()
    scheduler.set_timesteps(6)
    ((args, kwargs),) = calls
    kwargs.pop("timestep", None)
    assert not args
    session = dit_accel.enable(model, scheduler, WARM)
    batch = kwargs["hidden_states"].shape[0]
    for _ in range(2):
        for t in scheduler.timesteps[begin:]:
            time = t.expand(batch).to(torch.bfloat16) if half else t.expand(batch)
            with torch.no_grad():
                model(**kwargs, timestep=time / 1000 if family == "flux" else time)
        report = session.report()
        ran = 6 - begin
        assert report.steps == ran
        wanted = [(n, tiny.self_sites if n / ran < 0.3 else 0) for n in range(ran)]
        assert steps_of(report) == wanted


def ticks(clock: StepClock, times: Any) -> list[tuple[int, int]]:
    found = []
    for t in times:
        clock.tick(t, ("transformer", "cond"), {})
        found.append((clock.step, clock.steps))
    return found


def test_runs_over_the_same_timesteps_may_begin_elsewhere() -> None:
    """Loops that set the timesteps once and run all of them, their tail, and all of them."""
    times = torch.tensor([900.0, 700.0, 500.0, 300.0, 100.0])
    whole, tail = [(n, 5) for n in range(5)], [(n, 2) for n in range(2)]
    for given in (list(times), times.tolist()):
        clock = StepClock(lambda: [SimpleNamespace(timesteps=times)], None)
        assert ticks(clock, [*given, *given[3:], *given, *given]) == whole + tail + whole + whole


@pytest.mark.parametrize("start", [0, 1, 3])
def test_heun_begins_at_the_second_of_two_equal_timesteps(start: int) -> None:
    """As diffusers' pipelines cut them: `timesteps[start * order:]`."""
    from diffusers import HeunDiscreteScheduler

    scheduler = HeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    times = scheduler.timesteps[start * 2 :]
    clock = StepClock(lambda: [scheduler], None)
    sample, found = torch.zeros(1, 4), []
    for t in times:
        clock.tick(t.clone(), ("transformer", "cond"), {})
        found.append((clock.step, clock.steps))
        sample = scheduler.step(torch.zeros(1, 4), t, sample).prev_sample
    assert found == [(n, len(times)) for n in range(len(times))]


@pytest.mark.parametrize(
    "name", ["WanPipeline", "LTXPipeline", "FluxPipeline", "HunyuanVideoPipeline"]
)
def test_a_pipeline_without_a_transformer_says_so(name: str) -> None:
    import inspect

    import diffusers

    made = getattr(diffusers, name)
    wanted = inspect.signature(made.__init__).parameters
    parts = {n: None for n, p in wanted.items() if p.default is p.empty and n != "self"}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    if "transformer" in wanted:
        parts["transformer"] = None
    pipe = made(**parts)
    with pytest.raises(DitAccelError, match="transformer.* None. Load the transformer") as error:
        pipe.enable_sparse_attention()
    assert "not supported" not in str(error.value)
    with pytest.raises(DitAccelError, match="transformer: expected a module, got NoneType"):
        dit_accel.enable({"transformer": pipe.transformer})


def test_an_expert_that_is_missing_is_not_needed(build: Any) -> None:
    tiny = build("wan")
    tiny.pipe.transformer_2 = None
    tiny.pipe.enable_sparse_attention(SPARSE)
    tiny.run()
    assert tiny.pipe.sparse_attention_report().kinds["self"]["sparse"] == 18


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ltx_video", "wan"])
def test_a_second_size_recompiles_like_stock(build: Any, family: str) -> None:
    def graphs(tiny: Any) -> list[int]:
        torch._dynamo.reset()
        tiny.pipe.transformer.compile(fullgraph=True, backend="eager")
        found = []
        for width in (tiny.inputs["width"], tiny.inputs["width"] - 64, tiny.inputs["width"] + 64):
            torch._dynamo.utils.counters.clear()
            outputs.append(tiny.run(width=width, num_inference_steps=1))
            found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return found

    outputs: list[torch.Tensor] = []
    tiny = build(family)
    stock = graphs(copy.deepcopy(tiny))
    tiny.pipe.enable_sparse_attention("dense", strict=True)
    ours = graphs(tiny)
    # Around a whole compiled model the hook that begins a forward is a small graph of its own.
    assert ours == [n + (n > 0) for n in stock]
    for one, other in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
