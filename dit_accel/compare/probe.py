"""Looking into a running pipeline's attention: errors per site, and the q, k, v of a call.

Both work on the attention modules by torch's own forward hooks: after a module has run, it runs
once more, dense, on the same inputs. So they see what reuse serves as well, and cost time: never
inside a timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_accel.api import Session, session_of
from dit_accel.broadcast import tensors_of
from dit_accel.compare.methods import self_sites, site_names
from dit_accel.errors import DitAccelError
from dit_accel.layout import TokenLayout
from dit_accel.policy import SiteKey
from dit_accel.state import Site

_SITE = "_dit_accel_site"


@dataclass
class Errors:
    """Relative L2 errors by site and step; the CFG branches of a step are averaged."""

    keys: list[SiteKey]
    steps: int = 0
    _found: dict[tuple[SiteKey, int], list[float]] = field(default_factory=dict)

    @property
    def layer_names(self) -> list[str]:
        return site_names(self.keys)

    @property
    def table(self) -> list[list[float | None]]:
        """[sites][steps]; None where a site did not run."""
        return [
            [_mean(self._found.get((key, step))) for step in range(self.steps)] for key in self.keys
        ]

    def add(self, key: SiteKey, step: int, steps: int, error: float) -> None:
        self.steps = steps
        self._found.setdefault((key, step), []).append(error)


@contextmanager
def measuring_errors(pipe: Any) -> Iterator[Errors]:
    """Compare every self-attention site's output with dense attention on the same inputs.

    Sparse attention must be enabled on the pipeline; what the profile runs dense counts as 0.
    """
    session = session_of(pipe)
    errors = Errors(self_sites(session))

    def look(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = site.state.forward
        assert forward is not None
        decision = site.state.decide(site)
        error = 0.0
        if decision.compute is not None or decision.reuse is not None:
            error = relative_l2(output, run_dense(site.module, args, kwargs))
        errors.add(site.key, forward.step, forward.steps, error)

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

    def look(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = site.state.forward
        assert forward is not None
        steps = {min(int(at * forward.steps), forward.steps - 1) for at in moments}
        if forward.step not in steps or forward.layout is None:
            return
        if wanted is not None and site.key.layer not in wanted:
            return
        layout, length = forward.layout, forward.layout.length
        for q, k, v, mask, scale in _calls_of(site.module, args, kwargs):
            if q.shape[1] == k.shape[1] == length:
                where = (site.key.name, site.key.layer, forward.step, forward.steps)
                use(Capture(q, k, v, scale, mask, layout, *where, forward.branch))

    with _watching(session, look):
        yield


def run_dense(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of an attention module with its stock attention, uncounted."""
    site = module.__dict__.pop(_SITE, None)
    try:
        return module.forward(*args, **kwargs)
    finally:
        if site is not None:
            module.__dict__[_SITE] = site


def relative_l2(output: Any, reference: Any) -> float:
    """|output - reference| / |reference| over all their tensors, in float32."""
    difference = norm = 0.0
    for a, b in zip(tensors_of(output), tensors_of(reference), strict=True):
        difference += float((a.float() - b.float()).square().sum())
        norm += float(b.float().square().sum())
    return (difference / norm) ** 0.5 if norm else 0.0


Look = Callable[[Site, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def _watching(session: Session, look: Look) -> Iterator[None]:
    def hook_of(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if site.state.forward is not None:
                look(site, args, kwargs, output)

        return hook

    with ExitStack() as stack:
        for site in session.sites:
            if site.key.kind == "self":
                handle = site.module.register_forward_hook(hook_of(site), with_kwargs=True)
                stack.callback(handle.remove)
        yield


class _Listening(TorchFunctionMode):
    """Notes the arguments of `scaled_dot_product_attention` (BHSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            bound = {**dict(zip(names, args, strict=False)), **given}
            q, k, v = (bound[name].transpose(1, 2) for name in names[:3])
            self.seen.append((q, k, v, bound.get("attn_mask"), bound.get("scale")))
        return func(*args, **given)


def _calls_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]]:
    """(q, k, v, mask, scale) of the attention calls that a module makes on these inputs."""
    from diffusers import attention_backend

    with attention_backend("native"), _Listening() as listening:
        run_dense(module, args, kwargs)
    return listening.seen


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
