"""Latents and captions, encoded once and kept on the device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from autoencoder import Size, encode, light_norms
from captions import caption
from demo_model import PAD, build_tokenizer
from diffusers import AutoencoderKLWan
from render import render
from scenes import sample_scene

TEXT_TOKENS = 39  # one more, standing for all padding, makes 40
PARAPHRASES = 4


@dataclass
class LatentCache:
    """Normalised latents [N, 16, T, H, W] bf16 of one size, token ids [N, PARAPHRASES, 39]."""

    latents: torch.Tensor
    tokens: torch.Tensor

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch: latents in float32 and one paraphrase's ids per clip."""
        device = self.latents.device
        rows = torch.randint(len(self.latents), (count,), device=device)
        which = torch.randint(self.tokens.shape[1], (count,), device=device)
        return self.latents[rows].float(), self.tokens[rows, which]


def tokenise(sentences: list[str]) -> torch.Tensor:
    """Token ids [N, TEXT_TOKENS], padded; raises if a sentence would be cut."""
    rows = build_tokenizer()(sentences).input_ids
    if max(map(len, rows)) > TEXT_TOKENS:
        raise ValueError(f"a caption has {max(map(len, rows))} tokens, at most {TEXT_TOKENS} fit")
    return torch.tensor([row + [PAD] * (TEXT_TOKENS - len(row)) for row in rows])


@torch.no_grad()
def fill_cache(
    vae: AutoencoderKLWan,
    size: Size,
    clips: int,
    seconds: float,
    seed: int,
    simple_share: float = 0.65,
    log: Callable[[str], None] = print,
) -> LatentCache:
    """Render and encode up to `clips` clips of one size, stopping after `seconds`."""
    device = next(vae.parameters()).device
    layout = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    rng, words = random.Random(seed), random.Random(seed + 1)
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=device).view(shape)
    latents: list[torch.Tensor] = []
    sentences: list[str] = []
    start, count = time.time(), 0
    with light_norms(vae), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        while count < clips and (count == 0 or time.time() - start < seconds):
            scenes = [sample_scene(rng, simple_share) for _ in range(size.batch)]
            pixels = render(scenes, size.frames, size.height, size.width, device)
            z = encode(vae, pixels.contiguous(memory_format=layout))[0].float()
            latents.append(((z - mean) / std).to(torch.bfloat16))
            sentences += [caption(s, words) for s in scenes for _ in range(PARAPHRASES)]
            count += size.batch
            if device.type == "cuda" and count % (8 * size.batch) == 0:
                torch.cuda.synchronize()
    tokens = tokenise(sentences).view(count, PARAPHRASES, TEXT_TOKENS).to(device)
    cache = LatentCache(torch.cat(latents).contiguous(), tokens)
    log(f"cache {size.frames}x{size.height}x{size.width}: {count} in {time.time() - start:.1f} s")
    return cache
