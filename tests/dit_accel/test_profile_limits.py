"""Profiles from anywhere: their size is bounded, and what is wrong with them is said briefly."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel import DitAccelError, load_profile
from dit_accel.engine.profile import parse_profile, with_overrides

RULE = "[[rule]]\ncompute = 'sliding_tile'\n"
LONG = "x" * 9000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tuned]\na = " + "[" * 50_000, "nested too deeply|not valid TOML"),
        ("[tuned]\na = " + "[" * 40 + "]" * 40, "mine.toml: values are nested too deeply"),
        (f"[tuned]\n{'.'.join('a' * 40)} = 1", "values are nested too deeply"),
        ("[tuned]\na = " + "9" * 5000, "is not valid TOML: Exceeds the limit"),
        ("[tuned]\na = " + "9" * 4000, "numbers of at most 64 bits, got 9999.*[.][.][.]9999"),
        (f"[tuned]\na = '{'x' * 20_000}'", "texts of at most 10,000 characters, got 20,000"),
        (f"[profile]\nname = '{LONG}'", "name in .*: expected at most 200 characters, got 9000"),
        (RULE * 1001, "expected at most 1,000 rules, got 1,001"),
        (f"[{LONG}]", "unknown table in mine.toml 'xxx"),
        (f"[profile]\n{LONG} = 1", "unknown key"),
        (f"[profile]\nfamily = '{LONG}'", "unknown family"),
        (f"[[rule]]\ncompute = '{LONG}'", "unknown compute"),
        (f"[[rule]]\ncompute = {[1] * 4000}", "unknown compute"),
        (RULE + f"{LONG} = 1", "unknown key"),
        (RULE + f"window = '{LONG}'", "window: expected one of"),
        (RULE + f"window = {{{LONG} = 1}}", "unknown unit of window"),
        (RULE + f"window = {{tiles = {list(range(2000))}}}", "window.tiles: expected three values"),
        (RULE + f"window = {{tiles = ['{LONG}', 1, 1]}}", "window.tiles: expected whole numbers"),
        (RULE + f"tile = '{LONG}'", "tile: expected"),
        (RULE + f"exact = '{LONG}'", "exact: expected true or false"),
        (RULE + f"steps = '{LONG}'", "steps in"),
        (RULE + f"layers = {{a = '{LONG}'}}", "layers in"),
        (RULE + f"heads = '{LONG}'", "heads: expected"),
        (RULE + f"heads = {{{LONG} = 'dense'}}", "heads: expected"),
        (RULE + f"reuse = '{LONG}'", "reuse in"),
        (RULE + f"reuse = {{every = '{LONG}'}}", "reuse.every"),
        (RULE + f"branch = '{LONG}'", "unknown branch"),
        (RULE + f"tail = '{LONG}'", "unknown tail"),
        (f"[[rule]]\nunion = '{LONG}'", "union: expected a list"),
        (f"[[rule]]\nunion = [{{compute = '{LONG}'}}]", "unknown pattern"),
        (f"[[rule]]\ncompute = '{LONG}'\nunion = []", "expected compute or union, got both"),
        (f"[[rule]]\ncompute = 'radial'\ndecay = '{LONG}'", "decay: expected a number"),
        (f"[[rule]]\ncompute = 'neighborhood'\ncausal = '{LONG}'", "causal: expected"),
    ],
    ids=lambda text: text[:40].replace("\n", " "),
)
def test_hostile_files_give_short_errors(text: str, message: str) -> None:
    with pytest.raises(DitAccelError, match=message) as caught:
        parse_profile(text, "mine.toml")
    assert len(str(caught.value)) < 1000


def test_large_and_endless_files(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_text("# " + "x" * (1 << 17))
    with pytest.raises(DitAccelError, match="large.toml': expected at most 128 KiB"):
        load_profile(path)
    path.write_text("# " + "x" * ((1 << 17) - 2))
    assert load_profile(path).rules == ()
    if Path("/dev/zero").exists():
        with pytest.raises(DitAccelError, match="at most 128 KiB"):
            load_profile("/dev/zero")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-at-all/x.toml"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(DitAccelError, match="unknown profile '.*neither a name nor") as caught:
        load_profile(name)
    assert len(str(caught.value)) < 1000


def test_overrides_are_shown_briefly() -> None:
    profile = parse_profile(RULE)
    for overrides in ({"layers": {"a": LONG}}, {"window": LONG}, {LONG: 1}, LONG):
        with pytest.raises(DitAccelError) as caught:
            with_overrides(profile, overrides)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 1000
