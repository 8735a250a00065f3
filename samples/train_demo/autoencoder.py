"""Training Wan's causal video autoencoder on rendered clips, against the clock."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from checker import observe_all, score, summary
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from muon import Optimizers, clock_rate
from render import render, to_uint8
from scenes import sample_scene, sample_simple

KL_WEIGHT = 1e-4
DETAIL_WEIGHT = 0.5


@dataclass(frozen=True)
class Size:
    """A batch of clips: frames, height and width in pixels, and how many at once."""

    frames: int
    height: int
    width: int
    batch: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """Its latent grid (T, H, W)."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


AE_SIZES = (Size(17, 96, 96, 20), Size(17, 128, 128, 12))
AE_FULL_SIZES = (Size(33, 192, 192, 3), Size(17, 256, 256, 3))


def _caches(part: torch.nn.Module) -> list[None]:
    return [None] * sum(isinstance(m, WanCausalConv3d) for m in part.modules())


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and log-variance [N, 16, T', H/8, W/8] of clips [N, 3, T, H, W].

    The same numbers as `vae.encode`, which walks through a clip four frames at a time: the
    network is causal, so all frames after the first may go through at once.
    """
    caches = _caches(vae.encoder)
    out = vae.encoder(clips[:, :, :1], feat_cache=caches, feat_idx=[0])
    if clips.shape[2] > 1:
        rest = vae.encoder(clips[:, :, 1:], feat_cache=caches, feat_idx=[0])
        out = torch.cat([out, rest], 2)
    mean, logvar = vae.quant_conv(out).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Clips [N, 3, T, H, W] of unnormalised latents, not clamped; as `vae.decode`, in one go."""
    caches = _caches(vae.decoder)
    z = vae.post_quant_conv(latents)
    out = vae.decoder(z[:, :, :1], feat_cache=caches, feat_idx=[0], first_chunk=True)
    if z.shape[2] > 1:
        rest = vae.decoder(z[:, :, 1:], feat_cache=caches, feat_idx=[0])
        out = torch.cat([out, rest], 2)
    return out


def _light_norm(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * (self.scale / norm.clamp_min(1e-6)).to(x.dtype) * self.gamma.to(x.dtype)


@contextlib.contextmanager
def light_norms(vae: AutoencoderKLWan) -> Iterator[None]:
    """Keep the norms' big tensors in the input's type: a third of the memory traffic."""
    norms = [m for m in vae.modules() if isinstance(m, WanRMS_norm)]
    for norm in norms:
        norm.forward = MethodType(_light_norm, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _details(out: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
    """L1 between the differences of neighbours along time, height and width."""
    error = out - clips
    return torch.stack([error.diff(dim=d).abs().mean() for d in (2, 3, 4)]).mean()


def loss_of(vae: AutoencoderKLWan, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss of a batch, and its mean squared error."""
    mean, logvar = encode(vae, clips)
    mean, logvar = mean.float(), logvar.float()
    sample = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
    out = decode(vae, sample).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = F.mse_loss(out, clips)
    loss = (out - clips).abs().mean() + mse + DETAIL_WEIGHT * _details(out, clips)
    return loss + KL_WEIGHT * kl, mse.detach()


def psnr(mse: float | torch.Tensor) -> float:
    """Peak signal to noise in dB for values in [-1, 1]."""
    return 10 * math.log10(4.0 / max(float(mse), 1e-12))


def build_optimizers(vae: AutoencoderKLWan, muon_lr: float, adam_lr: float) -> Optimizers:
    """Muon on the inner convolutions' kernels, AdamW on the rest."""
    edge = {id(p) for m in (vae.encoder.conv_in, vae.decoder.conv_out) for p in m.parameters()}
    matrices = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[:2]) > 1]
    matrices = [p for p in matrices if id(p) not in edge]
    chosen = {id(p) for p in matrices}
    others = [p for p in vae.parameters() if id(p) not in chosen]
    return Optimizers(matrices, others, muon_lr, adam_lr)


def train_autoencoder(
    vae: AutoencoderKLWan,
    seconds: float,
    device: torch.device,
    log: Callable[[str], None] = print,
    sizes: tuple[Size, ...] = AE_SIZES,
    full_sizes: tuple[Size, ...] = AE_FULL_SIZES,
    seed: int = 1,
    muon_lr: float = 6e-3,
    adam_lr: float = 2e-3,
) -> list[dict[str, float]]:
    """Train for `seconds`; full-size clips join in the last 40 %. Returns the loss curve."""
    rng = random.Random(seed)
    layout = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    vae.to(device).train()
    optimizers = build_optimizers(vae, muon_lr, adam_lr)
    curve: list[dict[str, float]] = []
    start, step, last = time.time(), 0, 0.0
    with light_norms(vae):
        while (passed := time.time() - start) < seconds:
            progress = passed / seconds
            choices = sizes if progress < 0.6 or step % 2 else full_sizes
            size = choices[(step // 2) % len(choices)]
            scenes = [sample_scene(rng, 0.5) for _ in range(size.batch)]
            clips = render(scenes, size.frames, size.height, size.width, device)
            clips = clips.contiguous(memory_format=layout)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, mse = loss_of(vae, clips)
            loss.backward()
            optimizers.step(clock_rate(progress, decay_from=0.35))
            step += 1
            if step == 1 or passed - last > seconds / 40:
                last = passed
                row = {
                    "seconds": passed,
                    "step": step,
                    "loss": float(loss.detach()),
                    "psnr": psnr(mse),
                }
                curve.append({k: round(float(v), 4) for k, v in row.items()})
                log(f"ae {curve[-1]} size {size.frames}x{size.height}")
    vae.eval()
    return curve


@torch.no_grad()
def set_statistics(
    vae: AutoencoderKLWan, device: torch.device, clips: int = 96, frames: int = 33, edge: int = 128
) -> None:
    """Set `latents_mean` and `latents_std` of the configuration from fresh clips."""
    rng, layout = random.Random(77), torch.channels_last_3d
    layout = layout if device.type == "cuda" else torch.contiguous_format
    rows = []
    for first in range(0, clips, 12):
        scenes = [sample_scene(rng) for _ in range(min(12, clips - first))]
        pixels = render(scenes, frames, edge, edge, device).contiguous(memory_format=layout)
        mean = encode(vae, pixels)[0]
        rows.append(mean.float().transpose(0, 1).flatten(1))
    values = torch.cat(rows, 1)
    std = values.std(1)
    floor = 0.1 * float(std.max())
    vae.register_to_config(
        latents_mean=[round(float(v), 4) for v in values.mean(1)],
        latents_std=[round(max(float(v), floor), 4) for v in std],
    )


@torch.no_grad()
def validate_autoencoder(
    vae: AutoencoderKLWan,
    device: torch.device,
    height: int,
    clips: int,
    frames: int = 33,
    batch: int = 16,
) -> dict:
    """Stock encode and decode of fresh clips: PSNR and checker, truth and decoded."""
    rng = random.Random(4242 + height)
    dtype = next(vae.parameters()).dtype
    errors, truths, decoded, scenes = [], [], [], []
    for first in range(0, clips, batch):
        part = [sample_simple(rng) for _ in range(min(batch, clips - first))]
        truth = render(part, frames, height, height, device)
        out = vae.decode(vae.encode(truth.to(dtype)).latent_dist.mode()).sample.float()
        errors += (out - truth).square().mean((1, 2, 3, 4)).tolist()
        truths += list(to_uint8(truth).cpu().numpy())
        decoded += list(to_uint8(out).cpu().numpy())
        scenes += part
    values = [psnr(e) for e in errors]
    seen = observe_all(truths)
    wrong = scenes[1:] + scenes[:1]
    return {
        "size": [frames, height, height],
        "clips": clips,
        "psnr_of_mean_error": round(psnr(sum(errors) / len(errors)), 2),
        "psnr_mean": round(sum(values) / len(values), 2),
        "psnr_min": round(min(values), 2),
        "checker_truth": summary(score(seen, scenes)),
        "checker_decoded": summary(score(observe_all(decoded), scenes)),
        "checker_wrong_prompts": summary(score(seen, wrong)),
        "pictures": [truths[:3], decoded[:3]],
    }
