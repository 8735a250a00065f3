"""Where a sparse call stops paying: too small, or too dense, and dense attention is faster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dit_accel.costs.files import DENSE, constant


@dataclass(frozen=True)
class CallPrice:
    """What a backend's call costs beside a dense one of the same sizes.

    A sparse call takes `overhead` + `slope` x launched density x the dense call's time.

    Args:
        overhead: seconds of a call however small.
        slope: time per launched pair over the dense kernel's.
        dense_rate: FLOP/s of the dense kernel. On slower hardware a dense call takes longer than
            this says, so that the estimate leans towards dense.
        moving: keys of a dense call of head_dim 128 that take as long as moving q, k, v and the
            output.
        alone: what visits of whole and of short blocks take, over one of a whole block; None where
            all take about the same.
        beside_text: the same, of boxes that stand beside text and are read another way.
    """

    overhead: float
    slope: float
    dense_rate: float
    moving: float = 0.0
    alone: tuple[float, float] | None = None
    beside_text: tuple[float, float] | None = None


@lru_cache(maxsize=64)
def call_price(backend: str, device_type: str) -> CallPrice | None:
    """The price of a backend's calls on this machine's device, None where nothing is known."""

    overhead, slope, moving = (
        constant(device_type, backend, name) for name in ("overhead", "slope", "moving_keys")
    )
    rate = constant(device_type, DENSE, "tflops")
    if overhead is None or slope is None or rate is None:
        return None
    visits = (_visits(device_type, kernel) for kernel in (backend, f"{backend} mixed"))
    return CallPrice(overhead, slope, 1e12 * rate, moving or 0.0, *visits)


def _visits(device_type: str, kernel: str) -> tuple[float, float] | None:
    whole, short = (constant(device_type, kernel, f"visit_{kind}") for kind in ("whole", "short"))
    return None if whole is None or short is None else (whole, short)


def pays(backend: str, device_type: str, flops: float, density: float) -> bool:
    """Whether a sparse call runs faster than dense.

    Args:
        device_type: such as "cuda".
        flops: of the dense call, 4 x batch x heads x queries x keys x head_dim.
        density: launched density of the plan.
    """
    price = call_price(backend, device_type)
    if price is None:
        return True
    dense = flops / price.dense_rate
    return price.overhead + price.slope * density * dense < dense


def effort(
    backend: str,
    device_type: str,
    density: float,
    *,
    tokens: int,
    moved: bool = False,
    whole: float | None = None,
    beside_text: bool = False,
) -> float:
    """A plan's time over dense, overhead aside: to compare plans.

    Moving tokens is counted, and that short blocks take longer than whole ones: tiles that are
    moved are nearly all short. Visits under a token rule count as whole ones, on all backends.

    Args:
        density: launched density of the plan.
        tokens: queries of the call.
        moved: whether the backend moves tokens in memory to run the plan.
        whole: share of the visits that go to whole blocks, of those without a token rule; None
            where it is not known or the plan has a token rule: then all count as whole.
        beside_text: whether boxes stand beside runs of text.
    """
    price = call_price(backend, device_type)
    if price is None:
        return density
    visit, kinds = 1.0, price.beside_text if beside_text else price.alone
    if whole is not None and kinds is not None:
        visit = whole * kinds[0] + (1 - whole) * kinds[1]
    return price.slope * visit * density + (price.moving / tokens if moved else 0.0)
