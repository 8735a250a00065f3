"""What an attention call costs the host: microseconds of back-to-back calls of a small shape.

    python samples/tools/measure_host.py

1,024 tokens, whose kernel is shorter than the host's part of a call. `kernel` is
`block_sparse_attention` over a plan; `pipeline` is the function that stands in for diffusers'
attention in an enabled transformer, called within a real forward, so with the decision, the plan
and the receipt; `stock` is diffusers' own function. `host` is the wall time of so many calls
between two synchronizations, best of some repeats. `device` is the work of a call alone, of calls
that were queued behind a wait; where it is longer than the host's part, `host` says nothing of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRID = (4, 16, 16)
HEADS, DIM = 4, 64
TILES = [3, 3, 3]
DEVICE_CALLS = 40
WAIT_CYCLES = 40_000_000
"""How long the GPU waits while calls are queued behind it, about 20 ms."""
BOUND = 0.8
"""Above this share of the host's time the device may be what was measured."""
STEPS = 50
PATTERNS = {
    "sliding_tile": f"window = {{tiles = {TILES}}}",
    "block_topk": "density = 0.25",
}
"""Patterns of pipelines; one that a tree does not have is left out."""
KEYWORDS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "backend": None,
    "parallel_config": None,
}
"""With which Wan's processor makes the call."""
Call = Callable[[], Any]
Times = tuple[list[float], float | None]
"""Microseconds a call: the host's of each repeat, the best first, and the device's."""


@dataclass(frozen=True)
class Row:
    """A measured way to call: microseconds a call; `device` is None on a CPU."""

    way: str
    pattern: str
    backend: str
    host: list[float]
    device: float | None
    note: str = ""


def main() -> int:
    options = parse()
    sys.path.insert(0, str(options.tree.resolve()))
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("This machine has no CUDA device.", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    from diffusers.utils import logging

    import dit_accel

    logging.set_verbosity_error()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {Path(dit_accel.__file__).parent}")
    print(f"{'':<10}{'pattern':<15}{'backend':<11}{'host us':>9}{'worst':>9}{'device us':>11}")
    with torch.no_grad():
        for row in rows(device, options.calls, options.repeats):
            print_row(row)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to measure")
    return parser.parse_args()


def rows(device: Any, calls: int, repeats: int) -> Iterator[Row]:
    """Every way, one after the other; a way that cannot run has the reason as its note."""
    qkv = tensors(device)

    def measure(call: Call) -> Times:
        return host_times(call, device, calls, repeats), device_time(call, device)

    backends = ("hopper", "triton") if device.type == "cuda" else ("torch",)
    yield Row("stock", "", "", *measure(stock_call(qkv)))
    for backend in backends:
        try:
            times = measure(kernel_call(qkv, backend))
        except ValueError as error:  # dit_accel's errors are of this type
            yield Row("kernel", "sliding_tile", backend, [], None, str(error))
        else:
            yield Row("kernel", "sliding_tile", backend, *times)
    for pattern, backend in itertools.product(PATTERNS, backends):
        try:
            times = Forward(device, pattern, backend).within(
                lambda attend: measure(lambda: attend(*qkv, **KEYWORDS))
            )
        except ValueError as error:
            yield Row("pipeline", pattern, backend, [], None, str(error))
        else:
            yield Row("pipeline", pattern, backend, *times)


def tensors(device: Any) -> tuple[Any, Any, Any]:
    import torch

    shape = (1, GRID[0] * GRID[1] * GRID[2], HEADS, DIM)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator).to(device, dtype_on(device)) for _ in range(3)
    )
    return q, k, v


def dtype_on(device: Any) -> Any:
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def kernel_call(qkv: tuple[Any, Any, Any], backend: str) -> Call:
    """The bare kernel over the plan that suits the backend."""
    from dit_accel.kernels.block_sparse import block_sparse_attention
    from dit_accel.kernels.patterns import pattern
    from dit_accel.layout import TokenLayout

    device = qkv[0].device
    kind = {"hopper": "boxes", "triton": "gather"}.get(backend, "lengths")
    rule = pattern("sliding_tile", window={"tiles": TILES})
    plan = rule.build(TokenLayout(GRID), device, layout_kind=kind)
    return lambda: block_sparse_attention(*qkv, plan, backend=backend)


def stock_call(qkv: tuple[Any, Any, Any]) -> Call:
    from diffusers.models import attention_dispatch

    return lambda: attention_dispatch.dispatch_attention_fn(*qkv, **KEYWORDS)


class Forward:
    """A small enabled transformer, in whose forward the stand-in is called."""

    def __init__(self, device: Any, pattern: str, backend: str) -> None:
        """ValueError for a pattern that this tree does not know."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        import dit_accel

        profile = load_profile(pattern)
        self.device = device
        self.model = transformer().to(device, dtype_on(device)).eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler.set_timesteps(STEPS)
        self.session = dit_accel.enable(
            self.model, scheduler=self.scheduler, profile=profile, backend=backend, strict=True
        )
        self.step = 0

    def within(self, work: Callable[[Callable[..., Any]], Times]) -> Times:
        """What `work` returns, given the stand-in, in the middle of the attention of a forward.

        RuntimeError where a call was not sparse, or not counted.
        """
        found: list[Times] = []
        self.forward()
        # The output projection runs inside the processor: a call from there is one of its site.
        handle = self.attention.to_out[0].register_forward_pre_hook(
            lambda module, args: found.append(work(self.stand_in()))
        )
        self.forward()
        handle.remove()
        counts = self.session.report().to_dict()["self"]
        own = 2  # one of each forward
        if not own < counts["calls"] == counts["sparse"]:
            raise RuntimeError(f"expected sparse calls of a site, the receipt has {counts}.")
        return found[0]

    @property
    def attention(self) -> Any:
        return self.model.blocks[0].attn1

    def stand_in(self) -> Callable[..., Any]:
        """The function that the rebound processor calls in place of diffusers' own."""
        stock = type(self.attention.processor).__mro__[1]
        origin = stock.__call__.__globals__["__name__"]
        return sys.modules[f"dit_accel._shadow.{origin}"].dispatch_attention_fn

    def forward(self) -> None:
        """One step of the run."""
        import torch

        dtype = dtype_on(self.device)
        config = self.model.config
        t, h, w = (n * p for n, p in zip(GRID, config.patch_size, strict=True))
        self.model(
            hidden_states=torch.zeros(
                (1, config.in_channels, t, h, w), device=self.device, dtype=dtype
            ),
            timestep=self.scheduler.timesteps[self.step : self.step + 1].to(self.device),
            encoder_hidden_states=torch.zeros(
                (1, 8, config.text_dim), device=self.device, dtype=dtype
            ),
        )
        self.step += 1


def transformer() -> Any:
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def load_profile(pattern: str) -> Any:
    """A profile that runs a pattern in every call; ValueError where it does not parse."""
    import dit_accel

    rule = f'[[rule]]\ncompute = "{pattern}"\n{PATTERNS[pattern]}\n'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{pattern}.toml"
        file.write_text(f'[profile]\nname = "{pattern}"\nbreakeven = false\n\n{rule}')
        return dit_accel.load_profile(file)


def host_times(call: Call, device: Any, calls: int, repeats: int) -> list[float]:
    """See Times."""
    for _ in range(max(3, calls // 10)):
        call()
    found = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        found.append((time.perf_counter() - begin) / calls * 1e6)
    return sorted(found)


def device_time(call: Call, device: Any) -> float | None:
    """Microseconds of a call's work on the GPU: of calls that wait in its queue, all at once.

    None on a CPU, and where the calls could not be queued before the GPU came to them.
    """
    if device.type != "cuda":
        return None
    import torch

    calls = DEVICE_CALLS
    while calls >= 5:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        in_time = not begin.query()
        torch.cuda.synchronize(device)
        if in_time:
            return begin.elapsed_time(end) / calls * 1e3
        calls //= 2
    return None


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def print_row(row: Row) -> None:
    device = "-" if row.device is None else f"{row.device:.1f}"
    host, worst = (f"{x:.1f}" for x in (row.host[0], row.host[-1])) if row.host else ("-", "-")
    note = row.note
    if row.device is not None and row.host and row.device > BOUND * row.host[0]:
        note = f"{note} the device is the slower part".strip()
    line = f"{row.way:<10}{row.pattern:<15}{row.backend:<11}{host:>9}{worst:>9}{device:>11}  {note}"
    print(line.rstrip(), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
