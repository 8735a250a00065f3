"""The methods that diffusers' pipelines gain, put there when diffusers is imported.

This module imports nothing heavy: `import dit_accel` and the command line's help stay quick.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.engine.profile import Profile
    from dit_accel.report import Report

_BASES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


def enable_sparse_attention(
    self: Any,
    profile: str | Path | Profile = "auto",
    *,
    strict: bool | str = False,
    backend: str | None = None,
    cache_limit: int | str | None = "auto",
    overrides: dict[str, Any] | None = None,
) -> Any:
    """Make the pipeline's attention sparse, as a profile says. Enabling again replaces.

    Args:
        profile: "auto" (the family's balanced profile), the name of a shipped profile, "dense",
            a TOML file, or a `Profile`.
        strict: True raises where a call that the profile plans sparse would run dense;
            "except-breakeven" allows that where sparse would not pay.
        backend: which kernels run the plans ("triton", "torch", ...); None takes the best.
        cache_limit: what reused outputs may hold: bytes, a text such as "8GB", None for no limit.
            "auto" is half of what the stock model leaves free: on a GPU, of its memory beyond the
            most that was in use when a forward of this size had ended (until then nothing is
            kept); on a CPU, of the memory that is free when the run begins. Beyond the limit the
            outputs stay that save the most time for each byte.
        overrides: rule keys that replace the profile's, such as `{"window": {"tiles": [3, 3, 3]}}`.

    Returns:
        The pipeline.

    Raises:
        DitAccelError: an unsupported pipeline, an unknown name, or a wrong value.
    """
    from dit_accel import api

    api.enable_pipeline(
        self,
        profile,
        strict=strict,
        backend=backend,
        cache_limit=cache_limit,
        overrides=overrides,
    )
    return self


def disable_sparse_attention(self: Any) -> Any:
    """Make the pipeline exactly the stock one again; a no-op where nothing is enabled."""
    from dit_accel import api

    api.disable_pipeline(self)
    return self


def sparse_attention_report(self: Any, reset: bool = False) -> Report:
    """What ran sparse, reused and dense in the pipeline's last call, and why.

    Args:
        reset: forget the run after reporting it.

    Raises:
        DitAccelError: sparse attention is not enabled.
    """
    from dit_accel import api

    return api.session_of(self).report_of(self, reset)


def sparse_attention_warmup(self: Any, height: int, width: int, num_frames: int = 1) -> Any:
    """Compile every kernel that the enabled profile will need for videos of this size (pixels).

    Returns:
        The pipeline.

    Raises:
        DitAccelError: sparse attention is not enabled.
    """
    from dit_accel import api

    api.warmup(self, height, width, num_frames)
    return self


def install() -> None:
    """Add the methods now where diffusers is loaded, else as soon as it is."""
    waiting = dict(_BASES)
    for name in _BASES:
        if name in sys.modules:
            _add(sys.modules[name], waiting.pop(name))
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def _add(module: ModuleType, base: str) -> None:
    for method in (
        enable_sparse_attention,
        disable_sparse_attention,
        sparse_attention_report,
        sparse_attention_warmup,
    ):
        setattr(getattr(module, base), method.__name__, method)


class _AfterImport(MetaPathFinder):
    """Runs `_add` right after one of the waited-for modules has been executed."""

    def __init__(self, waiting: dict[str, str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        base = self._waiting.pop(fullname, None)
        if base is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add(module, base)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
