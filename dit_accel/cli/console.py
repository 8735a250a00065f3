"""Where the command line prints, and how it ends: errors become one message and an exit code."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from dit_accel.errors import DitAccelError

out = Console()
"""Results: tables, the report, the file that was written."""
err = Console(stderr=True)
"""Everything else: progress, warnings, errors."""

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes."""


def warn(message: str) -> None:
    _say(message, "Warning", "yellow")


def _say(message: str, title: str, style: str) -> None:
    """A panel on a terminal; one unwrapped line anywhere else, for logs and grep."""
    if err.is_terminal:
        panel = Panel(Text(message), title=title, title_align="left", border_style=style)
        err.print(panel)
    else:
        line = " ".join(message.split())
        err.print(f"{title.lower()}: {line}", markup=False, highlight=False, soft_wrap=True)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """End a command with a message and an exit code where it would raise.

    2 for a request that cannot be carried out, 130 for Ctrl-C, 1 for anything else. `--debug` or
    DIT_ACCEL_DEBUG=1 show the traceback instead.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = kwargs.get("debug") or os.environ.get("DIT_ACCEL_DEBUG", "0") not in ("", "0")
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _say(str(stop) or "stopped.", "Interrupted", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        except DitAccelError as error:
            if debug:
                raise
            _say(_capitalised(str(error)), "Error", "red")
            raise typer.Exit(BAD_INPUT) from None
        except Exception as error:
            if debug:
                raise
            said = f"{type(error).__name__}: {error}".rstrip(".: ")  # some say nothing
            _say(f"{said}.\n{_advice(error)}", "Failed", "red")
            raise typer.Exit(FAILED) from None

    return run


def _advice(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "Try --offload model (or group), or a smaller size or fewer frames."
    return "Set DIT_ACCEL_DEBUG=1 for the traceback."


def _capitalised(message: str) -> str:
    """First letter in upper case, unless the message starts with an option or a name."""
    first = message.split(" ", 1)[0]
    return message[:1].upper() + message[1:] if first.isalpha() and first.islower() else message
