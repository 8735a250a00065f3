"""Profiles by name: those that are shipped, and files of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from dit_accel.engine.profile.files import profile_families, shipped_files
from dit_accel.engine.profile.parse import read_profile
from dit_accel.engine.profile.schema import GENERIC, Profile
from dit_accel.errors import DitAccelError, nearest, shown, unknown


def load_profile(profile: str | Path | Profile = "auto", family: str | None = None) -> Profile:
    """The profile that a name, a TOML file or a `Profile` means.

    Args:
        profile: `"auto"` (the family's `balanced`), `"dense"`, a shipped name, a path, a Profile.
        family: the model family whose shipped profiles a name refers to, and which the profile
            must be for; None takes the generic ones, and any family's file.

    Raises:
        DitAccelError: neither a name nor a file (with the nearest), an unreadable file, a wrong
            key or value, a profile for another family.
    """
    found = _load(profile, family)
    if family is not None and found.family not in (GENERIC, family):
        raise DitAccelError(
            f"profile {found.name!r} is for {found.family}, the model is of family {family}: "
            f"choose one of its own profiles, or set family = '{GENERIC}'."
        )
    return found


def _load(profile: str | Path | Profile, family: str | None) -> Profile:
    if isinstance(profile, Profile):
        return profile
    if profile == "auto":
        return dataclasses.replace(_load("balanced", family), drop_short_warmup=True)
    if profile == "dense":
        return Profile("dense", family or GENERIC, "Every call dense, as the stock pipeline.")
    if not isinstance(profile, (str, Path)):
        raise DitAccelError(
            f"profile: expected a name, a TOML file or a Profile, got {shown(profile)}."
        )
    return read_profile(profile_file(profile, family))


def profile_file(
    profile: str | Path, family: str | None = None, others: Iterable[str] = ()
) -> Path:
    """The TOML file behind a shipped name or a path; a name goes before a file of that name.

    Args:
        others: what the caller takes beside these, for the hint.

    Raises:
        DitAccelError: there is no such name and no such file; says the nearest that there is.
    """
    if family is not None and family not in profile_families():
        raise unknown("family", str(family), profile_families())
    shipped = {name: path for fam, name, path in shipped_files() if fam == GENERIC}
    shipped |= {name: path for fam, name, path in shipped_files() if fam == family}
    if isinstance(profile, str) and profile in shipped:
        return shipped[profile]
    path = Path(profile)
    try:
        path = path.expanduser()
        if path.exists() and not path.is_dir():
            return path
        beside = {key: str(f) for f in path.parent.glob("*.toml") for key in (f.stem, f.name)}
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        beside = {}
    names = sorted({*shipped, "auto", "dense", *others})
    close = nearest(path.name, [*beside, *names])
    hint = f" Did you mean {close if close in names else beside[close]!r}?" if close else ""
    raise DitAccelError(
        f"unknown profile {shown(str(profile))}: neither a name nor a TOML file.{hint} "
        f"Known: {', '.join(names)}."
    )


def profile_names(family: str | None = None) -> list[tuple[str, str, str]]:
    """(family, name, description) of every shipped profile, or of one family's."""
    return [
        (fam, name, read_profile(path).description)
        for fam, name, path in shipped_files()
        if family in (None, fam)
    ]
