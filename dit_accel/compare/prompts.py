"""Prompts: one in quotes, or a text file with one a line."""

from __future__ import annotations

from pathlib import Path

from dit_accel.errors import DitAccelError, nearest


def read_prompts(source: str) -> list[str]:
    """The prompts that `--prompts` means, each once, in their order.

    Args:
        source: a text file (UTF-8, one prompt a line; empty lines and lines that start with #
            are left out), or a prompt.

    Raises:
        DitAccelError: a file that is missing, empty or not UTF-8; an empty prompt.
    """
    path = Path(source).expanduser()
    if not _names_a_file(source, path):
        if not source.strip():
            raise DitAccelError('the prompt is empty: give one, such as "a red circle moves left".')
        return [source.strip()]
    lines = [line.strip() for line in _text(path).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise DitAccelError(f"prompts file {path} holds no prompts: write one a line.")
    return list(dict.fromkeys(found))


def _names_a_file(source: str, path: Path) -> bool:
    """A prompt is long or has spaces; what looks like a file name must be one."""
    try:
        if path.is_file():
            return True
    except OSError:  # a prompt too long for a file name
        return False
    return path.suffix.lower() in (".txt", ".text", ".md", ".csv") and "\n" not in source


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DitAccelError(
            f"prompts file {path} is not UTF-8: byte {error.start} (line {line}) cannot be read. "
            "Save it as UTF-8."
        ) from error
    except OSError as error:
        siblings = [p.name for p in path.parent.glob("*.txt")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        hint = f" Did you mean {path.parent / close}?" if close else ""
        raise DitAccelError(
            f"prompts file {path} cannot be read: {error.strerror}.{hint}"
        ) from error
