"""The files of shipped profiles: `configs/<family>/<name>.toml`."""

from __future__ import annotations

from pathlib import Path

import dit_accel


def shipped_files() -> list[tuple[str, str, Path]]:
    """(family, name, file) of every shipped profile; "generic" is a family here."""
    folders = [Path(root) / "configs" for root in dit_accel.__path__]
    files = [path for folder in folders for path in sorted(folder.glob("*/*.toml"))]
    return [(path.parent.name, path.stem, path) for path in files]


def profile_families() -> list[str]:
    """What a profile can be for: every family of models, and "generic"."""
    return list(dict.fromkeys(family for family, _, _ in shipped_files()))
