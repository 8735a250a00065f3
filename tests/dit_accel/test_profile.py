"""Profiles: what is shipped, what is refused and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_accel import DitAccelError, Profile, families, load_profile, profile_names
from dit_accel.profile import parse_profile

RULE = "[[rule]]\ncompute = 'sliding_tile'\n"


def test_every_family_ships_three_profiles() -> None:
    shipped = {(family, name) for family, name, _ in profile_names()}
    for family in (*families(), "generic"):
        assert {(family, n) for n in ("quality", "balanced", "fast")} <= shipped
    assert all(description for _, _, description in profile_names())


def test_names_paths_and_profiles_load(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[profile]\nname = 'mine'\n" + RULE)
    assert load_profile(path).name == load_profile(str(path)).name == "mine"
    made = Profile("made")
    assert load_profile(made) is made
    assert load_profile("balanced", "flux").family == "flux"
    assert load_profile("balanced", None).family == "generic"
    assert load_profile("dense", "wan").rules == ()
    assert load_profile("auto", "wan").drop_short_warmup


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[profil]\n", "unknown table .* 'profil'. Did you mean 'profile'"),
        ("[profile]\nnme = 'x'\n", "unknown key .* 'nme'. Did you mean 'name'"),
        ("[rule]\ncompute = 'dense'\n", "double brackets"),
        ("[[rule]]\ncompute = 'sliding_tiles'\n", "Did you mean 'sliding_tile'"),
        (RULE + "windw = 3\n", "unknown key .* 'windw'. Did you mean 'window'"),
        ("[[rule]]\nwindow = {tiles = [3, 3, 3]}\n", "unknown key .* 'window'"),
        (RULE + "window = {tiles = [0, 3, 3]}\n", "window"),
        (RULE + "window = {fraction = [1.5, 1, 1]}\n", "window"),
        (RULE + "steps = [0, 50]\n", "fractions"),
        (RULE + "steps = [0.5, 0.2]\n", "fractions"),
        (RULE + "branch = 'conditional'\n", "unknown branch .*Known: any, cond, uncond"),
        (RULE + "expert = 'transformer2'\n", "Did you mean 'transformer_2'"),
        (RULE + "attention = 'both'\n", "unknown attention"),
        (RULE + "heads = '0-3'\n", "heads"),
        (RULE + "reuse = {every = 0}\n", "every .* >= 1"),
        (RULE + "reuse = {evry = 2}\n", "Did you mean 'every'"),
        (RULE + "reuse = {every = 2, max_age = 3}\n", "max_age"),
        ("[[rule]]\nattention = 'cross'\ncompute = 'full'\n", "cross-attention"),
        ("[[rule]\n", "not valid TOML"),
    ],
)
def test_refusals_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        parse_profile(text, "mine.toml")


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(DitAccelError, match="Did you mean 'balanced'"):
        load_profile("balance", "wan")
    with pytest.raises(DitAccelError, match="cannot be read"):
        load_profile(tmp_path / "missing.toml")


def test_overrides_replace_keys_of_sparse_rules() -> None:
    base = parse_profile(RULE + "[[rule]]\nlayers = '0'\ncompute = 'dense'\n")
    wider = base.with_overrides({"window": {"tiles": [5, 5, 5]}, "steps": [0.5, 1.0]})
    assert wider.rules[0].compute != base.rules[0].compute
    assert wider.rules[0].steps == (0.5, 1.0)
    assert wider.rules[1] == base.rules[1]
    assert base.with_overrides({"breakeven": False}).breakeven is False
    reused = base.with_overrides({"reuse": {"every": 2}})
    assert [rule.compute for rule in reused.rules] == [rule.compute for rule in base.rules]
    assert all(rule.reuse is not None and rule.reuse.every == 2 for rule in reused.rules)
    with pytest.raises(DitAccelError, match="Did you mean 'window'"):
        base.with_overrides({"windows": 3})
    with pytest.raises(DitAccelError, match="runs no pattern"):
        load_profile("dense").with_overrides({"steps": [0.5, 1.0]})
