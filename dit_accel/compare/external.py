"""Other projects' methods, run on the same clips through their public APIs: `--against`.

Each entry says what it needs, and switches itself on for the calls in its block. Settings are the
method's own defaults; `NAME:key=value` sets fields of its configuration, such as
`diffusers-first-block:threshold=0.1`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dit_accel.compare.timing import transformers
from dit_accel.errors import DitAccelError, unknown

BATCHED_GUIDANCE = ("CogVideoX", "LTX", "Mochi", "Allegro", "Latte")
"""Pipelines that put both branches of guidance into one batch; the others call twice."""


@dataclass(frozen=True)
class Setting:
    """What a method may need to know: the pipeline, its steps, and one untimed call of it."""

    pipe: Any
    steps: int
    call: Callable[[], Any]


@dataclass(frozen=True)
class External:
    """A method of another project.

    Args:
        text: a sentence for the report.
        missing: why it cannot run here, None where it can.
        fields: names of what `NAME:key=value` may set.
        prepare: (setting, parameters) -> parameters, before the first call.
        enabled: (pipe, parameters) -> a block in which the method is on.
    """

    text: str
    missing: Callable[[], str | None]
    fields: Callable[[], list[str]]
    prepare: Callable[[Setting, dict[str, Any]], dict[str, Any]]
    enabled: Callable[[Any, dict[str, Any]], contextlib.AbstractContextManager[None]]


def check_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Raise for a parameter that the method does not have."""
    fields = EXTERNALS[name].fields()
    for key in parameters:
        if key not in fields:
            raise unknown(f"parameter of {name}", key, fields)


def _as_given(setting: Setting, parameters: dict[str, Any]) -> dict[str, Any]:
    return parameters


def _diffusers_cache(
    config: str,
    text: str,
    defaults: Callable[[Any], dict[str, Any]] = lambda pipe: {},
    prepare: Callable[[Setting, dict[str, Any]], dict[str, Any]] = _as_given,
) -> External:
    """A cache of diffusers, by the name of its configuration class."""

    def missing() -> str | None:
        import diffusers

        if hasattr(diffusers, config):
            return None
        return f"diffusers {diffusers.__version__} has no {config}"

    def fields() -> list[str]:
        import diffusers

        return [item.name for item in dataclasses.fields(getattr(diffusers, config))]

    @contextmanager
    def enabled(pipe: Any, parameters: dict[str, Any]) -> Iterator[None]:
        import diffusers

        with ExitStack() as stack:
            model: Any
            for model in transformers(pipe):
                if not hasattr(model, "enable_cache"):
                    raise DitAccelError(f"{type(model).__name__} has no enable_cache()")
                made = getattr(diffusers, config)(**{**defaults(pipe), **parameters})
                model.enable_cache(made)
                stack.callback(model.disable_cache)
            yield

    return External(f"{text} diffusers' {config}.", missing, fields, prepare, enabled)


def _timestep(pipe: Any) -> Callable[[], Any]:
    return lambda: pipe.current_timestep


def _pab_defaults(pipe: Any) -> dict[str, Any]:
    return {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 800),
        "current_timestep_callback": _timestep(pipe),
    }


def _fastercache_defaults(pipe: Any) -> dict[str, Any]:
    batched = type(pipe).__name__.startswith(BATCHED_GUIDANCE)
    return {
        "current_timestep_callback": _timestep(pipe),
        "attention_weight_callback": lambda _: 0.3,
        "tensor_format": "BFCHW" if type(pipe).__name__.startswith("CogVideoX") else "BCFHW",
        # Its shortcut for the unconditional branch needs both branches in one batch.
        "is_guidance_distilled": not batched,
    }


def _magnitudes(setting: Setting, parameters: dict[str, Any]) -> dict[str, Any]:
    """The ratios that MagCache needs, by its own calibration run on the first clip."""
    if "mag_ratios" in parameters:
        return {"num_inference_steps": setting.steps, **parameters}
    printed = io.StringIO()
    calibration = {"calibrate": True, "num_inference_steps": setting.steps}
    method = EXTERNALS["diffusers-magcache"]
    with contextlib.redirect_stdout(printed), method.enabled(setting.pipe, calibration):
        setting.call()
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    if not lists:
        raise DitAccelError("its calibration printed no ratios")
    ratios = ast.literal_eval(lists[0])
    return {"num_inference_steps": setting.steps, "mag_ratios": ratios, **parameters}


def _package(module: str, distribution: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        if find_spec(module) is None:
            return f"{distribution} is not installed (pip install {distribution})"
        return None

    return missing


def _cache_dit_fields() -> list[str]:
    cache_dit = _cache_dit()
    return list(inspect.signature(cache_dit.DBCacheConfig.__init__).parameters)[1:]


@contextmanager
def _cache_dit_enabled(pipe: Any, parameters: dict[str, Any]) -> Iterator[None]:
    cache_dit = _cache_dit()
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**parameters))
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


def _cache_dit() -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
    return import_module("cache_dit")


def _attention_backend(name: str, text: str, module: str = "", package: str = "") -> External:
    """Another dense attention kernel, through diffusers' dispatcher."""

    @contextmanager
    def enabled(pipe: Any, parameters: dict[str, Any]) -> Iterator[None]:
        from diffusers import attention_backend

        with attention_backend(name):
            yield

    missing = _package(module, package) if module else (lambda: None)
    return External(text, missing, lambda: [], _as_given, enabled)


EXTERNALS: dict[str, External] = {
    "diffusers-pab": _diffusers_cache(
        "PyramidAttentionBroadcastConfig",
        "Pyramid Attention Broadcast: self-attention is computed in every second step;",
        _pab_defaults,
    ),
    "diffusers-first-block": _diffusers_cache(
        "FirstBlockCacheConfig",
        "Steps are skipped while the first block's output changes little;",
    ),
    "diffusers-fastercache": _diffusers_cache(
        "FasterCacheConfig",
        "Attention and the unconditional branch are reused;",
        _fastercache_defaults,
    ),
    "diffusers-taylorseer": _diffusers_cache(
        "TaylorSeerCacheConfig", "Features are extrapolated over steps by Taylor series;"
    ),
    "diffusers-magcache": _diffusers_cache(
        "MagCacheConfig",
        "Steps are skipped by the measured size of residuals;",
        prepare=_magnitudes,
    ),
    "diffusers-seacache": _diffusers_cache(
        "SeaCacheConfig", "Steps are skipped by a spectral measure of change;"
    ),
    "cache-dit": External(
        "cache-dit's enable_cache() with DBCache.",
        _package("cache_dit", "cache-dit"),
        _cache_dit_fields,
        _as_given,
        _cache_dit_enabled,
    ),
    "flex": _attention_backend(
        "flex", "Dense attention by torch's FlexAttention, diffusers' backend `flex`."
    ),
    "sage": _attention_backend(
        "sage",
        "Dense attention in 8 bits by SageAttention, diffusers' backend `sage`.",
        "sageattention",
        "sageattention",
    ),
}
