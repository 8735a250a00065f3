"""`--profiles` and `--prompts`: what they mean, and what they say to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel.compare.prompts import read_prompts
from dit_accel.compare.specs import load_spec, split_profiles
from dit_accel.engine.profile import Profile, Reuse
from dit_accel.errors import DitAccelError
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.selectors import selector


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("dense,fast", ["dense", "fast"]),
        (" dense , my.toml ", ["dense", "my.toml"]),
        (
            "dense,sliding_tile:window=3,3,3,fast",
            ["dense", "sliding_tile:window=3,3,3", "fast"],
        ),
        (
            "sliding_tile:window=1.0,.5,.5,tile=2,8,8,steps=0.1,1.0,full",
            ["sliding_tile:window=1.0,.5,.5,tile=2,8,8,steps=0.1,1.0", "full"],
        ),
        (
            "fast:window={tokens = [9, 24, 24]},layers=0-3,-1,dense",
            ["fast:window={tokens = [9, 24, 24]},layers=0-3,-1", "dense"],
        ),
        ("a:x=1,b:y=2", ["a:x=1", "b:y=2"]),
        (
            "block_topk:density=0.2,lists=shared,block_topp,block_topp:p=0.8",
            ["block_topk:density=0.2,lists=shared", "block_topp", "block_topp:p=0.8"],
        ),
        ("dense,dense", ["dense", "dense"]),
    ],
)
def test_lists_are_split_between_profiles_only(text, specs):
    assert split_profiles(text) == specs


@pytest.mark.parametrize(
    ("text", "params"),
    [("block_topk", {}), ("block_topk:density=0.2,sinks=1,lists=shared,steps=0.1,1.0", {
        "density": 0.2, "sinks": 1, "lists": "shared"})],
)  # fmt: skip
def test_selectors_are_named_likewise(text, params):
    (rule,) = load_spec(text).profile.rules
    assert rule.compute == selector("block_topk", **params) and rule.heads == "all"
    with pytest.raises(DitAccelError, match="'block_topk'"):
        load_spec("block_tpk")
    with pytest.raises(DitAccelError, match="Did you mean 'density'"):
        load_spec("block_topk:densty=0.2")


def test_an_empty_list_is_an_error():
    with pytest.raises(DitAccelError, match="no profiles"):
        split_profiles(" , ")


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ("3,3,3", {"tiles": [3, 3, 3]}),
        ("1.0,0.5,0.5", {"fraction": [1.0, 0.5, 0.5]}),
        ("1,0.5,0.5", {"fraction": [1, 0.5, 0.5]}),
        ("{tokens = [9, 24, 24]}", {"tokens": [9, 24, 24]}),
    ],
)
def test_whole_windows_count_tiles_and_decimals_are_fractions(values, window):
    spec = load_spec(f"sliding_tile:window={values}")
    (rule,) = spec.profile.rules
    assert rule.compute == pattern("sliding_tile", window=window)
    assert spec.profile.breakeven and (rule.attention, rule.steps) == ("self", (0.0, 1.0))


def test_an_inline_profile_takes_the_keys_of_a_rule():
    text = "sliding_tile:tile=2,4,4,steps=0.25,1.0,layers=1-3,-1,reuse={every=2},breakeven=false"
    profile = load_spec(text).profile
    (rule,) = profile.rules
    assert rule.compute.tile == (2, 4, 4)
    assert (rule.steps, rule.layers, rule.reuse) == ((0.25, 1.0), "1-3,-1", Reuse(2))
    assert not profile.breakeven and profile.name == text


def test_a_named_profile_with_other_keys():
    base = load_spec("fast", "wan")
    changed = load_spec("fast:window=3,3,3,breakeven=false", "wan")
    computes = [r.compute for r in changed.profile.rules if r.sparse]
    assert computes == [pattern("sliding_tile", window={"tiles": [3, 3, 3]})]
    assert len(changed.profile.rules) == len(base.profile.rules)
    assert base.profile.breakeven and not changed.profile.breakeven
    assert 'name = "fast"' in base.text and "breakeven = false" in changed.text


def test_files_profiles_and_auto(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('[profile]\nname = "other"\n[[rule]]\ncompute = "full"\n')
    spec = load_spec(str(file))
    assert spec.name == "mine" and spec.text == file.read_text()
    assert load_spec("auto", "wan").profile.drop_short_warmup
    assert load_spec(Profile("own", rules=spec.profile.rules)).name == "own"
    assert not load_spec("fast", "wan", breakeven=False).profile.breakeven


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("balancd", ["'balanced'"]),
        ("sliding_tyle:window=3,3,3", ["'sliding_tile'"]),
        ("sliding_tile:windw=3,3,3", ["'window'"]),
        ("sliding_tile:window=3,3", ["three values"]),
        ("sliding_tile:window=a b", ["window", "not a value"]),
        ("sliding_tile:tile=[1", ["tile", "not a value"]),
        ("sliding_tile:3,3", ["NAME:key=value"]),
        ("fast:steps=0.5", ["steps"]),
        ("dense:window=3,3,3", ["no pattern"]),
        ("gone.toml", ["unknown profile 'gone.toml'", "nor a TOML file"]),
        ("slidng_tile", ["Did you mean 'sliding_tile'", "fast"]),
    ],
)
def test_mistakes_are_named(text, words):
    with pytest.raises(DitAccelError) as error:
        load_spec(text, "wan")
    for word in words:
        assert word in str(error.value)


def test_prompts_come_from_a_file_or_are_one(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# heading\n\n  a red circle \na blüe square\na red circle\n".encode())
    assert read_prompts(str(file)) == ["a red circle", "a blüe square"]
    assert read_prompts(" a red circle, moving. ") == ["a red circle, moving."]
    assert read_prompts("word " * 2000) == ["word " * 1999 + "word"]


def test_prompt_files_that_cannot_be_used(tmp_path: Path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n# nothing\n")
    latin.write_bytes("a red circle\na bl\xfce square\n".encode("latin-1"))
    for source, words in [
        (empty, "holds no prompts"),
        (latin, r"not UTF-8: byte 17 \(line 2\)"),
        (tmp_path / "emty.txt", "empty.txt"),
        ("", "empty"),
    ]:
        with pytest.raises(DitAccelError, match=words):
            read_prompts(str(source))


def test_the_bundled_prompts_are_24_that_the_checker_can_judge():
    from dit_accel.compare.adherence import Wanted, read_prompt

    prompts = read_prompts(str(Path(__file__).parents[3] / "samples" / "prompts" / "demo.txt"))
    assert len(prompts) == 24
    wanted = [read_prompt(prompt) for prompt in prompts]
    assert all(isinstance(each, Wanted) for each in wanted)
    assert len(set(wanted)) == 24
