"""Clip search: a smaller range per tile makes finer steps; a few large weights lose, the outputs may gain.

For every tile the share of its range in 1.0, 0.95 .. 0.5 is taken that moves the tile's part of the outputs least,

    sum over inputs of |(Q(w) - w) x|^2,

and a row whose whole output gets worse for it (tiles together do what none does alone) keeps its full range. Source:
AWQ, Lin et al. 2023, arXiv:2306.00978, whose code clips so; the paper only says that it does.

Shapes: N outputs, D inputs, G tiles of g columns in a row, T sampled inputs, K = min(T, g).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.ops.formats import rounding
from puna.ops.formats.scheme import Scheme

SHARES = tuple(1 - i / 20 for i in range(11))
_NUMBERS = 1 << 24  # of intermediate results at a time


def search_clip(weight_ND: Tensor, scheme: Scheme, sample_TD: Tensor, *, shares: Sequence[float] = SHARES) -> Tensor:
    """The share of the range to keep, one per tile, for `rounding.choose_scales(clip=...)`. shares begins with 1."""
    assert shares[0] == 1
    weight_ND, sample_TD = weight_ND.detach().float(), sample_TD.float()
    height, width = scheme.tile((weight_ND.shape[0], weight_ND.shape[1]))
    factor_GgK = _factors(sample_TD, width)
    rows = max(1, _NUMBERS // max(1, height * max(weight_ND.shape[1], sample_TD.shape[0]))) * height
    parts = [_search_rows(part, scheme, factor_GgK, sample_TD, shares, height) for part in weight_ND.split(rows)]
    return torch.cat(parts) if parts else weight_ND.new_ones(scheme.grid((0, weight_ND.shape[1])))


def _factors(sample_TD: Tensor, width: int) -> Tensor:
    """F of every tile with F F^T = X^T X: with more samples than columns the R of X = Q R says the same in less."""
    tiles_GTg = sample_TD.unflatten(1, (-1, width)).transpose(0, 1)
    if tiles_GTg.shape[1] > width:
        tiles_GTg = torch.linalg.qr(tiles_GTg, mode="r").R
    return tiles_GTg.transpose(1, 2).contiguous()


def _search_rows(
    weight_ND: Tensor, scheme: Scheme, factor_GgK: Tensor, sample_TD: Tensor, shares: Sequence[float], height: int
) -> Tensor:
    best = weight_ND.new_ones(weight_ND.shape[0] // height, factor_GgK.shape[0])
    least = torch.full_like(best, torch.inf)
    for share in shares:
        loss = _by_tile(_tile_losses(_delta(weight_ND, scheme, share), factor_GgK), height)
        best = torch.where(loss < least, share, best)
        least = torch.minimum(least, loss)
    before, after = (_delta(weight_ND, scheme, clip) @ sample_TD.t() for clip in (1.0, best))
    worse = _by_tile((after.square().sum(1) - before.square().sum(1))[:, None], height) > 0
    return best.masked_fill(worse, 1)


def _delta(weight_ND: Tensor, scheme: Scheme, clip: Tensor | float) -> Tensor:
    scales, zeros = rounding.choose_scales(weight_ND, scheme, clip)
    return rounding.dequantize(rounding.quantize(weight_ND, scheme, scales, zeros), scales, zeros).sub_(weight_ND)


def _tile_losses(delta_ND: Tensor, factor_GgK: Tensor) -> Tensor:
    """(N, G): what each tile of each row alone does to the outputs."""
    tiles_GNg = delta_ND.unflatten(1, (factor_GgK.shape[0], -1)).transpose(0, 1)
    return torch.bmm(tiles_GNg, factor_GgK).square_().sum(2).t()


def _by_tile(values_NG: Tensor, height: int) -> Tensor:
    """Sums over the rows that share a scale."""
    return values_NG.unflatten(0, (-1, height)).sum(1)
