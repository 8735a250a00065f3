"""The files of measured constants: which one is whose, and what stands in them.

A row gives one constant of a backend's kernel. `head_dim` is 0 for what does not depend on it: the
price of a call for the route (`overhead`, `slope`), weights for the kernels (`deal_...`). `machine`
and `dense` are no backends but the GPU itself and the fastest dense kernel.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from dit_accel.errors import DitAccelError

TABLES = Path(__file__).parent / "tables"
COLUMNS = ("backend", "head_dim", "constant", "value", "unit", "source")
STAND_INS = {"h100": "h200"}
"""GPUs whose numbers another one's table gives: the same kernels on as many multiprocessors."""
REFERENCE = {"cpu": "cpu", "cuda": "h200"}
"""By device type: whose numbers are taken for a device that was not measured."""
DENSE = "dense"
MACHINE = "machine"

Values = Mapping[tuple[str, int], Mapping[str, float]]
"""Constants by name, of each (backend, head_dim)."""


def gpu_key(name: str) -> str:
    """Short name of a GPU, such as h200 for "NVIDIA H200"."""
    text = name.lower()
    found = re.search(r"\b(gb|[abhl])\d{2,3}s?\b|rtx[ -]?(pro )?[a\d]\d{3,4}( ?(ti|super))?", text)
    return re.sub(r"[^a-z0-9]+", "", found.group(0) if found else text.removeprefix("nvidia "))


def this_gpu() -> str:
    """Name of this machine's GPU, "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def shipped_gpus(folder: Path = TABLES) -> list[str]:
    """GPUs that there is a table for."""
    return sorted(path.stem for path in folder.glob("*.csv") if path.stem != REFERENCE["cpu"])


def table_file(gpu: str, folder: Path = TABLES) -> Path | None:
    """The file with the numbers of a GPU by its name, None where none is shipped."""
    key = gpu_key(gpu)
    for stem in (key, STAND_INS.get(key, key)):
        path = folder / f"{stem}.csv"
        if stem in shipped_gpus(folder):
            return path
    return None


def known_gpus(folder: Path = TABLES) -> str:
    """The GPUs that calls can be predicted for, as a list to read."""
    there = shipped_gpus(folder)
    for stand_in, own in STAND_INS.items():
        if own in there and stand_in not in there:
            there.append(f"{stand_in} (by the numbers of {own})")
    return ", ".join(there) or "none yet"


def no_table(gpu: str, folder: Path = TABLES) -> DitAccelError:
    """The error for a GPU that was asked for by name and has no table."""
    return DitAccelError(
        f"gpu: there is no table of measured costs for {gpu!r}; there are: "
        f"{known_gpus(folder)}. Leave it out to be told densities and the bound alone: "
        "without a table, times are relative only."
    )


def values_of(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, int], dict[str, float]]:
    """The constants of rows with COLUMNS."""
    values: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        place = row["backend"], int(row["head_dim"])
        values.setdefault(place, {})[row["constant"]] = float(row["value"])
    return values


@lru_cache(maxsize=8)
def read_values(path: Path) -> Values:
    """The constants of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return values_of(csv.DictReader(file))


def constant(device_type: str, backend: str, name: str, head_dim: int = 0) -> float | None:
    """A constant for this machine's device of that type, such as "cuda".

    What its own table does not have is that of `reference`; None where neither has it.
    """
    own = table_file(this_gpu()) if device_type == "cuda" else None
    found = None if own is None else read_values(own).get((backend, head_dim), {}).get(name)
    return reference(device_type, backend, name, head_dim) if found is None else found


def reference(device_type: str, backend: str, name: str, head_dim: int = 0) -> float | None:
    """The same on every machine: from the table of `REFERENCE`."""
    if device_type not in REFERENCE:
        return None
    values = read_values(TABLES / f"{REFERENCE[device_type]}.csv")
    return values.get((backend, head_dim), {}).get(name)
