"""Rounding without data: scales and zero points for most weights, not for the few largest.

Plain rounding fits the range of a tile, so one large weight makes every step of its tile coarse. Half-quadratic
quantization minimises sum |w - w'|^p with p < 1 instead, which forgives a few large errors. Two easy steps in turn:

    e   the error the large weights are allowed: shrink(w - w') keeps what is large and zeroes what is small
    s, z   for the codes at hand the best line through w - e: least squares; z rounded to a code, then s again

Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models, mobiusml.github.io/hqq_blog.
They keep s and leave z a float; here z must be a stored code, and s moves instead. Several ranges to start from, the
best state of all is kept, and only states whose squared error is no larger than plain rounding's: so neither is worse
in any tile.

Shapes: N outputs, D inputs, G tiles of g columns in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats import rounding
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.pieces import for_each_piece
from puna.ops.formats.scheme import Scheme

P = 0.7
_STARTS = (1.0, 0.9, 0.8)  # shares of the range
_ITERATIONS = 6
# Errors below beta^(-1 / (2 - p)) = 0.43 steps are shrunk to 0; beta grows by kappa. Theirs is 10; 3 is better for a
# zero point that is a code: with 2 bits the norm is 0.75 of plain rounding's, not 0.80; with 4 both say 0.95.
_BETA, _KAPPA = 3.0, 1.01
_TINY = 1e-12


def hqq(weight_ND: Tensor, scheme: Scheme, *, scale_dtype: torch.dtype | None = None) -> Packed:
    """Integers per group or channel, with zero points or without; scale_dtype as for `rounding.choose_scales`.

    Errors: `PunaError` for other schemes, NaN and infinity.
    """
    if scheme.kind != "int" or scheme.granularity not in ("group", "channel"):
        raise PunaError(
            f"hqq cannot choose scales of {scheme.kind} per {scheme.granularity}",
            "use integers per group or channel, or rounding nearest",
        )
    rounding.check_finite(weight_ND, "the weight")
    weight_ND = weight_ND.detach().float()
    scales, zeros = rounding.choose_scales(weight_ND, scheme, dtype=scale_dtype)

    def work(rows: slice) -> None:
        found = _Tiles(weight_ND[rows].unflatten(1, (scales.shape[1], -1)), scheme, scales.dtype)
        for share in _STARTS:
            found.descend(share)
        scales[rows] = found.scale.squeeze(2).to(scales.dtype)
        if zeros is not None:
            zeros[rows] = found.zero.squeeze(2).to(torch.int8)

    for_each_piece(weight_ND, work)
    return pack(rounding.quantize(weight_ND, scheme, scales, zeros), scheme, scales, zeros)


class _Tiles:
    """Tiles (N, G, g) and the best scale and zero point (N, G, 1) found for each so far."""

    def __init__(self, tiles: Tensor, scheme: Scheme, dtype: torch.dtype):
        self.tiles, self.scheme, self.dtype = tiles, scheme, dtype
        self.scale, self.zero = self._start(1.0)
        wrong = tiles - self._rounded(self.scale, self.zero)[1]
        self._limit = wrong.square().sum(2, keepdim=True)
        self._least = _power(wrong).sum(2, keepdim=True)

    def descend(self, share: float) -> None:
        """From the range times `share`, keep what is better on the way."""
        scale, zero = self._start(share)
        beta = _BETA
        for _ in range(_ITERATIONS):
            codes, rounded = self._rounded(scale, zero)
            wrong = self.tiles - rounded
            power = _power(wrong)
            self._keep(scale, zero, wrong, power)
            scale, zero = self._line(codes, self.tiles - _shrink(wrong, power, scale, beta), scale, zero)
            beta *= _KAPPA
        wrong = self.tiles - self._rounded(scale, zero)[1]
        self._keep(scale, zero, wrong, _power(wrong))

    def _start(self, share: float) -> tuple[Tensor, Tensor]:
        flat = self.tiles.flatten(0, 1)  # a row per tile: "per channel" is then per tile
        channel = Scheme(self.scheme.bits, "int", self.scheme.symmetric)
        scale, zero = rounding.choose_scales(flat, channel, share, self.dtype)
        shape = (*self.tiles.shape[:2], 1)
        return scale.float().view(shape), scale.new_zeros(shape).float() if zero is None else zero.float().view(shape)

    def _rounded(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = (self.tiles / scale).add_(zero).clamp_(self.scheme.lowest, self.scheme.highest).round_()
        return codes, (codes - zero).mul_(scale)

    def _keep(self, scale: Tensor, zero: Tensor, wrong: Tensor, power: Tensor) -> None:
        loss = power.sum(2, keepdim=True)
        better = (loss < self._least) & (wrong.square().sum(2, keepdim=True) <= self._limit)
        self._least = torch.where(better, loss, self._least)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)

    def _line(self, codes: Tensor, wanted: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The line s (q - z) nearest to `wanted`; where codes are all the same, scale and zero as they were."""
        if not self.scheme.symmetric:
            mean, center = wanted.mean(2, keepdim=True), codes.mean(2, keepdim=True)
            spread = codes - center
            slope = (spread * wanted).sum(2, keepdim=True) / spread.square().sum(2, keepdim=True)
            moved = (center - mean / slope).round_().clamp_(self.scheme.lowest, self.scheme.highest)
            zero = torch.where(slope > 0, moved, zero)
        steps = codes - zero
        slope = (steps * wanted).sum(2, keepdim=True) / steps.square().sum(2, keepdim=True)
        stored = slope.to(self.dtype).float()  # the loss is judged with what will be stored
        return torch.where((stored > 0) & stored.isfinite(), stored, scale), zero


def _power(x: Tensor) -> Tensor:
    return x.abs().pow_(P)


def _shrink(x: Tensor, power: Tensor, scale: Tensor, beta: float) -> Tensor:
    """Badri and Shaji's generalised soft threshold, s sign(y) max(0, |y| - |y|^(p-1) / beta) for errors y = x / s.

    power: |x|^p, from which |y|^(p-1) is had by a division; powers are what takes the time here.
    """
    size = x.abs().clamp_(min=_TINY)
    threshold = power / size * (scale ** (2 - P) / beta)
    return x.sign().mul_(size.sub_(threshold).clamp_(min=0))
