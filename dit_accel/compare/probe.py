"""Looking into a running pipeline's attention: errors per site, and the q, k, v of a call.

Both observe the session: they see every call as it was made, and what reuse serves as well. To
compare, each call runs once more, dense, on the same inputs: never inside a timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.api import session_of
from dit_accel.compare.methods import self_sites, site_names
from dit_accel.engine.call import Site, tensors_of
from dit_accel.engine.ledger import Observation, Observer
from dit_accel.errors import DitAccelError
from dit_accel.hosts.diffusers.session import DiffusersSession
from dit_accel.layout import TokenLayout


@dataclass
class Errors:
    """Relative L2 errors by site and step; the CFG branches of a step are averaged."""

    keys: list[Site]
    steps: int = 0
    _found: dict[tuple[Site, int], list[float]] = field(default_factory=dict)

    @property
    def layer_names(self) -> list[str]:
        return site_names(self.keys)

    @property
    def table(self) -> list[list[float | None]]:
        """[sites][steps]; None where a site did not run."""
        return [
            [_mean(self._found.get((key, step))) for step in range(self.steps)] for key in self.keys
        ]

    def add(self, key: Site, step: int, steps: int, error: float) -> None:
        self.steps = steps
        self._found.setdefault((key, step), []).append(error)


@contextmanager
def measuring_errors(pipe: Any) -> Iterator[Errors]:
    """Compare what every self-attention site gives with dense attention on the same inputs.

    Sparse attention must be enabled on the pipeline; what the profile runs dense counts as 0.
    """
    session = session_of(pipe)
    errors = Errors(self_sites(session))

    def look(seen: Observation) -> None:
        if seen.site.kind != "self":
            return
        planned = seen.decision.compute is not None or seen.decision.reuse is not None
        error = relative_l2(seen.output, seen.dense()) if planned else 0.0
        errors.add(seen.site, seen.moment.step, seen.moment.steps, error)

    with _watching(session, look):
        yield errors


@dataclass(frozen=True)
class Capture:
    """One self-attention call of a dense run, after norms and rotary embedding.

    Args:
        query, key, value: [batch, tokens, heads, head_dim].
        scale: factor of the scores, None for head_dim ** -0.5.
        mask: as the model gives it, None for most.
        name, layer, step, steps, branch: where in the run it stands.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    mask: Tensor | None
    layout: TokenLayout
    name: str
    layer: int
    step: int
    steps: int
    branch: str


@contextmanager
def capturing(
    pipe: Any,
    layers: Sequence[int] | None,
    moments: Sequence[float],
    use: Callable[[Capture], None],
) -> Iterator[None]:
    """Hand q, k, v of chosen layers and moments of a dense run to `use`, at once and on the device.

    Args:
        layers: indices of blocks, negative ones from the end; None for all.
        moments: fractions of the run in [0, 1]: the step that begins there, 1.0 is the last one.

    Raises:
        DitAccelError: the model has no such block.
    """
    session = session_of(pipe)
    count = max((key.layers for key in self_sites(session)), default=0)
    for layer in layers or ():
        if not -count <= layer < count:
            raise DitAccelError(
                f"layers: expected blocks of this model, 0 to {count - 1} (-1 is the last one), "
                f"got {layer}."
            )
    wanted = None if layers is None else {layer % count for layer in layers}

    def look(seen: Observation) -> None:
        site, moment, call = seen.site, seen.moment, seen.call
        layout = moment.layouts.get(site.layout)
        steps = {min(int(at * moment.steps), moment.steps - 1) for at in moments}
        if call is None or site.kind != "self" or moment.step not in steps:
            return
        if wanted is not None and site.layer not in wanted:
            return
        if isinstance(layout, TokenLayout) and call.lengths == (layout.length, layout.length):
            use(
                Capture(
                    *call.bshd(),
                    scale=call.scale,
                    mask=call.mask,
                    layout=layout,
                    name=site.name,
                    layer=site.layer,
                    step=moment.step,
                    steps=moment.steps,
                    branch=moment.branch,
                )
            )

    with _watching(session, look):
        yield


def relative_l2(output: Any, reference: Any) -> float:
    """|output - reference| / |reference| over all their tensors, in float32."""
    difference = norm = 0.0
    for a, b in zip(tensors_of(output), tensors_of(reference), strict=True):
        difference += float((a.float() - b.float()).square().sum())
        norm += float(b.float().square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0


@contextmanager
def _watching(session: DiffusersSession, look: Observer) -> Iterator[None]:
    session.observers.append(look)
    try:
        yield
    finally:
        session.observers.remove(look)


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
