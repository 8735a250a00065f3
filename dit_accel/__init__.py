"""dit_accel: sparse and cached attention for diffusers' diffusion transformers."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `kernels`, `pipelines` and `configs` lie beside this folder; an installed
# distribution has them inside it. They must never be importable at top level (other people's
# distributions have those names), so the checkout's root joins this package's own path only.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
