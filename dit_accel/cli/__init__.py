"""The command line: `dit-accel generate`, `profiles`, `models`, `doctor`."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `dit-accel` command."""
    from dit_accel.cli.app import app

    app(prog_name="dit-accel")
