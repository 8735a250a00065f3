"""The prices that kernels read: as proven with them, and near the ratios of the table."""

from __future__ import annotations

import pytest

from dit_accel.costs import files
from dit_accel.costs.files import constant, read_values
from dit_accel.costs.kernels import deal_weights, tile_prices
from dit_accel.costs.table import cost_table


def test_the_deal_and_the_tiles_are_what_kernels_were_proven_with() -> None:
    """Another number deals other items to a program, or cuts grids in other tiles."""
    assert deal_weights() == (10, 12, 22, 3)
    assert tile_prices() == (((64, 0.75), (128, 1.0)), 1.2, 110)


def test_ratios_are_those_of_the_table() -> None:
    table = cost_table("h200")
    assert table is not None
    known = [table.of("hopper", dim) for dim in (64, 128)]
    short = [one.short / one.whole for one in known]
    assert min(short) - 0.02 <= deal_weights().short / deal_weights().tile <= max(short)
    masked = [price / one.whole for one in known for price in one.rules.values()]
    assert min(masked) <= deal_weights().masked / deal_weights().tile <= max(masked)
    mixed = [table.of("hopper", dim, "hopper mixed").short / one.whole for dim, one in
             zip((64, 128), known, strict=True)]  # fmt: skip
    assert min(short) <= tile_prices().clipped <= max(mixed)


@pytest.mark.parametrize("kernel", ["hopper", "triton", "triton gathered"])
@pytest.mark.parametrize("dim", [64, 128])
def test_visits_of_the_split_are_those_of_the_table(kernel: str, dim: int) -> None:
    """Microseconds at the clock of long calls; the kernels were measured again since."""
    table, told = cost_table("h200"), constant("cuda", kernel, "split_visit", dim)
    assert table is not None and told is not None
    kflops = 4 * 128**2 * dim * table.programs / 1e3
    cycles = table.of("hopper" if kernel == "hopper" else "triton", dim, kernel).whole
    assert told == pytest.approx(cycles / table.clock.settled(kflops / cycles), rel=0.1)


def test_a_gpu_with_a_table_goes_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert constant("mps", "torch", "overhead") is None
    path = files.TABLES / "b200.csv"
    own = {("hopper", 0): {"slope": 1.5}}
    monkeypatch.setattr(files, "this_gpu", lambda: "NVIDIA B200")
    monkeypatch.setattr(files, "table_file", lambda name: path if "B200" in name else None)
    monkeypatch.setattr(files, "read_values", lambda p: own if p == path else read_values(p))
    assert constant("cuda", "hopper", "slope") == 1.5
    assert constant("cuda", "hopper", "overhead") == 3e-4, "an H200's"
