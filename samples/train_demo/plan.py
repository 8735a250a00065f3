"""How the time is spent: sizes, batches and seconds of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoencoder import AE_FULL_SIZES, AE_SIZES, Size
from flow import Stage

# 1,296 tokens: a square and a wide clip share every tensor shape inside the blocks.
SMALL, SMALL_WIDE = Size(33, 96, 96, 128), Size(33, 72, 128, 128)
MIDDLE = Size(33, 128, 128, 72)  # 2,304 tokens
DEMO = Size(33, 192, 192, 32)  # 5,184 tokens, the CPU demo's size
DEMO_WIDE, DEMO_TALL = Size(33, 144, 256, 32), Size(33, 256, 144, 32)
LARGE = Size(33, 256, 256, 16)  # 9,216 tokens


@dataclass(frozen=True)
class Plan:
    """Seconds, sizes and counts of a whole training; `caches` maps a size to (clips, seconds)."""

    ae_seconds: float
    text_seconds: float
    dit_seconds: float
    stages: tuple[Stage, ...]
    caches: dict[Size, tuple[int, float]]
    ae_sizes: tuple[Size, ...] = AE_SIZES
    ae_full_sizes: tuple[Size, ...] = AE_FULL_SIZES
    ae_checks: tuple[tuple[int, int, int], ...] = ((192, 128, 33), (256, 24, 33))  # edge, clips, T
    ae_statistics: tuple[int, int, int] = (96, 33, 128)  # clips, T, edge
    prompts: int = 128
    sampling: dict = field(default_factory=dict)
    preview: dict = field(default_factory=lambda: {"height": 96, "width": 96})
    save_seconds: float = 30.0
    eval_seconds: float = 100.0
    muon_lr: float = 4e-3
    adam_lr: float = 1.5e-3


def full_plan(minutes: float = 20.0) -> Plan:
    """The plan of the shipped model; `minutes` scales everything but the evaluation."""
    scale = minutes / 20.0
    caches = {
        SMALL: (40_000, 36.0),
        SMALL_WIDE: (6_000, 6.0),
        MIDDLE: (8_000, 9.0),
        DEMO: (8_000, 20.0),
        DEMO_WIDE: (1_600, 4.0),
        DEMO_TALL: (1_600, 4.0),
        LARGE: (1_200, 6.0),
    }
    return Plan(
        ae_seconds=165 * scale,
        text_seconds=20 * scale,
        dit_seconds=520 * scale,
        stages=(
            Stage(0.46, ((SMALL, 0.8), (SMALL_WIDE, 0.2))),
            Stage(0.54, ((MIDDLE, 0.85), (SMALL, 0.15))),
            Stage(
                1.0,
                ((DEMO, 0.64), (DEMO_WIDE, 0.08), (DEMO_TALL, 0.08), (LARGE, 0.1),
                 (MIDDLE, 0.05), (SMALL, 0.05)),
            ),
        ),
        caches={k: (int(n * scale), s * scale) for k, (n, s) in caches.items()},
    )  # fmt: skip


def polish_plan(seconds: float) -> Plan:
    """More training for an existing model: small clips first, then the demo's size."""
    return Plan(
        ae_seconds=0,
        text_seconds=15,
        dit_seconds=seconds,
        stages=(
            Stage(0.45, ((SMALL, 1.0),)),
            Stage(1.0, ((DEMO, 0.8), (DEMO_WIDE, 0.1), (DEMO_TALL, 0.1))),
        ),
        caches={SMALL: (12_000, 11.0), DEMO: (4_000, 14.0)}
        | {DEMO_WIDE: (400, 2.0), DEMO_TALL: (400, 2.0)},
        eval_seconds=70.0,
        muon_lr=2.5e-3,
        adam_lr=1e-3,
    )


def tiny_plan() -> Plan:
    """A plan for a CPU that touches every line in a minute or two."""
    a, b = Size(5, 32, 32, 2), Size(5, 32, 48, 2)
    return Plan(
        ae_seconds=4,
        text_seconds=2,
        dit_seconds=8,
        stages=(Stage(0.5, ((a, 1.0),)), Stage(1.0, ((b, 0.5), (a, 0.5)))),
        caches={a: (4, 5.0), b: (4, 5.0)},
        ae_sizes=(a,),
        ae_full_sizes=(b,),
        ae_checks=((32, 3, 5),),
        ae_statistics=(2, 5, 32),
        prompts=2,
        sampling={"frames": 5, "height": 32, "width": 32},
        preview={"frames": 5, "height": 32, "width": 32},
        save_seconds=2.0,
        eval_seconds=2.0,
    )
