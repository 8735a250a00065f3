"""Whatever ends a run, nothing that we hold stays: bytes of the store, and what was kept dies."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.api import session_of
from dit_accel.engine.profile import parse_profile
from dit_accel.engine.store import Store
from dit_accel.hosts.diffusers.attachment import attachment_of

REUSE = parse_profile(
    "[profile]\nbreakeven = false\n"
    "[[rule]]\ncompute = 'sliding_tile'\nwindow = {tiles = [1, 1, 1]}\ntile = [2, 3, 3]\n"
    "reuse = {every = 9}\n[[rule]]\nattention = 'cross'\nreuse = {every = 9}\n"
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


class Kept:
    """Weak references to all stores, and to every tensor that any of them was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stores: weakref.WeakSet[Store] = weakref.WeakSet()
        self.values: list[weakref.ref[Any]] = []
        put = Store.put

        def watched(store: Store, site: Any, what: str, rows: Any, value: Any) -> bool:
            self.stores.add(store)
            tensors = value.value if isinstance(value.value, tuple) else (value.value,)
            self.values += [weakref.ref(tensor) for tensor in tensors]
            return put(store, site, what, rows, value)

        monkeypatch.setattr(Store, "put", watched)

    def gone(self) -> bool:
        """Something was kept, and nothing is."""
        gc.collect()
        held = sum(store.bytes for store in self.stores)
        return bool(self.values) and held == 0 and all(ref() is None for ref in self.values)


def at_step(step: int, what: Callable[[Any], None]) -> Any:
    def callback(pipe: Any, now: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if now == step:
            what(pipe)
        return kwargs

    return callback


def fails(error: type[BaseException]) -> Callable[..., None]:
    def fail(*args: Any) -> None:
        raise error("the end")

    return fail


class AtCall:
    """A forward hook that fails at the n-th call of a module, before it or after it."""

    def __init__(self, module: torch.nn.Module, call: int, error: type[BaseException]) -> None:
        self.left, self.error = call, error
        self.handle = module.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise self.error("the end")


ERRORS = [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError]


ENDS = [("forward", torch.OutOfMemoryError), ("callback", KeyboardInterrupt)]


@pytest.mark.parametrize(("where", "error"), ENDS)
def test_errors_in_every_family(tiny: Any, kept: Kept, where: str, error: Any) -> None:
    tiny.pipe.enable_sparse_attention(REUSE)
    tiny.steps = max(2, tiny.steps - 1)
    stop(tiny, where, error)
    assert kept.gone()
    for model in (tiny.pipe.transformer, tiny.pipe.components.get("transformer_2")):
        assert model is None or attachment_of(model).here.moment is None  # type: ignore[union-attr]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["forward", "callback"])
def test_a_run_after_an_error(build: Any, kept: Kept, where: str, error: Any) -> None:
    tiny, fresh = build("wan"), build("wan")
    fresh.pipe.transformer.load_state_dict(tiny.pipe.transformer.state_dict())
    for each in (tiny, fresh):
        each.pipe.enable_sparse_attention(REUSE)
    stop(tiny, where, error)
    assert kept.gone()
    assert torch.equal(tiny.run(), fresh.run()) and kept.gone()


def stop(tiny: Any, where: str, error: Any) -> None:
    """A call that ends in the second step of the last expert, past most of its sites; or after the
    second step."""
    *_, last = session_of(tiny.pipe).sites
    if where == "forward":
        AtCall(last.module, tiny.branches + 1, error)
    changes = {} if where == "forward" else {"callback_on_step_end": at_step(1, fails(error))}
    with pytest.raises(error):
        tiny.run(**changes)


def test_guidance_that_is_switched_off_half_way(build: Any, kept: Kept) -> None:
    tiny = build("wan")

    def off(pipe: Any) -> None:
        pipe._guidance_scale = 1.0

    change = {"callback_on_step_end": at_step(0, off), "num_inference_steps": 5}
    tiny.pipe.enable_sparse_attention(REUSE)
    clean = tiny.run(**change)
    assert kept.gone()
    assert torch.equal(tiny.run(**change), clean)


def texts() -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randn(1, 8, 16, generator=noise) for _ in range(2)]


def forwards(model: Any, steps: list[tuple[float, str]]) -> torch.Tensor:
    """An own loop over (timestep, branches)."""
    latents = torch.randn(1, 16, 5, 10, 14, generator=torch.Generator().manual_seed(0))
    prompts = dict(zip("cu", texts(), strict=True))
    with torch.no_grad():
        for time, branches in steps:
            for branch in branches:
                with model.cache_context({"c": "cond", "u": "uncond"}[branch]):
                    flow = model(latents, torch.tensor([time]), prompts[branch], return_dict=False)
            latents = latents - 0.1 * flow[0]
    return latents


FULL = [(900.0, "uc"), (700.0, "uc"), (500.0, "uc"), (300.0, "uc")]


@pytest.mark.parametrize(
    "steps",
    [
        FULL,
        [(900.0, "uc"), (700.0, "c"), (500.0, "c"), (300.0, "c")],
        [(900.0, "c"), (700.0, "cu"), (500.0, "c"), (300.0, "c")],
        [(900.0, "cc"), (700.0, "cc"), (500.0, "cc"), (300.0, "cc")],  # two windows
    ],
    ids=["full", "off", "between", "windows"],
)
def test_own_loops_that_run_to_their_end(build: Any, kept: Kept, steps: Any) -> None:
    model = build("wan").pipe.transformer
    dit_accel.enable(model, profile=REUSE, steps=4)
    forwards(model, FULL)
    assert kept.gone()
    forwards(model, steps)
    assert kept.gone()


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_an_own_loop_whose_forward_fails(build: Any, kept: Kept, error: Any) -> None:
    model = build("wan").pipe.transformer
    dit_accel.enable(model, profile=REUSE, steps=4)
    clean = forwards(model, FULL)
    AtCall(model.blocks[2].ffn, 4, error)
    with pytest.raises(error):
        forwards(model, FULL)
    assert kept.gone()
    assert torch.equal(forwards(model, FULL), clean)


@pytest.mark.parametrize("how", ["thread", "reset", "disable", "again"])
def test_an_own_loop_that_stops_half_way(build: Any, kept: Kept, how: str) -> None:
    """Nothing tells the end: it goes with the thread, on request, or with the next run."""
    model = build("wan").pipe.transformer
    session = dit_accel.enable(model, profile=REUSE, steps=4)
    if how == "thread":
        thread = threading.Thread(target=forwards, args=(model, FULL[:2]))
        thread.start()
        thread.join()
        assert session.run_of(session).ledger.report("p", "wan", "m", {}).kinds["self"]["calls"]
    else:
        forwards(model, FULL[:2])
        assert not kept.gone()
    if how == "reset":
        session.report(reset=True)
    elif how == "disable":
        dit_accel.disable(model)
    elif how == "again":
        forwards(model, FULL)
    assert kept.gone()


def test_a_pipeline_that_only_shares_the_transformer(build: Any, kept: Kept) -> None:
    """Its interrupted call is known to be over when the next forward of the thread begins."""
    tiny = build("wan")
    parts = {**tiny.pipe.components, "scheduler": copy.deepcopy(tiny.pipe.scheduler)}
    other = copy.copy(tiny)
    other.pipe = type(tiny.pipe)(**parts)
    other.pipe.set_progress_bar_config(disable=True)
    tiny.pipe.enable_sparse_attention(REUSE)
    clean = tiny.run()
    seen: list[int] = []

    def count(*_: Any) -> None:
        seen.append(sum(len(store) for store in list(kept.stores)))

    for error in ERRORS:
        with pytest.raises(error):
            other.run(callback_on_step_end=at_step(1, fails(error)))
        first = tiny.pipe.transformer.blocks[0].register_forward_hook(count)
        seen.clear()
        assert torch.equal(tiny.run(), clean)
        first.remove()
        assert seen[0] == 2 and kept.gone()  # what the first block of this run has kept


@pytest.mark.slow
def test_a_whole_compiled_model(build: Any, kept: Kept) -> None:
    """Its hooks are traced, so that the end of a forward is not seen: the operators tell it."""
    model = build("wan").pipe.transformer
    dit_accel.enable(model, profile=REUSE, steps=4)
    clean = forwards(model, FULL)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.cache_context = model.cache_context
    assert torch.allclose(forwards(compiled, FULL), clean, atol=1e-4) and kept.gone()
    forwards(compiled, [(900.0, "uc"), *[(time, "c") for time, _ in FULL[1:]]])
    assert kept.gone()
    attachment = attachment_of(model)
    assert attachment is not None
    decide = attachment.session.decide

    def full(site: Any, moment: Any) -> Any:
        if moment.step == 1 and site.layer == 2:
            raise torch.OutOfMemoryError("the end")
        return decide(site, moment)

    attachment.session.decide = full
    with pytest.raises(torch.OutOfMemoryError):
        forwards(compiled, FULL)
    assert kept.gone()
    attachment.session.decide = decide
    assert torch.allclose(forwards(compiled, FULL), clean, atol=1e-4)
