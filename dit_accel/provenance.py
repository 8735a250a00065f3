"""Of what a measurement was made with: versions of packages, the code's commit, the time."""

from __future__ import annotations

import datetime
import os
import subprocess
from importlib import metadata

from dit_accel.home import ROOT


def installed(package: str) -> str:
    """Version of an installed package, "" where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Commit of the code: the variable COMMIT, else what git says of the checkout, else ""."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def now() -> str:
    """Date and time to the minute, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M")
