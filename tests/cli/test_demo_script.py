"""samples/demo.py with a tiny random model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_accel.errors import DitAccelError
from dit_accel.video import read_video

SCRIPT = Path(__file__).resolve().parents[2] / "samples" / "demo.py"
SPARSE = """
[profile]
name = "tiny"
breakeven = false
[[rule]]
compute = "sliding_tile"
window = {tokens = [1, 3, 3]}
"""


@pytest.fixture
def demo(tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location("demo_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_script", module)
    spec.loader.exec_module(module)

    def run(*args: str) -> int:
        given = ["--model", str(tiny_wan), "--out", str(tmp_path / "out"), "--device", "cpu"]
        given += ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", *args]
        monkeypatch.setattr("sys.argv", ["demo.py", *given])
        return module.main()

    return run


def test_demo_writes_both_videos_and_the_report(demo, tmp_path: Path, capsys):
    profile = tmp_path / "tiny.toml"
    profile.write_text(SPARSE)
    assert demo("--profile", str(profile)) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("denoising", "attention", "PSNR", "launched density"))
    out = tmp_path / "out"
    names = ["dense.mp4", "report.json", "side_by_side.mp4", "sparse.mp4"]
    assert sorted(p.name for p in out.iterdir()) == names
    height, width, _ = read_video(out / "side_by_side.mp4")[0].shape
    assert height > 2 * 32 and width > 2 * 2 * 48
    data = json.loads((out / "report.json").read_text())
    assert data["dense"]["self"]["sparse"] == 0 and data["sparse"]["self"]["sparse"] == 8
    assert "psnr_db" in data and data["speedup"]["denoising"] > 0


def test_demo_fails_when_nothing_ran_sparse(demo, capsys):
    assert demo("--profile", "dense") == 1
    assert "Nothing ran sparse" in capsys.readouterr().err


def test_demo_checks_its_output_first(demo, tmp_path: Path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DitAccelError, match="is a file"):
        demo()
