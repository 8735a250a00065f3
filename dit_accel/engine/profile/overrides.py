"""Single keys in place of a profile's own, as `overrides` of a pipeline asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dit_accel.engine.profile.parse import (
    KEYS,
    PLAIN_KEYS,
    checked,
    compute_of,
    flag,
    heads_of,
)
from dit_accel.engine.profile.schema import Profile, Rule, RuleCompute
from dit_accel.errors import DitAccelError, shown, unknown
from dit_accel.kernels.compute import Compute
from dit_accel.kernels.computes import COMPUTES
from dit_accel.kernels.patterns.composite import Union

WHERE = "overrides"


def with_overrides(profile: Profile, overrides: Mapping[str, Any]) -> Profile:
    """The profile with some keys replaced.

    `steps`, `layers` and other keys of a rule are set in every rule that runs a pattern or a
    selector, a compute's parameters (`window`, `tile`, ...) in every compute that has them, `reuse`
    in every rule, `breakeven` in the profile.

    Raises DitAccelError for an unknown key, a value that is not legal, or keys without effect.
    """
    if not isinstance(overrides, Mapping):
        raise DitAccelError(f"overrides: expected a table of rule keys, got {shown(overrides)}.")
    own = dict(overrides)
    breakeven = flag("breakeven", own.pop("breakeven", profile.breakeven))
    if own and not any(rule.sparse for rule in profile.rules) and "reuse" not in own:
        raise DitAccelError(
            f"overrides: profile {profile.name!r} runs no pattern, so {', '.join(sorted(own))} "
            "would have no effect; choose another profile."
        )
    kinds = {type(each) for rule in profile.rules for each in rule.computes}
    if str(own.get("compute")) in COMPUTES:
        kinds = {COMPUTES[own["compute"]]}  # in place of all others
    known = {"compute", *KEYS, *(each.name for kind in kinds for each in kind.parameters())}
    for key in own:
        if key not in known:
            raise unknown("key in overrides", key, known)
    rules = tuple(_overridden(rule, own) for rule in profile.rules)
    return dataclasses.replace(profile, rules=rules, breakeven=breakeven)


def _overridden(rule: Rule, keys: Mapping[str, Any]) -> Rule:
    """The rule with other values: all keys where it is sparse, else `reuse` alone."""
    own = {key: value for key, value in keys.items() if rule.sparse or key == "reuse"}
    params = {key: value for key, value in own.items() if key not in ("compute", *KEYS)}
    changes = {key: parse(own[key], WHERE) for key, parse in PLAIN_KEYS.items() if key in own}
    changes["compute"] = _with_params(rule.compute, params)
    changes["per_head"] = tuple((h, _with_params(each, params)) for h, each in rule.per_head)
    if "compute" in own:
        kind = COMPUTES.get(str(own["compute"]))
        names = [each.name for each in kind.parameters()] if kind else []
        table = {key: value for key, value in params.items() if key in names}
        changes["compute"] = compute_of({"compute": own["compute"], **table}, WHERE)
    if "heads" in own:
        changes["heads"], changes["per_head"] = heads_of(own["heads"], WHERE)
    return checked(dataclasses.replace(rule, **changes), WHERE)


def _with_params(compute: RuleCompute | None, params: Mapping[str, Any]) -> RuleCompute | None:
    """A compute with those of `params` that it has, all checked anew."""
    if not isinstance(compute, Compute):
        return compute
    if isinstance(compute, Union) and "union" not in params:
        return Union(tuple(_with_params(part, params) for part in compute.union))  # type: ignore[misc]
    names = [each.name for each in compute.parameters()]
    own = {key: value for key, value in params.items() if key in names}
    try:
        return dataclasses.replace(compute, **own)
    except DitAccelError as error:
        raise DitAccelError(f"overrides: {error}") from error
