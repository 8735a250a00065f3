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


def sliding_tile(qt, qh, qw, kt, kh, kw, p):
    """Tiles within a window of tiles that moves inward at the borders.

    Per axis: p = size, longer, parts, window; the first `longer` of the `parts` tiles are size + 1
    long, the others size. A window of n < parts tiles is odd.
    """
    edge = p[1] * (p[0] + 1)
    q = (qt < edge) * (qt // (p[0] + 1)) + (qt >= edge) * (p[1] + (qt - edge) // p[0])
    k = (kt < edge) * (kt // (p[0] + 1)) + (kt >= edge) * (p[1] + (kt - edge) // p[0])
    low = q - p[3] // 2
    t = ((k >= low) | (k >= p[2] - p[3])) & ((k < p[3]) | (k < low + p[3]))
    edge = p[5] * (p[4] + 1)
    q = (qh < edge) * (qh // (p[4] + 1)) + (qh >= edge) * (p[5] + (qh - edge) // p[4])
    k = (kh < edge) * (kh // (p[4] + 1)) + (kh >= edge) * (p[5] + (kh - edge) // p[4])
    low = q - p[7] // 2
    h = ((k >= low) | (k >= p[6] - p[7])) & ((k < p[7]) | (k < low + p[7]))
    edge = p[9] * (p[8] + 1)
    q = (qw < edge) * (qw // (p[8] + 1)) + (qw >= edge) * (p[9] + (qw - edge) // p[8])
    k = (kw < edge) * (kw // (p[8] + 1)) + (kw >= edge) * (p[9] + (kw - edge) // p[8])
    low = q - p[11] // 2
    w = ((k >= low) | (k >= p[10] - p[11])) & ((k < p[11]) | (k < low + p[11]))
    return t & h & w


def neighborhood(qt, qh, qw, kt, kh, kw, p):
    """Generalized neighborhood attention. Per axis: p = length, window, stride, dilation, causal.

    Tokens of one dilation group (x mod dilation) see each other: n of them, numbered x // dilation.
    The window of a stride group begins at `low`, moved inward at the borders; a causal one ends at
    the query and is not moved in at the start.
    """
    q = qt // p[3]
    k = kt // p[3]
    n = (p[0] - qt % p[3] + p[3] - 1) // p[3]
    low = q // p[2] * p[2] + p[2] // 2 - p[1] // 2 + p[4] * (p[2] - p[2] // 2 - p[1] + p[1] // 2)
    ends = (k <= q) | ((p[4] == 0) & ((k < p[1]) | (k < low + p[1])))
    t = (qt % p[3] == kt % p[3]) & ((k >= low) | (k >= n - p[1])) & ends
    q = qh // p[8]
    k = kh // p[8]
    n = (p[5] - qh % p[8] + p[8] - 1) // p[8]
    low = q // p[7] * p[7] + p[7] // 2 - p[6] // 2 + p[9] * (p[7] - p[7] // 2 - p[6] + p[6] // 2)
    ends = (k <= q) | ((p[9] == 0) & ((k < p[6]) | (k < low + p[6])))
    h = (qh % p[8] == kh % p[8]) & ((k >= low) | (k >= n - p[6])) & ends
    q = qw // p[13]
    k = kw // p[13]
    n = (p[10] - qw % p[13] + p[13] - 1) // p[13]
    low = q // p[12] * p[12] + p[12] // 2 - p[11] // 2
    low = low + p[14] * (p[12] - p[12] // 2 - p[11] + p[11] // 2)
    ends = (k <= q) | ((p[14] == 0) & ((k < p[11]) | (k < low + p[11])))
    w = (qw % p[13] == kw % p[13]) & ((k >= low) | (k >= n - p[11])) & ends
    return t & h & w


def frames(qt, qh, qw, kt, kh, kw, p):
    """The query's own frame; all frames of, and for, the reference frames.

    References are the frames m * p[1] // p[0] for m < p[0], and those before p[2].
    """
    q = (qt < p[2]) | ((qt * p[0] + p[1] - 1) // p[1] * p[1] // p[0] == qt)
    k = (kt < p[2]) | ((kt * p[0] + p[1] - 1) // p[1] * p[1] // p[0] == kt)
    return (qt == kt) | q | k


def radial(qt, qh, qw, kt, kh, kw, p):
    """Radial attention: bands |a - b| <= width of places in a frame, width by frame distance.

    p[0]: tokens of a row. p[1]: the first p[1] frames are seen whole. p[g], for frame distances
    from 2 ** (g - 1) on, g from 2 to 13: width * 4096 + split - 1; widths fall and splits rise with
    g. A distance must be a multiple of the split, a power of two. 0 and 1 are seen whole.
    """
    d = qt - kt
    e = d * d
    a = (qh - kh) * p[0] + qw - kw
    a = a * ((a > 0) * 2 - 1)
    near = (e < 4) | ((a <= p[2] // 4096) & ((d & (p[2] % 4096)) == 0))
    near = near & ((e < 16) | ((a <= p[3] // 4096) & ((d & (p[3] % 4096)) == 0)))
    near = near & ((e < 64) | ((a <= p[4] // 4096) & ((d & (p[4] % 4096)) == 0)))
    near = near & ((e < 256) | ((a <= p[5] // 4096) & ((d & (p[5] % 4096)) == 0)))
    near = near & ((e < 1024) | ((a <= p[6] // 4096) & ((d & (p[6] % 4096)) == 0)))
    near = near & ((e < 4096) | ((a <= p[7] // 4096) & ((d & (p[7] % 4096)) == 0)))
    near = near & ((e < 16384) | ((a <= p[8] // 4096) & ((d & (p[8] % 4096)) == 0)))
    near = near & ((e < 65536) | ((a <= p[9] // 4096) & ((d & (p[9] % 4096)) == 0)))
    near = near & ((e < 262144) | ((a <= p[10] // 4096) & ((d & (p[10] % 4096)) == 0)))
    near = near & ((e < 1048576) | ((a <= p[11] // 4096) & ((d & (p[11] % 4096)) == 0)))
    near = near & ((e < 4194304) | ((a <= p[12] // 4096) & ((d & (p[12] % 4096)) == 0)))
    near = near & ((e < 16777216) | ((a <= p[13] // 4096) & ((d & (p[13] % 4096)) == 0)))
    return near | (kt < p[1])


def disc(qt, qh, qw, kt, kh, kw, p):
    """Spatial discs dh^2 + dw^2 < p[0], in frames with |dt| <= p[1]."""
    near = (qh - kh) * (qh - kh) + (qw - kw) * (qw - kw) < p[0]
    return near & (qt - kt <= p[1]) & (kt - qt <= p[1])


def band(qt, qh, qw, kt, kh, kw, p):
    """Bands |i - j| <= p[3] of places i = t p[0] + h p[1] + w p[2]; keys before p[4] are seen."""
    k = kt * p[0] + kh * p[1] + kw * p[2]
    d = qt * p[0] + qh * p[1] + qw * p[2] - k
    return ((d <= p[3]) & (-d <= p[3])) | (k < p[4])


def power_strided(qt, qh, qw, kt, kh, kw, p):
    """Tiles near on all axes but at most one, where they may be a power of two apart.

    Per axis: p = size, longer, half; tiles as in `sliding_tile`, near ones at most `half` apart.
    p[9]: the first p[9] tiles along t are seen by all.
    """
    edge = p[1] * (p[0] + 1)
    q = (qt < edge) * (qt // (p[0] + 1)) + (qt >= edge) * (p[1] + (qt - edge) // p[0])
    k = (kt < edge) * (kt // (p[0] + 1)) + (kt >= edge) * (p[1] + (kt - edge) // p[0])
    d = q - k
    t = (d <= p[2]) & (-d <= p[2])
    far_t = t | ((d > 0) & ((d & (d - 1)) == 0)) | ((d < 0) & ((-d & (-d - 1)) == 0))
    sink = k < p[9]
    edge = p[4] * (p[3] + 1)
    q = (qh < edge) * (qh // (p[3] + 1)) + (qh >= edge) * (p[4] + (qh - edge) // p[3])
    k = (kh < edge) * (kh // (p[3] + 1)) + (kh >= edge) * (p[4] + (kh - edge) // p[3])
    d = q - k
    h = (d <= p[5]) & (-d <= p[5])
    far_h = h | ((d > 0) & ((d & (d - 1)) == 0)) | ((d < 0) & ((-d & (-d - 1)) == 0))
    edge = p[7] * (p[6] + 1)
    q = (qw < edge) * (qw // (p[6] + 1)) + (qw >= edge) * (p[7] + (qw - edge) // p[6])
    k = (kw < edge) * (kw // (p[6] + 1)) + (kw >= edge) * (p[7] + (kw - edge) // p[6])
    d = q - k
    w = (d <= p[8]) & (-d <= p[8])
    far_w = w | ((d > 0) & ((d & (d - 1)) == 0)) | ((d < 0) & ((-d & (-d - 1)) == 0))
    return sink | (far_t & h & w) | (t & far_h & w) | (t & h & far_w)


TOKEN_RULES: dict[str, TokenRule] = {
    rule.__name__: rule
    for rule in (box, sliding_tile, neighborhood, frames, radial, disc, band, power_strided)
}
