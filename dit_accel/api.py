"""Enabling and disabling sparse attention on transformers and on whole pipelines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_accel import seam
from dit_accel.attention import launch, planned
from dit_accel.broadcast import OutputCache
from dit_accel.clock import StepClock
from dit_accel.engine.profile import Profile, load_profile, with_overrides
from dit_accel.errors import DitAccelError, nearest, unknown
from dit_accel.kernels.backends import BACKENDS
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.adapter import Adapter
from dit_accel.pipelines.registry import ADAPTERS, adapter_for
from dit_accel.policy import Policy, SiteKey
from dit_accel.report import Recorder, Report
from dit_accel.state import Attached, RootHook, RunState, Settings, Site

_SESSION = "_dit_accel_session"


@dataclass
class Session(Attached):
    """What enabling attached to one pipeline or transformer."""

    state: RunState
    sites: list[Site]
    experts: dict[str, nn.Module]
    hooks: list[RootHook] = field(default_factory=list)
    owners: list[weakref.ref[Any]] = field(default_factory=list)

    def report(self, reset: bool = False) -> Report:
        """The receipt of the last denoising run; `reset` forgets the run after that."""
        made = self.state.recorder.report(self.state.cache.peak, self.state.cache.refused)
        if reset:
            self.state.recorder.start(0)
            self.state.cache.reset()
        return made

    def attach(self) -> None:
        for site in self.sites:
            seam.attach(site)
        for expert, model in self.experts.items():
            own = [site for site in self.sites if site.key.expert == expert]
            self.hooks.append(RootHook(model, expert, self.state, _reattach(own)))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for site in self.sites:
            seam.detach(site)
        self.state.cache.reset()


def enable(
    transformer: nn.Module | Mapping[str, nn.Module],
    scheduler: Any = None,
    profile: str | Path | Profile = "auto",
    *,
    steps: int | None = None,
    strict: bool | str = False,
    backend: str | None = None,
    cache_limit: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Session:
    """Enable sparse attention on a transformer that your own loop drives.

    Args:
        transformer: a supported transformer, or several by expert name.
        scheduler: the diffusers scheduler of the loop, from which step and number of steps are
            read; or a function that returns the schedulers that may drive it.
        profile: as for `pipe.enable_sparse_attention`.
        steps: number of denoising steps, where there is no scheduler.

    Returns:
        What was attached; its `report()` tells what the last run did.

    Raises:
        DitAccelError: an unsupported model, an unknown name, or a wrong value.
    """
    experts = {"transformer": transformer} if isinstance(transformer, nn.Module) else transformer
    if not isinstance(experts, Mapping) or not experts:
        raise DitAccelError(
            f"transformer: expected a module or a mapping of modules, got {type(experts).__name__}."
            " A pipeline has the method enable_sparse_attention()."
        )
    adapter = _adapter(experts)
    _check_options(strict, backend, cache_limit, steps)
    chosen = load_profile(profile, adapter.family)
    if overrides is not None:
        chosen = with_overrides(chosen, overrides)
    schedulers = scheduler if callable(scheduler) else (lambda: [scheduler])
    session = _session(
        adapter, dict(experts), chosen, Settings(strict, backend, steps), schedulers, cache_limit
    )
    for site in session.sites:
        seam.check(site)
    for model in experts.values():
        disable(model)
    session.attach()
    for model in experts.values():
        setattr(model, _SESSION, session)
    return session


def disable(transformer: nn.Module) -> None:
    """Take everything back that `enable` attached; a no-op where it attached nothing."""
    session: Session | None = transformer.__dict__.get(_SESSION)
    if session is None:
        return
    session.detach()
    for model in session.experts.values():
        model.__dict__.pop(_SESSION, None)


def enable_pipeline(pipe: Any, profile: str | Path | Profile, **options: Any) -> None:
    """See `dit_accel.methods.enable_sparse_attention`."""
    experts = _experts(pipe)
    # Pipelines may share a transformer: whichever runs, its scheduler tells the step.
    owners = [weakref.ref(pipe)]
    for model in experts.values():
        before: Session | None = model.__dict__.get(_SESSION)
        owners += [ref for ref in (before.owners if before else []) if ref() not in (pipe, None)]
    owners = list(dict.fromkeys(owners))

    def schedulers() -> list[Any]:
        return [getattr(ref(), "scheduler", None) for ref in owners]

    session = enable(experts, schedulers, profile, **options)
    session.owners = owners


def disable_pipeline(pipe: Any) -> None:
    """See `dit_accel.methods.disable_sparse_attention`."""
    for module in _modules(pipe).values():
        disable(module)


def session_of(pipe: Any) -> Session:
    """What is enabled on a pipeline."""
    for module in _modules(pipe).values():
        if _SESSION in module.__dict__:
            return module.__dict__[_SESSION]
    raise DitAccelError("sparse attention is not enabled: call enable_sparse_attention() first.")


def warmup(pipe: Any, height: int, width: int, num_frames: int) -> None:
    """See `dit_accel.methods.sparse_attention_warmup`."""
    session = session_of(pipe)
    state = session.state
    before, after = state.adapter.text_tokens
    layout = TokenLayout(state.adapter.grid(pipe, height, width, num_frames), before, after)
    for model in session.experts.values():
        config: Any = model.config
        parameter = next(model.parameters())
        device = getattr(pipe, "_execution_device", parameter.device)
        shape = (1, layout.length, config.num_attention_heads, config.attention_head_dim)
        q, k, v = (torch.randn(shape, device=device).to(parameter.dtype) for _ in range(3))
        for pattern in state.policy.patterns():
            plan, backend, reason = planned(state, layout, pattern, (q, k, v))
            if reason is None:
                launch(state, q, k, v, plan, backend)


def _session(
    adapter: Adapter,
    experts: dict[str, nn.Module],
    profile: Profile,
    settings: Settings,
    schedulers: Callable[[], Sequence[Any]],
    cache_limit: int | None,
) -> Session:
    found = [
        (SiteKey(name, layer, layers, kind, expert), module)
        for expert, model in experts.items()
        for name, layer, layers, kind, module in adapter.modules(model)
    ]
    model_name = type(next(iter(experts.values()))).__name__
    state = RunState(
        adapter=adapter,
        policy=Policy(profile, [key for key, _ in found]),
        settings=settings,
        clock=StepClock(schedulers, settings.steps),
        recorder=Recorder(profile.name, adapter.family, model_name, cache_limit),
        cache=OutputCache(cache_limit),
    )
    sites = [Site(key, module, state, adapter.masks) for key, module in found]
    return Session(state, sites, experts)


def _reattach(sites: list[Site]) -> Callable[[], None]:
    def refresh() -> None:
        for site in sites:
            if not seam.attached(site):
                seam.attach(site)

    return refresh


def _modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models by name, each as it was before `torch.compile(module)` wrapped it."""
    models = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return {name: getattr(model, "_orig_mod", model) for name, model in models.items()}


def _experts(pipe: Any) -> dict[str, nn.Module]:
    found = {name: model for name, model in _modules(pipe).items() if adapter_for(model)}
    if not found:
        names = [name for adapter in ADAPTERS for name in adapter.pipelines]
        close = nearest(type(pipe).__name__, names)
        hint = f" The nearest is {close}." if close else ""
        raise DitAccelError(
            f"{type(pipe).__name__} is not supported: none of its components is a transformer "
            f"that dit_accel knows. Supported pipelines: {', '.join(names)}.{hint}"
        )
    return found


def _adapter(experts: Mapping[str, nn.Module]) -> Adapter:
    adapters = {name: adapter_for(model) for name, model in experts.items()}
    for name, adapter in adapters.items():
        if adapter is None:
            known = ", ".join(t for a in ADAPTERS for t in a.transformers)
            raise DitAccelError(
                f"{name} is a {type(experts[name]).__name__}, which is not supported. "
                f"Supported transformers: {known}."
            )
    (first, *_) = adapters.values()
    assert first is not None
    return first


def _check_options(strict: Any, backend: Any, cache_limit: Any, steps: Any) -> None:
    if not isinstance(strict, bool) and strict != "except-breakeven":
        raise DitAccelError(f"strict must be True, False or 'except-breakeven', got {strict!r}.")
    if backend is not None and backend not in BACKENDS:
        raise unknown("backend", str(backend), BACKENDS)
    for name, value, least in (("cache_limit", cache_limit, 0), ("steps", steps, 1)):
        if value is not None and (type(value) is not int or value < least):
            raise DitAccelError(f"{name} is a whole number >= {least} or None, got {value!r}.")
