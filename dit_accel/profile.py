"""Profiles: the TOML files that say which attention site runs what, and when."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dit_accel
from dit_accel.errors import DitAccelError, nearest, unknown
from dit_accel.kernels.patterns import PATTERNS, Pattern, pattern
from dit_accel.kernels.patterns.composite import Union, check_heads

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERIC = "generic"
WARMUP_FREE_STEPS = 8
"""At this many denoising steps and fewer, `auto` spends none of them on a dense warm-up."""

_PROFILE_KEYS = ("name", "family", "description", "breakeven")
_RULE_KEYS = ("attention", "layers", "heads", "expert", "branch", "steps", "compute", "reuse")
_CHOICES = {
    "attention": ("self", "cross"),
    "expert": ("any", "transformer", "transformer_2"),
    "branch": ("any", "cond", "uncond"),
}


@dataclass(frozen=True)
class Reuse:
    """Serve a site's last output instead of computing it.

    Args:
        every: the output is computed in one of `every` successive calls of the site and branch.
        what: what is kept; "output" is the attention module's output (as in Pyramid Attention
            Broadcast, arXiv 2408.12588).
        max_age: oldest output that may be served, as a fraction of the denoising run.
    """

    every: int
    what: str = "output"
    max_age: float | None = None


Compute = Pattern | Literal["dense"]


@dataclass(frozen=True)
class Rule:
    """One `[[rule]]`: a selection of calls, and the keys that it sets for them.

    `compute` is None where the rule leaves it as earlier rules set it. It is for the query heads
    `heads`; the others keep what earlier rules gave. `per_head` then gives single groups of heads a
    compute of their own.
    """

    attention: str = "self"
    layers: str = "all"
    expert: str = "any"
    branch: str = "any"
    steps: tuple[float, float] = (0.0, 1.0)
    compute: Compute | None = None
    reuse: Reuse | None = None
    heads: str = "all"
    per_head: tuple[tuple[str, Compute], ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the rule runs a pattern, on any head."""
        return bool(self.patterns)

    @property
    def patterns(self) -> list[Pattern]:
        """The patterns that the rule runs, also as part of a union."""
        computes = [self.compute, *(compute for _, compute in self.per_head)]
        found = [compute for compute in computes if isinstance(compute, Pattern)]
        return found + [part for each in found if isinstance(each, Union) for part in each.union]

    def overridden(self, keys: Mapping[str, Any]) -> Rule:
        """This rule with other values: all keys where it runs a pattern, else `reuse` alone."""
        own = {key: value for key, value in keys.items() if self.sparse or key == "reuse"}
        params = {key: value for key, value in own.items() if key not in _RULE_KEYS}
        changed = dataclasses.replace(
            self,
            compute=_with_params(self.compute, params),
            per_head=tuple((heads, _with_params(each, params)) for heads, each in self.per_head),
        )
        table = {key: value for key, value in own.items() if key in _RULE_KEYS}
        if not table:
            return changed
        if str(table.get("compute")) in PATTERNS:
            fields = {f.name for f in dataclasses.fields(PATTERNS[table["compute"]])}
            table |= {key: value for key, value in params.items() if key in fields}
        new = _rule({"attention": self.attention, "compute": "dense", **table}, "overrides")
        names = {"attention", *(key for key in table if key in _RULE_KEYS)}
        if "heads" in table:
            names.add("per_head")
        return dataclasses.replace(changed, **{name: getattr(new, name) for name in names})


@dataclass(frozen=True)
class Profile:
    """A policy for a model family; see `load_profile`.

    Args:
        breakeven: run a call dense where the planned pattern would not pay on this machine.
        tuned: the `[tuned]` table that the tuner wrote, empty in a profile written by hand.
    """

    name: str
    family: str = GENERIC
    description: str = ""
    rules: tuple[Rule, ...] = ()
    breakeven: bool = True
    tuned: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)
    drop_short_warmup: bool = False

    def without_warmup(self) -> Profile:
        """The same profile with sparse computes from the first step on."""
        rules = []
        for rule in self.rules:
            start, end = rule.steps
            if rule.compute == "dense" and start == 0.0 and end < 1.0:
                continue
            if rule.sparse and start > 0.0:
                rule = dataclasses.replace(rule, steps=(0.0, end))
            rules.append(rule)
        return dataclasses.replace(self, rules=tuple(rules))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Profile:
        """The same profile with some rule keys replaced.

        `steps`, `layers` and other keys of a rule are set in every rule that runs a pattern, a
        pattern's parameters (`window`, `tile`, ...) in every pattern that has them, `reuse` in
        every rule, `breakeven` in the profile.
        """
        if not isinstance(overrides, Mapping):
            raise DitAccelError(f"overrides: expected a table of rule keys, got {overrides!r}.")
        own = dict(overrides)
        breakeven = _boolean("breakeven", own.pop("breakeven", self.breakeven))
        if own and not any(rule.sparse for rule in self.rules) and "reuse" not in own:
            raise DitAccelError(
                f"overrides: profile {self.name!r} runs no pattern, so {', '.join(sorted(own))} "
                "would have no effect; choose another profile."
            )
        patterns = [each for rule in self.rules for each in rule.patterns]
        kinds = {type(each) for each in patterns}
        if str(own.get("compute")) in PATTERNS:
            kinds = {PATTERNS[own["compute"]]}  # in place of all others
        known = {*_RULE_KEYS, *(f.name for kind in kinds for f in dataclasses.fields(kind))}
        for key in own:
            if key not in known:
                raise unknown("key in overrides", key, known)
        rules = tuple(rule.overridden(own) for rule in self.rules)
        return dataclasses.replace(self, rules=rules, breakeven=breakeven)


def load_profile(profile: str | Path | Profile = "auto", family: str | None = None) -> Profile:
    """The profile that a name, a TOML file or a `Profile` means.

    Args:
        profile: `"auto"` (the family's `balanced`), `"dense"`, a shipped name, a path, a Profile.
        family: the model family whose shipped profiles a name refers to, and which the profile
            must be for; None takes the generic ones, and any family's file.

    Raises:
        DitAccelError: neither a name nor a file (with the nearest), an unreadable file, a wrong
            key or value, a profile for another family.
    """
    found = _load(profile, family)
    if family is not None and found.family not in (GENERIC, family):
        raise DitAccelError(
            f"profile {found.name!r} is for {found.family}, the model is of family {family}: "
            f"choose one of its own profiles, or set family = '{GENERIC}'."
        )
    return found


def _load(profile: str | Path | Profile, family: str | None) -> Profile:
    if isinstance(profile, Profile):
        return profile
    if profile == "auto":
        return dataclasses.replace(_load("balanced", family), drop_short_warmup=True)
    if profile == "dense":
        return Profile("dense", family or GENERIC, "Every call dense, as the stock pipeline.")
    if not isinstance(profile, (str, Path)):
        raise DitAccelError(f"profile: expected a name, a TOML file or a Profile, got {profile!r}.")
    return _read(profile_file(profile, family))


def profile_file(
    profile: str | Path, family: str | None = None, others: Iterable[str] = ()
) -> Path:
    """The TOML file behind a shipped name or a path; a name goes before a file of that name.

    Args:
        others: what the caller takes beside these, for the hint.

    Raises:
        DitAccelError: there is no such name and no such file; says the nearest that there is.
    """
    from dit_accel.catalog import families

    if family not in (None, GENERIC, *families()):
        raise unknown("family", str(family), (GENERIC, *families()))
    shipped = {name: path for fam, name, path in _shipped() if fam == GENERIC}
    shipped |= {name: path for fam, name, path in _shipped() if fam == family}
    if isinstance(profile, str) and profile in shipped:
        return shipped[profile]
    path = Path(profile).expanduser()
    if path.exists() and not path.is_dir():
        return path
    names = sorted({*shipped, "auto", "dense", *others})
    beside = {key: str(f) for f in path.parent.glob("*.toml") for key in (f.stem, f.name)}
    close = nearest(path.name, [*beside, *names])
    hint = f" Did you mean {close if close in names else beside[close]!r}?" if close else ""
    raise DitAccelError(
        f"unknown profile {str(profile)!r}: neither a name nor a TOML file.{hint} "
        f"Known: {', '.join(names)}."
    )


def profile_names(family: str | None = None) -> list[tuple[str, str, str]]:
    """(family, name, description) of every shipped profile, or of one family's."""
    return [
        (fam, name, _read(path).description)
        for fam, name, path in _shipped()
        if family in (None, fam)
    ]


def parse_profile(text: str, source: str = "profile") -> Profile:
    """A profile from TOML text; `source` names it in errors."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DitAccelError(f"{source} is not valid TOML: {error}.") from error
    for key in data:
        if key not in ("profile", "rule", "tuned"):
            raise unknown(f"table in {source}", key, ("profile", "rule", "tuned"))
    from dit_accel.catalog import families

    head = _table(data.get("profile", {}), f"{source} [profile]")
    for key in head:
        if key not in _PROFILE_KEYS:
            raise unknown(f"key in {source} [profile]", key, _PROFILE_KEYS)
    tables = data.get("rule", [])
    if not isinstance(tables, list):
        raise DitAccelError(f"{source}: write rules as [[rule]], with double brackets.")
    family = str(head.get("family", GENERIC))
    if family not in (GENERIC, *families()):
        raise unknown(f"family in {source}", family, (GENERIC, *families()))
    return Profile(
        name=str(head.get("name", source)),
        family=family,
        description=str(head.get("description", "")),
        rules=tuple(_rule(t, f"{source} [[rule]] {i + 1}") for i, t in enumerate(tables)),
        breakeven=_boolean("breakeven", head.get("breakeven", True)),
        tuned=_table(data.get("tuned", {}), f"{source} [tuned]"),
    )


def _read(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DitAccelError(f"profile file {str(path)!r} cannot be read: {error}.") from error
    return parse_profile(text, path.name)


def _shipped() -> list[tuple[str, str, Path]]:
    folders = [Path(root) / "configs" for root in dit_accel.__path__]
    files = [path for folder in folders for path in sorted(folder.glob("*/*.toml"))]
    return [(path.parent.name, path.stem, path) for path in files]


def _rule(table: Any, where: str) -> Rule:
    table = _table(table, where)
    if "union" in table and table.setdefault("compute", "union") != "union":
        raise DitAccelError(
            f"{where}: expected compute or union, got both: a union's patterns are its own list, "
            f"union = [{table['compute']!r}, ...]."
        )
    compute = _compute(
        {k: v for k, v in table.items() if k not in _RULE_KEYS or k == "compute"}, where
    )
    for key, choices in _CHOICES.items():
        if key in table and table[key] not in choices:
            raise unknown(f"{key} in {where}", str(table[key]), choices)
    heads, per_head = _heads(table.get("heads", "all"), where)
    if table.get("attention", "self") == "cross" and (per_head or isinstance(compute, Pattern)):
        raise DitAccelError(
            f"compute in {where}: cross-attention runs 'dense' and can be reused, "
            f"got {table.get('compute', 'heads')!r}."
        )
    if heads != "all" and compute is None:
        raise DitAccelError(f"heads in {where}: expected a compute for heads {heads!r}, got none.")
    if (heads != "all" or per_head) and "reuse" in table:
        raise DitAccelError(
            f"reuse in {where}: it keeps the output of all heads; write it as a rule of its own."
        )
    return Rule(
        attention=table.get("attention", "self"),
        layers=_layers(table.get("layers", "all"), where),
        expert=table.get("expert", "any"),
        branch=table.get("branch", "any"),
        steps=_steps(table.get("steps", (0.0, 1.0)), where),
        compute=compute,
        reuse=_reuse(table["reuse"], where) if "reuse" in table else None,
        heads=heads,
        per_head=per_head,
    )


def _compute(table: Mapping[str, Any], where: str) -> Compute | None:
    """The compute of a table that holds its name and its parameters alone."""
    name = table.get("compute")
    computes = ("dense", *PATTERNS)
    if name is not None and name not in computes:
        raise unknown(f"compute in {where}", str(name), computes)
    params = {key: value for key, value in table.items() if key != "compute"}
    allowed = set(_RULE_KEYS)
    if name in PATTERNS:
        allowed |= {f.name for f in dataclasses.fields(PATTERNS[name])}
    for key in params:
        if key not in allowed:
            raise unknown(f"key in {where}", key, allowed)
    if name not in PATTERNS:
        return name
    try:
        return pattern(name, **params)
    except DitAccelError as error:
        raise DitAccelError(f"{where}: {error}") from error


def _with_params(compute: Any, params: Mapping[str, Any]) -> Any:
    """A compute with those of `params` that it has, all checked anew."""
    if not isinstance(compute, Pattern):
        return compute
    if isinstance(compute, Union):
        return Union(tuple(_with_params(part, params) for part in compute.union))
    names = [f.name for f in dataclasses.fields(compute)]
    try:
        return dataclasses.replace(compute, **{k: v for k, v in params.items() if k in names})
    except DitAccelError as error:
        raise DitAccelError(f"overrides: {error}") from error


def _heads(value: Any, where: str) -> tuple[str, tuple[tuple[str, Compute], ...]]:
    """(heads that the rule's compute is for, computes of single groups of heads)."""
    if isinstance(value, Mapping):
        groups = []
        for text, table in value.items():
            place = f"heads {text!r} in {where}"
            compute = _compute(
                _table({"compute": table} if table == "dense" else table, place), place
            )
            if compute is None:
                raise DitAccelError(f"{place}: expected a compute, got {table!r}.")
            groups.append((_checked_heads(text, where), compute))
        return "all", tuple(groups)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _checked_heads(value, where), ()


def _checked_heads(text: Any, where: str) -> str:
    try:
        return check_heads(text)
    except DitAccelError as error:
        raise DitAccelError(f"{where}: {error}") from error


def _reuse(value: Any, where: str) -> Reuse:
    table = _table(value, f"reuse in {where}")
    for key in table:
        if key not in ("every", "what", "max_age"):
            raise unknown(f"key of reuse in {where}", key, ("every", "what", "max_age"))
    every = table.get("every")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise DitAccelError(f"reuse.every in {where} must be a whole number >= 1, got {every!r}.")
    if table.get("what", "output") != "output":
        raise unknown(f"reuse.what in {where}", str(table["what"]), ("output",))
    max_age = table.get("max_age")
    if max_age is not None and not (_is_number(max_age) and 0 < max_age <= 1):
        raise DitAccelError(
            f"reuse.max_age in {where} is a fraction of the run in (0, 1], got {max_age!r}."
        )
    return Reuse(every, "output", None if max_age is None else float(max_age))


def _steps(value: Any, where: str) -> tuple[float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    if not good or not 0 <= value[0] < value[1] <= 1:
        raise DitAccelError(
            f"steps in {where} are fractions [a, b] of the denoising run with 0 <= a < b <= 1, "
            f"got {value!r}."
        )
    return float(value[0]), float(value[1])


def _layers(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(v, (str, int)) for v in value):
        return ",".join(str(v) for v in value)
    if isinstance(value, str) and value.strip():
        return value
    raise DitAccelError(
        f"layers in {where}: expected 'all', ranges such as '0-9,-1', fractions such as "
        f"'0.0-0.5', or site names, got {value!r}."
    )


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DitAccelError(f"{where} must be a table, got {value!r}.")
    return dict(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise DitAccelError(f"{name} must be true or false, got {value!r}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
