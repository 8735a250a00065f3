"""What a host hands to the engine: an attention call, where it is made, and when. Plain values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse import Layout
from dit_accel.layout import TokenLayout

if TYPE_CHECKING:
    from dit_accel.engine.run import Run

Tensors = tuple[Tensor, Tensor, Tensor]
Kind = Literal["self", "cross"]
VIDEO = "video"
"""The layout that a site follows where its model has one sequence."""


@dataclass(frozen=True)
class Site:
    """One attention module of a transformer: what rules select it by.

    name: dotted module name within its transformer.
    layer: index of its block, counted through all block lists of the transformer.
    layers: number of blocks.
    kind: "self" (joint attention over video and text counts as self) or "cross".
    expert: the pipeline component that it belongs to, such as "transformer_2".
    layout: which of the forward's layouts its self-attention follows.
    masks: what masks its self-attention gets: "none", or "key_padding" where the layout's valid
        lengths say what the mask says.
    heads: query heads of the module; 0 where that is not known.
    """

    name: str
    layer: int
    layers: int
    kind: Kind
    expert: str = "transformer"
    layout: str = VIDEO
    masks: Literal["none", "key_padding"] = "none"
    heads: int = 0

    def __hash__(self) -> int:
        return self._hash  # asked for several times in every call

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.kind, self.expert))

    @cached_property
    def cross(self) -> Site:
        """The same module, for its calls whose keys are not the queries' own tokens."""
        return replace(self, kind="cross")


class Row(NamedTuple):
    """Whose a sample is: nothing that is kept for one row is ever served to another.

    branch: the CFG branch as the host names it, "" where it has no names.
    prompt: what tells its conditioning from any other that the run has seen.
    window: what tells windows or regions of one branch and prompt apart.
    """

    branch: str
    prompt: Hashable = None
    window: Hashable = None


@dataclass(frozen=True, eq=False)
class Moment:
    """Where a transformer's forward stands.

    run: the denoising run of one caller that it belongs to.
    expert: the pipeline component that runs.
    step, steps: of the run, from 0.
    rows: one for the whole batch, or one for each sample.
    layouts: by name, where the tokens of a self-attention call are, or why that is not known.
    recurs: whether the rows will be told again in later steps: where not, nothing is kept.
    """

    run: Run
    expert: str
    step: int
    steps: int
    rows: tuple[Row, ...]
    layouts: Mapping[str, TokenLayout | str] = field(default_factory=dict)
    recurs: bool = True

    @cached_property
    def branch(self) -> str:
        """The CFG branch that all rows share, "" where they do not."""
        first = self.rows[0].branch
        return first if all(row.branch == first for row in self.rows) else ""


@dataclass(slots=True)
class Call:
    """One attention call as the model makes it.

    query, key, value: BSHD or BHSD, as `layout` says. mask: as the model gives it.
    parallel: whether its tokens are spread over several devices.
    dense: runs the call exactly as stock would, in the caller's own layout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    layout: Layout
    parallel: bool
    dense: Callable[[], Tensor]

    def bshd(self) -> Tensors:
        """Query, key and value as [batch, tokens, heads, head_dim] views."""
        if self.layout == "bshd":
            return self.query, self.key, self.value
        return self.query.transpose(1, 2), self.key.transpose(1, 2), self.value.transpose(1, 2)

    @property
    def flops(self) -> float:
        """Floating-point operations of the dense call."""
        dim = self.query.shape[-1]
        rows = self.query.numel() // max(1, dim)
        return 2.0 * rows * self.lengths[1] * (dim + self.value.shape[-1])

    @property
    def lengths(self) -> tuple[int, int]:
        """(query tokens, key tokens)."""
        axis = 1 if self.layout == "bshd" else 2
        return self.query.shape[axis], self.key.shape[axis]

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass will come through this call."""
        tensors = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of a module's output: a tensor, or tuples and lists of them."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []


def autocast_of(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast casts to on a tensor's device now, None where it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
