"""Pooled keys: key blocks that enter the softmax as one key each, their mean.

A pooled key j stands for n_j tokens: it has the score scale q . kbar_j + ln(n_j) and the value
vbar_j, with kbar and vbar the means of the tokens' keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PooledKeys:
    """The pooled keys of a call; `BlockPlan.pooled_index` numbers them.

    key, value: [B, NP, Hkv, D] in the type of q, any strides. log_count: float32 [B or 1, NP],
    added to the scores (natural log); -inf leaves a pooled key out.
    """

    key: Tensor
    value: Tensor
    log_count: Tensor

    @property
    def count(self) -> int:
        """Number of pooled keys, NP."""
        return self.log_count.shape[-1]

    def to(self, device: torch.device | str) -> PooledKeys:
        """The same pooled keys on another device."""
        return PooledKeys(self.key.to(device), self.value.to(device), self.log_count.to(device))
