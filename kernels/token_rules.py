"""Token masks of partial blocks: which token pairs count, from the tokens' coordinates.

A rule is one function for three languages: torch calls it on tensors, Triton and Gluon compile its
source. So it is written in operators alone: arithmetic, comparisons, `&` and `|`, constants and
`p[i]`; no calls (also not to min, max or abs), no control flow, `//` of non-negative numbers only.
k >= min(a, b) is (k >= a) | (k >= b); k >= max(a, b) is (k >= a) & (k >= b).

Arguments: coordinates (t, h, w) of the query and of the key, which broadcast against each other,
and `p`, the rule's integer parameters (at most MAX_PARAMS). Returns whether the pair counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_PARAMS = 16
TokenRule = Callable[..., Any]


def box(qt, qh, qw, kt, kh, kw, p):
    """Pairs with |dt| <= p[0], |dh| <= p[1], |dw| <= p[2]."""
    t = (qt - kt <= p[0]) & (kt - qt <= p[0])
    h = (qh - kh <= p[1]) & (kh - qh <= p[1])
    w = (qw - kw <= p[2]) & (kw - qw <= p[2])
    return t & h & w


TOKEN_RULES: dict[str, TokenRule] = {"box": box}
