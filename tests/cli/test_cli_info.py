"""Help, version, tables and doctor."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import typer

import dit_accel
from dit_accel.cli.app import app

ROOT = Path(__file__).resolve().parents[2]


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from dit_accel.cli.app import app\n"
        "assert CliRunner().invoke(app, ['generate', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert time.monotonic() - begin < 5  # about 0.4 s on an idle machine


def test_options_of_one_name_read_alike_in_every_command():
    """Other names than these mean one thing, so they have one help, panel and default."""
    own = {"help", "model", "profile", "backend", "output", "layers", "repeats", "tile"}
    seen: dict[str, set[tuple[object, ...]]] = {}
    commands = [typer.main.get_command(app)]
    for command in commands:  # grows while it is walked
        commands += getattr(command, "commands", {}).values()
        for each in command.params:
            panel = getattr(each, "rich_help_panel", None)
            about = (each.opts[0], each.help, panel, each.default)
            seen.setdefault(each.name, set()).add(about)
    assert len(commands) >= 10
    twice = {name: kinds for name, kinds in seen.items() if len(kinds) > 1 and name not in own}
    assert not twice


def test_module_can_be_run():
    command = [sys.executable, "-m", "dit_accel.cli", "--version"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    python = platform.python_version()
    assert text.split() == ["dit-accel", dit_accel.__version__, "(Python", f"{python})"]


def test_profiles(cli):
    code, text = cli("profiles")
    assert code == 0
    for family, name, _ in dit_accel.profile_names():
        assert family in text and name in text
    code, text = cli("profiles", "--family", "flux")
    assert code == 0 and "balanced" in text and "cogvideox" not in text


def test_computes(cli):
    from dit_accel.kernels.computes import COMPUTES
    from dit_accel.kernels.tails import TAILS

    known = {**COMPUTES, **TAILS}
    code, text = cli("computes")
    assert code == 0 and all(name in text for name in known)
    for name, kind in known.items():
        code, text = cli("computes", name)
        assert code == 0 and all(row.name in text for row in kind.parameters())
    code, text = cli("computes", "block_topc")
    assert code == 2 and "block_topk" in text


def test_models(cli):
    code, text = cli("models")
    assert code == 0
    for info in dit_accel.supported_models():
        assert info.family in text
        assert all(name in text for name in info.pipeline_classes)


def test_doctor(cli):
    from dit_accel.kernels.backends import available

    code, text = cli("doctor")
    assert code == 0
    for words in ("diffusers", "transformers", torch.__version__, platform.python_version()):
        assert words in text
    for name, reason in available().items():
        assert f"backend {name}" in text
        assert reason is None or reason in text
    if not torch.cuda.is_available():
        assert "GPU none" in text
