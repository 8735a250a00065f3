"""Rectified flow on cached latents, against the clock; the text encoder is trained and frozen.

x_s = (1 - s) x_0 + s noise, the transformer predicts noise - x_0 at timestep 1000 s, and s is
drawn uniformly and shifted by 3: what diffusers' FlowMatchEulerDiscreteScheduler(shift=3) runs.

WanPipeline pads the prompt's embeddings with zeros to `max_sequence_length` (512) and its
cross-attention attends that padding. All padding tokens are equal, so training keeps one of them
and adds ln(their number) to its score: the same softmax, over 40 keys.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from autoencoder import Size
from demo_model import EOS, PAD, SHIFT
from diffusers import WanTransformer3DModel
from latents import TEXT_TOKENS, LatentCache
from muon import Optimizers, clock_rate
from torch import nn
from transformers import UMT5EncoderModel

CAPTION_DROPOUT = 0.1
PIPELINE_LENGTHS = (512, 512, 512, 226, 128)  # max_sequence_length seen in training
EMA_DECAY = 0.999


class CompactTextProcessor:
    """Wan's cross-attention over text in which the last key stands for all padding keys.

    Reads the log of their number from the module's buffer `padding_bias` [1, 1, 1, keys].
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend text [B, keys, C] from hidden_states [B, S, C]."""
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(encoder_hidden_states))
        value = attn.to_v(encoder_hidden_states)
        q, k, v = (
            x.to(value.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x in (query, key, value)
        )
        scores = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5 + attn.padding_bias
        out = scores.softmax(-1).to(v.dtype) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def use_compact_text(transformer: WanTransformer3DModel) -> torch.Tensor:
    """Install the processor in every cross-attention; returns their shared bias buffer."""
    device = transformer.proj_out.weight.device
    bias = torch.zeros(1, 1, 1, TEXT_TOKENS + 1, device=device)
    for block in transformer.blocks:
        block.attn2.register_buffer("padding_bias", bias, persistent=False)
        block.attn2.set_processor(CompactTextProcessor())
    set_padding(bias, PIPELINE_LENGTHS[0])
    return bias


def set_padding(bias: torch.Tensor, max_sequence_length: int) -> None:
    """Let the last key count for all padding of a pipeline call of this text length."""
    bias[..., -1] = math.log(max_sequence_length - TEXT_TOKENS)


def encode_text(text_encoder: UMT5EncoderModel, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings [B, TEXT_TOKENS + 1, C] of ids [B, TEXT_TOKENS], zeros at all padding."""
    mask = tokens != PAD
    hidden = text_encoder(tokens, mask.long()).last_hidden_state
    return nn.functional.pad(hidden * mask[..., None], (0, 0, 0, 1))


def flow_loss(
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
    latents: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the velocity on a batch; drops a tenth of the captions."""
    count, device = len(latents), latents.device
    blank = torch.full_like(tokens, PAD)
    blank[:, 0] = EOS
    drop = torch.rand(count, 1, device=device) < CAPTION_DROPOUT
    with torch.no_grad():
        text = encode_text(text_encoder, torch.where(drop, blank, tokens))
    u = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    sigma = (SHIFT * u / (1 + (SHIFT - 1) * u)).view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    velocity = transformer(noisy, 1000 * sigma.flatten(), text, return_dict=False)[0]
    return (velocity.float() - (noise - latents)).square().mean()


class Average:
    """Exponential moving average of parameters, in float32."""

    def __init__(self, module: nn.Module) -> None:
        self.sources: list[torch.Tensor] = list(module.parameters())
        self.values = [p.detach().clone() for p in self.sources]
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current parameters; the memory grows to 1,000 updates."""
        self.count += 1
        decay = min(EMA_DECAY, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, self.sources, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages."""
        for p, value in zip(self.sources, self.values, strict=True):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)


@dataclass(frozen=True)
class Stage:
    """A part of the training until `until` (share of the whole time), with weighted sizes."""

    until: float
    sizes: tuple[tuple[Size, float], ...]


@dataclass
class FlowTrainer:
    """Everything that lasts through transformer training; times are seconds of training."""

    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    total_seconds: float
    stages: tuple[Stage, ...]
    caches: dict[Size, LatentCache]
    muon_lr: float = 4e-3
    adam_lr: float = 1.5e-3
    log: Callable[[str], None] = print
    seconds: float = 0.0
    steps: int = 0
    curve: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bias = use_compact_text(self.transformer)
        matrices = [p for p in self.transformer.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.transformer.parameters() if id(p) not in chosen]
        self.optimizers = Optimizers(matrices, others, self.muon_lr, self.adam_lr, 0.02)
        self.average = Average(self.transformer)
        self.rng = random.Random(5)
        self.losses: dict[str, list[torch.Tensor]] = {}
        self.warm: set[Size] = set()

    def pick(self, progress: float) -> Size:
        """Choose this step's size by the weights of the stage at `progress`."""
        stage = next((s for s in self.stages if progress < s.until), self.stages[-1])
        held = [(size, weight) for size, weight in stage.sizes if size in self.caches]
        sizes, weights = zip(*(held or [(size, 1.0) for size in self.caches]), strict=True)
        return self.rng.choices(sizes, weights)[0]

    def step(self, size: Size, rate: float) -> torch.Tensor:
        """One update on a batch of `size` at relative learning rate `rate`."""
        set_padding(self.bias, self.rng.choice(PIPELINE_LENGTHS))
        latents, tokens = self.caches[size].batch(size.batch)
        loss = self.loss(latents, tokens)
        loss.backward()
        self.optimizers.step(rate)
        self.average.update()
        return loss.detach()

    def warm_up(self, sizes: Iterable[Size]) -> None:
        """Compile for these sizes and log their speed; off the clock, changes nothing."""
        self.transformer.train()
        for size in sizes:
            if size in self.warm:
                continue
            self.warm.add(size)
            times = []
            for _ in range(3):
                start = time.time()
                latents, tokens = self.caches[size].batch(size.batch)
                self.loss(latents, tokens).backward()
                if latents.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.time() - start)
            for p in self.optimizers.params:
                p.grad = None
            self.log(f"warm {size.latent}: {times[0]:.1f} s, then {times[-1] * 1e3:.0f} ms a step")

    def loss(self, latents: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`flow_loss` in the training's precision."""
        device = latents.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return flow_loss(self.text_encoder, self.transformer, latents, tokens)

    def run(self, seconds: float) -> None:
        """Train for `seconds`, or until `total_seconds` are used up."""
        self.transformer.train()
        until = min(self.seconds + seconds, self.total_seconds)
        begin, offset, last = time.time(), self.seconds, self.seconds
        while self.seconds < until:
            progress = self.seconds / self.total_seconds
            size = self.pick(progress)
            loss = self.step(size, clock_rate(progress))
            name = "x".join(map(str, size.latent))
            self.losses.setdefault(name, []).append(loss)
            self.steps += 1
            if self.steps % 4 == 0:
                loss.item()  # keeps the clock honest
            self.seconds = offset + time.time() - begin
            if self.seconds - last > self.total_seconds / 60:
                last = self.seconds
                self._report()
        self.transformer.eval()

    def _report(self) -> None:
        means = {k: round(float(torch.stack(v).mean()), 4) for k, v in self.losses.items()}
        counts = {k: len(v) for k, v in self.losses.items()}
        self.losses = {}
        row = {"seconds": round(self.seconds, 1), "step": self.steps, "loss": means}
        self.curve.append(row)
        self.log(f"dit {row} steps {counts}")

    def state(self) -> dict:
        """All that is needed to go on: raw weights, averages, momenta, clock."""
        return {
            "raw": [p.detach().cpu() for p in self.average.sources],
            "average": [v.cpu() for v in self.average.values],
            "count": self.average.count,
            "optimizers": [o.state_dict() for o in self.optimizers.parts],
            "seconds": self.seconds,
            "steps": self.steps,
            "curve": self.curve,
        }

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Go on from `state()`; optimizer momenta are optional."""
        for p, raw in zip(self.average.sources, state["raw"], strict=True):
            p.copy_(raw)
        for value, kept in zip(self.average.values, state["average"], strict=True):
            value.copy_(kept)
        self.average.count = state["count"]
        for part, kept in zip(self.optimizers.parts, state.get("optimizers") or (), strict=False):
            part.load_state_dict(kept)
        self.seconds, self.steps, self.curve = state["seconds"], state["steps"], state["curve"]
