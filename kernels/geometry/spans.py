"""Tokens beside the video: how their spans are cut into blocks, and which of them are valid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dit_accel.kernels.geometry.tiling import clipped_split
from dit_accel.layout import TokenLayout


def side_blocks(layout: TokenLayout, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the blocks before and after the video: whole ones of a run, then its rest."""
    before, after = (
        tuple(size for run in runs for size in clipped_split(run.length, block))
        for runs in layout.runs
    )
    return before, after


def valid_lengths(layout: TokenLayout, sizes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[Bp, N]: valid tokens of each block (of `sizes`, at `starts`); Bp is 1 where samples agree.

    Every block's valid tokens are at its front.
    """
    runs = [run for side in layout.runs for run in side if run.valid is not None]
    if not runs:
        return sizes[None]
    lengths = np.repeat(sizes[None], len(runs[0].valid or ()), 0)
    for run in runs:
        inside = (starts >= run.start) & (starts < run.start + run.length)
        stops = run.start + np.array(run.valid)[:, None]
        lengths[:, inside] = np.clip(stops - starts[inside], 0, sizes[inside])
    return lengths


def side_order(layout: TokenLayout, device: torch.device) -> Tensor:
    """int64 [L]: positions of all tokens, where only those beside the video may be permuted."""
    tokens = torch.arange(layout.length, device=device)
    for run in (run for side in layout.runs for run in side):
        if run.order is not None:
            places = torch.tensor(run.order, device=device)
            tokens[run.start : run.start + run.length] = run.start + places
    return tokens
