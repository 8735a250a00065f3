"""Reuse of outputs: a site's last output is served again instead of being computed.

Source: Pyramid Attention Broadcast (arXiv 2408.12588); here keyed by branch, prompt and expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_accel.engine.call import Moment, Site, tensors_of
from dit_accel.engine.profile import Reuse
from dit_accel.engine.store import Kept


def served(
    reuse: Reuse,
    site: Site,
    moment: Moment,
    what: str,
    inputs: tuple[Any, ...],
    compute: Callable[[], tuple[Any, int]],
) -> tuple[Any, int | None]:
    """(output, calls): what is kept and how many calls it stands for, or what `compute` returns,
    which is then kept, and None.

    what: name of the slot. inputs: their shapes, types and devices must equal those of the kept
    output. compute: returns an output and how many attention calls it made.
    """
    if not moment.recurs:
        return compute()[0], None
    signature = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs if isinstance(x, Tensor))
    store = moment.run.store
    kept = store.get(site, what, moment.rows)
    if kept is not None and _fits(kept, reuse, moment, signature):
        kept.served += 1
        return kept.value, kept.calls
    output, calls = compute()
    if not any(tensor.requires_grad for tensor in tensors_of(output)):
        last, worth = moment.step + reuse.every - 1, _worth(reuse, site, inputs)
        made = Kept(output, moment.step, calls, signature, last=last, worth=worth)
        store.put(site, what, moment.rows, made)
    return output, None


def _worth(reuse: Reuse, site: Site, inputs: tuple[Any, ...]) -> float:
    """Keys that a query is spared, times the share of calls that are served: time for each byte."""
    lengths = [x.shape[1] for x in inputs if isinstance(x, Tensor) and x.ndim >= 3]
    lengths = [length for length in lengths if length > 1] or [1]
    keys = max(lengths) if site.kind == "self" else min(lengths)  # text is shorter than video
    return keys * (1 - 1 / reuse.every)


def _fits(kept: Kept, reuse: Reuse, moment: Moment, signature: tuple[Any, ...]) -> bool:
    """Whether what is kept may stand for this call.

    It is never older than `every` steps, also where another cache skipped this site's calls in
    between.
    """
    age = moment.step - kept.step
    return (
        kept.signature == signature
        and kept.served + 1 < reuse.every
        and 0 <= age < reuse.every
        and (reuse.max_age is None or age / moment.steps <= reuse.max_age)
    )
