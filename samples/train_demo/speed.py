"""Settings of the GPU, and which of PyTorch's dense attention kernels is fastest on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def set_up_cuda() -> None:
    """Allow TF32, let cuDNN search, let regional compilation hold all sizes."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.benchmark_limit = 4
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True


def _milliseconds(backend: SDPBackend, tokens: int) -> float:
    q, k, v = (
        torch.randn(8, 4, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    with sdpa_kernel(backend):
        for i in range(6):
            if i == 2:
                torch.cuda.synchronize()
                start = torch.cuda.Event(enable_timing=True)
                start.record()
            F.scaled_dot_product_attention(q, k, v).sum().backward()
    end = torch.cuda.Event(enable_timing=True)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 4


def choose_attention(tokens: int = 5184) -> str:
    """Time flash and cuDNN attention forward and backward; switch the slower one off."""
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            times[backend] = _milliseconds(backend, tokens)
        except RuntimeError:
            continue
    if len(times) == 2:
        flash = times[SDPBackend.FLASH_ATTENTION] <= times[SDPBackend.CUDNN_ATTENTION]
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_cudnn_sdp(not flash)
    return "attention: " + ", ".join(f"{b.name} {t:.2f} ms" for b, t in times.items())
