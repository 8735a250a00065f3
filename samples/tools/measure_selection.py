"""What an online selection costs: time of each step, memory, and whether device and host agree.

python samples/tools/measure_selection.py --out selection.csv

Per model: block means of q and k; scores, selection and lists from them; all of `select`, on the
GPU and on the host; the Hopper kernel's work lists; the sparse attention with and without them; the
fastest dense kernel there is. First the plan is compared with the same made on the host, on a call
whose scores are exact: where they differ, nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from typing import Any

import torch

from dit_accel.bench.dense import present
from dit_accel.bench.timing import measure
from dit_accel.kernels.backends import eligible
from dit_accel.kernels.block_sparse import block_sparse_attention
from dit_accel.kernels.geometry.blocks import blocks_of
from dit_accel.kernels.plan import BlockPlan
from dit_accel.kernels.pooling import pool_queries_and_keys
from dit_accel.kernels.selectors import Context, Selector, base, selector
from dit_accel.kernels.selectors import select as steps
from dit_accel.layout import TokenLayout
from dit_accel.provenance import commit, installed, now

MODELS: dict[str, tuple[TokenLayout, int, int]] = {
    "wan-14b-720p": (TokenLayout((21, 45, 80)), 40, 128),
    "hunyuan-video-720p": (TokenLayout((33, 45, 80), after=256), 24, 128),
    "tiny": (TokenLayout((3, 16, 24), after=20), 2, 64),
}
SELECTORS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("block_topk", {"density": 0.1}),
    ("block_topk", {"density": 0.25}),
    ("block_topk", {"density": 0.25, "sinks": 1, "neighbours": True}),
    ("block_topk", {"density": 0.25, "lists": "shared"}),
    ("block_topp", {"p": 0.9, "max_density": 0.5}),
)
HOST_CALLS = 50


def exact_call(context: Context) -> Context:
    """The same sizes with equal tokens in a block, small integers: means and scores are exact."""
    blocks, device = context.blocks, context.q.device
    lengths = blocks.q.lengths[0].long()
    owner = torch.arange(blocks.q.count, device=device).repeat_interleave(lengths)
    generator = torch.Generator(device=device).manual_seed(1)
    made = []
    for x in (context.q, context.k):
        shape = (x.shape[0], blocks.q.count, *x.shape[2:])
        rows = torch.randint(-1, 2, shape, generator=generator, device=device).to(x.dtype)
        tokens = torch.empty_like(x)
        tokens[:, slice(None) if blocks.q.order is None else blocks.q.order.long()] = rows[:, owner]
        made.append(tokens)
    return Context(made[0], made[1], context.v, blocks, 0.125, context.heads)


def rows_that_differ(chosen_by: Selector, context: Context) -> int:
    """Lists of the device that the host's are not equal to, from the same means."""
    made = chosen_by.select(context)
    blocks = context.blocks.to("cpu")
    means = pool_queries_and_keys(context.q, context.k, context.blocks)
    shape, task = base.prepared(blocks, chosen_by, len(context.q), context.heads)
    lists = steps.Lists.of(task.room)
    factor = context.scale * (context.heads**-0.5 if task.shared else 1)
    steps.in_torch(means[0].cpu(), means[1].cpu(), blocks, task, factor, lists, None)
    first, stop = blocks.first_video, blocks.first_video + blocks.video_blocks
    count = made.visits.count[..., first:stop].cpu()
    differ = count != lists.count[..., first:stop]
    width = shape.most
    listed = torch.arange(width) < count.unsqueeze(-1)
    indices = [
        index.cpu()[task.room.first_list :].view(*listed.shape)
        for index in (made.visits.index, lists.index)
    ]
    differ |= ((indices[0] != indices[1]) & listed).any(-1)
    return int(differ.sum())


def host_microseconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes of the host's time, the device far behind."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    return (time.perf_counter() - begin) / HOST_CALLS * 1e6


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Memory that a call takes beyond what is held before it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / (1 << 20)


def hopper_lists(plan: BlockPlan, context: Context) -> Callable[[], object] | None:
    """A call that makes the Hopper kernel's work lists, where that kernel runs the plan."""
    if eligible("hopper", context.q, context.k, context.v, plan):
        return None
    from dit_accel.kernels.hopper.online import online_lists
    from dit_accel.kernels.machine import processors

    programs = processors(context.q.device)
    return lambda: online_lists(plan, len(context.q), context.heads, programs)


def times(chosen_by: Selector, context: Context, backend: str, repeats: int) -> dict[str, Any]:
    """Milliseconds and MiB of the steps of one selector."""
    device, blocks, batch = context.q.device, context.blocks, len(context.q)
    plan = chosen_by.select(context)
    _, task = base.prepared(blocks, chosen_by, batch, context.heads)
    queries, keys = pool_queries_and_keys(context.q, context.k, blocks)
    lists = steps.Lists.of(task.room)
    make = steps.in_triton if steps.runs_triton(context.q) else steps.in_torch

    def attend(some: BlockPlan) -> object:
        return block_sparse_attention(context.q, context.k, context.v, some, backend=backend)

    def ms(call: Callable[[], object] | None) -> float | None:
        return None if call is None else measure(call, device, repeats).median_ms

    emit = hopper_lists(plan, context) if backend == "hopper" else None
    # The attention of a plan that was used before has its work lists already.
    attend(plan)
    fresh = ms(lambda: attend(chosen_by.select(context)))
    counts = plan.visits.count[..., blocks.first_video :][..., : blocks.video_blocks]
    return {
        "means_ms": ms(lambda: pool_queries_and_keys(context.q, context.k, blocks)),
        "scores_select_lists_ms": ms(
            lambda: make(queries, keys, blocks, task, context.scale, lists, None)
        ),
        "select_ms": ms(lambda: chosen_by.select(context)),
        "select_host_us": host_microseconds(lambda: chosen_by.select(context), device),
        "work_lists_ms": ms(emit),
        "attention_ms": ms(lambda: attend(plan)),
        "select_and_attention_ms": fresh,
        "select_peak_mib": peak_mib(lambda: chosen_by.select(context), device),
        "sparse_peak_mib": peak_mib(lambda: attend(chosen_by.select(context)), device),
        "mean_blocks": counts.float().mean().item(),
        "most_blocks": plan.shape.most,
        "expected_density": chosen_by.expected(blocks),
    }


def dense_time(context: Context, repeats: int) -> tuple[str, float | None, float]:
    """Name, milliseconds and MiB of the fastest dense kernel that runs."""
    best: tuple[str, float | None, float] = ("none", None, 0.0)
    device = context.q.device
    for kernel in present(device)[0]:

        def call(run: Callable[..., Any] = kernel.run) -> object:
            return run(context.q, context.k, context.v)

        try:
            took = measure(call, device, repeats).median_ms
        except RuntimeError as error:
            print(f"{kernel.name}: {error}")
            continue
        if best[1] is None or took < best[1]:
            best = kernel.name, took, peak_mib(call, device)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS)[:2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", default="selection.csv")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {
        "gpu": gpu, "torch": torch.__version__, "triton": installed("triton"), "commit": commit(),
        "date": now(),
    }  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for model in options.models:
        layout, heads, dim = MODELS[model]
        generator = torch.Generator(device=device).manual_seed(0)
        shape = (1, layout.length, heads, dim)
        q, k, v = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)
        )
        dense: tuple[str, float | None, float] | None = None
        for name, params in SELECTORS:
            chosen_by = selector(name, **params)
            kind, backend = ("lengths", "torch") if device.type == "cpu" else ("boxes", "hopper")
            blocks = blocks_of(layout, chosen_by.tiling(layout, kind), device)  # type: ignore[arg-type]
            context = Context(q, k, v, blocks, dim**-0.5, heads)
            plan = chosen_by.select(context)
            if backend == "hopper" and (reason := eligible("hopper", q, k, v, plan)):
                print(f"hopper: {reason}")
                backend = "triton"
                blocks = blocks_of(layout, chosen_by.tiling(layout, "gather"), device)
                context = Context(q, k, v, blocks, dim**-0.5, heads)
            wrong = rows_that_differ(chosen_by, exact_call(context))
            random = rows_that_differ(chosen_by, context)
            lists = plan.heads * blocks.video_blocks
            row: dict[str, Any] = {
                "model": model, "selector": name, "parameters": chosen_by.describe(),
                "backend": backend, "lists": lists, "differ_exact": wrong, "differ_random": random,
            }  # fmt: skip
            exact = chosen_by.budget(blocks.video_blocks).mass is None
            if wrong and exact:
                print(f"{model} {name}: {wrong} of {lists} lists differ from the host's")
            else:
                dense = dense or dense_time(context, options.repeats)
                row |= times(chosen_by, context, backend, options.repeats)
                row |= {"dense": dense[0], "dense_ms": dense[1], "dense_peak_mib": dense[2]}
            rows.append(row | about)
            print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    print(about)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
