"""Training the text encoder alone: what a word means where it stands.

Left to the transformer's loss, a small UMT5 encoder learns a bag of words: its unscaled attention
saturates early, and "a red circle over a green background" and its opposite get the same vectors.
So it is trained first, on captions only, and then frozen, as Wan's own encoder is. The target of
a word is its own fixed vector plus one for its role (main object, second object, background,
camera), scaled to a common length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from captions import ROLES, tagged_caption
from demo_model import EOS, PAD, TEXT_DIM, build_tokenizer
from latents import TEXT_TOKENS
from muon import clock_rate
from scenes import sample_scene
from torch import nn
from transformers import UMT5EncoderModel

ROLE_STRENGTH = 0.8  # length of a role's vector relative to a word's
LENGTH = 0.75  # root mean square of a target


def role_vectors(seed: int = 3) -> torch.Tensor:
    """Fixed vectors [roles, TEXT_DIM] of unit root mean square; the main object's is zero."""
    vectors = torch.randn(len(ROLES), TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    vectors[0] = 0
    return ROLE_STRENGTH * vectors


def word_vectors(count: int, seed: int = 4) -> torch.Tensor:
    """Fixed vectors [count, TEXT_DIM] of the vocabulary, about unit root mean square."""
    return torch.randn(count, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def caption_batch(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and roles, each [count, TEXT_TOKENS], of random captions."""
    ids = build_tokenizer().get_vocab()
    tokens = torch.full((count, TEXT_TOKENS), PAD)
    roles = torch.zeros(count, TEXT_TOKENS, dtype=torch.long)
    for row in range(count):
        words = tagged_caption(sample_scene(rng, 0.4), rng) if rng.random() > 0.03 else []
        for i, (word, role) in enumerate(words):
            tokens[row, i], roles[row, i] = ids[word], ROLES.index(role)
        tokens[row, len(words)] = EOS
    return tokens, roles


def train_text_encoder(
    encoder: UMT5EncoderModel,
    words: torch.Tensor,
    seconds: float,
    log: Callable[[str], None] = print,
    batch: int = 64,
    seed: int = 21,
) -> float:
    """Regress outputs onto word plus role; returns the share of tokens nearest to their target.

    `words` is [vocabulary, TEXT_DIM].
    """
    device = next(encoder.parameters()).device
    words = words.to(device) / words.square().mean().sqrt()
    table = words[:, None] + role_vectors().to(device)[None]  # [vocabulary, roles, C]
    table = LENGTH * table / table.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        encoder.shared.weight.copy_(words)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, betas=(0.9, 0.98))
    rng = random.Random(seed)
    pool = [caption_batch(rng, 512) for _ in range(8)]
    tokens, roles = (torch.cat(parts).to(device) for parts in zip(*pool, strict=True))
    encoder.train()
    start, step, right = time.time(), 0, 0.0
    while (passed := time.time() - start) < seconds:
        rows = torch.randint(len(tokens), (batch,), device=device)
        ids, mask = tokens[rows], tokens[rows] != PAD
        out = encoder(ids, mask.long()).last_hidden_state
        loss = (out - table[ids, roles[rows]])[mask].square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * clock_rate(passed / seconds)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0:
            log(f"text {passed:.0f} s, step {step}, loss {float(loss.detach()):.5f}")
    encoder.eval()
    with torch.no_grad():
        ids, roles = (x.to(device) for x in caption_batch(random.Random(seed + 1), 256))
        mask = ids != PAD
        out = encoder(ids, mask.long()).last_hidden_state
        errors = (out[:, :, None] - table[ids]).square().mean(-1)  # [B, L, roles]
        right = float((errors.argmin(-1) == roles)[mask].float().mean())
    log(f"text: {step} steps, role right on {100 * right:.2f} % of the words of new captions")
    return right
