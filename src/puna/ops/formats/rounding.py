"""A matrix to codes, and back: scales from the range of every tile, codes by rounding to nearest.

    symmetric   s = absmax / 7.5              q = clamp(round(w / s))          w' = q s
    asymmetric  s = (max - min) / 15          q = clamp(round(w / s + z))      w' = (q - z) s,   z = round(-8 - min / s)

(four bits; codes and zero points are signed, -8..7). Both keep |w - w'| <= s/2, both represent 0 exactly, ties go to
the even code. float8 is the symmetric case with absmax / 448 and the rounding of the cast. All as compressed-tensors
computes it, so its readers see the numbers that were meant. Source: Nagel et al. 2021, arXiv:2106.08295, sections 2.1
to 2.3.

Shapes: N rows (outputs), D columns (inputs), scales (N / tile rows, D / tile columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats.pieces import for_each_piece
from puna.ops.formats.scheme import Scheme


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and infinity, which would silently become some code. Errors: `PunaError` that counts them."""
    if torch.isfinite(tensor.sum(dtype=torch.float32)):  # one fast pass; only a sum that overflows is looked at again
        return
    nans, infinities = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    if nans or infinities:
        raise PunaError(
            f"{name} holds {nans} NaN and {infinities} infinite of {tensor.numel()} numbers",
            "the model is damaged or its training diverged: quantize an earlier checkpoint",
        )


def choose_scales(
    weight_ND: Tensor, scheme: Scheme, clip: Tensor | float = 1.0, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points (int8, None if symmetric) from the range of each tile.

    clip: share of the range to keep, one number or one per tile (AWQ's clip search, arXiv:2306.00978, section 4).
    dtype: what the scales are stored in (fp32; fp64 for an fp64 weight): they are rounded first and the zero points,
    and later the codes, chosen for the rounded ones. A scale that would be 0 (a tile of zeros, or numbers too small
    for dtype) becomes dtype's eps, one that would overflow dtype's largest number. weight must be finite.
    """
    dtype = dtype or _working(weight_ND)
    low, high = (bound.clone() for bound in _bounds(weight_ND, scheme))
    low, high = low.clamp_(max=0) * clip, high.clamp_(min=0) * clip
    if scheme.symmetric:
        return symmetric_scale(torch.maximum(-low, high), scheme, dtype), None
    scales = _storable((high - low) / (2 * scheme.half_range), dtype)
    zeros = (scheme.lowest - low / scales.to(low.dtype)).round_().clamp_(scheme.lowest, scheme.highest)
    return scales, zeros.to(torch.int8)


def symmetric_scale(absmax: Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> Tensor:
    """The scale for numbers up to absmax, of any shape: a tile's own or a calibrated one; never 0."""
    return _storable(absmax.to(_working(absmax)) / scheme.half_range, dtype or _working(absmax))


def quantize(weight_ND: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Codes of a finite matrix, unpacked: int8 or float8_e4m3fn (N, D); rounded to nearest, clamped to the range."""
    weight_ND = weight_ND.contiguous()
    codes_ND = torch.empty_like(weight_ND, dtype=code_dtype(scheme))
    row_scales, row_zeros = _per_row(scales, codes_ND), None if zeros is None else _per_row(zeros, codes_ND)

    def work(rows: slice) -> None:
        tiles = _row_tiles(weight_ND[rows], row_scales)
        codes = encode(tiles, scheme, row_scales[rows], None if row_zeros is None else row_zeros[rows])
        codes_ND[rows] = codes.view(codes_ND[rows].shape)

    for_each_piece(weight_ND, work)
    return codes_ND


def dequantize(codes_ND: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Numbers (N, D) of codes, in the scales' dtype but at least fp32."""
    codes_ND = codes_ND.contiguous()
    weight_ND = torch.empty_like(codes_ND, dtype=_working(scales))
    row_scales, row_zeros = _per_row(scales, codes_ND), None if zeros is None else _per_row(zeros, codes_ND)

    def work(rows: slice) -> None:
        tiles = _row_tiles(codes_ND[rows], row_scales)
        numbers = decode(tiles, row_scales[rows], None if row_zeros is None else row_zeros[rows])
        weight_ND[rows] = numbers.view(weight_ND[rows].shape)

    for_each_piece(codes_ND, work)
    return weight_ND


def encode(x: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Codes of x for scales that broadcast against it: the one place where rounding happens."""
    x = x.to(_working(x))
    y = x / scale.to(x.dtype)
    if zero is not None:
        y += zero
    y.clamp_(scheme.lowest, scheme.highest)
    return y.to(torch.float8_e4m3fn) if scheme.kind == "float" else y.round_().to(torch.int8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Numbers of codes, for scales that broadcast against them; in the scales' dtype but at least fp32."""
    y = codes.to(_working(scale))
    if zero is not None:
        y -= zero
    return y.mul_(scale)


def code_dtype(scheme: Scheme) -> torch.dtype:
    """What one unpacked code is kept in."""
    return torch.float8_e4m3fn if scheme.kind == "float" else torch.int8


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    stored = scales.clamp_(max=info.max).to(dtype)
    return stored.masked_fill_(stored == 0, info.eps)


def _bounds(weight_ND: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(lowest, highest) number of every tile."""
    weight_ND = weight_ND.contiguous()
    rows, columns = weight_ND.shape
    height, width = scheme.tile((rows, columns))
    low = weight_ND.new_empty(rows, columns // max(1, width), dtype=_working(weight_ND))
    high = torch.empty_like(low)

    def work(part: slice) -> None:
        tiles = weight_ND[part].unflatten(1, (-1, width))
        low[part], high[part] = tiles.amin(2), tiles.amax(2)

    for_each_piece(weight_ND, work)
    return low.unflatten(0, (-1, height)).amin(1), high.unflatten(0, (-1, height)).amax(1)


def _per_row(values: Tensor, matrix_ND: Tensor) -> Tensor:
    """One value per tile, repeated for each row of the tile: (N, D / width, 1)."""
    height = matrix_ND.shape[0] // max(1, values.shape[0])
    return values.repeat_interleave(height, 0)[..., None]


def _row_tiles(rows_ND: Tensor, row_scales: Tensor) -> Tensor:
    return rows_ND.unflatten(1, (row_scales.shape[1], -1))
