"""Enabling and disabling sparse attention on diffusers' transformers and pipelines."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dit_accel.engine.attend import run as attend_route
from dit_accel.engine.budget import parse_limit
from dit_accel.engine.call import Moment, Row
from dit_accel.engine.policy import Policy
from dit_accel.engine.profile import Profile, load_profile, with_overrides
from dit_accel.engine.run import Run
from dit_accel.engine.session import Settings
from dit_accel.errors import DitAccelError, nearest, unknown
from dit_accel.hosts.diffusers import callers, pipeline, seam
from dit_accel.hosts.diffusers.attachment import (
    KEY,
    Attachment,
    attachment_of,
    sites_of,
    unwrapped,
)
from dit_accel.hosts.diffusers.hooks import RootHook
from dit_accel.hosts.diffusers.session import DiffusersSession
from dit_accel.kernels.backends import BACKENDS
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter
from dit_accel.pipelines.registry import ADAPTERS, adapter_for

_sessions: WeakKeyDictionary[Any, DiffusersSession] = WeakKeyDictionary()
"""What each enabled pipeline was enabled with."""


def enable(
    transformer: nn.Module | Mapping[str, nn.Module],
    scheduler: Any = None,
    profile: str | Path | Profile = "auto",
    *,
    steps: int | None = None,
    strict: bool | str = False,
    backend: str | None = None,
    cache_limit: int | str | None = "auto",
    overrides: Mapping[str, Any] | None = None,
    branches: Sequence[str] | None = None,
) -> DiffusersSession:
    """Enable sparse attention on a transformer that your own loop drives.

    Args:
        transformer: a supported transformer, or several by expert name.
        scheduler: the diffusers scheduler of the loop, from which step and number of steps are
            read; or a function that returns the schedulers that may drive it.
        profile: as for `pipe.enable_sparse_attention`.
        steps: number of denoising steps, where there is no scheduler.
        branches: the CFG branches that the loop will name; rules for others are then refused.

    Returns:
        What was attached; its `report()` tells what the last run did.

    Raises:
        DitAccelError: an unsupported model, an unknown name, or a wrong value.
    """
    experts = {"transformer": transformer} if isinstance(transformer, nn.Module) else transformer
    if isinstance(experts, Mapping):
        absent = [name for name, model in experts.items() if not isinstance(model, nn.Module)]
        if absent:
            raise DitAccelError(
                f"{absent[0]}: expected a module, got {type(experts[absent[0]]).__name__}."
            )
        experts = {name: _stock(model) for name, model in experts.items()}
    if not isinstance(experts, Mapping) or not experts:
        raise DitAccelError(
            f"transformer: expected a module or a mapping of modules, got {type(experts).__name__}."
            " A pipeline has the method enable_sparse_attention()."
        )
    adapter = _adapter(experts)
    _check_options(strict, backend, steps)
    limit = parse_limit(cache_limit)
    chosen = load_profile(profile, adapter.family)
    if overrides is not None:
        chosen = with_overrides(chosen, overrides)
    found = [site for n, model in experts.items() for site, _ in sites_of(model, n, adapter)]
    session = DiffusersSession(
        Policy(chosen, found, branches),
        Settings(strict, backend, steps, limit),
        adapter=adapter,
        model=type(next(iter(experts.values()))).__name__,
        schedulers=scheduler if callable(scheduler) else (lambda: [scheduler]),
    )
    made = [Attachment(model, name, adapter, session) for name, model in experts.items()]
    for attachment in made:
        for bound in attachment.sites:
            seam.check(bound)
    for attachment in made:
        _attach(attachment)
    return session


def disable(transformer: nn.Module) -> None:
    """Take everything back that `enable` attached; a no-op where it attached nothing."""
    found = attachment_of(_stock(transformer))
    if found is not None:
        _end(found.session)


def enable_pipeline(pipe: Any, profile: str | Path | Profile, **options: Any) -> None:
    """See `dit_accel.methods.enable_sparse_attention`."""
    owner = weakref.ref(pipe)

    def schedulers() -> list[Any]:
        return [getattr(owner(), "scheduler", None)]

    before = _sessions.get(pipe)
    experts = _experts(pipe)
    options["branches"] = _adapter(experts).branches
    session = enable(experts, schedulers, profile, **options)
    if before is not None:
        _end(before)
    _sessions[pipe] = session
    callers.stock.discard(pipe)
    pipeline.mark(pipe, refresh)


def disable_pipeline(pipe: Any) -> None:
    """See `dit_accel.methods.disable_sparse_attention`."""
    own = _sessions.get(pipe)
    if own is not None:
        _end(own)
    pipeline.unmark(pipe)
    # What another pipeline has enabled on a transformer that they share stays, for that one.
    others = {id(session) for session in _sessions.values()}
    for module in _modules(pipe).values():
        found = attachment_of(module)
        if found is not None and id(found.session) in others:
            callers.stock.add(pipe)
        else:
            disable(module)


def session_of(pipe: Any) -> DiffusersSession:
    """What is enabled on a pipeline."""
    for module in _modules(pipe).values():
        found = attachment_of(module)
        if found is not None:
            return found.session
    raise DitAccelError("sparse attention is not enabled: call enable_sparse_attention() first.")


def refresh(pipe: Any) -> None:
    """Attach what was exchanged on an enabled pipeline since: transformers, blocks, modules,
    processors.

    Raises:
        DitAccelError: one of them is not known.
    """
    session = _sessions.get(pipe)
    models = _modules(pipe)
    experts = {name: model for name, model in models.items() if adapter_for(model)}
    if session is not None:
        _leave(session, models, experts)
    for name, model in experts.items():
        found = attachment_of(model)
        if found is not None:
            seam.follow(found)
        elif session is not None:
            _adapter({name: model}, session.adapter)
            made = Attachment(model, name, session.adapter, session)
            for bound in made.sites:
                seam.check(bound)
            if (before := session.attachments.get(name)) is not None:
                _detach(before)
            _attach(made)


def _leave(
    session: DiffusersSession, models: Mapping[str, nn.Module], experts: Mapping[str, nn.Module]
) -> None:
    """Detach from transformers that a pipeline has no more."""
    for name, before in list(session.attachments.items()):
        if name not in experts:
            _detach(before)
        if name in models and name not in experts:
            raise DitAccelError(
                f"{name} was exchanged for a {type(models[name]).__name__}, which is not "
                "supported: call disable_sparse_attention() first."
            )


def warmup(pipe: Any, height: int, width: int, num_frames: int) -> None:
    """See `dit_accel.methods.sparse_attention_warmup`."""
    session = session_of(pipe)
    before, after = session.adapter.text_tokens
    layout = TokenLayout(session.adapter.grid(pipe, height, width, num_frames), before, after)
    scratch = Run(0)
    moment = Moment(scratch, "", 0, 1, (Row(""),), {})
    for attachment in session.attachments.values():
        site = attachment.sites[0].site
        config: Any = attachment.model.config
        parameter = next(attachment.model.parameters())
        device = getattr(pipe, "_execution_device", parameter.device)
        shape = (1, layout.length, config.num_attention_heads, config.attention_head_dim)
        q, k, v = (torch.randn(shape, device=device).to(parameter.dtype) for _ in range(3))
        backend = session.settings.backend
        for compute, tail in session.policy.computes():
            route = session.routes.find(layout, compute, (q, k, v), backend, tail)
            if route.reason is None:
                attend_route(route, q, k, v, None, site, moment, session)
    session.runs.setdefault(pipe, Run(0)).ledger.compile_s += scratch.ledger.compile_s


def _attach(attachment: Attachment) -> None:
    """Hang it on its transformer, in place of what hangs there."""
    model = attachment.model
    before = attachment_of(model)
    if before is not None:
        _detach(before)
    for bound in attachment.sites:
        seam.attach(bound)
    attachment.hooks = [RootHook(attachment, seam.follow, seam.complete)]
    attachment.session.attachments[attachment.expert] = attachment
    setattr(model, KEY, attachment)


def _detach(attachment: Attachment) -> None:
    """Take everything off its transformer, which may be gone, and off its session."""
    for hook in attachment.hooks:
        hook.remove()
    for bound in attachment.sites:
        seam.detach(bound)
    model = attachment.alive
    if model is not None:
        for processor in (getattr(model, "original_attn_processors", None) or {}).values():
            seam.restore(processor)  # those that fusing projections has put aside
        model.__dict__.pop(KEY, None)
    if attachment.session.attachments.get(attachment.expert) is attachment:
        del attachment.session.attachments[attachment.expert]


def _end(session: DiffusersSession) -> None:
    """Detach all that a session has attached; its reports stay."""
    for attachment in list(session.attachments.values()):
        _detach(attachment)
    for run in list(session.runs.values()):
        run.end()
    for pipe in [pipe for pipe, own in _sessions.items() if own is session]:
        del _sessions[pipe]
        pipeline.unmark(pipe)


def _stock(model: Any) -> Any:
    """A model as it was before `torch.compile(model)` or another wrapper held it."""
    return next((each for each in unwrapped(model) if adapter_for(each)), model)


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models by name, each as it was before a wrapper held it."""
    models = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return {name: _stock(model) for name, model in models.items()}


def _experts(pipe: Any) -> dict[str, nn.Module]:
    found = {name: model for name, model in _modules(pipe).items() if adapter_for(model)}
    if not found:
        absent = [
            n for n, m in pipe.components.items() if n.startswith("transformer") and m is None
        ]
        if absent:
            raise DitAccelError(
                f"this {type(pipe).__name__} has no model to make sparse: "
                f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} None. Load the "
                "transformer first, or enable sparse attention on a pipeline that has one."
            )
        names = [name for adapter in ADAPTERS for name in adapter.pipelines]
        close = nearest(type(pipe).__name__, names)
        hint = f" The nearest is {close}." if close else ""
        raise DitAccelError(
            f"{type(pipe).__name__} is not supported: none of its components is a transformer "
            f"that dit_accel knows. Supported pipelines: {', '.join(names)}.{hint}"
        )
    return found


def _adapter(experts: Mapping[str, nn.Module], enabled: Adapter | None = None) -> Adapter:
    """The family of the models, which is that of what is enabled beside them."""
    adapters = {name: adapter_for(model) for name, model in experts.items()}
    if enabled is not None:
        adapters = {"": enabled, **adapters}
    for name, adapter in adapters.items():
        if adapter is None:
            known = ", ".join(t for a in ADAPTERS for t in a.transformers)
            raise DitAccelError(
                f"{name} is a {type(experts[name]).__name__}, which is not supported. "
                f"Supported transformers: {known}."
            )
    (first, *others) = adapters.values()
    assert first is not None
    for other in others:
        if other is not first:
            raise DitAccelError(
                f"transformer: expected models of one family, got {first.family} and "
                f"{other.family if other else None}; enable each family by a call of its own."
            )
    return first


def _check_options(strict: Any, backend: Any, steps: Any) -> None:
    if not isinstance(strict, bool) and strict != "except-breakeven":
        raise DitAccelError(f"strict must be True, False or 'except-breakeven', got {strict!r}.")
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", str(backend), BACKENDS)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise DitAccelError(f"steps is a whole number >= 1 or None, got {steps!r}.")
