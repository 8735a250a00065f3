"""One denoising run of one caller: everything that must not cross into another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.engine.call import tensors_of
from dit_accel.engine.ledger import Ledger
from dit_accel.engine.store import Store
from dit_accel.report import Report


class Prompts:
    """Numbers for what a run is conditioned on: another one where it is another tensor, or was
    written to since.

    The tensors of the latest two steps are held, so that their memory is not another prompt's.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, int, list[Tensor]]] = {}
        self._count = 0

    def number(self, conditioning: Any, step: int) -> int:
        """The number of a tensor, or of tuples and lists of tensors, at a step."""
        tensors = tensors_of(conditioning)
        # In inference mode torch does not count writes: then the content is compared, which waits.
        counted = not any(x.is_inference() for x in tensors)
        key = tuple((x.data_ptr(), x.shape, x.dtype, x._version if counted else 0) for x in tensors)
        number, _, held = self._known.get(key, (-1, 0, tensors))
        if number < 0 or not (counted or all(map(torch.equal, held, tensors))):
            self._count += 1
            number = self._count
            held = tensors if counted else [x.clone() for x in tensors]
        self._known[key] = number, step, held
        self._known = {k: seen for k, seen in self._known.items() if seen[1] >= step - 1}
        return number


class Run:
    """What a run keeps between calls, and what it has done so far.

    Two pipelines, threads or requests that use one transformer have a run each. The counts outlive
    the run, for the report; what is kept does not.
    """

    def __init__(self, steps: int, cache_limit: int | None = None) -> None:
        self.store = Store(cache_limit)
        self.ledger = Ledger(steps)
        self.prompts = Prompts()
        self.over = False
        self.estimate = 0

    @property
    def steps(self) -> int:
        """Denoising steps of the run."""
        return self.ledger.steps

    def end(self) -> None:
        """Free what is kept, whatever ended the run; no forward belongs to it any more."""
        self.over = True
        self.prompts = Prompts()
        self.store.forget()

    def report(self, profile: str, family: str, model: str) -> Report:
        """The receipt of the run so far, for a profile and a model of these names."""
        cache = {
            "peak_bytes": self.store.peak,
            "limit_bytes": self.store.limit,
            "refused": self.store.refused,
            "estimate_bytes": self.estimate,
        }
        return self.ledger.report(profile, family, model, cache)
