"""dit_accel: sparse and cached attention for diffusers' diffusion transformers.

Importing it adds `enable_sparse_attention`, `disable_sparse_attention`,
`sparse_attention_report` and `sparse_attention_warmup` to diffusers' pipelines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel.home import CHECKOUT, ROOT
from dit_accel.home import VERSION as __version__  # noqa: F401

# In a checkout `kernels`, `pipelines` and `configs` lie beside this folder; an installed
# distribution has them inside it. They must never be importable at top level (other people's
# distributions have those names), so the checkout's root joins this package's own path only.
if CHECKOUT:
    __path__.append(str(ROOT))

if TYPE_CHECKING:
    from dit_accel.api import disable, enable
    from dit_accel.catalog import families, supported_models
    from dit_accel.engine.profile import Profile, load_profile, profile_names
    from dit_accel.errors import DitAccelError, StrictError
    from dit_accel.planner import Forecast, diagnose, plan
    from dit_accel.report import Report

__all__ = [
    "DitAccelError",
    "Forecast",
    "Profile",
    "Report",
    "StrictError",
    "diagnose",
    "disable",
    "enable",
    "families",
    "load_profile",
    "plan",
    "profile_names",
    "supported_models",
]

_HOMES = {
    "disable": "api",
    "enable": "api",
    "families": "catalog",
    "supported_models": "catalog",
    "DitAccelError": "errors",
    "StrictError": "errors",
    "Forecast": "planner",
    "diagnose": "planner",
    "plan": "planner",
    "Profile": "engine.profile",
    "load_profile": "engine.profile",
    "profile_names": "engine.profile",
    "Report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


from dit_accel import methods  # noqa: E402  (the path above must be extended first)

methods.install()
