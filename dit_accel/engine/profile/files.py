"""The files of shipped profiles: `configs/<family>/<name>.toml`."""

from __future__ import annotations

from pathlib import Path

from dit_accel.home import CONFIGS


def shipped_files() -> list[tuple[str, str, Path]]:
    """(family, name, file) of every shipped profile; "generic" is a family here."""
    return [(path.parent.name, path.stem, path) for path in sorted(CONFIGS.glob("*/*.toml"))]


def profile_families() -> list[str]:
    """What a profile can be for: every family of models, and "generic"."""
    return list(dict.fromkeys(family for family, _, _ in shipped_files()))
