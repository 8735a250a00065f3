"""A plan and a backend are chosen once for calls that are alike, and anew for any other."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_accel import attention
from dit_accel.api import session_of
from dit_accel.errors import DitAccelError
from dit_accel.kernels.patterns import pattern
from dit_accel.layout import TokenLayout
from dit_accel.profile import Profile, Rule

RULE = pattern("sliding_tile", window={"tiles": [1, 1, 1]}, tile=[1, 4, 4])
LAYOUT = TokenLayout((3, 8, 9))
HEADS, DIM = 2, 32


def state_of(backend: str | None = None) -> Any:
    return SimpleNamespace(settings=SimpleNamespace(backend=backend), choices={})


def tensors(
    layout: TokenLayout = LAYOUT, dtype: torch.dtype = torch.float32, shift: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, S, heads, head_dim], contiguous, `shift` elements behind an aligned address."""
    size = layout.length * HEADS * DIM

    def one() -> torch.Tensor:
        return torch.zeros(size + 64, dtype=dtype)[shift : shift + size].view(1, -1, HEADS, DIM)

    return one(), one(), one()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every question to `eligible`, also from `choose`."""
    from dit_accel.kernels import backends

    seen: list[tuple[Any, ...]] = []
    real = backends.eligible

    def eligible(name: str, *call: Any) -> str | None:
        seen.append((name, call[0].dtype, call[0].stride()))
        return real(name, *call)

    monkeypatch.setattr(backends, "eligible", eligible)
    monkeypatch.setattr(attention, "eligible", eligible)
    return seen


def test_a_run_asks_once_for_each_kind_of_call(tiny_wan: Any, asked: list[Any]) -> None:
    rules = (Rule(compute=RULE), Rule(layers="0", compute=pattern("full")))
    tiny_wan.pipe.enable_sparse_attention(Profile("p", rules=rules, breakeven=False))
    tiny_wan.run()
    report = tiny_wan.pipe.sparse_attention_report().to_dict()["self"]
    assert report["sparse"] == 3 * 2 * 3  # steps, branches, layers
    assert len(asked) == 2 * 2  # patterns; `choose` asks, and the choice is asked for its reason
    tiny_wan.run()
    assert len(asked) == 2 * 2
    tiny_wan.run(num_frames=9)
    assert len(asked) == 4 * 2


def test_a_choice_is_the_one_that_would_be_made_anew() -> None:
    state = state_of()
    for dtype in (torch.float32, torch.float64):
        first, again = (attention.planned(state, LAYOUT, RULE, tensors(dtype=dtype)) for _ in "ab")
        fresh = attention.planned(state_of(), LAYOUT, RULE, tensors(dtype=dtype))
        assert first is again and first[0] is fresh[0] and first[1:] == fresh[1:]
        assert (first[2] is None) == (dtype == torch.float32)


def test_whatever_a_choice_looks_at_asks_anew(asked: list[Any]) -> None:
    state = state_of()

    def asks(*call: Any) -> bool:
        before = len(asked)
        attention.planned(state, *call)
        return len(asked) > before

    q, k, v = tensors()
    wide = torch.zeros(1, LAYOUT.length, HEADS, 3 * DIM)
    padded = torch.zeros(2, LAYOUT.length, HEADS, DIM)
    other = pattern("sliding_tile", window={"tiles": [1, 3, 3]}, tile=[1, 4, 4])
    for call in (
        (LAYOUT, RULE, (q, k, v)),
        (LAYOUT, RULE, tensors(dtype=torch.bfloat16)),
        (LAYOUT, RULE, (wide[..., :DIM], k, v)),
        (LAYOUT, RULE, (q, wide[..., :DIM], v)),
        (LAYOUT, RULE, (q, k, wide[..., DIM : 2 * DIM])),
        (LAYOUT, RULE, tensors(shift=1)),
        (LAYOUT, RULE, (padded, padded, padded)),
        (LAYOUT, other, (q, k, v)),
        (TokenLayout((3, 9, 8)), RULE, (q, k, v)),
        (TokenLayout((3, 7, 10), after=6, valid=((0, 4),)), RULE, (q, k, v)),
        (TokenLayout((3, 7, 10), after=6, valid=((0, 5),)), RULE, (q, k, v)),
    ):
        assert asks(*call), call[:2]
        assert not asks(*call)
    assert not asks(LAYOUT, RULE, tensors())  # other tensors that look the same
    state.settings.backend = "reference"
    assert asks(LAYOUT, RULE, (q, k, v))
    assert attention.planned(state, LAYOUT, RULE, (q, k, v))[1] == "reference"


def test_strides_that_change_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are for tensors that bulk copies can read: by their type, strides and address."""
    launch = pytest.importorskip("dit_accel.kernels.hopper.launch")
    monkeypatch.setattr(
        attention,
        "layout_kind",
        lambda q, k, v, _: "gather" if launch.tensor_obstacle(q, k, v) else "boxes",
    )
    monkeypatch.setattr(attention, "kind_for", lambda _: "gather")
    monkeypatch.setattr(attention, "effort", lambda backend, device, plan: plan.shape.box is None)
    layout, rule = (
        TokenLayout((4, 16, 16)),
        pattern("sliding_tile", window={"fraction": [1, 0.5, 0.5]}),
    )
    state = state_of()

    def boxes(*call: torch.Tensor) -> bool:
        return attention.planned(state, layout, rule, call)[0].shape.box is not None

    def half(shift: int = 0, width: int = 64) -> torch.Tensor:
        flat = torch.zeros(layout.length * HEADS * width + 8, dtype=torch.bfloat16)
        return flat[shift:][: layout.length * HEADS * width].view(1, -1, HEADS, width)[..., :64]

    good = half()
    for _ in range(2):  # the second time from what is kept
        assert boxes(good, good, good)
        assert not boxes(good.float(), good.float(), good.float())
        assert not boxes(half(shift=1), good, good)
        assert not boxes(good, good, half(width=65))
        assert boxes(half(width=128), half(width=128), half(width=128))


def test_no_tensor_is_kept_alive() -> None:
    state = state_of()
    call = tensors()
    alive = [weakref.ref(tensor) for tensor in call]
    attention.planned(state, LAYOUT, RULE, call)
    del call
    gc.collect()
    assert state.choices and not any(ref() is not None for ref in alive)


def test_only_so_many_are_kept(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHOICES", 3)
    state = state_of()
    layouts = [TokenLayout((1, 4, width)) for width in range(4, 9)]
    for layout in layouts:
        attention.planned(state, layout, RULE, tensors(layout))
    assert [key[0] for key in state.choices] == layouts[-3:]
    before = len(asked)
    attention.planned(state, layouts[-1], RULE, tensors(layouts[-1]))
    assert len(asked) == before
    attention.planned(state, layouts[0], RULE, tensors(layouts[0]))
    assert len(asked) > before


def test_what_does_not_fit_is_refused_before_a_kernel_sees_it() -> None:
    q, k, v = tensors()
    with pytest.raises(DitAccelError, match="v: expected .* like q, got torch.float16"):
        attention.planned(state_of(), LAYOUT, RULE, (q, k, v.half()))
    with pytest.raises(DitAccelError, match="q: expected"):
        attention.planned(state_of(), TokenLayout((3, 8, 8)), RULE, (q, k, v))


def test_each_enabling_chooses_anew(tiny_wan: Any) -> None:
    profile = Profile("p", rules=(Rule(compute=RULE),), breakeven=False)
    tiny_wan.pipe.enable_sparse_attention(profile)
    tiny_wan.run()
    (choice,) = session_of(tiny_wan.pipe).state.choices.values()
    assert choice[1] == ("torch" if not torch.cuda.is_available() else choice[1])
    tiny_wan.pipe.enable_sparse_attention(profile, backend="reference")
    tiny_wan.run()
    (choice,) = session_of(tiny_wan.pipe).state.choices.values()
    assert choice[1] == "reference"
