"""Where the package lies, and its version: what files of any part of it may ask."""

from __future__ import annotations

from pathlib import Path

VERSION = "0.1.0"
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The checkout, or the folder that the package is installed in."""
CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "kernels").is_dir()
"""Whether `kernels`, `pipelines` and `configs` lie beside the package, instead of in it."""
CONFIGS = (ROOT if CHECKOUT else PACKAGE) / "configs"
"""The folders of shipped profiles, one for each family."""
