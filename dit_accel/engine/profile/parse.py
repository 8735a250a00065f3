"""From TOML to a `Profile`: every key is known, every value is legal, or it is an error.

A profile is data that may come from anywhere, so its size, its nesting and its numbers are
bounded, and errors show long values in part. What makes a TOML parser slow or deep (long dotted
keys, nested brackets, many lines) is bounded before it reads anything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.engine.profile.files import profile_families
from dit_accel.engine.profile.schema import GENERIC, Profile, Reuse, Rule, RuleCompute
from dit_accel.errors import DitAccelError, shown, unknown
from dit_accel.kernels.computes import COMPUTES, compute
from dit_accel.kernels.patterns.composite import check_heads
from dit_accel.kernels.tails import TAILS, Tail, tail

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 17
MAX_LINES = 10_000
MAX_RULES = 1000
MAX_DEPTH = 16
MAX_TEXT = 10_000
MAX_NAME = 200
MAX_LIST = 1000

# A string or what begins like one, a comment, a bracket, a dot between parts of a key, the end of a
# line. None of them is ever tried twice at a place: reading takes time in proportion to the text.
_TOKEN = re.compile(
    r'"""(?:[^"\\]|\\.?|"(?!""))*(?:"""|\Z)|'
    r"'''(?:[^']|'(?!''))*(?:'''|\Z)|"
    r'"(?:[^"\\\n]|\\[^\n]?)*"?|'
    r"'[^'\n]*'?|#[^\n]*|[\[{\]}.,=\n]",
    re.DOTALL,
)

TABLES = ("profile", "rule", "tuned")
PROFILE_KEYS = ("name", "family", "description", "breakeven")
CHOICES = {
    "attention": ("self", "cross"),
    "expert": ("any", "transformer", "transformer_2"),
    "branch": ("any", "cond", "uncond"),
}


def read_profile(path: Path) -> Profile:
    """The profile of a file; DitAccelError if it cannot be read or is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = "" if len(raw) > MAX_BYTES else raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DitAccelError(f"profile file {str(path)!r} cannot be read: {error}.") from error
    if len(raw) > MAX_BYTES:
        raise DitAccelError(f"profile file {str(path)!r}: expected at most {MAX_BYTES >> 10} KiB.")
    return parse_profile(text, path.name)


def parse_profile(text: str, source: str = "profile") -> Profile:
    """A profile from TOML text; `source` names it in errors."""
    data = _toml(text, source)
    for key in data:
        if key not in TABLES:
            raise unknown(f"table in {source}", key, TABLES)
    head = table_of(data.get("profile", {}), f"{source} [profile]")
    for key in head:
        if key not in PROFILE_KEYS:
            raise unknown(f"key in {source} [profile]", key, PROFILE_KEYS)
    rules = data.get("rule", [])
    if not isinstance(rules, list):
        raise DitAccelError(f"{source}: write rules as [[rule]], with double brackets.")
    if len(rules) > MAX_RULES:
        raise DitAccelError(f"{source}: expected at most {MAX_RULES:,} rules, got {len(rules):,}.")
    family = str(head.get("family", GENERIC))
    if family not in profile_families():
        raise unknown(f"family in {source}", family, profile_families())
    name = str(head.get("name", source))
    if len(name) > MAX_NAME:
        raise DitAccelError(
            f"name in {source} [profile]: expected at most {MAX_NAME} characters, got {len(name)}."
        )
    return Profile(
        name=name,
        family=family,
        description=str(head.get("description", "")),
        rules=tuple(_rule(t, f"{source} [[rule]] {i + 1}") for i, t in enumerate(rules)),
        breakeven=flag("breakeven", head.get("breakeven", True)),
        tuned=table_of(data.get("tuned", {}), f"{source} [tuned]"),
    )


def _toml(text: str, source: str) -> dict[str, Any]:
    _check_text(text, source)
    try:
        data = tomllib.loads(text)
    except RecursionError as error:
        raise DitAccelError(f"{source}: values are nested too deeply.") from error
    except ValueError as error:  # no TOML, or an integer of thousands of digits
        why = str(error)
        why = why if len(why) <= MAX_NAME else f"{why[:MAX_NAME]}..."
        raise DitAccelError(f"{source} is not valid TOML: {why}.") from error
    _check_size(data, source, MAX_DEPTH)
    return data


def _check_text(text: str, source: str) -> None:
    """Before anything is parsed: lines, brackets within each other, and parts of a dotted key."""
    if len(text) > MAX_BYTES:
        raise DitAccelError(f"{source}: expected at most {MAX_BYTES >> 10} KiB.")
    if text.count("\n") > MAX_LINES:
        raise DitAccelError(f"{source}: expected at most {MAX_LINES:,} lines.")
    depth = parts = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth = max(0, depth - 1)
        parts = parts + 1 if token == "." else parts * (token[0] in "\"'")
        if max(depth, parts) > MAX_DEPTH:
            raise DitAccelError(f"{source}: values are nested too deeply.")


def _check_size(value: Any, source: str, depth: int) -> None:
    if depth == 0:
        raise DitAccelError(f"{source}: values are nested too deeply.")
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_size(key, source, depth)
            _check_size(part, source, depth - 1)
    elif isinstance(value, list):
        for part in value:
            _check_size(part, source, depth - 1)
    elif isinstance(value, str) and len(value) > MAX_TEXT:
        raise DitAccelError(
            f"{source}: expected texts of at most {MAX_TEXT:,} characters, got {len(value):,}: "
            f"{shown(value)}."
        )
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DitAccelError(f"{source}: expected numbers of at most 64 bits, got {shown(value)}.")


def _rule(table: Any, where: str) -> Rule:
    table = table_of(table, where)
    if "union" in table and table.setdefault("compute", "union") != "union":
        raise DitAccelError(
            f"{where}: expected compute or union, got both: a union's patterns are its own list, "
            f"union = [{shown(table['compute'])}, ...]."
        )
    named = compute_of({k: v for k, v in table.items() if k not in KEYS}, where)
    heads, per_head = heads_of(table.get("heads", "all"), where)
    own = {key: parse(table[key], where) for key, parse in PLAIN_KEYS.items() if key in table}
    rule = Rule(compute=named, heads=heads, per_head=per_head, **own)
    return checked(rule, where)


def checked(rule: Rule, where: str) -> Rule:
    """The rule, if its keys go together; DitAccelError else."""
    if rule.attention == "cross" and (rule.sparse or rule.per_head):
        raise DitAccelError(
            f"compute in {where}: cross-attention runs 'dense' and can be reused, got "
            f"{rule.computes[0].name if rule.sparse else 'heads'!r}."
        )
    if rule.attention == "cross" and rule.tail is not None:
        raise DitAccelError(f"tail in {where}: cross-attention runs dense and has none.")
    if rule.heads != "all" and rule.compute is None:
        raise DitAccelError(
            f"heads in {where}: expected a compute for heads {shown(rule.heads)}, got none."
        )
    if (rule.heads != "all" or rule.per_head) and rule.reuse is not None:
        raise DitAccelError(
            f"reuse in {where}: it keeps the output of all heads; write it as a rule of its own."
        )
    for each in rule.computes:
        if each.online and (rule.heads != "all" or rule.per_head):
            raise DitAccelError(
                f"heads in {where}: expected patterns or 'dense' for single heads, got "
                f"{each.name!r}, which chooses for all heads of a site."
            )
    return rule


def compute_of(table: Mapping[str, Any], where: str) -> RuleCompute | None:
    """The compute of a table that holds its name and its parameters alone; None without a name."""
    name = table.get("compute")
    if name is not None and name not in ("dense", *COMPUTES):
        raise unknown(f"compute in {where}", str(name), ("dense", *COMPUTES))
    kind = COMPUTES.get(str(name))
    allowed = {"compute", *KEYS, *(each.name for each in (kind.parameters() if kind else ()))}
    for key in table:
        if key not in allowed:
            raise unknown(f"key in {where}", key, allowed)
    if kind is None or name is None:
        return name
    _check_union(table.get("union"), where)
    try:
        return compute(name, **{key: value for key, value in table.items() if key != "compute"})
    except DitAccelError as error:
        raise DitAccelError(f"{where}: {error}") from error


def _check_union(parts: Any, where: str) -> None:
    for part in parts if isinstance(parts, list) else ():
        name = part.get("compute") if isinstance(part, Mapping) else part
        if isinstance(name, str) and name in COMPUTES and COMPUTES[name].online:
            raise DitAccelError(
                f"{where}: union: expected patterns, got {name!r}, which chooses blocks from q and "
                "k; write it as a rule of its own."
            )


def heads_of(value: Any, where: str) -> tuple[str, tuple[tuple[str, RuleCompute], ...]]:
    """(heads that the rule's compute is for, computes of single groups of heads)."""
    if isinstance(value, Mapping):
        groups = []
        for text, table in value.items():
            place = f"heads {shown(text)} in {where}"
            named = compute_of(
                table_of({"compute": table} if table == "dense" else table, place), place
            )
            if named is None:
                raise DitAccelError(f"{place}: expected a compute, got {shown(table)}.")
            groups.append((_heads_text(text, where), named))
        return "all", tuple(groups)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return _heads_text(value, where), ()


def _heads_text(text: Any, where: str) -> str:
    try:
        return check_heads(text)
    except DitAccelError as error:
        raise DitAccelError(f"{where}: {error}") from error


def _choice(key: str) -> Callable[[Any, str], str]:
    def parse(value: Any, where: str) -> str:
        if value not in CHOICES[key]:
            raise unknown(f"{key} in {where}", str(value), CHOICES[key])
        return str(value)

    return parse


def _layers(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return _layers(shown(value), where)
    if isinstance(value, list) and value and all(isinstance(v, (str, int)) for v in value):
        return _layers(",".join(shown(v) if isinstance(v, int) else v for v in value), where)
    if isinstance(value, str) and value.strip() and _bounded(value):
        return value
    raise DitAccelError(
        f"layers in {where}: expected 'all', ranges such as '0-9,-1', fractions such as "
        f"'0.0-0.5', or site names, got {shown(value)}."
    )


def _bounded(text: str) -> bool:
    """Whether no number has more digits than one can need."""
    return len(text) <= MAX_LIST and not re.search(r"\d{10}", text)


def _steps(value: Any, where: str) -> tuple[float, float]:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))
    if not good or not 0 <= value[0] < value[1] <= 1:
        raise DitAccelError(
            f"steps in {where} are fractions [a, b] of the denoising run with 0 <= a < b <= 1, "
            f"got {shown(value)}."
        )
    return float(value[0]), float(value[1])


def _reuse(value: Any, where: str) -> Reuse:
    table = table_of(value, f"reuse in {where}")
    for key in table:
        if key not in ("every", "what", "max_age"):
            raise unknown(f"key of reuse in {where}", key, ("every", "what", "max_age"))
    every = table.get("every")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise DitAccelError(
            f"reuse.every in {where} must be a whole number >= 1, got {shown(every)}."
        )
    if table.get("what", "output") != "output":
        raise unknown(f"reuse.what in {where}", str(table["what"]), ("output",))
    max_age = table.get("max_age")
    if max_age is not None and not (_is_number(max_age) and 0 < max_age <= 1):
        raise DitAccelError(
            f"reuse.max_age in {where} is a fraction of the run in (0, 1], got {shown(max_age)}."
        )
    return Reuse(every, "output", None if max_age is None else float(max_age))


def _tail(value: Any, where: str) -> Tail:
    if isinstance(value, Tail):
        return value
    table = {"kind": value} if isinstance(value, str) else table_of(value, f"tail in {where}")
    kind = table.pop("kind", None)
    if kind is None and table:
        raise unknown(f"key of tail in {where}", next(iter(table)), ("kind",))
    if kind not in TAILS:
        raise unknown(f"tail in {where}", str(kind), TAILS)
    known = [each.name for each in TAILS[kind].parameters()]
    for key in table:
        if key not in known:
            raise unknown(f"key of tail in {where}", key, ("kind", *known))
    try:
        return tail(kind, **table)
    except DitAccelError as error:
        raise DitAccelError(f"tail in {where}: {error}") from error


def table_of(value: Any, where: str) -> dict[str, Any]:
    """A table of its own; DitAccelError if the value is none."""
    if not isinstance(value, Mapping):
        raise DitAccelError(f"{where} must be a table, got {shown(value)}.")
    return dict(value)


def flag(name: str, value: Any) -> bool:
    """True or false; DitAccelError if the value is neither."""
    if not isinstance(value, bool):
        raise DitAccelError(f"{name} must be true or false, got {shown(value)}.")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PLAIN_KEYS: dict[str, Callable[[Any, str], Any]] = {
    **{key: _choice(key) for key in CHOICES},
    "layers": _layers,
    "steps": _steps,
    "reuse": _reuse,
    "tail": _tail,
}
"""Keys of a rule that need nothing but their own value: (value, where) -> the `Rule`'s field."""
KEYS = (*PLAIN_KEYS, "heads")
"""Keys of a rule beside its compute and the compute's parameters."""
