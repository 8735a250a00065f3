"""What a tail costs, step by step, and what a whole call takes beside dense attention.

python samples/tools/measure_tail.py --out tail.csv

Per model, selector and tail: the whole call (selection, attention, tail) as the engine makes it;
the attention of the same lists alone; the steps of the tail; the fastest dense kernel. First a call
of a ragged size is compared with the same made by torch in float32: where they differ, nothing is
timed.
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from typing import Any

import torch
from measure_selection import dense_time, peak_mib

from dit_accel.bench.timing import measure
from dit_accel.engine.route import Route, make_route
from dit_accel.kernels import probe as probes
from dit_accel.kernels.computes import compute
from dit_accel.kernels.pooling import pooled_keys
from dit_accel.kernels.selectors import Context, Selector
from dit_accel.kernels.tails import join, tail
from dit_accel.layout import TokenLayout
from dit_accel.provenance import commit, installed, now

MODELS: dict[str, tuple[TokenLayout, int, int]] = {
    "wan-14b-720p": (TokenLayout((21, 45, 80)), 40, 128),
    "wan-1.3b-480p": (TokenLayout((21, 30, 52)), 12, 128),
    "hunyuan-video-720p": (TokenLayout((33, 45, 80), after=256), 24, 128),
    "cogvideox-5b": (TokenLayout((13, 30, 45), before=226), 48, 64),
}
TAILS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("drop", {}),
    ("pooled", {}),
    ("linear", {}),
    ("linear", {"slope": 8}),
    ("linear", {"slope": "head"}),
    ("linear", {"pool": 64}),
    ("linear", {"pool": 16}),
)
COMPUTES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("probe_error", {"density": 0.1}),
    ("probe_error", {"density": 0.2}),
    ("block_topk", {"density": 0.2}),
)


def tensors(layout: TokenLayout, heads: int, dim: int, device: Any, dtype: Any) -> Any:
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (1, layout.length, heads, dim)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]


def attend(route: Route, qkv: Any) -> torch.Tensor:
    return route.attend(*qkv, qkv[0].shape[-1] ** -0.5, None)


def error(device: Any, dtype: Any, backend: str | None) -> float:
    """Relative error of a ragged call over the same lists in float32 with torch."""
    layout = TokenLayout((5, 13, 22), before=7, after=70)
    qkv = tensors(layout, 4, 128, device, dtype)
    rule = compute("probe_error", density=0.3)
    worst = 0.0
    for name, params in TAILS[1:]:
        route = make_route(layout, rule, tuple(qkv), backend, tail(name, **params))
        got = attend(route, qkv).float()
        assert isinstance(rule, Selector)
        q, k, v = (x.float() for x in qkv)
        context = Context(*qkv, route.blocks, 128**-0.5, 4, None, route.tail.size(route.blocks))
        plan = rule.select(context)
        from dit_accel.kernels.torch_backend import torch_attention

        out, lse = torch_attention(q, k, v, plan, 128**-0.5, True)
        assert lse is not None
        exact = Context(q, k, v, route.blocks, 128**-0.5, 4, None, context.size)
        saved = join.runs_triton, probes.runs_triton
        join.runs_triton = probes.runs_triton = lambda x: False
        route.tail.join(exact, plan, out, lse)
        join.runs_triton, probes.runs_triton = saved
        worst = max(worst, float((got - out).norm() / out.norm()))
        print(f"  {backend} {name} {params}: {float((got - out).norm() / out.norm()):.5f}")
    return worst


def steps(route: Route, qkv: Any, repeats: int) -> dict[str, float]:
    """Milliseconds of the steps of a call with a tail, each alone."""
    q, k, v = qkv
    blocks, form, scale = route.blocks, route.tail.form(route.blocks), q.shape[-1] ** -0.5
    context = Context(q, k, v, blocks, scale, q.shape[2], None, form.size)
    plan = route.plan
    if plan is None:
        assert isinstance(route.compute, Selector)
        plan = route.compute.select(context)
    pieces = probes.pieces_of(blocks, form.size)
    pooled = pooled_keys(k, v, pieces.table, pieces.size)
    from dit_accel.kernels.portable import tail as kernel

    found = context.probe() if form.exact else None
    mass, shift = join._statistics(context, blocks, form, pooled)
    heads = q.shape[2]

    def rows() -> Any:
        some = mass if form.slope is not None else None
        return kernel.rows(some, shift, plan.visits, blocks, pieces.each, heads, q.dtype)

    bias, weights = rows()
    if form.slope is not None and form.slope > 1:
        weights = join._averaged(weights, form.slope)
    parts = list(join._parts(form, blocks, q, k))
    out, lse = torch.zeros_like(q), q.new_zeros((1, heads, q.shape[1]), dtype=torch.float32)
    slopes: list[Any] = [None] * len(parts)

    def covariances() -> None:
        for _, some in parts:
            kernel.covariances(k, v, blocks, pieces, some)

    def products() -> None:
        c = kernel.covariances(k, v, blocks, pieces, parts[0][1])
        for heads_, _ in parts:
            join._slopes(weights[:, heads_.start : heads_.stop], c[:, : len(heads_)])

    def joins() -> None:
        for (some, _), slope in zip(parts, slopes, strict=True):
            kernel.join(q, out, lse, blocks, pooled, bias, slope, form.slope or 1, some, scale)

    def ms(call: Any) -> float:
        return measure(call, q.device, repeats).median_ms

    took = {
        "pool_ms": ms(lambda: pooled_keys(k, v, pieces.table, pieces.size)),
        "rows_ms": ms(rows),
    }
    if form.exact:
        size = form.size
        rank: Any = "error" if route.compute.name == "probe_error" else None
        took["probe_ms"] = ms(lambda: probes.probe(q, k, blocks, scale, size, rank))
        if isinstance(route.compute, Selector):
            took["select_ms"] = ms(
                lambda: route.compute.select(context)  # type: ignore[attr-defined]
            )
    if form.slope is not None:
        took["covariances_ms"], took["products_ms"] = ms(covariances), ms(products)
        for number, (some, of_keys) in enumerate(parts):
            c = kernel.covariances(k, v, blocks, pieces, of_keys)
            slopes[number] = join._slopes(weights[:, some.start : some.stop], c)
    took["join_ms"] = ms(joins)
    assert found is None or found.mass is mass
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backends", nargs="*", default=["hopper", "triton"])
    parser.add_argument("--no-steps", action="store_true")
    parser.add_argument("--out", default="tail.csv")
    options = parser.parse_args()
    device = torch.device("cuda")
    about = {
        "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__,
        "triton": installed("triton"), "commit": commit(), "date": now(),
    }  # fmt: skip
    for backend in options.backends:
        if error(device, torch.bfloat16, backend) > 0.02:
            raise SystemExit(f"{backend}: wrong, nothing is timed")
    made: list[dict[str, Any]] = []
    for model in options.models:
        layout, heads, dim = MODELS[model]
        qkv = tensors(layout, heads, dim, device, torch.bfloat16)
        dense: tuple[str, float | None, float] | None = None
        for name, params in COMPUTES:
            for kind, own in TAILS:
                rule = compute(name, **params)
                route = make_route(layout, rule, tuple(qkv), options.backends[0], tail(kind, **own))
                attend(route, qkv)
                call = partial(attend, route, qkv)
                whole = measure(call, device, options.repeats).median_ms
                if dense is None:
                    size = (layout, heads)
                    context = Context(*qkv, route.blocks, dim**-0.5, size[1])
                    dense = dense_time(context, options.repeats)
                row = {
                    "model": model, "compute": name, **params, "tail": kind,
                    "parameters": route.tail.describe(), "backend": route.backend,
                    "launched": route.launched, "whole_ms": whole,
                    "dense": dense[0], "dense_ms": dense[1],
                    "ratio": (dense[1] or 0.0) / whole,
                    "peak_mib": peak_mib(call, device),
                }  # fmt: skip
                if kind != "drop" and not options.no_steps and name != "block_topk":
                    row |= steps(route, qkv, options.repeats)
                made.append({**row, **about})
                shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                print(*shown.values(), flush=True)
    names = list(dict.fromkeys(key for row in made for key in row))
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(made)


if __name__ == "__main__":
    main()
