"""Runs the command line in an empty folder, and reads the CSV files that it writes."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `dit-accel bench ARGS`. Returns the exit code and all that it printed."""
    from dit_accel.cli.app import app

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["bench", *map(str, args)], prog_name="dit-accel")
        return result.exit_code, re.sub(r"\s+", " ", result.output)

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[str], list[dict[str, str]]]:
    """The rows of a CSV file in the test's folder."""

    def read(name: str) -> list[dict[str, str]]:
        with (tmp_path / name).open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return read
