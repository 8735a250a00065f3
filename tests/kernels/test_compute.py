"""Parameters of computes: one declaration validates, names what is legal and documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from dit_accel.errors import DitAccelError
from dit_accel.kernels.compute import Compute, make, param, tile_param
from dit_accel.kernels.geometry.tiling import Tiling, raster_runs
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class Sample(Compute):
    """A compute with one parameter of each sort."""

    name: ClassVar[str] = "sample"

    share: float = param(0.25, above=0, high=1, usual=(0.1, 0.5), help="Kept share.")
    mass: float | None = param(None, kind=float, low=0, below=1, help="Kept mass.")
    count: int = param(2, low=1, high=8, unit="blocks", help="How many.")
    sinks: int = param(0, low=0, help="How many first ones.")
    near: bool = param(False, help="Whether neighbours are kept.")
    order: str = param("raster", choices=("raster", "tile"), help="In which order.")
    names: tuple[str, ...] = param(["a"], form="[name]", parse=lambda v, _: tuple(v), help="Names.")
    tile: Any = tile_param()

    def tiling(self, layout: TokenLayout, kind: Any) -> Tiling:
        return raster_runs(layout.grid)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("share", 0, "share: expected a number above 0 and up to 1, got 0; usual are 0.1 to 0.5."),
        ("share", 1.5, "got 1.5; the nearest legal value is 1."),
        ("share", float("nan"), "got nan; usual are"),
        ("share", float("inf"), "got inf; the nearest legal value is 1."),
        ("share", "half", "got 'half'; usual are"),
        ("share", True, "got True"),
        ("share", None, "got None"),
        ("mass", -1, "mass: expected a number >= 0 and below 1, got -1; the nearest .* is 0"),
        ("mass", 1, "got 1; a legal value is 0."),
        ("count", 0, "count: expected a whole number from 1 to 8, got 0; the nearest .* is 1."),
        ("count", 2.6, "got 2.6; the nearest legal value is 3."),
        ("count", 99, "the nearest legal value is 8."),
        ("count", 10**5000, "got a number of about 5,000 digits; the nearest legal value is 8."),
        ("sinks", 1e30, "sinks: expected a whole number >= 0, got 1e.30; a legal value is 0."),
        ("near", 1, "near: expected true or false, got 1."),
        ("order", "tiles", "unknown order of sample 'tiles'. Did you mean 'tile'"),
        ("order", "x" * 1000, "unknown order of sample 'xxx.*[.][.][.]xxx"),
        ("tile", [9, 9, 9], "at most 128 tokens"),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_what_is_refused_and_how(key: str, value: Any, words: str) -> None:
    with pytest.raises(DitAccelError, match=words) as caught:
        Sample(**{key: value})
    assert len(str(caught.value)) < 400


def test_values_are_parsed_and_plain() -> None:
    some = Sample(share=np.float64(0.5), count=np.int64(3), names=["b", "c"], tile=[2, 8, 8])
    assert (some.share, some.count, some.names, some.tile) == (0.5, 3, ("b", "c"), (2, 8, 8))
    assert type(some.share) is float and type(some.count) is int
    assert Sample(mass=0).mass == 0 and Sample().mass is None
    assert hash(Sample()) == hash(Sample()) and Sample().names == ("a",)


def test_what_documentation_is_made_of() -> None:
    legal = {each.name: each.legal for each in Sample.parameters()}
    assert legal == {
        "share": "number above 0 and up to 1",
        "mass": "number >= 0 and below 1",
        "count": "whole number from 1 to 8",
        "sinks": "whole number >= 0",
        "near": "true | false",
        "order": "raster | tile",
        "names": "[name]",
        "tile": '"auto" | [t, h, w]',
    }
    defaults = [each.default_text for each in Sample.parameters()]
    assert defaults == ["0.25", "", "2", "0", "false", "'raster'", "['a']", "'auto'"]
    assert Sample(mass=0.5).describe() == (
        "share = 0.25, mass = 0.5, count = 2, sinks = 0, near = false, order = 'raster', "
        "names = ['a'], tile = 'auto'"
    )


def test_making_one_by_name() -> None:
    registry: dict[str, type[Sample]] = {"sample": Sample}
    assert make("compute", registry, "sample", {"count": 3}) == Sample(count=3)
    with pytest.raises(DitAccelError, match="unknown compute 'sampel'. Did you mean 'sample'"):
        make("compute", registry, "sampel", {})
    with pytest.raises(DitAccelError, match="unknown parameter of sample 'cout'. .* 'count'"):
        make("compute", registry, "sample", {"cout": 3})
