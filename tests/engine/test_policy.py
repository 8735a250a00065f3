"""Which rule wins, where and when."""

from __future__ import annotations

import pytest

from dit_accel.engine.call import Site
from dit_accel.engine.policy import Policy, branch_class, selects
from dit_accel.engine.profile import load_profile, parse_profile
from dit_accel.errors import DitAccelError
from dit_accel.kernels.patterns import pattern
from dit_accel.kernels.patterns.composite import PerHead


def site(layer: int, kind: str = "self", expert: str = "transformer", layers: int = 10) -> Site:
    name = f"blocks.{layer}.attn{1 if kind == 'self' else 2}"
    return Site(name, layer, layers, kind, expert)  # type: ignore[arg-type]


SITES = [site(n, kind) for n in range(10) for kind in ("self", "cross")]


def policy(body: str) -> Policy:
    return Policy(parse_profile(body), SITES)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", range(10)),
        ("0", [0]),
        ("-1", [9]),
        ("0-2,-2", [0, 1, 2, 8]),
        ("7--1", [7, 8, 9]),
        ("0.0-0.5", range(5)),
        ("0.5-1.0", range(5, 10)),
        ("blocks.3.*", [3]),
        ("10", []),
    ],
)
def test_layers(layers: str, expected: list[int]) -> None:
    assert [n for n in range(10) if selects(layers, site(n))] == list(expected)


def test_later_rules_override_the_keys_that_they_set() -> None:
    rules = policy(
        "[[rule]]\ncompute = 'sliding_tile'\nreuse = {every = 2}\n"
        "[[rule]]\nlayers = '0'\ncompute = 'dense'\n"
        "[[rule]]\nlayers = '1'\nreuse = {every = 1}\n"
    )
    first = rules.decide(site(0), "cond", 0, 10)
    assert first.compute is None and first.reuse is not None and first.reuse.every == 2
    second = rules.decide(site(1), "cond", 0, 10)
    assert second.compute is not None and second.reuse is None
    assert rules.decide(site(1, "cross"), "cond", 0, 10).compute is None


def test_steps_are_half_open_fractions() -> None:
    rules = policy("[[rule]]\ncompute = 'sliding_tile'\nsteps = [0.2, 0.6]\n")
    sparse = [n for n in range(50) if rules.decide(site(0), "", n, 50).compute is not None]
    assert sparse == list(range(10, 30))


def test_branches_and_experts() -> None:
    rules = Policy(
        parse_profile(
            "[[rule]]\nbranch = 'uncond'\ncompute = 'sliding_tile'\n"
            "[[rule]]\nexpert = 'transformer_2'\ncompute = 'full'\n"
        ),
        [*SITES, site(0, expert="transformer_2")],
    )
    assert rules.decide(site(0), "uncond", 0, 4).compute is not None
    assert rules.decide(site(0), "cond", 0, 4).compute is None
    assert rules.decide(site(0), "cond_uncond", 0, 4).compute is None
    assert rules.decide(site(0, expert="transformer_2"), "cond", 0, 4).compute is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cond", "cond"),
        ("pred_cond", "cond"),
        ("uncond", "uncond"),
        ("pred_uncond", "uncond"),
        ("uncond_stg", "uncond"),
        ("cond_uncond", "any"),
        ("call0", "any"),
    ],
)
def test_branch_names(name: str, expected: str) -> None:
    assert branch_class(name) == expected


def test_auto_spends_no_warmup_on_few_steps() -> None:
    auto = Policy(load_profile("auto", "wan"), SITES)
    assert auto.decide(site(3), "cond", 0, 8).compute is not None
    assert auto.decide(site(3), "cond", 0, 9).compute is None
    assert auto.decide(site(0), "cond", 0, 8).compute is None  # a dense layer is no warm-up
    named = Policy(load_profile("balanced", "wan"), SITES)
    assert named.decide(site(3), "cond", 0, 8).compute is None


def test_a_rule_that_selects_nothing_is_an_error() -> None:
    with pytest.raises(DitAccelError, match="'12' selects none of the model's 10 layers"):
        policy("[[rule]]\nlayers = '12'\ncompute = 'sliding_tile'\n")
    with pytest.raises(DitAccelError, match="Did you mean 'blocks.3.attn1'"):
        policy("[[rule]]\nlayers = 'block.3.attn1'\ncompute = 'sliding_tile'\n")


def test_heads_overlay_what_earlier_rules_gave() -> None:
    rules = policy(
        "[[rule]]\ncompute = 'sliding_tile'\n"
        "[[rule]]\nheads = '0-2'\ncompute = 'radial'\nsteps = [0.5, 1.0]\n"
        "[[rule]]\nheads = {'-1' = 'dense', '1' = {compute = 'disc'}}\nlayers = '1'\n"
    )
    sliding, radial, disc = (pattern(name) for name in ("sliding_tile", "radial", "disc"))
    assert rules.decide(site(0), "cond", 0, 10).compute == sliding
    late = rules.decide(site(0), "cond", 5, 10).compute
    assert isinstance(late, PerHead)
    assert late.assigned(4) == ([radial, sliding], [0, 0, 0, 1])
    both = rules.decide(site(1), "cond", 5, 10).compute
    assert isinstance(both, PerHead)
    assert both.assigned(5) == ([radial, disc, sliding, pattern("full")], [0, 1, 0, 2, 3])
    early = rules.decide(site(1), "cond", 0, 10).compute
    assert isinstance(early, PerHead)
    assert early.assigned(3) == ([sliding, disc, pattern("full")], [0, 1, 2])
    assert {compute for compute, _ in rules.computes()} == {sliding, late, both, early}


def test_heads_over_dense() -> None:
    rules = policy("[[rule]]\nheads = '0'\ncompute = 'disc'\n")
    some = rules.decide(site(0), "cond", 0, 10).compute
    assert isinstance(some, PerHead) and some.assigned(2)[0] == [pattern("disc"), pattern("full")]
    none = policy("[[rule]]\nheads = '0'\ncompute = 'dense'\n")
    assert none.decide(site(0), "cond", 0, 10).compute is None
