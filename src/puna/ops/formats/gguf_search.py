"""Scales for llama.cpp's K blocks, by search: rounding decides the codes, but which scale rounds best cannot be
derived.

A few scales around the obvious one are tried. For each the codes are rounded, and for fixed codes the best scale and
offset are a weighted least-squares line, so every trial ends at its own optimum:

    minimise  sum w (y - s q - t)^2      s = (W Sqy - Sy Sq) / det,  t = (Sqq Sy - Sq Sqy) / det,  det = W Sqq - Sq^2

with W, Sq, Sqq, Sqy, Sy the w-weighted sums of 1, q, q^2, q y, y. The trial with the least error wins.

Layout: one column per group, one row per weight of the group, so that sums run down long contiguous rows.
Shapes: x and w (group, S); results (S,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.ops.formats.gguf_simple import inverse

_FLAT = 1e-5  # of W Sqq: below, all codes are equal and det is rounding noise


def total(x: Tensor, dim: int = 0) -> Tensor:
    """The sum along a dimension of 2^n, halves added to halves: in an order that depends on nothing else.

    torch's own sum may add in another order when there are more columns: a block's bytes would depend on the others.
    """
    while x.shape[dim] > 1:
        first, second = x.chunk(2, dim)
        x = first + second
    return x.squeeze(dim)


def search_line(x: Tensor, w: Tensor, highest: int, trials: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(scale, offset), both >= 0, for x = scale q - offset with q in 0..highest.

    trials: what the range is divided by; `highest` gives the obvious scale. The offset cannot be negative (the format
    subtracts an unsigned number), so a group of positive weights is coded from 0.
    """
    low = x.amin(0).clamp_(max=0)
    y = x - low
    span = y.amax(0)
    sum_w, sum_y, steps = total(w), total(w * y), inverse(span)
    sums = []
    for trial in trials:
        q = (y * (steps * trial)).round_().clamp_(max=highest)
        sums.append(_sums(w, q, y))
    sum_q, sum_qy, sum_qq = torch.stack(sums, 1)  # each (trials, S)
    det = sum_w * sum_qq - sum_q * sum_q
    t = ((sum_qq * sum_y - sum_q * sum_qy) / det).minimum(-low)
    s = (sum_qy - t * sum_q) / sum_qq  # the best scale for this offset, whether it is the line's own or the highest
    error = s * (s * sum_qq + 2 * (t * sum_q - sum_qy)) + t * (t * sum_w - 2 * sum_y)
    error.masked_fill_(~(det > _FLAT * sum_w * sum_qq), torch.inf)
    least, best = error.min(0, keepdim=True)
    fits = least[0].isfinite()
    scale = torch.where(fits, s.gather(0, best)[0], span / highest)
    return scale, torch.where(fits, -(low + t.gather(0, best)[0]), -low)


def search_scale(x: Tensor, w: Tensor, lowest: int, trials: Sequence[float]) -> Tensor:
    """Scale of either sign for x = scale q with q in lowest..-lowest-1; the largest |x| is near code `lowest`.

    trials: what that largest number is divided by; `lowest` gives the obvious scale.
    For fixed codes the best scale is Sqx / Sqq and lowers the error by Sqx^2 / Sqq.
    """
    high, low = x.amax(0), x.amin(0)
    peak = torch.where(high > -low, high, low)
    steps = inverse(peak)
    sums = []
    for trial in trials:
        q = (x * (steps * trial)).round_().clamp_(lowest, -lowest - 1)
        sums.append(_sums(w, q, x))
    _, sum_qx, sum_qq = torch.stack(sums, 1)
    s = sum_qx / sum_qq
    most, best = (s * sum_qx).nan_to_num_(0).max(0, keepdim=True)
    return torch.where(most[0] > 0, s.gather(0, best)[0], peak / lowest)


def _sums(w: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """The w-weighted sums of q, q y and q^2 (3, S), added up in one go."""
    products = w.new_empty(w.shape[0], 3, w.shape[1])
    wq = torch.mul(w, q, out=products[:, 0])
    torch.mul(wq, y, out=products[:, 1])
    torch.mul(wq, q, out=products[:, 2])
    return total(products)
