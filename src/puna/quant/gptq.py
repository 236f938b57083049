"""GPTQ: column by column, what rounding one column did to the outputs is made good by the columns still to come.

Frantar et al. 2022, arXiv:2210.17323. Their solver inverts H (the sum of x x^T), factors the inverse, and updates all
later columns. Here is the same arithmetic without the inverse. With H = L diag(d) L^T, L lower with ones on its
diagonal, the error of one output row is

    dw H dw^T = sum over j of d_j (dw_j + sum over i > j of dw_i L_ij)^2

so from the last column to the first: choose q_j as w_j + sum over i > j of (w_i - q_i) L_ij, rounded. One factor is a
quarter of the work of the inverse and its factor, loses fewer digits, and the sum above is the exact error at no cost
(this view: Chen et al. 2025, arXiv:2507.18553). Columns are cut in halves again and again, so nearly all work is
products of large matrices.

Act-order by weight: columns with large inputs first, but scales are chosen beforehand, from the weight as it was, and
groups stay neighbours ("static groups"): codes go back to their places, any format can hold them. A row for which
GPTQ would be worse than plain rounding keeps plain rounding.

Shapes: N rows (outputs), D columns (inputs). Memory beside the arguments and the codes: 2 D^2 numbers while factoring,
then D^2, and about 6 for every weight of the rows worked on at a time (at most 16 million weights: 0.4 GB).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.base.console import PunaError
from puna.ops.formats import rounding
from puna.ops.formats.packed import Packed, pack
from puna.ops.formats.scheme import Scheme

_LEAF = 32  # columns below which they are done one by one
_PANEL = 256
_NUMBERS = 1 << 24  # weights worked on at a time: a head of 128,000 rows needs no more memory than a small layer
_MOST_DAMPING = 1e4


@dataclass(frozen=True)
class Result:
    """The weight in codes and what there is to tell of it.

    damping: share of the mean diagonal that was added to H, above what was asked for where H had no Cholesky factor.
    dead_columns: inputs that were always 0. rounded_rows: rows that kept plain rounding. loss and rounding_loss:
    tr dW H dW^T of this result and of plain rounding with the same scales.
    """

    packed: Packed
    damping: float
    dead_columns: int
    rounded_rows: int
    loss: float
    rounding_loss: float

    @property
    def repaired(self) -> float:
        """The share of plain rounding's damage that is gone: 0 for none."""
        return 1 - self.loss / self.rounding_loss if self.rounding_loss > 0 else 0.0


def gptq(
    weight_ND: Tensor,
    second_DD: Tensor,
    scheme: Scheme,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    clip: Tensor | float = 1.0,
    scale_dtype: torch.dtype | None = None,
) -> Result:
    """Round `weight_ND` for inputs whose sum of x x^T is `second_DD` (`Moments.second_DD`, left as it is).

    clip, scale_dtype: as for `rounding.choose_scales`. Columns whose inputs were always 0 are rounded plainly.
    Errors: `PunaError` for NaN or infinity in either.
    """
    rounding.check_finite(weight_ND, "the weight")
    rounding.check_finite(second_DD, "the sum of the inputs' products")
    weight_ND = weight_ND.detach().float()
    scales, zeros = rounding.choose_scales(weight_ND, scheme, clip, scale_dtype)
    diagonal_D = second_DD.diagonal()
    # What is rounded first stands last. Equal inputs keep the order of the columns.
    order_D = torch.arange(len(diagonal_D), device=weight_ND.device).flip(0)
    if act_order:
        order_D = order_D[diagonal_D[order_D].argsort(stable=True)]
    factor = _factor(second_DD, order_D, damping)
    codes_ND = torch.empty_like(weight_ND, dtype=rounding.code_dtype(scheme))
    row_scales, row_zeros = _per_row(scales, weight_ND), None if zeros is None else _per_row(zeros, weight_ND)
    sums = weight_ND.new_zeros(3, dtype=torch.float64)
    for rows in _row_ranges(weight_ND):
        part_zeros = None if row_zeros is None else row_zeros[rows]
        codes_ND[rows], told = _round_rows(weight_ND[rows], scheme, row_scales[rows], part_zeros, order_D, factor)
        sums += told
    rounded, loss, rounding_loss = sums.tolist()
    packed = pack(codes_ND, scheme, scales, zeros)
    return Result(packed, factor.damping, int((diagonal_D <= 0).sum()), int(rounded), loss, rounding_loss)


@dataclass(frozen=True)
class _Factor:
    """H + added I = L diag(d) L^T in the order of work; `damping` is what was added as a share of the mean."""

    lower_DD: Tensor
    diag_D: Tensor
    added: float
    damping: float

    def loss(self, residual_DN: Tensor, delta_DN: Tensor) -> Tensor:
        """delta H delta^T of every row (N,), from L^T delta and delta, both used up; without what was added to H."""
        damped_N = self.diag_D @ residual_DN.square_()
        return damped_N.sub_(delta_DN.square_().sum(0), alpha=self.added).clamp_(min=0)


def _factor(second_DD: Tensor, order_D: Tensor, damping: float) -> _Factor:
    damped_DD = second_DD.float().index_select(0, order_D).index_select(1, order_D)
    diagonal_D = second_DD.diagonal().float()
    mean = float(diagonal_D.sum() / (diagonal_D > 0).sum().clamp(min=1)) or 1.0  # of inputs that are not always 0
    added, wanted = 0.0, damping * mean
    while wanted <= max(_MOST_DAMPING, damping) * mean:
        damped_DD.diagonal().add_(wanted - added)
        added, wanted = wanted, 10 * wanted
        lower_DD, failed = torch.linalg.cholesky_ex(damped_DD)
        root_D = lower_DD.diagonal().clone()
        if not int(failed) and bool(root_D.isfinite().all()):
            return _Factor(lower_DD.div_(root_D), root_D.square_(), added, added / mean)
    raise PunaError(
        f"the inputs' second moments ({len(order_D)} x {len(order_D)}) have no Cholesky factor, damped by {added:.3g}",
        "they are damaged: measure them again, or use rounding nearest",
    )


def _round_rows(
    weight_ND: Tensor, scheme: Scheme, scales_NG: Tensor, zeros_NG: Tensor | None, order_D: Tensor, factor: _Factor
) -> tuple[Tensor, Tensor]:
    """Codes (N, D), and (rows that kept plain rounding, loss, plain rounding's loss) in fp64."""
    columns = _Columns(weight_ND, scheme, scales_NG, zeros_NG, order_D, factor.lower_DD)
    columns.solve(0, len(order_D))
    loss_N = factor.loss(columns.wanted_DN, columns.delta_DN)
    codes_ND = columns.codes_DN.index_select(0, order_D.argsort()).t()
    plain_ND = rounding.quantize(weight_ND, scheme, scales_NG, zeros_NG)
    delta_DN = _turned(rounding.dequantize(plain_ND, scales_NG, zeros_NG).sub_(weight_ND), order_D)
    plain_N = factor.loss(_times_lower(factor.lower_DD, delta_DN, columns.wanted_DN), delta_DN)
    worse_N = loss_N > plain_N
    told = torch.stack([worse_N.sum(), torch.minimum(loss_N, plain_N).sum(dtype=torch.float64), plain_N.sum()])
    return torch.where(worse_N[:, None], plain_ND, codes_ND), told


class _Columns:
    """Some rows of the weight, transposed and in the order of work, while they are rounded from the last to the first.

    wanted_DN: what a column should become; once it is rounded, how far it is from that. delta_DN: the weight; once
    rounded, the weight minus what stands for it.
    """

    def __init__(
        self,
        weight_ND: Tensor,
        scheme: Scheme,
        scales_NG: Tensor,
        zeros_NG: Tensor | None,
        order_D: Tensor,
        lower_DD: Tensor,
    ):
        self.scheme, self.lower_DD = scheme, lower_DD
        self.delta_DN = _turned(weight_ND, order_D)
        self.wanted_DN = self.delta_DN.clone()
        self.codes_DN = torch.empty_like(self.delta_DN, dtype=rounding.code_dtype(scheme))
        self.scales = list(scales_NG.t().contiguous())
        self.zeros = [None] * len(self.scales) if zeros_NG is None else list(zeros_NG.t().contiguous())
        self.group = (order_D // (len(order_D) // max(1, len(self.scales)))).tolist()

    def solve(self, low: int, high: int) -> None:
        """Round columns low..high; what was rounded after `high` is already in `wanted`."""
        if high - low <= _LEAF:
            return self._one_by_one(low, high)
        middle = (low + high) // 2
        self.solve(middle, high)
        self.wanted_DN[low:middle].addmm_(self.lower_DD[middle:high, low:middle].t(), self.delta_DN[middle:high])
        self.solve(low, middle)

    def _one_by_one(self, low: int, high: int) -> None:
        upper = self.lower_DD[low:high, low:high].t().contiguous()
        for j in reversed(range(low, high)):
            wanted_N = self.wanted_DN[j]
            if j + 1 < high:
                wanted_N.addmv_(self.delta_DN[j + 1 : high].t(), upper[j - low, j + 1 - low :])
            scale_N, zero_N = self.scales[self.group[j]], self.zeros[self.group[j]]
            code_N = rounding.encode(wanted_N, self.scheme, scale_N, zero_N)
            rounded_N = rounding.decode(code_N, scale_N, zero_N)
            self.codes_DN[j] = code_N
            self.delta_DN[j] -= rounded_N
            wanted_N -= rounded_N


def _turned(matrix_ND: Tensor, order_D: Tensor) -> Tensor:
    """Its columns as rows, in the order of work: turned first, because gathering columns would be far slower."""
    return matrix_ND.t().contiguous().index_select(0, order_D)


def _times_lower(lower_DD: Tensor, delta_DN: Tensor, out_DN: Tensor) -> Tensor:
    """L^T delta in panels, so that the half of L that is 0 costs nothing."""
    for low in range(0, len(lower_DD), _PANEL):
        high = low + _PANEL
        torch.mm(lower_DD[low:, low:high].t(), delta_DN[low:], out=out_DN[low:high])
    return out_DN


def _per_row(values: Tensor, weight_ND: Tensor) -> Tensor:
    """One value per tile -> one per row of the tile: (N, groups)."""
    return values.repeat_interleave(weight_ND.shape[0] // max(1, values.shape[0]), 0)


def _row_ranges(weight_ND: Tensor) -> list[slice]:
    rows = max(1, _NUMBERS // max(1, weight_ND.shape[1]))
    return [slice(start, start + rows) for start in range(0, weight_ND.shape[0], rows)]
