"""Profiles: the TOML files that say which attention site runs what, and when."""

from dit_accel.engine.profile.overrides import with_overrides
from dit_accel.engine.profile.parse import parse_profile
from dit_accel.engine.profile.schema import (
    GENERIC,
    WARMUP_FREE_STEPS,
    Profile,
    Reuse,
    Rule,
    RuleCompute,
)
from dit_accel.engine.profile.shipped import load_profile, profile_file, profile_names

__all__ = [
    "GENERIC",
    "WARMUP_FREE_STEPS",
    "Profile",
    "Reuse",
    "Rule",
    "RuleCompute",
    "load_profile",
    "parse_profile",
    "profile_file",
    "profile_names",
    "with_overrides",
]
