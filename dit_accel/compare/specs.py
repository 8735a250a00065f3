"""What `--profiles` means: names, files, and profiles written on the command line.

An inline profile is `COMPUTE:key=value,key=value`: one rule for all self-attention, as in
`sliding_tile:window=3,3,3`. `NAME:key=value` is the shipped profile NAME with these keys in its
rules, as in `balanced:breakeven=false`. Keys are those of a profile's rule, and `breakeven`.
A value is what TOML takes, or numbers without brackets. A `window` of whole numbers counts tiles,
one with decimals up to 1.0 is a fraction of each axis.
"""

from __future__ import annotations

import dataclasses
import json
import pprint
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.engine.profile import (
    Profile,
    load_profile,
    parse_profile,
    profile_file,
    with_overrides,
)
from dit_accel.errors import DitAccelError
from dit_accel.kernels.computes import COMPUTES
from dit_accel.kernels.geometry.windows import bare_window

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_KEY = re.compile(r"\s*[A-Za-z_]+\s*=")


def split_profiles(text: str) -> list[str]:
    """The specs of a list such as `dense,fast,sliding_tile:window=3,3,3,tile=2,8,8,my.toml`.

    A comma inside brackets, before a number and before `key=` goes on with the spec before it.
    """
    specs: list[str] = []
    for part in _outside_brackets(text):
        goes_on = _NUMBER.fullmatch(part.strip()) or (_KEY.match(part) and ":" not in part)
        if specs and goes_on and ":" in specs[-1]:
            specs[-1] += "," + part
        elif part.strip():
            specs.append(part.strip())
    if not specs:
        raise DitAccelError("no profiles were given: name some, such as dense,balanced,fast.")
    return specs


@dataclass(frozen=True)
class Spec:
    """A profile under the name that the user gave it, and a text that says what it is (TOML)."""

    name: str
    profile: Profile
    text: str


def load_spec(
    given: str | Path | Profile, family: str | None = None, breakeven: bool | None = None
) -> Spec:
    """The profile that a spec, a path or a `Profile` means.

    Args:
        family: the model family whose shipped profiles a name refers to.
        breakeven: True or False set it, None leaves what the profile says.

    Raises:
        DitAccelError: an unknown name, key or value (with the nearest).
    """
    if isinstance(given, Profile):
        spec = Spec(given.name, given, pprint.pformat(given, width=100))
    else:
        spec = _from_text(str(given), family)
    if breakeven is None or spec.name == "dense":
        return spec
    profile = dataclasses.replace(spec.profile, breakeven=breakeven)
    return Spec(spec.name, profile, f"{spec.text}\n# with breakeven = {toml(breakeven)}\n")


def parameters_of(spec: str) -> dict[str, Any]:
    """The values of `NAME:key=value,key=value`; empty for a bare name."""
    _, _, rest = (part.strip() for part in spec.partition(":"))
    return {key: _value(key, text, spec) for key, text in _pairs(rest, spec).items()}


def _from_text(text: str, family: str | None) -> Spec:
    head, colon, _ = (part.strip() for part in text.partition(":"))
    if text in COMPUTES:
        return _one_rule(text, text, {})
    if not colon or Path(text).is_file():
        return _named(text, family)
    keys = parameters_of(text)
    if head in COMPUTES:
        return _one_rule(text, head, keys)
    base = _named(head, family)
    changed = dataclasses.replace(with_overrides(base.profile, keys), name=text)
    shown = ", ".join(f"{key} = {toml(value)}" for key, value in keys.items())
    return Spec(text, changed, f"{base.text}\n# with {shown}\n")


def _named(name: str, family: str | None) -> Spec:
    if name == "dense":
        return Spec(name, load_profile(name, family), "Every call dense, as the stock pipeline.")
    file = profile_file("balanced" if name == "auto" else name, family, COMPUTES)
    label = Path(name).stem if name.endswith(".toml") else name
    return Spec(label, load_profile(name, family), file.read_text("utf-8"))


def _one_rule(spec: str, compute: str, keys: Mapping[str, Any]) -> Spec:
    own = dict(keys)
    head: dict[str, Any] = {"name": spec, "breakeven": own.pop("breakeven", True)}
    rule = {"attention": "self", "compute": compute, **own}
    lines = ["[profile]", *(f"{key} = {toml(value)}" for key, value in head.items())]
    lines += ["", "[[rule]]", *(f"{key} = {toml(value)}" for key, value in rule.items())]
    text = "\n".join(lines) + "\n"
    return Spec(spec, parse_profile(text, repr(spec)), text)


def _pairs(text: str, spec: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    key = ""
    for part in _outside_brackets(text) if text else ():
        if _KEY.match(part):
            key, _, value = (piece.strip() for piece in part.partition("="))
            pairs[key] = value
        elif key and part.strip():
            pairs[key] += "," + part.strip()
        else:
            raise DitAccelError(
                f"{spec!r}: expected NAME:key=value,key=value, such as sliding_tile:window=3,3,3."
            )
    return pairs


def _value(key: str, text: str, spec: str) -> Any:
    """A value as TOML gives it; bare numbers become a list, bare words a text."""
    numbers = [part.strip() for part in text.split(",")]
    if all(_NUMBER.fullmatch(part) for part in numbers):
        found = [float(n) if re.search(r"[.eE]", n) else int(n) for n in numbers]
        if key == "window":
            return bare_window(found)
        return found if len(found) > 1 else found[0]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if re.fullmatch(r"[\w.*-]+(,[\w.*-]+)*", text):
            return text
        raise DitAccelError(f"{spec!r}: {key} is not a value: {error}.") from error


def _outside_brackets(text: str) -> list[str]:
    """The parts of a text between commas that stand in no brackets and no quotes."""
    parts, depth, quote, last = [], 0, "", 0
    for index, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[last:index])
            last = index + 1
    return [*parts, text[last:]]


def toml(value: Any) -> str:
    """A value in TOML's notation."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml(each) for each in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(v)}" for key, v in value.items()) + "}"
    return repr(value)
