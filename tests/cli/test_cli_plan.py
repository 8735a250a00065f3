"""`dit-accel plan` and `dit-accel doctor --model`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_plan_prints_and_draws(cli):
    code, text = cli(
        "plan", "--model", "wan-14b", "--height", 720, "--width", 1280, "--frames", 81,
        "--pattern", "sliding_tile", "--window", "3,3,3", "--out", "p.png",
    )  # fmt: skip
    assert code == 0, text
    for words in ("75,600 tokens: 21 x 45 x 80", "tiles = [3, 3, 3]", "waste", "launched", "drawn"):
        assert words in text
    assert Path("p.png").stat().st_size > 5000


def test_plan_speaks_json(cli):
    code, text = cli("plan", "--model", "flux", "--pattern", "disc:radius={tokens=8}", "--json")
    assert code == 0, text
    data = json.loads(text)
    assert data["grid"] == [1, 64, 64] and "tokens = [8]" in data["parameters"]
    assert data["bound"] > 1


def test_windows_in_every_unit(cli):
    for window, shown in (
        ("0.5,0.5,0.5", "fraction = [0.5, 0.5, 0.5]"),
        ("tokens=9,15,24", "tokens = [9, 15, 24]"),
        ("3,5,-1", "tiles = [3, 5, -1]"),
    ):
        code, text = cli("plan", "--model", "wan-1.3b", "--window", window)
        assert code == 0 and shown in text


def test_patterns_without_parameters(cli):
    code, text = cli("plan", "--model", "flux", "--pattern", "full", "--backend", "triton")
    assert code == 0 and "full" in text and "full:" not in text
    code, text = cli("plan", "--model", "demo", "--frames", 10)
    assert code == 0 and "10 becomes 9" in text and "backend" in text


def test_selectors_are_planned(cli):
    code, text = cli(
        "plan", "--model", "ltx", "--pattern", "block_topk:density=0.2", "--out", "p.png"
    )
    assert code == 0, text
    for words in ("block_topk: sinks = 0", "chosen from q and k", "kept about 1", "drawn"):
        assert words in text
    code, text = cli(
        "plan", "--model", "ltx", "--pattern", "block_topp:p=0.8,lists=shared", "--json"
    )
    assert code == 0 and json.loads(text)["online"]


def test_brackets_are_shown(cli):
    code, text = cli(
        "plan", "--model", "ltx", "--pattern", "neighborhood:causal=[true,false,false]"
    )
    assert code == 0 and "causal = [true, false, false]" in text


def test_bad_requests(cli):
    for arguments, words in (
        (("--model", "wan-14"), "Did you mean 'wan-14b'"),
        (("--pattern", "radal"), "Did you mean 'radial'"),
        (("--pattern", "block_topk:densty=1"), "Did you mean 'density'"),
        (("--pattern", "block_topk:density=2"), "the nearest legal value is 1"),
        (("--window", "3,x,3"), "--window: expected numbers"),
        (("--window", "0,3,3"), "nearest legal value is 1"),
        (("--tile", "3,3"), "--tile: expected three whole numbers"),
        (("--tile", "9,9,9"), "at most 128 tokens"),
        (("--out", "p.jpg"), "ends in .png"),
        (("--query", "99,0,0", "--out", "p.png"), "nearest legal value is 20"),
        (("--backend", "cuda"), "nknown backend"),
        (("--gpu", "bogus"), "no table of measured costs for 'bogus'"),
        (("--model", "flux", "--frames", "9"), "flux makes single images"),
        (("--model", "nosuch"), "nknown model 'nosuch'. Known:"),
        (("--pattern", "radial:decay=0"), "above 0 and up to 16, got 0; usual are 0.2 to 0.95"),
    ):
        code, text = cli("plan", *arguments)
        assert code == 2 and words in text, text


def test_doctor_tells_why(cli):
    code, text = cli("doctor", "--model", "flux", "--profile", "fast")
    assert code == 0, text
    for words in ("why is it not faster here?", "limit", "sliding_tile", "break-even", "advice"):
        assert words in text
    code, text = cli("doctor", "--model", "flx")
    assert code == 2 and "Did you mean 'flux'" in text


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from dit_accel.cli.app import app\n"
        "assert CliRunner().invoke(app, ['plan', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
