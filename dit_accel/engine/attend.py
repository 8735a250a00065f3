"""The one entry of every attention call, from every host: decide, route, run, keep, count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.engine.call import Call, Moment, Site, autocast_of
from dit_accel.engine.ledger import Observation, Span, mark
from dit_accel.engine.policy import Decision
from dit_accel.engine.reuse import output as reuse_output
from dit_accel.engine.route import Route
from dit_accel.engine.session import Session
from dit_accel.errors import StrictError
from dit_accel.kernels.compute import Compute
from dit_accel.layout import TokenLayout

BREAK_EVEN = "below break-even"
UNSEEN = "its processor makes no attention call that dit_accel sees"
PROFILE = "profile"


def attend(call: Call, site: Site, moment: Moment, session: Session) -> Tensor:
    """The output of one attention call of a site, in the call's own layout.

    Beside its self-attention a site may attend to other keys, such as those of an image prompt:
    such a call counts as cross-attention.

    Raises StrictError where the session is strict and a planned compute cannot run.
    """
    if site.kind == "self" and call.lengths[0] != call.lengths[1]:
        site = site.cross
    turn = _Turn(call, site, moment, session, session.decide(site, moment))
    compute = turn.decision.compute
    if compute is None:
        return _dense(turn, PROFILE)
    layout = moment.layouts.get(site.layout, "not known to this model")
    if isinstance(layout, str):
        return _unplanned(turn, f"layout: {layout}")
    if (reason := _obstacle(call, site, layout, compute)) is not None:
        return _unplanned(turn, reason)
    q, k, v = call.bshd()
    tail, backend = turn.decision.tail, session.settings.backend
    route = session.routes.find(layout, compute, (q, k, v), backend, tail)
    if route.reason is not None:
        return _unplanned(turn, f"backend {route.backend}: {route.reason}")
    if session.policy.profile.breakeven and not route.pays:
        return _unplanned(turn, BREAK_EVEN)
    output, span = run(route, q, k, v, call.scale, site, moment, session)
    moment.run.ledger.count_sparse(site, moment.step, route)
    if call.layout == "bhsd":
        output = output.transpose(1, 2)
    for observer in session.observers:
        observer(
            Observation(
                site, moment, turn.decision, "sparse", output, call.dense, call, route, span
            )
        )
    return output


def unseen(site: Site, moment: Moment, session: Session) -> None:
    """Count that a site has run without a call that the host could hand over.

    Raises StrictError where the session is strict and the profile plans a compute for it.
    """
    if session.decide(site, moment).compute is not None:
        _refuse(session, site, UNSEEN)
    moment.run.ledger.count(site, moment.step, "dense", reason=UNSEEN)


def serve(
    site: Site,
    moment: Moment,
    session: Session,
    what: str,
    inputs: tuple[Any, ...],
    compute: Callable[[], tuple[Any, int]],
    dense: Callable[[], Any],
) -> Any:
    """What a site or a call returns: served from what is kept where the policy reuses, else
    computed.

    what: names what is kept, among all that the site keeps. inputs: see `reuse.output.served`.
    compute: returns an output and how many attention calls it made, each of which it counts.
    dense: the output with stock attention, for observers.
    """
    decision = session.decide(site, moment)
    if decision.reuse is None:
        return compute()[0]
    output, calls = reuse_output.served(decision.reuse, site, moment, what, inputs, compute)
    if calls is not None:
        moment.run.ledger.count(site, moment.step, "reused", calls=calls)
        for observer in session.observers:
            observer(Observation(site, moment, decision, "reused", output, dense))
    return output


def run(
    route: Route,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    site: Site,
    moment: Moment,
    session: Session,
) -> tuple[Tensor, Span | None]:
    """A route's output (BSHD) under the run's clock; a call that compiles its kernel is timed
    apart, and has no span."""
    ledger, device = moment.run.ledger, q.device
    tally = None
    if route.plan is None:
        pairs = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        tally = ledger.device_row(site, moment.step, pairs, device, route.padded)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    variant = route.variant(q)
    if variant is not None and variant not in session.warm:
        session.warm.add(variant)
        with ledger.compilation(device):
            return route.attend(q, k, v, scale, tally), None
    begin = mark(device)
    output = route.attend(q, k, v, scale, tally)
    span = begin, mark(device)
    ledger.timed(*span)
    return output, span


class _Turn(NamedTuple):
    """A call, and all that decides over it."""

    call: Call
    site: Site
    moment: Moment
    session: Session
    decision: Decision


def _obstacle(call: Call, site: Site, layout: TokenLayout, compute: Compute) -> str | None:
    """Why this call cannot run a compute over tokens laid out so, None where it can."""
    if call.lengths != (layout.length, layout.length):
        return "layout: not the video's own attention"
    if (reason := compute.obstacle(layout)) is not None:
        return f"layout: {reason}"
    if call.mask is not None and site.masks != "key_padding":
        return "attention mask"
    if call.dropout or call.causal:
        return "dropout" if call.dropout else "causal"
    if call.parallel:
        return "context parallel"
    types = call.query.dtype, call.key.dtype, call.value.dtype
    if len(set(types)) > 1:
        return f"mixed types ({', '.join(_named(t) for t in types)})"
    cast = autocast_of(call.query)
    if cast not in (None, types[0]):
        return f"autocast from {_named(types[0])} to {_named(cast)}"
    return "gradients are needed" if call.needs_gradients else None


def _named(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _unplanned(turn: _Turn, reason: str) -> Tensor:
    _refuse(turn.session, turn.site, reason)
    return _dense(turn, reason)


def _refuse(session: Session, site: Site, reason: str) -> None:
    strict = session.settings.strict
    if strict is True or (strict == "except-breakeven" and reason != BREAK_EVEN):
        raise StrictError(
            f"strict: {site.name} would run dense although the profile plans a pattern: {reason}."
        )


def _dense(turn: _Turn, reason: str) -> Tensor:
    call, site, moment, session, decision = turn
    ledger, device = moment.run.ledger, call.query.device
    begin = mark(device)
    output = call.dense()
    span = begin, mark(device)
    ledger.timed(*span)
    ledger.count(site, moment.step, "dense", reason=reason)
    for observer in session.observers:
        observer(Observation(site, moment, decision, "dense", output, call.dense, call, span=span))
    return output
