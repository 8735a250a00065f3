"""What an adapter tells about a model family: its attention sites and where its tokens are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dit_accel.layout import TokenLayout
from dit_accel.pipelines.preset import Preset

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["self", "cross"]
Bound = Mapping[str, Any]
"""A transformer forward's arguments by name."""
Placed = TokenLayout | str


@dataclass(frozen=True)
class Sites:
    """Attention modules of one block list.

    Args:
        blocks: attribute of the transformer that holds the blocks.
        attention: attribute of a block that holds the attention module.
        kind: "self" for attention over the video (joint with text or not), "cross" for text.
        layout: which of the forward's layouts its self-attention follows.
    """

    blocks: str
    attention: str
    kind: Kind
    layout: str = "video"


@dataclass(frozen=True)
class Adapter:
    """One model family.

    Args:
        family: name of the family; its profiles lie in configs/<family>/.
        transformers: class names of its transformers; subclasses count as them.
        pipelines: class names of its pipelines, for tables and messages.
        sites: its block lists in the order of the forward; layers are numbered through them.
        place: (transformer, forward arguments, cache) -> the layout of a self-attention call, or
            the reason why it is not known; a mapping of them by name where a forward has several.
            The cache lives as long as the denoising run.
        grid: (pipeline, height, width, frames in pixels) -> (T, H, W) in tokens.
        masks: "none" where self-attention gets no mask; "key_padding" where it gets one that
            cuts padded text, which `place` then reports as `valid` lengths.
        text: how text takes part, for tables.
        text_tokens: non-video tokens (before, after) that a warm-up assumes.
        text_valid: which text tokens count: "attended" where stock attends its padding too.
        branches: the CFG branches that its pipelines name, where they run each in a forward of its
            own or all in one; None where a pipeline may run without.
        fps: frames per second that its videos were trained with.
        presets: its models by name.
    """

    family: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    sites: tuple[Sites, ...]
    place: Callable[[nn.Module, Bound, dict[Any, Any]], Placed | Mapping[str, Placed]]
    grid: Callable[[Any, int, int, int], tuple[int, int, int]]
    masks: Literal["none", "key_padding"] = "none"
    text: str = "cross-attention"
    text_tokens: tuple[int, int] = (0, 0)
    text_valid: str = "all (stock attends its padding)"
    branches: tuple[str, ...] | None = None
    fps: float = 16.0
    presets: tuple[Preset, ...] = ()

    def layouts(
        self, model: nn.Module, bound: Bound, cache: dict[Any, Any]
    ) -> Mapping[str, Placed]:
        """By name, where the tokens of this forward's self-attention are, or why not known."""
        placed = self.place(model, bound, cache)
        return placed if isinstance(placed, Mapping) else {"video": placed}

    def modules(self, model: nn.Module) -> Iterator[tuple[str, int, int, Kind, nn.Module, str]]:
        """(name, layer, number of layers, kind, module, layout) of every attention site."""
        lists = list(dict.fromkeys(s.blocks for s in self.sites if hasattr(model, s.blocks)))
        offsets, total = {}, 0
        for name in lists:
            offsets[name] = total
            total += len(getattr(model, name))
        for site in self.sites:
            if site.blocks not in offsets:
                continue
            for index, block in enumerate(getattr(model, site.blocks)):
                module = _attention(block, site.attention)
                if module is not None:
                    name = f"{site.blocks}.{index}.{site.attention}"
                    yield name, offsets[site.blocks] + index, total, site.kind, module, site.layout


def _attention(block: nn.Module, name: str) -> nn.Module | None:
    """A block's attention module of this name, in the block or in what a wrapper of it holds.

    None where it is `nn.Identity`, which calls no attention; the block itself where it has none, so
    that whoever attaches to it sees that it is unknown.
    """
    module = getattr(block, name, None)
    if module is None:
        inside = (each for path, each in block.named_modules() if path.endswith(f".{name}"))
        module = next(inside, block)
    return None if type(module).__name__ == "Identity" else module


def video_grid(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    """`Adapter.grid` of a causal autoencoder, which keeps the first frame apart, and patches of
    latents: the pipeline and its transformer's configuration say how large both are."""
    config = (pipe.transformer or pipe.transformer_2).config
    patch = config.patch_size
    if isinstance(patch, int):
        patch = config.patch_size_t or 1, patch, patch
    if hasattr(pipe, "vae_scale_factor_temporal"):
        scales = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    else:
        scales = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
    latents = (frames - 1) // scales[0] + 1
    return (
        (latents + patch[0] - 1) // patch[0],
        height // scales[1] // patch[1],
        width // scales[1] // patch[2],
    )


def class_names(model: object) -> set[str]:
    """Names of an object's class and its bases, without the shards of compiled wrappers."""
    return {re.sub(r"^FSDP", "", cls.__name__) for cls in type(model).__mro__}
