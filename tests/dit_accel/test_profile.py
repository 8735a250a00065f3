"""Profiles: what is shipped, what is refused and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dit_accel import DitAccelError, Profile, families, load_profile, profile_names
from dit_accel.engine.profile import Reuse, parse_profile, with_overrides
from dit_accel.engine.profile.files import profile_families
from dit_accel.engine.profile.parse import KEYS
from dit_accel.kernels.compute import Compute, param
from dit_accel.kernels.computes import COMPUTES
from dit_accel.kernels.geometry.tiling import Tiling, raster_runs
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.tails import TAILS, tail
from dit_accel.layout import TokenLayout

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
        (RULE + "heads = '0-x'\n", "heads: expected 'all', numbers and ranges"),
        (RULE + "heads = '0-3'\nreuse = {every = 2}\n", "rule of its own"),
        ("[[rule]]\nheads = '0-3'\n", "expected a compute for heads '0-3'"),
        ("[[rule]]\nheads = {'0-3' = {}}\n", "heads '0-3' in .*expected a compute"),
        ("[[rule]]\nheads = {'0' = {compute = 'radal'}}\n", "Did you mean 'radial'"),
        ("[[rule]]\nheads = {'0' = {compute = 'radial', dcay = 1}}\n", "Did you mean 'decay'"),
        ("[[rule]]\nattention = 'cross'\nheads = {'0' = 'dense'}\n", "cross-attention"),
        ("[[rule]]\nunion = []\n", "union: expected a list of patterns"),
        ("[[rule]]\nunion = [{compute = 'disk'}]\n", "union\\[0\\].*Did you mean 'disc'"),
        ("[[rule]]\nunion = [{decay = 0.2}]\n", "union\\[0\\]: expected a table"),
        (RULE + "reuse = {every = 0}\n", "every .* >= 1"),
        (RULE + "reuse = {evry = 2}\n", "Did you mean 'every'"),
        (RULE + "reuse = {every = 2, max_age = 3}\n", "max_age"),
        ("[[rule]]\nattention = 'cross'\ncompute = 'full'\n", "cross-attention"),
        (RULE + "tail = 'linaer'\n", "unknown tail .* 'linaer'. Did you mean 'linear'"),
        (RULE + "tail = {knd = 'drop'}\n", "unknown key of tail .* Did you mean 'kind'"),
        (RULE + "tail = 3\n", "tail in .* must be a table"),
        ("[[rule]]\nattention = 'cross'\ntail = 'drop'\n", "cross-attention runs dense"),
        ("[[rule]\n", "not valid TOML"),
    ],
)
def test_refusals_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(DitAccelError, match=message):
        parse_profile(text, "mine.toml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("balance", "unknown profile 'balance': neither .* Did you mean 'balanced'"),
        ("w.tml", "Did you mean 'w.toml'.* Known: auto, balanced, dense, fast, quality"),
        ("W", "Did you mean 'w.toml'"),
        (Path("w.tom"), "Did you mean 'w.toml'"),
        ("deep/mine", "Did you mean 'deep/mine.toml'"),
        ("wan/fast", "Did you mean 'fast'"),
        ("deep", "unknown profile 'deep'"),
        ("", "unknown profile '': neither a name nor a TOML file. Known"),
        ("gone/zzzzzz.toml", "nor a TOML file. Known"),
        (None, "expected a name, a TOML file or a Profile, got None"),
    ],
)
def test_what_is_no_profile(
    given: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("w.toml", "deep/mine.toml"):
        (tmp_path / name).write_text(RULE)
    with pytest.raises(DitAccelError, match=message):
        load_profile(given, "wan")


def test_the_hint_reaches_pipelines(
    tiny_wan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.toml").write_text(RULE)
    pipe = tiny_wan.pipe
    with pytest.raises(DitAccelError, match="Did you mean 'w.toml'"):
        pipe.enable_sparse_attention(profile="w.tml")
    pipe.enable_sparse_attention(profile="w.toml")
    assert pipe.sparse_attention_report().profile == "w.toml"


def test_files_of_any_ending_and_families(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("[profile]\nfamily = 'flux'\n" + RULE)
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    found = load_profile(str(tmp_path / "mine.txt"))
    assert found.family == "flux" and found.rules
    assert load_profile(found, "flux") is found
    with pytest.raises(DitAccelError, match="'mine.txt' is for flux, the model is of family wan"):
        load_profile(tmp_path / "mine.txt", "wan")
    with pytest.raises(DitAccelError, match="is for flux"):
        load_profile(found, "wan")
    with pytest.raises(DitAccelError, match="unknown family 'wann'. Did you mean 'wan'"):
        load_profile("fast", "wann")
    with pytest.raises(DitAccelError, match="cannot be read"):
        load_profile(tmp_path / "bytes.toml")


def test_overrides_replace_keys_of_sparse_rules() -> None:
    base = parse_profile(RULE + "[[rule]]\nlayers = '0'\ncompute = 'dense'\n")
    wider = with_overrides(base, {"window": {"tiles": [5, 5, 5]}, "steps": [0.5, 1.0]})
    assert wider.rules[0].compute != base.rules[0].compute
    assert wider.rules[0].steps == (0.5, 1.0)
    assert wider.rules[1] == base.rules[1]
    assert with_overrides(base, {"breakeven": False}).breakeven is False
    reused = with_overrides(base, {"reuse": {"every": 2}})
    assert [rule.compute for rule in reused.rules] == [rule.compute for rule in base.rules]
    assert all(rule.reuse is not None and rule.reuse.every == 2 for rule in reused.rules)
    with pytest.raises(DitAccelError, match="Did you mean 'window'"):
        with_overrides(base, {"windows": 3})
    with pytest.raises(DitAccelError, match="unknown key in overrides 'window'"):
        with_overrides(base, {"compute": "disc", "window": {"tiles": [1, 1, 1]}})
    with pytest.raises(DitAccelError, match="expected compute or union, got both"):
        parse_profile("[[rule]]\ncompute = 'disc'\nunion = ['radial', 'disc']\n")
    with pytest.raises(DitAccelError, match="runs no pattern"):
        with_overrides(load_profile("dense"), {"steps": [0.5, 1.0]})


def test_unions_and_heads() -> None:
    made = parse_profile(
        "[[rule]]\nunion = [{compute = 'radial', decay = 0.3}, {compute = 'sliding_tile'}]\n"
        "[[rule]]\nheads = {'0-1' = {compute = 'disc', radius = {tokens = 5}}, '-1' = 'dense'}\n"
        "[[rule]]\nheads = '2'\ncompute = 'full'\n"
    )
    united, groups, third = made.rules
    parts = [pattern("radial", decay=0.3), pattern("sliding_tile")]
    assert united.compute == pattern("union", union=parts)
    disc = pattern("disc", radius={"tokens": 5})
    assert groups.compute is None and groups.heads == "all" and groups.sparse
    assert groups.per_head == (("0-1", disc), ("-1", "dense"))
    assert third.heads == "2" and third.compute == pattern("full")
    smaller = with_overrides(made, {"radius": {"tokens": 3}, "steps": [0.5, 1.0]}).rules[1]
    assert smaller.per_head[0][1] == pattern("disc", radius={"tokens": 3})
    assert smaller.steps == (0.5, 1.0) and smaller.per_head[1] == ("-1", "dense")
    other = with_overrides(made, {"compute": "disc", "radius": {"tokens": 9}}).rules[0]
    assert other.compute == pattern("disc", radius={"tokens": 9})
    with pytest.raises(DitAccelError, match="overrides: radius"):
        with_overrides(made, {"radius": {"tokens": 0}})


def test_tails_are_names_or_tables() -> None:
    text = "[[rule]]\ncompute = 'disc'\ntail = "
    for name in TAILS:
        table = f"{{kind = '{name}'}}"
        short, long = (parse_profile(text + each).rules[0] for each in (f"'{name}'", table))
        assert short == long and short.tail == tail(name)
    with pytest.raises(DitAccelError, match="tail in .*: pool: .*nearest legal value is 64"):
        parse_profile(text + "{kind = 'pooled', pool = 65}")
    with pytest.raises(DitAccelError, match="key of tail in .*'slop'.*Did you mean 'slope'"):
        parse_profile(text + "{kind = 'linear', slop = 4}")
    assert parse_profile(RULE).rules[0].tail is None


def test_an_override_reaches_a_union_s_own_list() -> None:
    made = parse_profile("[[rule]]\nunion = ['radial', 'disc']\n")
    rule = with_overrides(made, {"union": ["full"]}).rules[0]
    assert rule.compute == pattern("union", union=["full"])
    with pytest.raises(DitAccelError, match="heads in overrides: expected a compute"):
        with_overrides(
            parse_profile("[[rule]]\nheads = {0 = {compute = 'disc'}}\n"), {"heads": "1"}
        )


@dataclass(frozen=True)
class Chooser(Compute):
    """A selector as far as profiles know."""

    name: ClassVar[str] = "chooser"
    online: ClassVar[bool] = True

    density: float = param(0.2, above=0, high=1, help="Kept share.")

    def tiling(self, layout: TokenLayout, kind: Any) -> Tiling:
        return raster_runs(layout.grid)


def test_selectors_are_computes_of_whole_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPUTES, "chooser", Chooser)
    rule = parse_profile("[[rule]]\ncompute = 'chooser'\ndensity = 0.3\n").rules[0]
    assert rule.compute == Chooser(0.3) and rule.sparse and rule.computes == [Chooser(0.3)]
    wider = with_overrides(parse_profile("[[rule]]\ncompute = 'chooser'\n"), {"density": 0.4})
    assert wider.rules[0].compute == Chooser(0.4)
    for text, words in (
        ("compute = 'chooser'\ndensity = 0", "density: expected a number above 0"),
        ("compute = 'choser'", "Did you mean 'chooser'"),
        ("attention = 'cross'\ncompute = 'chooser'", "cross-attention runs 'dense'"),
        ("union = ['radial', 'chooser']", "union: expected patterns, got 'chooser'"),
        ("union = [{compute = 'chooser'}]", "union: expected patterns, got 'chooser'"),
        ("heads = '0-3'\ncompute = 'chooser'", "for single heads, got 'chooser', which chooses"),
        ("heads = {'0' = {compute = 'chooser'}}", "for single heads, got 'chooser'"),
    ):
        with pytest.raises(DitAccelError, match=words):
            parse_profile(f"[[rule]]\n{text}\n")


@pytest.mark.parametrize("name", COMPUTES)
def test_every_parameter_can_be_written_in_a_rule(name: str) -> None:
    assert not {each.name for each in COMPUTES[name].parameters()} & {"compute", *KEYS}


def steps(*rules: str) -> list[tuple[float, float]]:
    text = "".join(f"[[rule]]\n{rule}\n" for rule in rules)
    return [rule.steps for rule in parse_profile(text).without_warmup().rules]


def test_without_warmup_only_the_first_bucket_begins_earlier() -> None:
    radial = "compute = 'radial'\nsteps = "
    assert steps(f"{radial}[0.2, 1.0]") == [(0.0, 1.0)]
    assert steps(f"{radial}[0.2, 0.5]", f"{radial}[0.5, 1.0]") == [(0.0, 0.5), (0.5, 1.0)]
    assert steps(f"{radial}[0.5, 1.0]", f"{radial}[0.2, 0.5]") == [(0.5, 1.0), (0.0, 0.5)]
    # Another selection has a first bucket of its own, unless a wider one is sparse before it.
    own = [f"layers = '{n}'\n{radial}[{start}, 1.0]" for n, start in ((1, 0.3), (2, 0.6))]
    assert steps(*own) == [(0.0, 1.0), (0.0, 1.0)]
    assert steps(f"{radial}[0.2, 1.0]", own[1]) == [(0.0, 1.0), (0.6, 1.0)]
    assert steps(f"{radial}[0.6, 1.0]", own[0]) == [(0.0, 1.0), (0.0, 1.0)]
    cond = f"branch = 'cond'\n{radial}[0.6, 1.0]"
    assert steps(f"branch = 'uncond'\n{radial}[0.2, 1.0]", cond) == [(0.0, 1.0), (0.0, 1.0)]
    assert steps(f"branch = 'any'\n{radial}[0.2, 1.0]", cond) == [(0.0, 1.0), (0.6, 1.0)]
    heads = f"heads = '0'\n{radial}[0.6, 1.0]"
    assert steps(f"{radial}[0.2, 1.0]", heads) == [(0.0, 1.0), (0.6, 1.0)]
    assert steps(f"heads = '1'\n{radial}[0.2, 1.0]", heads) == [(0.0, 1.0), (0.0, 1.0)]


def test_without_warmup_keeps_what_is_no_warmup() -> None:
    text = (
        "[[rule]]\ncompute = 'radial'\n[[rule]]\nlayers = '0'\ncompute = 'dense'\n"
        "[[rule]]\nsteps = [0, 0.2]\ncompute = 'dense'\nreuse = {every = 2}\n"
    )
    first, layer, warmup = parse_profile(text).without_warmup().rules
    assert (first.steps, first.compute) == ((0.0, 1.0), pattern("radial"))
    assert layer.compute == "dense"
    assert warmup.compute is None and warmup.reuse == Reuse(2)


def test_families_of_profiles_are_those_of_models() -> None:
    assert set(profile_families()) == {"generic", *families()}
