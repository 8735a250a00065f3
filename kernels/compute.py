"""What a rule of a profile can name: a pattern or a selector, and the parameters that it has.

A compute is a frozen dataclass whose fields are made by `param` (as is a tail): each carries its
default, range, unit and help. So one declaration validates what a user passes, and gives the
command line, the README's tables and the ComfyUI widgets their text.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from dit_accel.errors import DitAccelError, shown, unknown
from dit_accel.kernels.geometry.tile_choice import LayoutKind
from dit_accel.kernels.geometry.tiling import Tiling, parse_tile
from dit_accel.layout import TokenLayout

TILE_HELP = (
    'Blocks of the video: "auto" chooses the tile that makes a call cheapest, [t, h, w] (at most '
    "128 tokens) is taken as it is and clipped at the far edges."
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a compute or a tail, as `param` declared it.

    default: as a profile would write it; None stands for what `help` says.
    kind: bool, int, float or str, the type of plain values; None where `parse` reads the value.
    low, high: the range of a number, ends included; above, below: likewise, ends excluded.
    usual: the range that the method's source uses.
    unit: of a number, such as "tokens". help: one sentence.
    choices: the legal words, if there are only some. form: how a value that is no plain one is
        written, such as "{tiles | tokens | fraction = [t, h, w]}".
    parse: (value, name) -> the value to keep; raises DitAccelError.
    """

    name: str
    default: Any
    kind: type | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    usual: tuple[float, float] | None = None
    unit: str = ""
    help: str = ""
    choices: tuple[str, ...] | None = None
    form: str = ""
    parse: Callable[[Any, str], Any] | None = dataclasses.field(default=None, repr=False)

    @property
    def legal(self) -> str:
        """What values are legal, in words: of a range, of choices, or the form to write."""
        if self.form or self.choices:
            return self.form or " | ".join(self.choices or ())
        if self.kind is bool:
            return "true | false"
        return " ".join(filter(None, (_NOUNS.get(self.kind, ""), self.range)))

    @property
    def range(self) -> str:
        """The range in words, such as ">= 1" or "above 0 and up to 16"; "" for none."""
        if self.above is not None and self.below is not None:
            return f"between {self.above:g} and {self.below:g}"
        if self.low is not None and self.high is not None:
            return f"from {self.low:g} to {self.high:g}"
        ends = (
            (">=", self.low),
            ("above", self.above),
            ("up to", self.high),
            ("below", self.below),
        )
        return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None)

    @property
    def default_text(self) -> str:
        """The default as a profile would write it; "" where it is None."""
        return "" if self.default is None else value_text(self.default)

    def check(self, value: Any, owner: str) -> Any:
        """The value to keep; DitAccelError that says what is legal, with the nearest such value.

        owner: the name of what has the parameter.
        """
        if value is None and self.default is None:
            return None
        if self.parse is not None:
            return self.parse(value, self.name)
        if self.choices is not None:
            if value not in self.choices:
                raise unknown(f"{self.name} of {owner}", str(value), self.choices)
            return value
        if self.kind is bool:
            if not isinstance(value, bool):
                raise DitAccelError(f"{self.name}: expected true or false, got {shown(value)}.")
            return value
        number = _number(value)
        broken = self.kind is int and type(number) is not int
        if number is None or broken or self._outside(number):
            raise DitAccelError(
                f"{self.name}: expected a {self.legal}, got {shown(value)}; {self._hint(number)}."
            )
        return number

    def _outside(self, number: float) -> bool:
        inside = (
            (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )
        return not inside or abs(number) == math.inf

    def _hint(self, number: float | None) -> str:
        """The nearest legal value, where there is one; else what is usual."""
        if number is not None and number == number:  # no NaN
            low = -math.inf if self.low is None else self.low
            near = min(max(number, low), math.inf if self.high is None else self.high)
            if abs(near) < 1e9:
                near = round(near) if self.kind is int else near
                if not self._outside(near):
                    return f"the nearest legal value is {near:g}"
        if self.usual is not None:
            return f"usual are {self.usual[0]:g} to {self.usual[1]:g}"
        middle = None if self.above is None or self.below is None else (self.above + self.below) / 2
        known = (self.default, self.low, self.high, middle)
        return f"a legal value is {next(v for v in known if v is not None):g}"


_NOUNS: dict[type | None, str] = {int: "whole number", float: "number", str: "text"}


def param(
    default: Any,
    *,
    kind: type | None = None,
    parse: Callable[[Any, str], Any] | None = None,
    **told: Any,
) -> Any:
    """A dataclass field that is a parameter of a `Parametrised`; see `Parameter` for the arguments.

    The default may be a list or a table; it is parsed like what a user passes. A default of None
    makes None legal, for "not given". kind: needed where the default is None and nothing parses
    the value; else it is the default's type, so that a number which may be broken has a float as
    its default.
    """
    if parse is None and kind is None:
        kind = type(default)
    declared = Parameter("", default, None if parse else kind, parse=parse, **told)
    if isinstance(default, (list, dict)):
        return dataclasses.field(
            default_factory=lambda: deepcopy(default), metadata={"parameter": declared}
        )
    return dataclasses.field(default=default, metadata={"parameter": declared})


def tile_param(help: str = TILE_HELP) -> Any:
    """The parameter `tile`, which is "auto" or a triple of whole numbers."""
    return param(
        "auto", unit="tokens", help=help, form='"auto" | [t, h, w]',
        parse=lambda value, _: parse_tile(value),
    )  # fmt: skip


@dataclass(frozen=True)
class Parametrised(ABC):
    """Its parameters are the dataclass fields made by `param`.

    name: what a profile calls it. Hashable.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_parameters(self)

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """What a user can set, in order."""
        return _parameters(cls)

    def describe(self) -> str:
        """The parameters in the form of a profile, but those that are not given."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(f"{name} = {value_text(v)}" for name, v in values.items() if v is not None)


@dataclass(frozen=True)
class Compute(Parametrised):
    """What makes plans; its parameters are keys of a profile's rule too.

    by_head: whether query heads may differ, so that plans need their number. online: whether plans
    come from q and k, call by call. everywhere: whether it does not ask where tokens are, so that
    a video may be of any size.
    """

    by_head: ClassVar[bool] = False
    online: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False

    def obstacle(self, layout: TokenLayout) -> str | None:
        """Why it can make no plan for a layout, or None."""
        return layout.obstacle or (None if self.everywhere else layout.too_large)

    @abstractmethod
    def tiling(self, layout: TokenLayout, kind: LayoutKind) -> Tiling:
        """How the layout's grid is cut for this compute and kind of backend."""


@lru_cache(maxsize=256)
def _parameters(cls: type[Parametrised]) -> tuple[Parameter, ...]:
    return tuple(
        dataclasses.replace(field.metadata["parameter"], name=field.name)
        for field in dataclasses.fields(cls)
        if "parameter" in field.metadata
    )


def check_parameters(compute: Parametrised) -> None:
    """Validates every parameter of a new object, and puts what is parsed in its place."""
    for each in compute.parameters():
        value = each.check(getattr(compute, each.name), compute.name)
        object.__setattr__(compute, each.name, value)


Made = TypeVar("Made", bound=Parametrised)


def make(
    what: str, registry: Mapping[str, type[Made]], name: str, params: Mapping[str, Any]
) -> Made:
    """A new entry of a registry, which holds `what` ("pattern", "selector", "tail").

    Raises DitAccelError for an unknown name or parameter, or a value that is not legal.
    """
    if name not in registry:
        raise unknown(what, name, registry)
    known = [each.name for each in registry[name].parameters()]
    for key in params:
        if key not in known:
            raise unknown(f"parameter of {name}", key, known)
    return registry[name](**params)


def from_table(value: object, where: str, make: Callable[..., Made]) -> Made:
    """A compute from a table {compute = name, ...} or its bare name; "dense" is "full".

    where: names it in errors. make: of a name and parameters, as `make` above for one registry.
    """
    if isinstance(value, str):
        value = {"compute": "full" if value == "dense" else value}
    if not isinstance(value, Mapping) or not isinstance(value.get("compute"), str):
        raise DitAccelError(
            f'{where}: expected a table such as {{compute = "sliding_tile"}} or a name such as '
            f'"full", got {shown(value)}.'
        )
    params = {str(key): part for key, part in value.items() if key != "compute"}
    try:
        return make(value["compute"], **params)
    except DitAccelError as error:
        raise DitAccelError(f"{where}: {error}") from error


def value_text(value: Any) -> str:
    """A parameter's value in the form of a profile, on one line."""
    if hasattr(value, "as_dict"):
        ((unit, numbers),) = value.as_dict().items()
        return f"{{{unit} = [{', '.join(f'{number:g}' for number in numbers)}]}}"
    if isinstance(value, Compute):
        return f"{{compute = {value.name!r}, {value.describe()}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {value_text(part)}' for key, part in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _number(value: Any) -> float | None:
    """A number, of numpy too, as an int or a float of Python; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return float(value) if isinstance(value, float) or hasattr(value, "__float__") else None
