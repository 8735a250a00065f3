"""`dit-accel compare`: from the command line to the page, and what it says to mistakes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from dit_accel.compare.results import Results, summarise

SMALL = ["--height", 64, "--width", 64, "--frames", 9, "--steps", 2]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are loaded: bad input is to be found before."""
    from dit_accel.cli import runtime

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(runtime, "load", refuse)


def test_from_the_command_line_to_the_page(cli, wan_folder, sparse, monkeypatch):
    from dit_accel.cli import runtime

    Path("prompts.txt").write_text("a red circle moves left\n# later\na circle\n")
    arguments = [
        "--model", wan_folder, "--profiles", f"dense,{sparse}", "--prompts", "prompts.txt",
        "--metrics", "psnr,flicker", "--no-breakeven", "--repeats", 1, "--error-maps", "none",
        "--out", "report", *SMALL,
    ]  # fmt: skip
    code, output = cli(*arguments)
    assert code == 0, output
    assert "report/index.html" in output and "psnr" in output
    results = Results.from_json(Path("report/results.json").read_text())
    assert [clip.profile for clip in results.clips] == ["dense", sparse] * 2
    assert all((Path("report") / clip.video).is_file() for clip in results.clips)
    assert summarise(results)[1].density.high < 1.0
    assert results.environment.command.startswith("dit-accel")
    assert len(list(csv.DictReader(Path("report/results.csv").read_text().splitlines()))) == 4
    assert "http://" not in Path("report/index.html").read_text().replace("http://www.w3.org", "")
    with monkeypatch.context() as patch:  # a finished run needs no weights
        patch.setattr(runtime, "load", None)
        code, output = cli(*arguments)
    assert code == 0 and "4 clips are there already" in output and "faster" in output
    assert Results.from_json(Path("report/results.json").read_text()) == results
    code, output = cli(*arguments, "--seeds", "0,1")
    assert (
        code == 2
        and "--out report holds" in output
        and "--resume" in output
        and "--overwrite" in output
    )
    code, output = cli(*arguments, "--guidance-scale", 2.0, "--resume")
    assert code == 2 and "guidance_scale" in output


def test_a_profile_that_ran_dense_is_pointed_out(cli, wan_folder):
    code, output = cli(
        "--model", wan_folder, "--profiles", "balanced", "--prompts", "a circle", "--metrics",
        "flicker", "--repeats", 1, *SMALL,
    )  # fmt: skip
    assert code == 0
    assert re.search(r" balanced [\d.]+ ran dense - ", output), output
    # 2 steps of 2 branches and 2 layers; the profile keeps the first step and layer dense.
    why = "ran dense because: profile (6), below break-even (2); --no-breakeven runs it sparse"
    assert f"balanced: {why}" in output
    assert f">{why}<" in Path("report/index.html").read_text()
    (row,) = summarise(Results.from_json(Path("report/results.json").read_text()))[1:]
    assert row.ran_dense and row.calls == {"dense: profile": 6, "dense: below break-even": 2}
    code, output = cli(
        "--model", wan_folder, "--profiles", "balanced", "--prompts", "a circle", "--metrics",
        "flicker", "--repeats", 1, "--strict", "--out", "strict", *SMALL,
    )  # fmt: skip
    assert code == 2 and "below break-even" in output


def test_the_table_of_attention(cli, wan_folder):
    arguments = [
        "--attention", "--model", wan_folder, "--prompts", "a circle", "--layers", "0,-1",
        "--moments", "0,1", "--profiles", "full,sliding_tile:window=1,1,1,tile=1,4,4",
        "--out", "table", *SMALL,
    ]  # fmt: skip
    code, output = cli(*arguments)
    assert code == 0, output
    assert "medians over 8 captured calls" in output
    rows = json.loads(Path("table/attention.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 2 and {row["layer"] for row in rows} == {0, 1}
    assert len(Path("table/attention.csv").read_text().splitlines()) == 17
    code, output = cli(*arguments)
    assert code == 2 and "exists" in output
    code, output = cli(*arguments, "--layers", "0,2", "--out", "other")
    assert code == 2 and "0 to 1 (-1 is the last one), got 2" in output


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--profiles", "balancd"], ["Did you mean 'balanced'"]),
        (["--profiles", "sliding_tile:windw=3,3,3"], ["Did you mean 'window'"]),
        (["--profiles", "gone.toml"], ["gone.toml"]),
        (["--metrics", "pnsr"], ["Did you mean 'psnr'"]),
        (["--against", "cache-dt"], ["Did you mean 'cache-dit'"]),
        (["--seeds", "one"], ["--seeds", "0,1,2"]),
        (["--seeds", "3,-1"], ["--seeds", ">= 0, got -1"]),
        (["--error-maps", "every"], ["error maps", "first"]),
        (["--backend", "tritn"], ["Did you mean 'triton'"]),
        (["--prompts", "gone.txt"], ["gone.txt"]),
        (["--prompts", "empty.txt"], ["holds no prompts"]),
        (["--prompts", "latin.txt"], ["not UTF-8", "line 1"]),
        (["--out", "full"], ["not empty"]),
        (["--resume", "--overwrite"], ["choose one"]),
        (["--attention", "--moments", "2"], ["--moments"]),
        (["--attention", "--layers", "x"], ["--layers"]),
        (["--layers", "0"], ["--layers is for --attention"]),
        (["--moments", "0"], ["--moments is for --attention"]),
        (["--model", "gone"], ["gone"]),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(cli, wan_folder, arguments, words):
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("ein blauer Kreis, größer".encode("latin-1"))
    Path("full").mkdir()
    Path("full", "mine.txt").write_text("mine")
    given = ["--model", wan_folder, "--prompts", "a circle", *SMALL, *arguments]
    code, output = cli(*given)
    assert code == 2, output
    for word in words:
        assert word in output


@pytest.mark.usefixtures("no_loading")
def test_a_model_of_ones_own_needs_prompts(cli, wan_folder):
    code, output = cli("--model", wan_folder, *SMALL)
    assert code == 2 and "--prompts" in output


def test_keep_going_from_the_command_line(cli, wan_folder, monkeypatch):
    import dit_accel.compare.runner as runner

    stock, numbers = runner._Session._timed, iter(range(100))

    def unlucky(self, *args, **kwargs):
        if next(numbers) == 1:
            raise RuntimeError("out of luck")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(runner._Session, "_timed", unlucky)
    arguments = [
        "--model", wan_folder, "--profiles", "dense,full", "--no-breakeven", "--prompts",
        "a circle", "--metrics", "psnr", "--repeats", 1, "--error-maps", "none", *SMALL,
    ]  # fmt: skip
    code, output = cli(*arguments, "--keep-going")
    assert code == 0 and "out of luck" in output and "1 failed" in output
    code, output = cli(*arguments)
    assert code == 0 and "failed" not in output


@pytest.mark.slow
def test_the_demo_runs_sparse(cli):
    """One prompt, two profiles, six steps: seconds to minutes on two cores."""
    from dit_accel.models.find import demo_folder

    lines = (demo_folder().parent / "prompts" / "demo.txt").read_text().splitlines()
    code, output = cli(
        "--prompts", lines[2], "--profiles", "dense,balanced", "--frames", 17,
        "--height", 96, "--width", 96, "--steps", 6, "--no-breakeven", "--strict",
        "--error-maps", "none", "--repeats", 1,
    )  # fmt: skip
    assert code == 0, output
    results = Results.from_json(Path("report/results.json").read_text())
    assert len(results.clips) == 2
    dense, balanced = summarise(results)
    assert dense.density.low == dense.density.high == 1.0
    assert balanced.density.high < 0.8
    assert balanced.metrics["psnr"].low > 15
    assert dense.metrics["adherence"] is not None
