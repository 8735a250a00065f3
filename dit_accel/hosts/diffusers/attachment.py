"""What hangs on one transformer: its sites, their rebound processors, and the hooks around it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_accel.engine.call import Moment, Site
from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers.session import DiffusersSession
from dit_accel.pipelines.adapter import Adapter

KEY = "_dit_accel_attachment"
"""Where a transformer holds its attachment."""


class Attached:
    """What hangs on an enabled model: a deep copy of the model is a stock one, without it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return None

    def __reduce__(self) -> Any:
        raise DitAccelError(
            "a model cannot be pickled while sparse attention is enabled on it: call "
            "disable_sparse_attention() first, or use save_pretrained."
        )


class Here(threading.local):
    """Where a transformer stands in this thread.

    moment: of the forward that runs, or None. inside: whether a forward runs, be it a stock one.
    caller: whose forward that is. context: the CFG branch that the pipeline has named, and the
    other arguments of `cache_context`.
    """

    moment: Moment | None = None
    inside: bool = False
    caller: Any = None
    context: tuple[str, Mapping[str, Any]] | None = None


@dataclass(eq=False)
class BoundSite(Attached):
    """An attention module under our seam."""

    site: Site
    module: nn.Module
    attachment: Attachment

    @property
    def session(self) -> DiffusersSession:
        """What is enabled on its transformer."""
        return self.attachment.session

    @property
    def moment(self) -> Moment | None:
        """Where its transformer's forward stands in this thread; None outside of one."""
        return self.attachment.here.moment


class Attachment(Attached):
    """One transformer, as one component of a pipeline."""

    def __init__(
        self, model: nn.Module, expert: str, adapter: Adapter, session: DiffusersSession
    ) -> None:
        self._model = weakref.ref(model)
        self.expert = expert
        self.adapter = adapter
        self.session = session
        self.here = Here()
        self.places = places_of(model, adapter)
        self.sites = [
            BoundSite(site, module, self) for site, module in sites_of(model, expert, adapter)
        ]
        self.hooks: list[Any] = []

    @property
    def alive(self) -> nn.Module | None:
        """The transformer, which owns this attachment; None once it is gone."""
        return self._model()

    @property
    def model(self) -> nn.Module:
        """The transformer, for those that it calls."""
        model = self._model()
        assert model is not None
        return model


def sites_of(model: nn.Module, expert: str, adapter: Adapter) -> list[tuple[Site, nn.Module]]:
    """A transformer's attention modules, in the order of a forward, as rules select them.

    A module that stands at several places is the site of the first one.
    """
    found: dict[int, tuple[Site, nn.Module]] = {}
    for name, layer, layers, kind, module, layout in adapter.modules(model):
        site = Site(name, layer, layers, kind, expert, layout, adapter.masks, _heads(module))
        found.setdefault(id(module), (site, module))
    return list(found.values())


def places_of(model: nn.Module, adapter: Adapter) -> list[tuple[Any, ...]]:
    """Which module is where: by comparing them it is seen whether any was exchanged."""
    return [
        (name, layer, layers, id(module))
        for name, layer, layers, _, module, _ in adapter.modules(model)
    ]


def unwrapped(part: Any) -> Iterator[Any]:
    """A component, then what `torch.compile` or another wrapper around one module holds."""
    while part is not None:
        yield part
        held = list(part.children()) if isinstance(part, nn.Module) else []
        part = held[0] if len(held) == 1 else None


def _heads(module: nn.Module) -> int:
    heads = getattr(module, "heads", 0)
    return heads if isinstance(heads, int) else 0


def attachment_of(model: nn.Module) -> Attachment | None:
    """What hangs on a transformer, or None."""
    found: Attachment | None = model.__dict__.get(KEY)
    return found
