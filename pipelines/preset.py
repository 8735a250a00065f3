"""Models by name: what is known of one without its weights or its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dit_accel.layout import TokenLayout


class Size(NamedTuple):
    """Pixels and frames of what is generated; an image has one frame."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True)
class Preset:
    """A model at its usual size, for the planner, the benches and the command line.

    Args:
        name: on the command line; aliases: other names for it.
        title: for people.
        family: of its profiles.
        heads, head_dim: of self-attention.
        layers: the arguments of its class that count its blocks, with their values.
        mlp: channels inside the feed-forward part.
        cross: whether blocks also attend to the text.
        size: where none is asked for.
        text: tokens before and after the video in self-attention.
        prompt: tokens of the text that a forward gets.
        scales: (frames, pixels) that a token spans.
        latent: pixels that a latent spans along a side.
        forwards: of the transformer in a step, 2 with guidance.
        config: what the checkpoint's transformer/config.json sets beyond the defaults of the
            family's class in diffusers; None where no bench builds the model.
        source: the checkpoint.
    """

    name: str
    title: str
    family: str
    heads: int
    head_dim: int
    layers: Mapping[str, int]
    mlp: int
    cross: bool
    size: Size
    text: tuple[int, int] = (0, 0)
    prompt: int = 512
    scales: tuple[int, int] = (4, 16)
    latent: int = 8
    forwards: int = 2
    config: Mapping[str, Any] | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Blocks, each with one self-attention call."""
        return sum(self.layers.values())

    @property
    def token_weights(self) -> float:
        """Weights of the linear layers that a video token passes: query, key, value and output;
        query and output of cross-attention; feed-forward."""
        width = self.heads * self.head_dim
        return self.depth * ((6 if self.cross else 4) * width**2 + 2 * width * self.mlp)

    def grid(self, size: Size) -> tuple[int, int, int]:
        """(T, H, W) in tokens; an axis that is smaller than a token has none."""
        per_frame, per_pixel = self.scales
        frames = (size.frames - 1) // per_frame + 1
        return frames, size.height // per_pixel, size.width // per_pixel

    def latents(self, size: Size) -> tuple[int, int, int]:
        """(frames, height, width) of the latent video."""
        return self.grid(size)[0], size.height // self.latent, size.width // self.latent

    def layout(self, size: Size | None = None) -> TokenLayout:
        """The tokens of a self-attention call."""
        return TokenLayout(self.grid(size or self.size), *self.text)

    def cut(self, layers: int | None) -> dict[str, int]:
        """The arguments that count blocks, for about `layers` of them in the same proportion."""
        if layers is None or layers >= self.depth:
            return dict(self.layers)
        return {name: max(1, round(n * layers / self.depth)) for name, n in self.layers.items()}
