"""Muon for matrices, AdamW for everything else, and a learning rate that follows the clock.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix,
found with a few Newton-Schulz iterations; the step is scaled to the size of an AdamW step
(Liu et al., 2025), so both parts share one schedule.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of matrices [N, rows, columns] towards 1 (to about 0.7 .. 1.2)."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per matrix. Tensors of 3 and more axes are flattened to
    (first axis, rest). Matrices of one shape are handled as one batch."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(params), defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[(p.shape[0], p.numel() // p.shape[0])].append(p)
            for shape, params in by_shape.items():
                self._step_shape(params, shape, group)

    def _step_shape(self, params: list[torch.Tensor], shape: tuple[int, int], group: dict) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        looks = torch._foreach_lerp(grads, buffers, group["momentum"])
        updates = orthogonalise(torch.stack([look.reshape(shape) for look in looks]))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        size = 0.2 * math.sqrt(max(shape))
        deltas = [u.reshape(p.shape) for u, p in zip(updates, params, strict=True)]
        torch._foreach_add_(params, deltas, alpha=-group["lr"] * size)


class Optimizers:
    """Muon on the chosen matrices and AdamW on the rest, under one relative rate."""

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        fused = others[0].is_cuda
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
        ]
        self.rates = (muon_lr, adam_lr)
        self.params = [*matrices, *others]

    def step(self, rate: float, clip: float = 1.0) -> None:
        """Clip the joint gradient norm, step both parts at `rate` times their base rates."""
        torch.nn.utils.clip_grad_norm_(self.params, clip, foreach=True)
        for p in self.params:
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)  # one bad batch must not cost the run
        for part, base in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = base * rate
            part.step()
            part.zero_grad(set_to_none=True)


def clock_rate(progress: float, warm: float = 0.02, decay_from: float = 0.5) -> float:
    """Relative rate at a share of the time: linear warm-up, constant, cosine to zero."""
    if progress < warm:
        return max(progress / warm, 0.02)
    if progress < decay_from:
        return 1.0
    x = min((progress - decay_from) / (1 - decay_from), 1.0)
    return max(0.5 * (1 + math.cos(math.pi * x)), 0.005)
