"""Tables of what is shipped and supported, made from the registries."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

import dit_accel
from dit_accel.cli import runtime
from dit_accel.errors import unknown


def profiles_table(family: str | None = None) -> Table:
    """Family, name and description of the shipped profiles."""
    known = {row[0] for row in dit_accel.profile_names()}
    if family is not None and family not in known:
        raise unknown("family", family, known)
    table = Table("Family", "Profile", "What it does", title="Profiles")
    last = ""
    for group, name, description in dit_accel.profile_names(family):
        if last and group != last:
            table.add_section()
        table.add_row(group if group != last else "", name, description)
        last = group
    table.caption = "auto is the balanced profile of the model's family; dense is the stock model."
    return table


def computes_table(name: str | None = None) -> Table:
    """What a profile's rule can name as compute and tail; of one of them, the parameters."""
    runtime.quiet()
    from dit_accel.kernels.compute import Parametrised
    from dit_accel.kernels.computes import COMPUTES
    from dit_accel.kernels.tails import TAILS

    known: dict[str, type[Parametrised]] = {**COMPUTES, **TAILS}
    if name is None:
        table = Table(
            "Compute", "What it does", "Parameters", title="Computes and tails", show_lines=True
        )
        for each, kind in known.items():
            keys = ", ".join(parameter.name for parameter in kind.parameters())
            table.add_row(f"tail {each}" if each in TAILS else each, Text(_summary(kind)), keys)
        table.caption = "Their parameters: dit-accel computes NAME."
        return table
    if name not in known:
        raise unknown("compute", name, known)
    columns = ("Parameter", "Default", "Legal", "What it means")
    table = Table(*columns, title=name, caption=_summary(known[name]), show_lines=True)
    for row in known[name].parameters():
        unit = f" Unit: {row.unit}." if row.unit else ""
        table.add_row(row.name, Text(row.default_text), Text(row.legal), Text(row.help + unit))
    return table


def _summary(kind: type) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def models_table() -> Table:
    """The supported families with their pipelines."""
    runtime.quiet()
    table = Table(title="Supported models", show_lines=True)
    table.add_column("Family", no_wrap=True)
    table.add_column("Pipelines of diffusers", no_wrap=True)
    table.add_column("Text tokens")
    for info in dit_accel.supported_models():
        table.add_row(info.family, "\n".join(info.pipeline_classes), f"{info.text}; {info.notes}")
    table.caption = "Any size, length and batch that the model itself takes."
    return table
