"""Which blocks and which backend a kind of call takes: chosen once for calls that are alike."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.breakeven import effort, pays
from dit_accel.engine.call import Tensors
from dit_accel.kernels.backends import BACKENDS, choose, eligible, layout_kind
from dit_accel.kernels.block_sparse import check_call
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.patterns.base import Pattern, kind_for
from dit_accel.kernels.plan import BlockPlan
from dit_accel.layout import TokenLayout

ROUTES = 128
"""How many routes a session keeps: a step makes the same few kinds of calls in every layer."""


COMPILED = ("hopper", "triton", "flex", "fa4")


@dataclass(frozen=True)
class PlanRow:
    """A route in words and numbers, for the report. waste: None where blocks take no slots."""

    pattern: str
    parameters: str
    backend: str
    blocks: int
    cut: str
    waste: float | None
    launched_density: float


@dataclass(frozen=True, eq=False)
class Route:
    """How calls of one kind run.

    plan: the blocks and what they visit. reason: why `backend` cannot run it, or None.
    pays: whether it is expected to beat dense. launched, kept: densities of a call.
    row: what the report says of it.
    """

    compute: Pattern
    plan: BlockPlan
    backend: str
    reason: str | None
    pays: bool
    launched: float
    kept: float
    row: PlanRow

    def variant(self, query: Tensor) -> tuple[Any, ...] | None:
        """What tells compiled kernels apart; None where nothing is compiled."""
        if self.backend not in COMPILED:
            return None
        plan = self.plan
        return (
            self.backend, query.dtype, query.shape[-1], plan.block_q, plan.block_k, plan.list_kinds,
        )  # fmt: skip

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The call's output, BSHD."""
        return BACKENDS[self.backend].forward(q, k, v, self.plan, scale, False, None)[0]


class RouteCache:
    """The routes of one session; what they hold goes with it.

    Tensors of calls are not kept. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._routes: OrderedDict[tuple[Any, ...], Route] = OrderedDict()
        self._making = threading.Lock()

    def __len__(self) -> int:
        return len(self._routes)

    @property
    def routes(self) -> list[Route]:
        """The latest used last."""
        return list(self._routes.values())

    def find(
        self, layout: TokenLayout, compute: Pattern, call: Tensors, wanted: str | None = None
    ) -> Route:
        """The route of a call (BSHD) over tokens laid out so. wanted: the only backend to ask."""
        key = (layout, compute, wanted, *map(_seen, call))
        found = self._routes.get(key)
        if found is not None:
            if len(self._routes) >= ROUTES:  # only then does it matter which was used last
                with suppress(KeyError):  # another thread has just let go of it
                    self._routes.move_to_end(key)
            return found
        with self._making:
            found = self._routes.get(key)
            if found is None:
                found = make_route(layout, compute, call, wanted)
                if len(self._routes) >= ROUTES:
                    self._routes.popitem(last=False)
                self._routes[key] = found
        return found


def _seen(x: Tensor) -> tuple[Any, ...]:
    """All that a choice looks at in a tensor; bulk copies begin at multiples of 16 bytes."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def make_route(
    layout: TokenLayout, compute: Pattern, call: Tensors, wanted: str | None = None
) -> Route:
    """See RouteCache.find.

    Boxes that hardware copies may fit a grid badly: then tiles of any shape are the cheaper plan,
    although their tokens must be moved, or gathered by a slower kernel.
    """
    q = call[0]
    device, heads = q.device, q.shape[2]
    kind = layout_kind(*call, wanted)
    plan = compute.build(layout, device, heads, layout_kind=kind)
    backend = wanted or choose(*call, plan)
    if wanted is None and kind == "boxes":
        other = compute.build(layout, device, heads, layout_kind=kind_for(device))
        rival = choose(*call, other)
        if effort(rival, device.type, other) < effort(backend, device.type, plan):
            plan, backend, kind = other, rival, kind_for(device)
    reason = eligible(backend, *call, plan)
    if reason is None:
        check_call(*call, plan)
    launched = plan.launched_density(backend)
    return Route(
        compute,
        plan,
        backend,
        reason,
        pays(backend, device.type, _flops(*call), launched),
        launched,
        plan.kept_density(),
        _row(layout, compute, plan, backend, kind),
    )


def _flops(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of the dense call."""
    rows = q.numel() // max(1, q.shape[-1])
    return 2.0 * rows * k.shape[1] * (q.shape[-1] + v.shape[-1])


def _row(
    layout: TokenLayout, compute: Pattern, plan: BlockPlan, backend: str, kind: LayoutKind
) -> PlanRow:
    text = -(-layout.before // plan.block_q) + -(-layout.after // plan.block_q)
    blocks = plan.q_blocks.count - text
    waste = blocks * plan.block_q / layout.video_length - 1
    return PlanRow(
        pattern=compute.name,
        parameters=describe(compute),
        backend=backend,
        blocks=blocks,
        cut="blocks" if compute.by_head else compute.tiling(layout, kind).words,
        waste=None if backend in ("torch", "reference") else waste,
        launched_density=plan.launched_density(backend),
    )


def describe(compute):  # bridge
    import dataclasses
    from dit_accel.kernels.compute import value_text

    values = {f.name: getattr(compute, f.name) for f in dataclasses.fields(compute)}
    return ", ".join(f"{name} = {v!r}" for name, v in values.items() if v is not None)
