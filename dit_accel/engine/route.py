"""Which blocks and which backend a kind of call takes: chosen once for calls that are alike."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.costs import effort, pays
from dit_accel.engine.call import Tensors, autocast_of
from dit_accel.kernels.backends import BACKENDS, choose, eligible, layout_kind
from dit_accel.kernels.block_sparse import check_call
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.launching import alike
from dit_accel.kernels.patterns.base import Pattern, kind_for
from dit_accel.kernels.patterns.composite import PerHead
from dit_accel.kernels.plan import BlockPlan, Shape
from dit_accel.kernels.selectors.base import Context, Selector
from dit_accel.kernels.tails import Drop, Tail
from dit_accel.layout import TokenLayout

NO_TAIL = Drop()
ROUTES = 128
"""How many routes a session keeps: a step makes the same few kinds of calls in every layer."""


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

    tail: what stands for the keys that its plans do not visit.
    blocks, shape: what the host knows of the plan before q and k. plan: of a pattern; None where
    `compute` selects from q and k at each call.
    reason: why `backend` cannot run it, or None. pays: whether it is expected to beat dense.
    launched, kept: densities of a call; of a selector the launched one to expect.
    known: what of the launched density the host knows before a call; the device counts the rest.
    padded: whether blocks are computed with all their slots; else with their own tokens.
    row: what the report says of it.
    """

    compute: Compute
    tail: Tail
    blocks: Blocks
    shape: Shape
    plan: BlockPlan | None
    backend: str
    reason: str | None
    pays: bool
    launched: float
    kept: float
    known: float
    padded: bool
    row: PlanRow

    def variant(self, query: Tensor) -> tuple[Any, ...] | None:
        """What tells compiled kernels apart; None where nothing is compiled."""
        if not BACKENDS[self.backend].compiles:
            return None
        shape = self.shape
        made = self.compute.name if shape.online else ""
        blocks = shape.block_q, shape.block_k, shape.kinds, shape.box is None, shape.rules
        return self.backend, query.dtype, query.shape[-1], made, self.tail, *blocks

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, tally: Tensor | None) -> Tensor:
        """The call's output, BSHD. tally: int64 [2] on the device, for the counts of a plan that
        only the device knows. Autocast has no say in what a backend computes in."""
        if autocast_of(q) is not None:
            with torch.autocast(q.device.type, enabled=False):
                return self.attend(q, k, v, scale, tally)
        forward, plan = BACKENDS[self.backend].forward, self.plan
        if plan is not None and self.tail.empty:
            return forward(q, k, v, plan, scale, False, None)[0]
        size = None if self.tail.empty else self.tail.size(self.blocks)
        context = Context(q, k, v, self.blocks, scale, q.shape[2], tally, size)
        if plan is None:
            assert isinstance(self.compute, Selector)
            plan = self.compute.select(context)
        if self.tail.empty:
            return forward(q, k, v, plan, scale, False, None)[0]
        out, lse = forward(q, k, v, plan, scale, True, None)
        assert lse is not None, "it was asked for"
        self.tail.join(context, plan, out, lse)
        return out


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
        self,
        layout: TokenLayout,
        compute: Compute,
        call: Tensors,
        wanted: str | None = None,
        tail: Tail = NO_TAIL,
    ) -> Route:
        """The route of a call (BSHD) over tokens laid out so. wanted: the only backend to ask."""
        # A policy's computes and tails are the same objects at every call, and a route holds its
        # own.
        q, k, v = call
        devices = q.device, k.device, v.device
        key = (
            layout,
            id(compute),
            id(tail),
            wanted,
            devices,
            alike(q, k, v),
        )  # all that a choice looks at
        found = self._routes.get(key)
        if found is not None:
            if len(self._routes) >= ROUTES:  # only then does it matter which was used last
                with suppress(KeyError):  # another thread has just let go of it
                    self._routes.move_to_end(key)
            return found
        with self._making:
            found = self._routes.get(key)
            if found is None:
                found = make_route(layout, compute, call, wanted, tail)
                if len(self._routes) >= ROUTES:
                    self._routes.popitem(last=False)
                self._routes[key] = found
        return found


def make_route(
    layout: TokenLayout,
    compute: Compute,
    call: Tensors,
    wanted: str | None = None,
    tail: Tail = NO_TAIL,
) -> Route:
    """See RouteCache.find.

    Boxes that hardware copies may fit a grid badly: then tiles of any shape are the cheaper plan,
    although their tokens must be moved, or gathered by a slower kernel.
    """
    form = layout_kind(*call, wanted)
    route = _route(layout, compute, tail, call, wanted, form)
    other = kind_for(call[0].device)
    if wanted is not None or other == form:
        return route
    rival = _route(layout, compute, tail, call, wanted, other)
    return min((route, rival), key=lambda each: _effort(each, call[0]))


def plan_effort(backend: str, device_type: str, plan: BlockPlan) -> float:
    """A plan's time over dense, overhead aside: to compare plans (see `costs.effort`)."""
    whole = None
    if not plan.shape.kinds.partial:
        whole = plan.counts.whole / max(1, plan.counts.entries)
    return effort(
        backend,
        device_type,
        plan.launched_density(backend),
        tokens=plan.blocks.q_length,
        moved=BACKENDS[backend].moves(plan.shape),
        whole=whole,
        beside_text=plan.shape.mixed,
    )


def _effort(route: Route, query: Tensor) -> float:
    """Likewise of a route; a selector has no favourites among whole and short blocks."""
    if route.plan is not None:
        return plan_effort(route.backend, query.device.type, route.plan)
    lengths = route.blocks.k.lengths
    return effort(
        route.backend,
        query.device.type,
        route.launched,
        tokens=query.shape[1],
        moved=BACKENDS[route.backend].moves(route.shape),
        whole=float((lengths == route.blocks.block_k).float().mean()),
        beside_text=route.shape.mixed,
    )


def _route(
    layout: TokenLayout,
    compute: Compute,
    tail: Tail,
    call: Tensors,
    wanted: str | None,
    form: LayoutKind,
) -> Route:
    q, _, v = call
    device, heads = q.device, q.shape[2]
    plan = None
    if isinstance(compute, Selector):
        blocks = blocks_of(layout, compute.tiling(layout, form), device)
        shape = compute.shape(blocks, q.shape[0], heads)
    else:
        assert isinstance(compute, Pattern)
        plan = compute.build(layout, device, heads, layout_kind=form)
        blocks, shape = plan.blocks, plan.shape
    backend = wanted or choose(*call, shape)
    reason = eligible(backend, *call, shape)
    if reason is None:
        check_call(*call, blocks, shape)
    padded = "lengths" not in BACKENDS[backend].forms
    known = tail.density(blocks, padded, isinstance(compute, Selector) and compute.probes)
    if plan is None:
        assert isinstance(compute, Selector)
        kept = compute.expected(blocks, padded)
        launched = known + kept
    else:
        known += plan.launched_density(backend)
        launched, kept = known, plan.kept_density()
    video = blocks.video_blocks
    flops = 2.0 * q.numel() * call[1].shape[1] * (1 + v.shape[-1] / max(1, q.shape[-1]))
    waste = video * blocks.block_q / layout.video_length - 1
    row = PlanRow(
        pattern=compute.name,
        parameters=_words(compute, tail),
        backend=backend,
        blocks=video,
        cut="blocks" if isinstance(compute, PerHead) else compute.tiling(layout, form).words,
        waste=waste if padded else None,
        launched_density=launched,
    )
    worth = pays(backend, device.type, flops, launched)
    densities = launched, kept, known
    return Route(
        compute, tail, blocks, shape, plan, backend, reason, worth, *densities, padded, row
    )


def _words(compute: Compute, tail: Tail) -> str:
    """The parameters of both, as a profile has them."""
    own = [compute.describe()]
    if not tail.empty:
        own.append(f"tail = {{kind = '{tail.name}', {tail.describe()}}}")
    return ", ".join(filter(None, own))
